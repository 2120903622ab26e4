//! How strong the modules of an adapter are: the Frobenius norm of what each adds to its layer.
//!
//! A product `up · down` is never formed: the square of its norm is the trace of
//! `(down · downᵀ) · (upᵀ · up)`, two matrices of the rank's size.

use formats::adapter::{AdapterFile, AdapterModule};
use rayon::prelude::*;

use crate::delta::{Delta, delta_of};
use crate::finite::FiniteRule;
use crate::matrix::Matrix;

/// The norm of each module, in the order of the file's modules; NaN where its numbers are not finite.
///
/// # Errors
/// Tensors that cannot be read.
pub(crate) fn norms(file: &AdapterFile) -> anyhow::Result<Vec<f64>> {
    file.modules.par_iter().map(|module| norm(file, module)).collect()
}

fn norm(file: &AdapterFile, module: &AdapterModule) -> anyhow::Result<f64> {
    let delta = delta_of(file, module, FiniteRule { allow_nan: true })?;
    let (square, scale) = match &delta {
        Delta::LowRank { up, down, scale } => {
            // The sum of the elementwise product of two symmetric matrices is their product's trace.
            let (ups, downs) = (gram_of_columns(up), gram_of_rows(down));
            (ups.iter().zip(&downs).map(|(a, b)| a * b).sum::<f64>(), *scale)
        }
        Delta::Dense { values, scale } => {
            (values.values.iter().map(|value| f64::from(*value).powi(2)).sum(), *scale)
        }
    };
    // Rounding may leave a sum just below 0; NaN stays.
    let square = if square < 0.0 { 0.0 } else { square };
    Ok(square.sqrt() * f64::from(scale.abs()))
}

/// `m · mᵀ`, row-major, summed in f64.
fn gram_of_rows(m: &Matrix) -> Vec<f64> {
    let mut gram = vec![0.0; m.rows * m.rows];
    for i in 0..m.rows {
        for j in 0..=i {
            let pairs = m.row(i).iter().zip(m.row(j));
            let sum: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            gram[i * m.rows + j] = sum;
            gram[j * m.rows + i] = sum;
        }
    }
    gram
}

/// `mᵀ · m`.
fn gram_of_columns(m: &Matrix) -> Vec<f64> {
    gram_of_rows(&m.transposed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_the_norm_of_the_product() {
        let up = Matrix::new(3, 2, vec![1.0, 2.0, -1.0, 0.5, 0.0, 3.0]);
        let down = Matrix::new(2, 4, vec![1.0, 0.0, 2.0, -1.0, 0.5, 1.0, 0.0, 2.0]);
        let product = up.product(&down, faer::Par::Seq);
        let direct: f64 = product.values.iter().map(|value| f64::from(*value).powi(2)).sum();
        let (ups, downs) = (gram_of_columns(&up), gram_of_rows(&down));
        let trace: f64 = ups.iter().zip(&downs).map(|(a, b)| a * b).sum();
        assert!((trace - direct).abs() < 1e-9 * direct, "{trace} {direct}");
    }
}
