//! Kernels that move elements: joins, cuts, upsampling, row lookup.

use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::simd::{Scalar, vectorized, with_scalar};
use crate::operands::{
    cut_last, even_image_shape, image_shape, joined_last, joined_rows, table_shape,
};
use crate::{EngineError, Ids, Result, Tensor, pool};

/// Rows per task for rows of `width` elements.
fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// Joins two tensors along the last axis.
pub(super) fn concat_last(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = joined_last("concat_last", a, b)?;
    let (wa, wb) = (a.last_dim(), b.last_dim());
    let width = wa + wb;
    with_scalar!(a.dtype(), T => {
        let (left, right) = (a.elements::<T>("concat_last")?, b.elements::<T>("concat_last")?);
        let (left, right): (&[T], &[T]) = (&left, &right);
        let mut out = pool::take::<T>(left.len() + right.len());
        let step = rows_per_task(width);
        out.par_chunks_mut((step * width).max(1)).enumerate().for_each(|(task, out)| {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let row = task * step + row;
                let (to_left, to_right) = out.split_at_mut(wa);
                to_left.copy_from_slice(&left[row * wa..][..wa]);
                to_right.copy_from_slice(&right[row * wb..][..wb]);
            }
        });
        Ok(Tensor::from_pooled(&shape, out))
    })
}

/// Cuts the last axis into its first `at` elements and the rest.
pub(super) fn split_last(x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
    let width = x.last_dim();
    let [first, rest] = cut_last("split_last", x, at)?;
    let cut = |from: usize, shape: &[usize]| -> Result<Tensor> {
        let size = shape.last().copied().unwrap_or(1);
        with_scalar!(x.dtype(), T => {
            let data = x.elements::<T>("split_last")?;
            let data: &[T] = &data;
            let mut out = pool::take::<T>(x.rows() * size);
            let step = rows_per_task(width);
            out.par_chunks_mut((step * size).max(1)).enumerate().for_each(|(task, out)| {
                for (row, out) in out.chunks_exact_mut(size).enumerate() {
                    out.copy_from_slice(&data[(task * step + row) * width + from..][..size]);
                }
            });
            Ok(Tensor::from_pooled(shape, out))
        })
    };
    Ok((cut(0, &first)?, cut(at, &rest)?))
}

/// Each pixel of `[B,H,W,C]` four times: `[B,2H,2W,C]`.
pub(super) fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let [b, h, w, c] = image_shape("upsample2x", x)?;
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("upsample2x")?;
        let mut out = pool::take::<T>(4 * data.len());
        let line = (w * c).max(1);
        out.par_chunks_mut(4 * line).zip(data.par_chunks(line)).for_each(|(out, x)| {
            let (first, second) = out.split_at_mut(2 * line);
            for (out, pixel) in first.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
                let (left, right) = out.split_at_mut(c);
                left.copy_from_slice(pixel);
                right.copy_from_slice(pixel);
            }
            second.copy_from_slice(first);
        });
        Ok(Tensor::from_pooled(&[b, 2 * h, 2 * w, c], out))
    })
}

vectorized! {
    /// `out = top[left] + top[right] + bottom[left] + bottom[right]` of one output pixel.
    fn sum_pixels<T: Scalar>(out: &mut [T], top: &[T], bottom: &[T]) {
        let c = out.len();
        let (t0, t1) = top.split_at(c);
        let (b0, b1) = bottom.split_at(c);
        for i in 0..c {
            let sum = t0[i].to_f32() + t1[i].to_f32() + b0[i].to_f32() + b1[i].to_f32();
            out[i] = T::from_f32(sum);
        }
    }
}

/// Gradient of [`upsample2x`]: sums of 2x2 pixels.
pub(super) fn upsample2x_backward(dy: &Tensor) -> Result<Tensor> {
    let [b, h, w, c] = even_image_shape("upsample2x_backward", dy)?;
    with_scalar!(dy.dtype(), T => {
        let data = dy.elements::<T>("upsample2x_backward")?;
        let mut out = pool::take::<T>(data.len() / 4);
        let line = (w * c).max(1);
        out.par_chunks_mut((line / 2).max(1)).zip(data.par_chunks(2 * line)).for_each(
            |(out, dy)| {
                let (top, bottom) = dy.split_at(line);
                let pairs = top.chunks_exact(2 * c).zip(bottom.chunks_exact(2 * c));
                for (out, (top, bottom)) in out.chunks_exact_mut(c).zip(pairs) {
                    sum_pixels(out, top, bottom);
                }
            },
        );
        Ok(Tensor::from_pooled(&[b, h / 2, w / 2, c], out))
    })
}

/// Rows of `table` `[N,C]` chosen by `ids`: `[ids.len(),C]`; an id outside is an error.
pub(super) fn embedding(table: &Tensor, ids: &Ids) -> Result<Tensor> {
    let Some(ids) = ids.on_host() else {
        return Err(EngineError::Device { op: "embedding", got: table.device() });
    };
    let [rows, width] = table_shape("embedding", table)?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
        let detail = format!("id {id} lies outside a table of {rows} rows");
        return Err(EngineError::shape("embedding", detail));
    }
    with_scalar!(table.dtype(), T => {
        let data = table.elements::<T>("embedding")?;
        let data: &[T] = &data;
        let mut out = pool::take::<T>(ids.len() * width);
        out.par_chunks_mut(width.max(1)).zip(ids).for_each(|(out, id)| {
            out.copy_from_slice(&data[*id as usize * width..][..width]);
        });
        Ok(Tensor::from_pooled(&[ids.len(), width], out))
    })
}

/// Puts the rows of `b` behind those of `a`, both read as `[rows, last axis]`.
pub(super) fn concat_rows(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = joined_rows("concat_rows", a, b)?;
    with_scalar!(a.dtype(), T => {
        let (upper, lower) = (a.elements::<T>("concat_rows")?, b.elements::<T>("concat_rows")?);
        let mut out = pool::take::<T>(upper.len() + lower.len());
        let (first, second) = out.split_at_mut(upper.len());
        first.copy_from_slice(&upper);
        second.copy_from_slice(&lower);
        Ok(Tensor::from_pooled(&shape, out))
    })
}
