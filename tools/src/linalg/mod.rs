//! Truncated singular value decompositions of what adapters add to weights.
//!
//! Promises: a sum of low-rank products is decomposed through its factors and never formed; a dense
//! matrix never meets a full SVD; the error `|A - A_k|` (Frobenius) is at most 1.001 times that of
//! the best matrix of rank k, down to the rounding of 32-bit factors; the same input gives the same
//! bits on any number of cores. Everything here runs on the calling thread: callers work on many
//! layers at once.

mod decompositions;
mod dense;
mod gaussian;
mod gram;
mod krylov;
mod low_rank;

#[cfg(test)]
mod tests;

pub(crate) use dense::Dense;
pub(crate) use low_rank::{Product, of_low_rank_sum};

use faer::Mat;

use decompositions::qr;
use gaussian::Gaussian;

use crate::matrix::Matrix;

/// Below this share of the matrix's norm an error is the rounding of 32-bit factors.
const ROUNDING: f64 = 3e-7;

/// How the leading singular vectors of a dense matrix are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// From products with few vectors where a check of the residuals finds them resolved,
    /// otherwise as [`Method::Exact`].
    Fast,
    /// From all eigenvalues of the Gram matrix of the smaller side, in 64 bits.
    Exact,
}

/// The leading part of a singular value decomposition; singular values fall.
#[derive(Clone, Debug)]
pub(crate) struct Svd {
    /// `[rows, k]`, orthonormal columns.
    pub u: Mat<f64>,
    /// `k` singular values.
    pub s: Vec<f64>,
    /// `[cols, k]`, orthonormal columns: V, not its transpose.
    pub v: Mat<f64>,
    /// Sum of the squares of all singular values, also those left out.
    pub energy: f64,
}

impl Svd {
    /// The same with singular values of 0 up to `rank` of them, their vectors orthonormal too: files
    /// have room for them, and training can go on from there.
    pub fn padded(mut self, rank: usize) -> Self {
        let known = self.s.len();
        if rank > known {
            self.s.resize(rank, 0.0);
            self.u = completed(&self.u, rank);
            self.v = completed(&self.v, rank);
        }
        self
    }

    /// `U * S` of the first `rank` values: `[rows, rank]`.
    pub fn up(&self, rank: usize) -> Matrix {
        let value = |row, col| (self.u[(row, col)] * self.s[col]) as f32;
        Matrix::from_faer(Mat::from_fn(self.u.nrows(), rank, value).as_ref())
    }

    /// The first `rank` rows of V transposed: `[rank, cols]`.
    pub fn down(&self, rank: usize) -> Matrix {
        let value = |row, col| self.v[(col, row)] as f32;
        Matrix::from_faer(Mat::from_fn(rank, self.v.nrows(), value).as_ref())
    }
}

/// `vectors` with more columns, up to `count`, orthonormal to all.
fn completed(vectors: &Mat<f64>, count: usize) -> Mat<f64> {
    let (rows, known) = vectors.shape();
    let mut random = Gaussian::new(count as u64).matrix(rows, count);
    random.as_mut().subcols_mut(0, known).copy_from(vectors);
    let mut q = qr(random).0;
    // QR keeps the first columns but for their signs.
    q.as_mut().subcols_mut(0, known).copy_from(vectors);
    q
}

/// The leading `rank` singular values and vectors of `matrix`. `seed` starts the random vectors.
///
/// # Errors
/// When an iteration of faer does not converge, which no finite matrix has shown.
///
/// # Panics
/// When `rank` exceeds the smaller side.
pub(crate) fn truncated(
    matrix: &Dense<'_>,
    rank: usize,
    method: Method,
    seed: u64,
) -> anyhow::Result<Svd> {
    let smaller = matrix.rows.min(matrix.cols);
    assert!(rank <= smaller, "rank {rank} of a {}x{} matrix", matrix.rows, matrix.cols);
    let energy = matrix.energy();
    let basis = if energy == 0.0 {
        Mat::identity(smaller, rank)
    } else if method == Method::Exact || !krylov::pays(smaller, rank) {
        gram::leading(matrix, rank)?
    } else {
        match krylov::leading(matrix, rank, energy, seed)? {
            Some(basis) => basis,
            None => gram::leading(matrix, rank)?,
        }
    };
    matrix.decompose_within(basis.as_ref(), energy)
}

/// All singular values of `matrix`, falling.
///
/// # Errors
/// As [`truncated`].
pub(crate) fn singular_values(matrix: &Dense<'_>) -> anyhow::Result<Vec<f64>> {
    gram::singular_values(matrix)
}
