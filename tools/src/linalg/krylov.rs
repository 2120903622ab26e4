//! Leading singular vectors from products with thin blocks: block Krylov iteration.
//!
//! From a random block `X`, an orthonormal basis `Q` of `A X, (A A^T) A X, (A A^T)^2 A X, ...` is
//! built, each block made orthogonal to all before it; the best approximations within it come from
//! the small matrix `(A^T Q)^T (A^T Q)`, summed in 64 bits. The products of subspace iteration
//! are the same, but nothing of what they saw is thrown away: a flat spectrum, where a block's own
//! powers hardly turn, is resolved all the same (C. Musco and C. Musco, Randomized block Krylov
//! methods, 2015).
//!
//! How far it is, is told by residuals. An approximate eigenpair `(t, x)` of `A A^T` with
//! `r = |A A^T x - t x|` lies within `r` of an eigenvalue, and within `r^2 / gap` of it where a gap
//! separates it from the rest. The sum of these over the leading `rank` bounds the energy that was
//! missed; it must be small beside the energy that any matrix of that rank leaves.

use faer::Mat;
use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatRef, Par};

use super::ROUNDING;
use super::decompositions::{eigen, qr};
use super::dense::{Dense, Scalar, product};
use super::gaussian::Gaussian;

/// Energy missed beside the energy left over, at most: 1.001 squared is 1.002, and half of it is
/// kept for what the residuals do not see.
const MISSED: f64 = 1e-3;

/// A remainder whose share of the energy is below this asks for 64 bits: residuals in 32 bits are not
/// seen below `f32::EPSILON` of the largest eigenvalue.
const NEEDS_DOUBLE: f64 = 3e-3;

/// Rows of `A^T Q` that are widened to 64 bits at a time.
const ROWS: usize = 512;

/// Columns of a block: few, as more of them see fewer powers; not fewer, as products would wait for
/// memory.
fn block_size(rank: usize) -> usize {
    if rank <= 48 { 16 } else { 32 }
}

/// Whether the leading `rank` vectors of a side of `small` come cheaper this way than from all
/// eigenvalues.
pub(crate) fn pays(small: usize, rank: usize) -> bool {
    small >= 128 && limit(small) >= 5 * rank + 2 * block_size(rank)
}

/// The largest basis before the exact way is cheaper.
fn limit(small: usize) -> usize {
    small * 3 / 5
}

/// An orthonormal basis of about the leading `rank` singular vectors of the smaller side,
/// `[small, rank]`; `None` when they are not resolved. `energy` is that of the whole matrix.
///
/// # Errors
/// No convergence of a small eigenproblem.
pub(crate) fn leading(
    matrix: &Dense<'_>,
    rank: usize,
    energy: f64,
    seed: u64,
) -> anyhow::Result<Option<Mat<f64>>> {
    match iterate::<f32>(matrix, rank, energy, seed)? {
        Outcome::Resolved(basis) => Ok(Some(basis)),
        Outcome::NeedsDouble => match iterate::<f64>(matrix, rank, energy, seed)? {
            Outcome::Resolved(basis) => Ok(Some(basis)),
            Outcome::NeedsDouble | Outcome::Unresolved => Ok(None),
        },
        Outcome::Unresolved => Ok(None),
    }
}

enum Outcome {
    /// The basis of the leading vectors.
    Resolved(Mat<f64>),
    /// What is left over is too small to be judged in this number type.
    NeedsDouble,
    /// The basis has grown to its limit.
    Unresolved,
}

fn iterate<T: Scalar>(
    matrix: &Dense<'_>,
    rank: usize,
    energy: f64,
    seed: u64,
) -> anyhow::Result<Outcome> {
    let (small, block) = (matrix.small(), block_size(rank));
    let mut gaussian = Gaussian::new(seed);
    let start = narrow::<T>(gaussian.matrix(matrix.large(), block).as_ref());
    let mut basis = Basis::<T>::new(matrix, rank + 4 * block);
    let mut next = T::times(matrix, start.as_ref());
    let mut check_at = rank + block;
    loop {
        let (q, r) = basis.orthogonalize(next);
        if basis.size >= check_at {
            let ritz = basis.ritz(r.as_ref())?;
            let left = energy - ritz.values[..rank].iter().sum::<f64>();
            let resolved =
                left <= ROUNDING * ROUNDING * energy || ritz.missed(rank) <= MISSED * left;
            if resolved && (T::EPSILON == f64::EPSILON || left > NEEDS_DOUBLE * energy) {
                return Ok(Outcome::Resolved(basis.vectors(&ritz, rank)));
            }
            if left <= NEEDS_DOUBLE * energy && T::EPSILON != f64::EPSILON {
                return Ok(Outcome::NeedsDouble);
            }
            if basis.size + block > limit(small) {
                return Ok(Outcome::Unresolved);
            }
            // Checks cost the cube of the size: not after every block of a large basis.
            check_at = basis.size + (basis.size / 8).max(1);
        }
        next = basis.extend(q);
    }
}

/// What is known after some blocks.
struct Basis<'m, T: Scalar> {
    matrix: &'m Dense<'m>,
    /// Columns in use of the three below.
    size: usize,
    /// Columns of the last block.
    last: usize,
    /// `[small, ..]`, orthonormal.
    q: Mat<T>,
    /// `A^T q`: `[large, ..]`.
    p: Mat<T>,
    /// `p^T p`, lower triangle.
    t: Mat<f64>,
}

impl<'m, T: Scalar> Basis<'m, T> {
    fn new(matrix: &'m Dense<'m>, capacity: usize) -> Self {
        let q = Mat::zeros(matrix.small(), capacity);
        let p = Mat::zeros(matrix.large(), capacity);
        Self { matrix, size: 0, last: 0, q, p, t: Mat::zeros(capacity, capacity) }
    }

    /// Makes room for `width` more columns.
    fn reserve(&mut self, width: usize) {
        if self.size + width > self.q.ncols() {
            let capacity = self.size * 3 / 2 + width;
            self.q = grown(&self.q, self.q.nrows(), capacity);
            self.p = grown(&self.p, self.p.nrows(), capacity);
            self.t = grown(&self.t, capacity, capacity);
        }
    }

    /// What `next` has beside the basis: `q * r`, `q` orthonormal and orthogonal to the basis.
    fn orthogonalize(&self, mut next: Mat<T>) -> (Mat<T>, Mat<T>) {
        self.remove_basis(&mut next);
        self.remove_basis(&mut next);
        let (mut q, r) = qr(next);
        // Where `next` lay within the basis, what is left is rounding, and that may lie within.
        self.remove_basis(&mut q);
        (qr(q).0, r)
    }

    /// `block -= q (q^T block)`.
    fn remove_basis(&self, block: &mut Mat<T>) {
        let q = self.q.subcols(0, self.size);
        let parts = product(q.transpose(), block.as_ref());
        matmul(block.as_mut(), Accum::Add, q, parts.as_ref(), -T::one_impl(), Par::Seq);
    }

    /// Takes a block into the basis; gives `A A^T` times it.
    fn extend(&mut self, q: Mat<T>) -> Mat<T> {
        let (start, width) = (self.size, q.ncols());
        let p = T::transposed_times(self.matrix, q.as_ref());
        let next = T::times(self.matrix, p.as_ref());
        self.reserve(width);
        self.q.as_mut().subcols_mut(start, width).copy_from(&q);
        self.p.as_mut().subcols_mut(start, width).copy_from(&p);
        self.size += width;
        self.last = width;
        let mut rows = self.t.as_mut().submatrix_mut(start, 0, width, start + width);
        let large = self.matrix.large();
        for at in (0..large).step_by(ROWS) {
            let count = ROWS.min(large - at);
            let all = wide(self.p.submatrix(at, 0, count, start + width));
            let new = all.subcols(start, width);
            matmul(rows.as_mut(), Accum::Add, new.transpose(), all.as_ref(), 1.0, Par::Seq);
        }
        next
    }

    /// The best approximations of eigenpairs of `A A^T`; `r` is from [`Self::orthogonalize`] of what
    /// [`Self::extend`] gave last.
    fn ritz(&self, r: MatRef<'_, T>) -> anyhow::Result<Ritz> {
        let t = self.t.submatrix(0, 0, self.size, self.size);
        let (values, vectors) = eigen(t)?;
        let ending = vectors.subrows(self.size - self.last, self.last);
        let beside = product(wide(r).as_ref(), ending);
        let residuals = (0..self.size).map(|at| beside.col(at).norm_l2()).collect();
        Ok(Ritz { values, residuals, vectors })
    }

    /// The leading `rank` vectors themselves, orthonormal in 64 bits.
    fn vectors(&self, ritz: &Ritz, rank: usize) -> Mat<f64> {
        let q = wide(self.q.subcols(0, self.size));
        qr(product(q.as_ref(), ritz.vectors.subcols(0, rank))).0
    }
}

/// Approximate eigenpairs within a basis, by falling eigenvalue.
struct Ritz {
    values: Vec<f64>,
    residuals: Vec<f64>,
    vectors: Mat<f64>,
}

impl Ritz {
    /// A bound of what the leading `rank` values lack. The gap may be taken after any place from
    /// `rank` on, so that a cluster around `rank` is seen as one; the smallest bound is the bound.
    fn missed(&self, rank: usize) -> f64 {
        let bound_to = |end: usize| -> f64 {
            let rest = self.values.get(end).map_or(0.0, |value| value + self.residuals[end]);
            let pairs = self.values[..end].iter().zip(&self.residuals[..end]);
            let of_pair = |(value, residual): (&f64, &f64)| {
                let gap = value - rest;
                if gap > *residual { residual * residual / gap } else { *residual }
            };
            pairs.map(of_pair).sum()
        };
        (rank..self.values.len()).map(bound_to).fold(f64::INFINITY, f64::min)
    }
}

/// A copy with zeros to the right and below.
fn grown<T: RealField>(matrix: &Mat<T>, rows: usize, cols: usize) -> Mat<T> {
    let mut out = Mat::zeros(rows, cols);
    out.as_mut().submatrix_mut(0, 0, matrix.nrows(), matrix.ncols()).copy_from(matrix);
    out
}

fn narrow<T: Scalar>(matrix: MatRef<'_, f64>) -> Mat<T> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, col| T::of(matrix[(row, col)]))
}

/// In 64 bits. Columns lie together in memory: run along them, as this is done to the whole basis
/// with every block.
fn wide<T: Scalar>(matrix: MatRef<'_, T>) -> Mat<f64> {
    let mut out = Mat::zeros(matrix.nrows(), matrix.ncols());
    for (to, from) in out.as_mut().col_iter_mut().zip(matrix.col_iter()) {
        to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to = from.wide());
    }
    out
}
