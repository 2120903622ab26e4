//! A dense matrix seen through its smaller side, and its products with thin matrices.
//!
//! Here the matrix is `A`, or its transpose where `A` is tall: `[small, large]`. Values are 32-bit;
//! products with 64-bit matrices convert a panel at a time.

use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::Svd;
use super::decompositions::{qr, thin_svd};

/// Numbers of a panel that is converted to 64 bits at a time: 1 MiB, so that it stays in cache.
const PANEL: usize = 1 << 17;

/// A matrix in somebody else's memory, row by row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dense<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows * cols` numbers.
    pub values: &'a [f32],
}

impl Dense<'_> {
    /// Whether [`Self::small_by_large`] is the transpose.
    fn is_tall(&self) -> bool {
        self.rows > self.cols
    }

    /// The smaller side.
    pub fn small(&self) -> usize {
        self.rows.min(self.cols)
    }

    /// The larger side.
    pub fn large(&self) -> usize {
        self.rows.max(self.cols)
    }

    /// The matrix with the smaller side as rows.
    pub fn small_by_large(&self) -> MatRef<'_, f32> {
        let matrix = MatRef::from_row_major_slice(self.values, self.rows, self.cols);
        if self.is_tall() { matrix.transpose() } else { matrix }
    }

    /// The sum of squares.
    pub fn energy(&self) -> f64 {
        let of_block = |block: &[f32]| -> f64 {
            let mut sums = [0.0_f64; 8];
            let mut chunks = block.chunks_exact(8);
            for chunk in &mut chunks {
                for (sum, value) in sums.iter_mut().zip(chunk) {
                    *sum += f64::from(*value) * f64::from(*value);
                }
            }
            let rest: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            sums.iter().sum::<f64>() + rest
        };
        self.values.chunks(4096).map(of_block).sum()
    }

    /// Calls `work` with panels of `small_by_large` in 64 bits, `[small, width]`, and the first of
    /// their columns; or `[height, large]` and the first row when `by_rows`.
    pub fn panels(&self, by_rows: bool, mut work: impl FnMut(usize, MatRef<'_, f64>)) {
        let matrix = self.small_by_large();
        let (length, other) =
            if by_rows { (self.small(), self.large()) } else { (self.large(), self.small()) };
        let step = (PANEL / other).clamp(1, length);
        // Laid out as the source, so that conversion runs along memory.
        let mut buffer = vec![0.0_f64; step * other];
        for start in (0..length).step_by(step) {
            let width = step.min(length - start);
            let source =
                if by_rows { matrix.subrows(start, width) } else { matrix.subcols(start, width) };
            let (m, n) = source.shape();
            let buffer = &mut buffer[..m * n];
            let mut panel = if self.is_tall() {
                MatMut::from_column_major_slice_mut(buffer, m, n)
            } else {
                MatMut::from_row_major_slice_mut(buffer, m, n)
            };
            faer::zip!(&mut panel, &source)
                .for_each(|faer::unzip!(to, from)| *to = f64::from(*from));
            work(start, panel.as_ref());
        }
    }

    /// The decomposition of the matrix projected on `basis`, `[small, k]` with orthonormal columns:
    /// the best that those leave.
    ///
    /// # Errors
    /// No convergence.
    pub fn decompose_within(&self, basis: MatRef<'_, f64>, energy: f64) -> anyhow::Result<Svd> {
        let (q, r) = qr(f64::transposed_times(self, basis));
        // A^T basis = q r, so A = basis r^T q^T within the basis.
        let (left, s, right) = thin_svd(r.transpose())?;
        let (small, large) = (product(basis, left.as_ref()), product(q.as_ref(), right.as_ref()));
        let (u, v) = if self.is_tall() { (large, small) } else { (small, large) };
        Ok(Svd { u, s, v, energy })
    }
}

/// A number type that thin matrices are kept in.
pub(crate) trait Scalar: RealField + Copy {
    /// What a product of two rounds to, of its size.
    const EPSILON: f64;

    /// Rounds.
    fn of(value: f64) -> Self;

    /// Widens.
    fn wide(self) -> f64;

    /// `small_by_large * thin`.
    fn times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self>;

    /// `small_by_large^T * thin`.
    fn transposed_times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self>;
}

impl Scalar for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;

    fn of(value: f64) -> Self {
        value as Self
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }

    fn times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self> {
        product(matrix.small_by_large(), thin)
    }

    fn transposed_times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self> {
        product(matrix.small_by_large().transpose(), thin)
    }
}

impl Scalar for f64 {
    const EPSILON: f64 = f64::EPSILON;

    fn of(value: f64) -> Self {
        value
    }

    fn wide(self) -> f64 {
        self
    }

    fn times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self> {
        let mut out = Mat::zeros(matrix.small(), thin.ncols());
        matrix.panels(matrix.rows <= matrix.cols, |start, panel| {
            if panel.ncols() == matrix.large() {
                let rows = out.as_mut().subrows_mut(start, panel.nrows());
                matmul(rows, Accum::Replace, panel, thin, 1.0, Par::Seq);
            } else {
                let part = thin.subrows(start, panel.ncols());
                matmul(out.as_mut(), Accum::Add, panel, part, 1.0, Par::Seq);
            }
        });
        out
    }

    fn transposed_times(matrix: &Dense<'_>, thin: MatRef<'_, Self>) -> Mat<Self> {
        let mut out = Mat::zeros(matrix.large(), thin.ncols());
        matrix.panels(matrix.rows <= matrix.cols, |start, panel| {
            if panel.ncols() == matrix.large() {
                let part = thin.subrows(start, panel.nrows());
                matmul(out.as_mut(), Accum::Add, panel.transpose(), part, 1.0, Par::Seq);
            } else {
                let rows = out.as_mut().subrows_mut(start, panel.ncols());
                matmul(rows, Accum::Replace, panel.transpose(), thin, 1.0, Par::Seq);
            }
        });
        out
    }
}

/// `left * right` on this thread.
pub(crate) fn product<T: RealField>(left: MatRef<'_, T>, right: MatRef<'_, T>) -> Mat<T> {
    let mut out = Mat::zeros(left.nrows(), right.ncols());
    matmul(out.as_mut(), Accum::Replace, left, right, T::one_impl(), Par::Seq);
    out
}
