//! The exact way: eigenvalues of the Gram matrix of the smaller side.
//!
//! Squaring halves the digits: in 64 bits singular values stay right down to 1e-8 of the largest,
//! which is less than the 32-bit numbers of the matrix say. A full SVD would take several times as
//! long and the memory of both sides.

use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::{Accum, Mat, MatRef, Par};

use super::decompositions::{eigen, eigenvalues};
use super::dense::Dense;

/// The leading `rank` singular vectors of the smaller side: `[small, rank]`.
///
/// # Errors
/// No convergence.
pub(crate) fn leading(matrix: &Dense<'_>, rank: usize) -> anyhow::Result<Mat<f64>> {
    let (_, vectors) = eigen(gram(matrix).as_ref())?;
    Ok(vectors.subcols(0, rank).to_owned())
}

/// All singular values, falling.
///
/// # Errors
/// No convergence.
pub(crate) fn singular_values(matrix: &Dense<'_>) -> anyhow::Result<Vec<f64>> {
    let values = eigenvalues(gram(matrix).as_ref())?;
    Ok(values.into_iter().map(|value| value.max(0.0).sqrt()).collect())
}

/// `A * A^T` of the smaller side, its lower triangle.
fn gram(matrix: &Dense<'_>) -> Mat<f64> {
    let small = matrix.small();
    let mut out = Mat::zeros(small, small);
    let mut add = |panel: MatRef<'_, f64>| {
        matmul(
            out.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            panel,
            BlockStructure::Rectangular,
            panel.transpose(),
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
    };
    matrix.panels(false, |_, panel| add(panel));
    out
}
