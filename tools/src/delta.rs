//! What a module of an adapter adds to the weight of its layer, whatever its kind.
//!
//! The weight is seen as a matrix `[out, in*kh*kw]`, the order of files. Low-rank kinds stay two
//! thin factors; the others become one dense matrix. The formulas are LyCORIS'
//! (<https://github.com/KohakuBlueleaf/LyCORIS>, `functional/`): einsums there, products of
//! row-major matrices here. Everything runs on the calling thread, so that many layers can be in
//! work at once.

use anyhow::{Context, ensure};
use faer::Par;
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule, KronFactor};
use formats::{Dtype, bytes_from_f32, extend_f32};

use crate::finite::FiniteRule;
use crate::matrix::{Matrix, add_product};

/// What a module adds to its layer's weight seen as `[out, in*kh*kw]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Delta {
    /// `scale * up * down`.
    LowRank {
        /// `[out, r]`
        up: Matrix,
        /// `[r, in*kh*kw]`
        down: Matrix,
        /// `alpha / r`
        scale: f32,
    },
    /// `scale * values`.
    Dense {
        /// `[out, in*kh*kw]`
        values: Matrix,
        /// `alpha / r`, or 1 where nothing has a rank.
        scale: f32,
    },
}

impl Delta {
    /// Rows and columns of the weight that it is for.
    pub fn size(&self) -> (usize, usize) {
        match self {
            Self::LowRank { up, down, .. } => (up.rows, down.cols),
            Self::Dense { values, .. } => (values.rows, values.cols),
        }
    }

    /// What the product or the matrix is multiplied by.
    pub fn scale(&self) -> f32 {
        match self {
            Self::LowRank { scale, .. } | Self::Dense { scale, .. } => *scale,
        }
    }

    /// `block += factor * delta` for the rows from `first` on, as many as `block` holds.
    pub fn add_rows(&self, first: usize, block: &mut [f32], factor: f32) {
        self.add_times(first, block, factor * self.scale());
    }

    /// As [`Self::add_rows`] with factor 1, without the scale.
    pub fn add_rows_unscaled(&self, first: usize, block: &mut [f32]) {
        self.add_times(first, block, 1.0);
    }

    fn add_times(&self, first: usize, block: &mut [f32], factor: f32) {
        match self {
            Self::LowRank { up, down, .. } => {
                let rows = block.len() / down.cols;
                let left = &up.values[first * up.cols..][..rows * up.cols];
                add_product(block, left, down, factor);
            }
            Self::Dense { values, .. } => {
                for (sum, value) in block.iter_mut().zip(&values.values[first * values.cols..]) {
                    *sum += factor * value;
                }
            }
        }
    }

    /// Rounds its matrices to a narrower type, which is how sd-scripts reads a file for a merge in
    /// that type.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn round(&mut self, dtype: Dtype) -> anyhow::Result<()> {
        let matrices = match self {
            Self::LowRank { up, down, .. } => vec![up, down],
            Self::Dense { values, .. } => vec![values],
        };
        for matrix in matrices {
            let bytes = bytes_from_f32(&matrix.values, dtype)?;
            matrix.values.clear();
            extend_f32(dtype, &bytes, &mut matrix.values);
        }
        Ok(())
    }
}

/// The delta of a module: of its layer's weight, or of the scale of a norm as `[n, 1]`. DoRA's
/// magnitudes and bias differences are left to the caller, who knows the layer.
///
/// # Errors
/// A tensor that cannot be read, holds values that are not finite, or does not fit the others;
/// the message names the file, the module and the shapes.
pub(crate) fn delta_of(
    file: &AdapterFile,
    module: &AdapterModule,
    finite: FiniteRule,
) -> anyhow::Result<Delta> {
    let read = Reader { file, finite };
    let scale = module.scale(file);
    let delta = match &module.kind {
        AdapterKind::LowRank { down, up, mid } => {
            let (up, down) = (read.matrix(up)?, read.matrix(down)?);
            let down = match mid {
                None => down,
                Some(mid) => core_times(&read.core(mid)?, &down)?,
            };
            fits(&up, &down).map(|()| Delta::LowRank { up, down, scale })
        }
        AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1, t2 } => {
            let first = read.product_or_tucker(w1_a, w1_b, t1.as_deref())?;
            let second = read.product_or_tucker(w2_a, w2_b, t2.as_deref())?;
            hadamard(first, &second).map(|values| Delta::Dense { values, scale })
        }
        AdapterKind::Kronecker { w1, w2, t2 } => {
            let first = read.factor(w1, None)?;
            let second = read.factor(w2, t2.as_deref())?;
            Ok(Delta::Dense { values: kronecker(&first, &second), scale })
        }
        AdapterKind::Full { diff } => Ok(Delta::Dense { values: read.matrix(diff)?, scale }),
        AdapterKind::Norm { w_norm: Some(key), .. } => {
            Ok(Delta::Dense { values: read.column(key)?, scale })
        }
        AdapterKind::Norm { w_norm: None, .. } => {
            Ok(Delta::Dense { values: Matrix::zeros(0, 1), scale })
        }
    };
    delta.with_context(|| format!("`{}`, module `{}`", file.path.display(), module.name))
}

/// Reads tensors of a file as matrices.
struct Reader<'f> {
    file: &'f AdapterFile,
    finite: FiniteRule,
}

/// A Tucker core: `[i, j, window]`.
struct Core {
    sizes: [usize; 3],
    values: Vec<f32>,
}

impl Reader<'_> {
    fn values(&self, key: &str) -> anyhow::Result<(Vec<usize>, Vec<f32>)> {
        let view = self.file.view(key)?;
        let values = view.to_f32();
        self.finite.check(&self.file.path, key, &values)?;
        ensure!(
            !view.shape.is_empty() && !view.is_empty(),
            "`{}` holds a tensor that should have rows and columns, `{key}`, its shape is: {:?}",
            self.file.path.display(),
            view.shape
        );
        Ok((view.shape, values))
    }

    /// `[rows, everything else]`.
    fn matrix(&self, key: &str) -> anyhow::Result<Matrix> {
        let (shape, values) = self.values(key)?;
        Ok(Matrix::new(shape[0], values.len() / shape[0], values))
    }

    /// `[n, 1]`, whatever the shape.
    fn column(&self, key: &str) -> anyhow::Result<Matrix> {
        let (_, values) = self.values(key)?;
        Ok(Matrix::new(values.len(), 1, values))
    }

    fn core(&self, key: &str) -> anyhow::Result<Core> {
        let (shape, values) = self.values(key)?;
        let [i, j, window @ ..] = shape.as_slice() else {
            anyhow::bail!(
                "`{}` holds a core that should have four dimensions, `{key}`, its shape is: \
                 {shape:?}",
                self.file.path.display()
            );
        };
        Ok(Core { sizes: [*i, *j, window.iter().product()], values })
    }

    /// One half of a LoHa: `a * b`, or with a core `t`: `sum_ij t[i,j,w] a[i,o] b[j,c]`.
    fn product_or_tucker(&self, a: &str, b: &str, t: Option<&str>) -> anyhow::Result<Matrix> {
        let (a, b) = (self.matrix(a)?, self.matrix(b)?);
        let Some(t) = t else {
            fits(&a, &b).with_context(|| self.file.path.display().to_string())?;
            return Ok(a.product(&b, Par::Seq));
        };
        let right = core_times(&self.core(t)?, &b)?;
        let left = a.transposed();
        fits(&left, &right)?;
        Ok(left.product(&right, Par::Seq))
    }

    /// One factor of a LoKr.
    fn factor(&self, factor: &KronFactor, t: Option<&str>) -> anyhow::Result<Matrix> {
        match factor {
            KronFactor::Whole(key) => self.matrix(key),
            KronFactor::Product(a, b) => self.product_or_tucker(a, b, t),
        }
    }
}

/// That `left * right` can be.
fn fits(left: &Matrix, right: &Matrix) -> anyhow::Result<()> {
    ensure!(
        left.cols == right.rows,
        "its halves have different ranks: [{}, {}] and [{}, {}]",
        left.rows,
        left.cols,
        right.rows,
        right.cols
    );
    Ok(())
}

/// `sum_j core[i, j, w] b[j, c]` as `[i, c*window]`.
fn core_times(core: &Core, b: &Matrix) -> anyhow::Result<Matrix> {
    let [outer, inner, window] = core.sizes;
    ensure!(
        inner == b.rows,
        "its core does not fit its factor: [{outer}, {inner}, window {window}] and [{}, {}]",
        b.rows,
        b.cols
    );
    let mut out = Matrix::zeros(outer, b.cols * window);
    for (i, row) in out.values.chunks_exact_mut(b.cols * window).enumerate() {
        for j in 0..inner {
            let taps = &core.values[(i * inner + j) * window..][..window];
            for (cell, b) in row.chunks_exact_mut(window).zip(b.row(j)) {
                for (sum, tap) in cell.iter_mut().zip(taps) {
                    *sum += tap * b;
                }
            }
        }
    }
    Ok(out)
}

/// Element by element.
fn hadamard(mut first: Matrix, second: &Matrix) -> anyhow::Result<Matrix> {
    ensure!(
        (first.rows, first.cols) == (second.rows, second.cols),
        "its two products differ in shape: [{}, {}] and [{}, {}]",
        first.rows,
        first.cols,
        second.rows,
        second.cols
    );
    for (a, b) in first.values.iter_mut().zip(&second.values) {
        *a *= b;
    }
    Ok(first)
}

/// Every element of `first` times all of `second`. A window stays innermost: it belongs to the
/// columns of `second`.
fn kronecker(first: &Matrix, second: &Matrix) -> Matrix {
    let mut values = Vec::with_capacity(first.values.len() * second.values.len());
    for a in 0..first.rows {
        for b in 0..second.rows {
            for factor in first.row(a) {
                values.extend(second.row(b).iter().map(|value| factor * value));
            }
        }
    }
    Matrix::new(first.rows * second.rows, first.cols * second.cols, values)
}
