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
            let sum = dot(m.row(i), m.row(j));
            gram[i * m.rows + j] = sum;
            gram[j * m.rows + i] = sum;
        }
    }
    gram
}

/// In eight sums side by side, which the compiler makes vectors of.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let (blocks_a, rest_a) = a.as_chunks::<LANES>();
    let (blocks_b, rest_b) = b.as_chunks::<LANES>();
    let mut sums = [0.0_f64; LANES];
    for (x, y) in blocks_a.iter().zip(blocks_b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(x[lane]) * f64::from(y[lane]);
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    sums.iter().sum::<f64>() + rest
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
        // Eleven columns: a block of eight and a rest.
        let make = |rows: usize, cols: usize| {
            Matrix::new(rows, cols, (0..rows * cols).map(|i| (i * 7 % 11) as f32 - 4.5).collect())
        };
        let (up, down) = (make(3, 2), make(2, 11));
        let product = up.product(&down, faer::Par::Seq);
        let direct: f64 = product.values.iter().map(|value| f64::from(*value).powi(2)).sum();
        let (ups, downs) = (gram_of_columns(&up), gram_of_rows(&down));
        let trace: f64 = ups.iter().zip(&downs).map(|(a, b)| a * b).sum();
        assert!((trace - direct).abs() < 1e-9 * direct, "{trace} {direct}");
    }
}
