//! Casts, sums and scalings; memory-bound, so each is one pass in chunks over all threads.

use rayon::prelude::*;

use super::simd::{Scalar, vectorized, with_scalar};
use crate::operands::{check_factors, check_same, images_of_rows};
use crate::{DType, EngineError, Result, Tensor, pool};

/// Elements of one task. A constant, so that results do not depend on the number of threads.
pub(super) const CHUNK: usize = 1 << 14;

/// The tensor itself when nothing shares its storage, otherwise a copy to be changed in place.
pub(super) fn owned<T: Scalar>(op: &'static str, mut x: Tensor) -> Result<Tensor> {
    if x.is_unique() {
        return Ok(x);
    }
    let data = x.elements::<T>(op)?;
    let mut out = pool::take::<T>(data.len());
    let chunks = out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK));
    chunks.for_each(|(out, data)| out.copy_from_slice(data));
    Ok(Tensor::from_pooled(x.shape(), out))
}

/// A new tensor of `f` over chunks of `x`.
fn map<T: Scalar, U: Scalar>(
    op: &'static str,
    x: &Tensor,
    f: impl Fn(&mut [U], &[T]) + Sync,
) -> Result<Tensor> {
    let data = x.elements::<T>(op)?;
    let mut out = pool::take::<U>(data.len());
    out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK)).for_each(|(out, x)| f(out, x));
    Ok(Tensor::from_pooled(x.shape(), out))
}

vectorized! {
    fn widen_into<T: Scalar>(out: &mut [f32], x: &[T]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_f32());
    }

    fn round_into<T: Scalar>(out: &mut [T], x: &[f32]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = T::from_f32(*x));
    }

    fn add_into<T: Scalar>(out: &mut [T], a: &[T], b: &[T]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o = T::from_f32(a.to_f32() + b.to_f32());
        }
    }

    fn add_onto<T: Scalar>(out: &mut [T], x: &[T]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = T::from_f32(o.to_f32() + x.to_f32()));
    }

    fn scale_into<T: Scalar>(out: &mut [T], x: &[T], factor: f32) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = T::from_f32(x.to_f32() * factor));
    }

    /// `sums[c] += rows[.., c]`.
    fn sum_into<T: Scalar>(sums: &mut [f32], rows: &[T]) {
        for row in rows.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(s, x)| *s += x.to_f32());
        }
    }
}

/// Rounds numbers to bf16, to the nearest, ties to even.
pub(crate) fn round(out: &mut [half::bf16], x: &[f32]) {
    round_into(out, x);
}

/// Another element type.
pub(super) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    match (x.dtype(), dtype) {
        (DType::F32, DType::F32) | (DType::BF16, DType::BF16) => Ok(x.clone()),
        (DType::F32, DType::BF16) => map("cast", x, round_into::<half::bf16>),
        (DType::BF16, DType::F32) => map("cast", x, widen_into::<half::bf16>),
        (_, other) => Err(EngineError::not_on_cpu("cast", other)),
    }
}

/// Sum of two tensors of one shape.
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_same("add", a, b)?;
    with_scalar!(a.dtype(), T => {
        let (left, right) = (a.elements::<T>("add")?, b.elements::<T>("add")?);
        let (left, right): (&[T], &[T]) = (&left, &right);
        let mut out = pool::take::<T>(left.len());
        out.par_chunks_mut(CHUNK)
            .zip(left.par_chunks(CHUNK))
            .zip(right.par_chunks(CHUNK))
            .for_each(|((out, a), b)| add_into(out, a, b));
        Ok(Tensor::from_pooled(a.shape(), out))
    })
}

/// `into += x`, in place when nothing shares `into`.
pub(super) fn accumulate(mut into: Tensor, x: &Tensor) -> Result<Tensor> {
    check_same("accumulate", &into, x)?;
    if !into.is_unique() {
        return add(&into, x);
    }
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("accumulate")?;
        let data: &[T] = &data;
        into.with_mut::<T, _>("accumulate", |out| {
            let chunks = out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK));
            chunks.for_each(|(out, x)| add_onto(out, x));
        })?;
    });
    Ok(into)
}

/// `x·factor`.
pub(super) fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    with_scalar!(x.dtype(), T => map("scale", x, |out: &mut [T], x: &[T]| scale_into(out, x, factor)))
}

/// Multiplies row `i` of `x`, read as `[rows, last axis]`, by `factors[i]`.
pub(super) fn scale_rows(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let width = check_factors("scale_rows", x, factors)?;
    let factors = factors.elements::<f32>("scale_rows")?;
    let factors: &[f32] = &factors;
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("scale_rows")?;
        let mut out = pool::take::<T>(data.len());
        out.par_chunks_mut(width)
            .zip(data.par_chunks(width))
            .zip(factors)
            .for_each(|((out, x), factor)| scale_into(out, x, *factor));
        Ok(Tensor::from_pooled(x.shape(), out))
    })
}

/// Sums `[B,...,C]` over all but the first and last axis: `[B,C]`.
///
/// Each task sums a block of rows; the blocks of an image are then added in order, in f64.
pub(super) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let (batch, area, width) = images_of_rows("sum_rows", x)?;
    let block = (CHUNK / width.max(1)).clamp(1, area.max(1));
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("sum_rows")?;
        let data: &[T] = &data;
        let mut out = pool::take::<T>(batch * width);
        out.fill(T::default());
        if !data.is_empty() {
            let images = out.par_chunks_mut(width).zip(data.par_chunks(area * width));
            images.for_each(|(out, image)| {
                let partial: Vec<Vec<f32>> = image
                    .par_chunks(block * width)
                    .map(|rows| {
                        let mut sums = vec![0f32; width];
                        sum_into(&mut sums, rows);
                        sums
                    })
                    .collect();
                for (channel, out) in out.iter_mut().enumerate() {
                    let sum: f64 = partial.iter().map(|sums| f64::from(sums[channel])).sum();
                    *out = T::from_f32(sum as f32);
                }
            });
        }
        Ok(Tensor::from_pooled(&[batch, width], out))
    })
}
