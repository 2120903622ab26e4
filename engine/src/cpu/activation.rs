//! SiLU, GELU, quick-GELU and GEGLU with their input gradients.

use rayon::prelude::*;

use super::elementwise::{CHUNK, owned};
use super::simd::{Scalar, vectorized, with_scalar};
use super::transcendental::{gelu, gelu_and_slope, quick_gelu, quick_gelu_slope, silu, silu_slope};
use crate::backend::Activation;
use crate::operands::{check_gated, check_same, halved};
use crate::{Result, Tensor, pool};

#[inline(always)]
fn map<T: Scalar>(out: &mut [T], x: &[T], f: impl Fn(f32) -> f32) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = T::from_f32(f(x.to_f32())));
}

#[inline(always)]
fn multiply<T: Scalar>(dy: &mut [T], x: &[T], slope: impl Fn(f32) -> f32) {
    dy.iter_mut().zip(x).for_each(|(dy, x)| *dy = T::from_f32(dy.to_f32() * slope(x.to_f32())));
}

vectorized! {
    fn forward<T: Scalar>(kind: Activation, out: &mut [T], x: &[T]) {
        match kind {
            Activation::Silu => map(out, x, silu),
            Activation::Gelu => map(out, x, gelu),
            Activation::QuickGelu => map(out, x, quick_gelu),
        }
    }

    fn backward<T: Scalar>(kind: Activation, dy: &mut [T], x: &[T]) {
        match kind {
            Activation::Silu => multiply(dy, x, silu_slope),
            Activation::Gelu => multiply(dy, x, |x| gelu_and_slope(x).1),
            Activation::QuickGelu => multiply(dy, x, quick_gelu_slope),
        }
    }

    /// Rows of `2C` to rows of `C`.
    fn gated<T: Scalar>(out: &mut [T], x: &[T], width: usize) {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
            let (value, gate) = x.split_at(width);
            for ((out, value), gate) in out.iter_mut().zip(value).zip(gate) {
                *out = T::from_f32(value.to_f32() * gelu(gate.to_f32()));
            }
        }
    }

    fn gated_backward<T: Scalar>(dx: &mut [T], dy: &[T], x: &[T], width: usize) {
        let rows = dx.chunks_exact_mut(2 * width).zip(x.chunks_exact(2 * width));
        for ((dx, x), dy) in rows.zip(dy.chunks_exact(width)) {
            let (d_value, d_gate) = dx.split_at_mut(width);
            let (value, gate) = x.split_at(width);
            let inputs = dy.iter().zip(value).zip(gate);
            for ((d_value, d_gate), ((dy, value), gate)) in d_value.iter_mut().zip(d_gate).zip(inputs)
            {
                let (y, slope) = gelu_and_slope(gate.to_f32());
                let dy = dy.to_f32();
                *d_value = T::from_f32(dy * y);
                *d_gate = T::from_f32(dy * value.to_f32() * slope);
            }
        }
    }
}

/// Applies an activation.
pub(super) fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("activation")?;
        let mut out = pool::take::<T>(data.len());
        out.par_chunks_mut(CHUNK)
            .zip(data.par_chunks(CHUNK))
            .for_each(|(out, x)| forward(kind, out, x));
        Ok(Tensor::from_pooled(x.shape(), out))
    })
}

/// Gradient of an activation's input.
pub(super) fn activation_backward(kind: Activation, dy: Tensor, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "activation_backward";
    check_same(OP, &dy, x)?;
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>(OP)?;
        let data: &[T] = &data;
        let mut dy = owned::<T>(OP, dy)?;
        dy.with_mut::<T, _>(OP, |dy| {
            dy.par_chunks_mut(CHUNK)
                .zip(data.par_chunks(CHUNK))
                .for_each(|(dy, x)| backward(kind, dy, x));
        })?;
        Ok(dy)
    })
}

/// `x` is `[...,2C]`: `x[..C] · gelu(x[C..])` (erf), result `[...,C]`.
pub(super) fn geglu(x: &Tensor) -> Result<Tensor> {
    let (width, shape) = halved("geglu", x)?;
    let rows = (CHUNK / width).max(1);
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>("geglu")?;
        let mut out = pool::take::<T>(data.len() / 2);
        out.par_chunks_mut(rows * width)
            .zip(data.par_chunks(2 * rows * width))
            .for_each(|(out, x)| gated(out, x, width));
        Ok(Tensor::from_pooled(&shape, out))
    })
}

/// Gradient of the input of [`geglu`].
pub(super) fn geglu_backward(dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "geglu_backward";
    let width = check_gated(OP, dy, x)?;
    let rows = (CHUNK / width).max(1);
    with_scalar!(x.dtype(), T => {
        let (data, above) = (x.elements::<T>(OP)?, dy.elements::<T>(OP)?);
        let (data, above): (&[T], &[T]) = (&data, &above);
        let mut out = pool::take::<T>(data.len());
        out.par_chunks_mut(2 * rows * width)
            .zip(above.par_chunks(rows * width))
            .zip(data.par_chunks(2 * rows * width))
            .for_each(|((dx, dy), x)| gated_backward(dx, dy, x, width));
        Ok(Tensor::from_pooled(x.shape(), out))
    })
}
