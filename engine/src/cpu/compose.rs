//! Weights made of small trainable tensors, and the way back to these; f32 throughout.
//!
//! Each task owns whole rows of what it writes, so that results do not depend on the number of
//! threads.

use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::simd::vectorized;
use crate::operands::{KroneckerSizes, check_same, row_length};
use crate::{Result, Tensor, pool};

/// Independent sums of a row, as many as the widest vector has lanes.
const LANES: usize = 16;

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (heads, tails) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = heads.remainder().iter().zip(tails.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in heads.zip(tails) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest
}

vectorized! {
    fn multiply_into(out: &mut [f32], a: &[f32], b: &[f32]) {
        out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a * b);
    }

    fn row_dot(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }

    /// `out = x·scale + y·shift`.
    fn mix_into(out: &mut [f32], x: &[f32], scale: f32, y: &[f32], shift: f32) {
        out.iter_mut().zip(x).zip(y).for_each(|((o, x), y)| *o = x * scale + y * shift);
    }

    /// One row of a Kronecker product: each of `first` times each window row of `second`.
    fn kronecker_row(out: &mut [f32], first: &[f32], second: &[f32], inner: usize) {
        let windows = out.chunks_exact_mut(first.len() * inner).zip(second.chunks_exact(inner));
        for (out, second) in windows {
            for (out, first) in out.chunks_exact_mut(inner).zip(first) {
                out.iter_mut().zip(second).for_each(|(o, x)| *o = first * x);
            }
        }
    }

    /// Adds a row's part of the gradient of `first`.
    fn first_gradient(sums: &mut [f32], dy: &[f32], second: &[f32], inner: usize) {
        let windows = dy.chunks_exact(sums.len() * inner).zip(second.chunks_exact(inner));
        for (dy, second) in windows {
            let parts = sums.iter_mut().zip(dy.chunks_exact(inner));
            parts.for_each(|(sum, dy)| *sum += dot(dy, second));
        }
    }

    /// Adds a row's part of the gradient of `second`.
    fn second_gradient(sums: &mut [f32], dy: &[f32], first: &[f32], inner: usize) {
        let windows = dy.chunks_exact(first.len() * inner).zip(sums.chunks_exact_mut(inner));
        for (dy, sums) in windows {
            for (dy, first) in dy.chunks_exact(inner).zip(first) {
                sums.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += first * dy);
            }
        }
    }
}

/// Product element by element.
pub(super) fn multiply(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_same("multiply", a, b)?;
    let (left, right) = (a.elements::<f32>("multiply")?, b.elements::<f32>("multiply")?);
    let (left, right): (&[f32], &[f32]) = (&left, &right);
    let mut out = pool::take::<f32>(left.len());
    out.par_chunks_mut(CHUNK)
        .zip(left.par_chunks(CHUNK))
        .zip(right.par_chunks(CHUNK))
        .for_each(|((out, a), b)| multiply_into(out, a, b));
    Ok(Tensor::from_pooled(a.shape(), out))
}

/// `[a·c, window, b·d]`, see [`crate::backend::Backend::kronecker`].
pub(super) fn kronecker(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    const OP: &str = "kronecker";
    let sizes = KroneckerSizes::new(OP, first, second)?;
    let (left, right) = (first.elements::<f32>(OP)?, second.elements::<f32>(OP)?);
    let (left, right): (&[f32], &[f32]) = (&left, &right);
    let shape = sizes.shape();
    let (width, part) = (sizes.window * sizes.d, sizes.window * shape[2]);
    let mut out = pool::take::<f32>(shape.iter().product());
    out.par_chunks_mut(part).enumerate().for_each(|(row, out)| {
        let (a, c) = (row / sizes.c, row % sizes.c);
        let first = &left[a * sizes.b..(a + 1) * sizes.b];
        kronecker_row(out, first, &right[c * width..(c + 1) * width], sizes.d);
    });
    Ok(Tensor::from_pooled(&shape, out))
}

/// Gradients of both matrices of [`kronecker`].
pub(super) fn kronecker_backward(
    dy: &Tensor,
    first: &Tensor,
    second: &Tensor,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "kronecker_backward";
    let sizes = KroneckerSizes::new(OP, first, second)?;
    let shape = sizes.shape();
    sizes.check_gradient(OP, dy)?;
    let (left, right) = (first.elements::<f32>(OP)?, second.elements::<f32>(OP)?);
    let dy = dy.elements::<f32>(OP)?;
    let (left, right, dy): (&[f32], &[f32], &[f32]) = (&left, &right, &dy);
    let (width, part) = (sizes.window * sizes.d, sizes.window * shape[2]);
    let mut of_first = pool::take::<f32>(left.len());
    of_first.par_chunks_mut(sizes.b).zip(dy.par_chunks(part * sizes.c)).for_each(|(sums, dy)| {
        sums.fill(0.);
        let rows = dy.chunks_exact(part).zip(right.chunks_exact(width));
        rows.for_each(|(dy, second)| first_gradient(sums, dy, second, sizes.d));
    });
    let mut of_second = pool::take::<f32>(right.len());
    of_second.par_chunks_mut(width).enumerate().for_each(|(c, sums)| {
        sums.fill(0.);
        let rows = dy.chunks_exact(part).skip(c).step_by(sizes.c);
        for (dy, first) in rows.zip(left.chunks_exact(sizes.b)) {
            second_gradient(sums, dy, first, sizes.d);
        }
    });
    let first = Tensor::from_pooled(first.shape(), of_first);
    Ok((first, Tensor::from_pooled(second.shape(), of_second)))
}

/// `multiplier·(m/norm - 1) + 1`; the norm has f32's epsilon added, as in LyCORIS.
fn row_scale(m: f32, norm: f32, multiplier: f32) -> f32 {
    multiplier * (m / (norm + f32::EPSILON) - 1.) + 1.
}

/// Rows of `v` brought to their magnitudes, and the norms they had.
pub(super) fn rescale_rows(
    v: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "rescale_rows";
    let length = row_length(OP, v, magnitude)?;
    let (rows, m) = (v.elements::<f32>(OP)?, magnitude.elements::<f32>(OP)?);
    let (rows, m): (&[f32], &[f32]) = (&rows, &m);
    let mut out = pool::take::<f32>(rows.len());
    let mut norms = pool::take::<f32>(m.len());
    out.par_chunks_mut(length)
        .zip(rows.par_chunks(length))
        .zip(norms.par_iter_mut().zip(m))
        .for_each(|((out, row), (norm, m))| {
            *norm = row_dot(row, row).sqrt();
            mix_into(out, row, row_scale(*m, *norm, multiplier), row, 0.);
        });
    Ok((Tensor::from_pooled(v.shape(), out), Tensor::from_pooled(magnitude.shape(), norms)))
}

/// Gradients of `v` and of the magnitudes of [`rescale_rows`]; the norm is differentiated too.
pub(super) fn rescale_rows_backward(
    dy: &Tensor,
    v: &Tensor,
    norms: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "rescale_rows_backward";
    check_same(OP, dy, v)?;
    check_same(OP, norms, magnitude)?;
    let length = row_length(OP, v, magnitude)?;
    let (dy, rows) = (dy.elements::<f32>(OP)?, v.elements::<f32>(OP)?);
    let (m, norms) = (magnitude.elements::<f32>(OP)?, norms.elements::<f32>(OP)?);
    let (dy, rows, m, norms): (&[f32], &[f32], &[f32], &[f32]) = (&dy, &rows, &m, &norms);
    let mut of_v = pool::take::<f32>(rows.len());
    let mut of_m = pool::take::<f32>(m.len());
    of_v.par_chunks_mut(length)
        .zip(dy.par_chunks(length).zip(rows.par_chunks(length)))
        .zip(of_m.par_iter_mut().zip(m.par_iter().zip(norms)))
        .for_each(|((out, (dy, row)), (of_m, (m, norm)))| {
            let (inverse, along) = (1. / (norm + f32::EPSILON), row_dot(dy, row));
            *of_m = multiplier * inverse * along;
            // A row of zeros has no direction: the norm's gradient there is 0, as in PyTorch.
            let direction = if *norm > 0. { 1. / norm } else { 0. };
            let shift = -multiplier * m * inverse * inverse * along * direction;
            mix_into(out, dy, row_scale(*m, *norm, multiplier), row, shift);
        });
    Ok((Tensor::from_pooled(v.shape(), of_v), Tensor::from_pooled(magnitude.shape(), of_m)))
}
