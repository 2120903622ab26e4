//! QR, SVD and symmetric eigenvalues of small or thin matrices, by faer on the calling thread.

use anyhow::anyhow;
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply,
};
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::traits::RealField;
use faer::{Conj, Mat, MatRef, Par};

/// `matrix = q * r`: `q` is `[m, p]` with orthonormal columns also where `matrix` lacks rank, `r` is
/// `[p, n]` and upper triangular, `p` is the smaller of `m` and `n`.
pub(crate) fn qr<T: RealField>(mut matrix: Mat<T>) -> (Mat<T>, Mat<T>) {
    let (m, n) = matrix.shape();
    let size = m.min(n);
    if size == 0 {
        return (Mat::zeros(m, 0), Mat::zeros(0, n));
    }
    let block = recommended_block_size::<T>(m, n);
    let mut factor = Mat::<T>::zeros(block, size);
    let mut memory =
        MemBuffer::new(qr_in_place_scratch::<T>(m, n, block, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    qr_in_place(matrix.as_mut(), factor.as_mut(), Par::Seq, stack, Default::default());
    let zero = T::zero_impl();
    let r =
        Mat::from_fn(
            size,
            n,
            |row, col| {
                if row <= col { matrix[(row, col)].clone() } else { zero.clone() }
            },
        );
    let mut q = Mat::<T>::identity(m, size);
    let mut memory = MemBuffer::new(apply_scratch::<T>(m, block, size));
    apply(
        matrix.get(.., ..size),
        factor.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
    );
    (q, r)
}

/// `matrix = u * diag(s) * v^T`, thin, singular values falling.
///
/// # Errors
/// No convergence.
pub(crate) fn thin_svd(matrix: MatRef<'_, f64>) -> anyhow::Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let (m, n) = matrix.shape();
    let size = m.min(n);
    let (mut u, mut s, mut v) = (Mat::zeros(m, size), Diag::zeros(size), Mat::zeros(n, size));
    let thin = ComputeSvdVectors::Thin;
    let mut memory =
        MemBuffer::new(svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Default::default()));
    svd(
        matrix,
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| anyhow!("the SVD of a {m}x{n} matrix did not converge"))?;
    let s = (0..size).map(|at| s[at]).collect();
    Ok((u, s, v))
}

/// Eigenvalues, falling, and their vectors as columns, of a symmetric matrix of which the lower
/// triangle is read.
///
/// # Errors
/// No convergence.
pub(crate) fn eigen(matrix: MatRef<'_, f64>) -> anyhow::Result<(Vec<f64>, Mat<f64>)> {
    let n = matrix.nrows();
    let mut vectors = Mat::zeros(n, n);
    let values = eigen_into(matrix, Some(&mut vectors))?;
    let vectors = vectors.as_ref().reverse_cols().to_owned();
    Ok((values, vectors))
}

/// Eigenvalues alone, falling.
///
/// # Errors
/// No convergence.
pub(crate) fn eigenvalues(matrix: MatRef<'_, f64>) -> anyhow::Result<Vec<f64>> {
    eigen_into(matrix, None)
}

fn eigen_into(matrix: MatRef<'_, f64>, vectors: Option<&mut Mat<f64>>) -> anyhow::Result<Vec<f64>> {
    let n = matrix.nrows();
    let mut values = Diag::zeros(n);
    let wanted = if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
    let mut memory =
        MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, wanted, Par::Seq, Default::default()));
    self_adjoint_evd(
        matrix,
        values.as_mut(),
        vectors.map(|vectors| vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| anyhow!("the eigenvalues of a matrix of {n} rows did not converge"))?;
    // faer gives them rising.
    Ok((0..n).rev().map(|at| values[at]).collect())
}
