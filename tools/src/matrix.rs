//! Matrices of 32-bit floats, row by row, and their products through faer.
//!
//! Row-major because that is how tensors lie in files: a weight of a Linear or a convolution is
//! `[out, in*kh*kw]` without moving a number. Every product says whether it runs on all cores or on
//! the calling thread alone; tools that work on many layers at once want the second.

use faer::{Accum, MatMut, MatRef, Par};

/// A matrix in memory of its own, row by row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows * cols` numbers.
    pub values: Vec<f32>,
}

impl Matrix {
    /// A matrix of the numbers `values`.
    ///
    /// # Panics
    /// When `values.len()` is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        assert_eq!(rows * cols, values.len(), "numbers of a {rows}x{cols} matrix");
        Self { rows, cols, values }
    }

    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, values: vec![0.0; rows * cols] }
    }

    /// The same numbers for faer.
    pub fn as_faer(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    /// A copy of a matrix of faer, whatever its layout.
    pub fn from_faer(matrix: MatRef<'_, f32>) -> Self {
        let mut copy = Self::zeros(matrix.nrows(), matrix.ncols());
        view_mut(&mut copy.values, matrix.nrows(), matrix.ncols()).copy_from(matrix);
        copy
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.cols..][..self.cols]
    }

    /// Rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        Self::from_faer(self.as_faer().transpose())
    }

    /// `self * right`.
    ///
    /// # Panics
    /// When the sizes do not fit.
    pub fn product(&self, right: &Self, par: Par) -> Self {
        let mut out = Self::zeros(self.rows, right.cols);
        let target = view_mut(&mut out.values, self.rows, right.cols);
        faer::linalg::matmul::matmul(
            target,
            Accum::Replace,
            self.as_faer(),
            right.as_faer(),
            1.0,
            par,
        );
        out
    }
}

/// `target += factor * left * right` on the calling thread. `target` is `[n, right.cols]` and `left`
/// `[n, right.rows]`, row by row: a block of rows of a larger sum, so that many threads can work on
/// one layer and each block stays in a core's cache.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn add_product(target: &mut [f32], left: &[f32], right: &Matrix, factor: f32) {
    if target.is_empty() || right.rows == 0 {
        return;
    }
    let rows = target.len() / right.cols;
    faer::linalg::matmul::matmul(
        view_mut(target, rows, right.cols),
        Accum::Add,
        MatRef::from_row_major_slice(left, rows, right.rows),
        right.as_faer(),
        factor,
        Par::Seq,
    );
}

fn view_mut(values: &mut [f32], rows: usize, cols: usize) -> MatMut<'_, f32> {
    MatMut::from_row_major_slice_mut(values, rows, cols)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, cols: usize, seed: usize) -> Matrix {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1000.0 - 1.0;
        Matrix::new(rows, cols, (0..rows * cols).map(value).collect())
    }

    fn by_hand(a: &Matrix, b: &Matrix) -> Vec<f64> {
        let cell = |i: usize, j: usize| {
            (0..a.cols).map(|k| f64::from(a.row(i)[k]) * f64::from(b.row(k)[j])).sum()
        };
        (0..a.rows * b.cols).map(|at| cell(at / b.cols, at % b.cols)).collect()
    }

    #[test]
    fn products_are_those_by_hand_on_any_number_of_cores() {
        // Both of faer's ways: tiny products, and those of its packed kernels.
        for (rows, inner, cols) in [(3, 2, 5), (1, 7, 9), (130, 8, 301), (65, 33, 1), (4, 1, 40)] {
            let (a, b) = (numbers(rows, inner, 1), numbers(inner, cols, 2));
            let want = by_hand(&a, &b);
            for par in [Par::Seq, Par::rayon(0)] {
                let got = a.product(&b, par);
                assert_eq!((got.rows, got.cols), (rows, cols));
                for (got, want) in got.values.iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() <= 1e-5, "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_rows_add_up_to_the_whole() {
        let (up, down) = (numbers(70, 8, 3), numbers(8, 90, 4));
        let start = numbers(70, 90, 5);
        let mut sum = start.clone();
        for (block, left) in sum.values.chunks_mut(90 * 16).zip(up.values.chunks(8 * 16)) {
            add_product(block, left, &down, -0.5);
        }
        for (at, want) in by_hand(&up, &down).iter().enumerate() {
            let want = f64::from(start.values[at]) - 0.5 * want;
            assert!((f64::from(sum.values[at]) - want).abs() <= 1e-5, "{at}");
        }
        add_product(&mut [], &[], &down, 1.0);
    }

    #[test]
    fn rows_and_columns_are_exchanged() {
        let matrix = Matrix::new(2, 3, vec![1., 2., 3., 4., 5., 6.]);
        assert_eq!(matrix.transposed(), Matrix::new(3, 2, vec![1., 4., 2., 5., 3., 6.]));
        assert_eq!(Matrix::from_faer(matrix.as_faer()), matrix);
    }
}
