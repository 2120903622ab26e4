//! Convolutions of NHWC maps: checks operands and hands them to the blocked product.

use rayon::prelude::*;

use super::gemm::{add_rest, check_added, check_low_rank, rounded, transposed, widened};
use crate::backend::{Conv, ConvGeometry};
use crate::{DType, EngineError, Result, Tensor};

/// Sizes of a checked convolution.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    h: usize,
    w: usize,
    ci: usize,
    oh: usize,
    ow: usize,
    co: usize,
    geometry: ConvGeometry,
}

impl Sizes {
    /// `x` is `[B,H,W,Ci]`, `weight` `[Co,kh,kw,Ci]`.
    fn new(op: &'static str, x: &[usize], weight: &[usize], g: ConvGeometry) -> Result<Self> {
        let fail = || {
            let detail = format!("x is {x:?}, the weight {weight:?}, the window {g:?}");
            EngineError::shape(op, detail)
        };
        match (x, weight) {
            (&[batch, h, w, ci], &[co, kh, kw, inner])
                if ci == inner && (kh, kw) == g.kernel && g.stride > 0 && kh * kw > 0 =>
            {
                let (oh, ow) = g.output(h, w).ok_or_else(fail)?;
                Ok(Self { batch, h, w, ci, oh, ow, co, geometry: g })
            }
            _ => Err(fail()),
        }
    }

    /// The input pixel of output pixel `(oy,ox)` under tap `(ky,kx)`, if inside.
    fn input(&self, o: (usize, usize), tap: (usize, usize)) -> Option<(usize, usize)> {
        let g = self.geometry;
        let y = (o.0 * g.stride + tap.0).checked_sub(g.pad_before)?;
        let x = (o.1 * g.stride + tap.1).checked_sub(g.pad_before)?;
        (y < self.h && x < self.w).then_some((y, x))
    }

    /// The output pixel that reads input pixel `(y,x)` under tap `(ky,kx)`, if there is one.
    fn output(&self, i: (usize, usize), tap: (usize, usize)) -> Option<(usize, usize)> {
        let g = self.geometry;
        let y = (i.0 + g.pad_before).checked_sub(tap.0)?;
        let x = (i.1 + g.pad_before).checked_sub(tap.1)?;
        let exact = y % g.stride == 0 && x % g.stride == 0;
        let (y, x) = (y / g.stride, x / g.stride);
        (exact && y < self.oh && x < self.ow).then_some((y, x))
    }
}

/// See [`Conv`]: `[B,OH,OW,Co]`.
pub(super) fn conv2d(p: &Conv) -> Result<Tensor> {
    let s = Sizes::new("conv2d", p.x.shape(), p.w.shape(), p.geometry)?;
    let rows = s.batch * s.oh * s.ow;
    check_low_rank("conv2d", p.low_rank.as_ref(), rows, s.co)?;
    check_added("conv2d", "bias", p.bias, 1, s.co)?;
    check_added("conv2d", "per_image", p.per_image, s.batch, s.co)?;
    check_added("conv2d", "residual", p.residual, rows, s.co)?;
    let (kh, kw) = p.geometry.kernel;
    let x = widened(p.x)?;
    let w = transposed(&widened(p.w)?, s.co, kh * kw * s.ci);
    let mut out = vec![0f32; rows * s.co];
    out.par_chunks_mut(s.co.max(1)).enumerate().for_each(|(pixel, row)| {
        let (b, oy, ox) = (pixel / (s.oh * s.ow), pixel / s.ow % s.oh, pixel % s.ow);
        for t in 0..kh * kw {
            let Some((y, xx)) = s.input((oy, ox), (t / kw, t % kw)) else { continue };
            let from = ((b * s.h + y) * s.w + xx) * s.ci;
            for c in 0..s.ci {
                let weights = &w[(t * s.ci + c) * s.co..][..s.co];
                row.iter_mut().zip(weights).for_each(|(o, w)| *o += x[from + c] * w);
            }
        }
    });
    add_rest(&mut out, (rows, s.co), p.low_rank.as_ref(), p.bias, p.residual)?;
    if let Some(shift) = p.per_image {
        let shift = widened(shift)?;
        for (pixel, row) in out.chunks_exact_mut(s.co.max(1)).enumerate() {
            let from = pixel / (s.oh * s.ow) * s.co;
            row.iter_mut().zip(&shift[from..]).for_each(|(o, s)| *o += s);
        }
    }
    Ok(rounded(&[s.batch, s.oh, s.ow, s.co], &out, p.x.dtype()))
}

/// Gradient of the input `[B,H,W,Ci]`, added to `onto`.
pub(super) fn conv2d_backward_input(
    dy: &Tensor,
    w: &Tensor,
    geometry: ConvGeometry,
    input: (usize, usize),
    onto: Option<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_input";
    let (batch, ci) = (dy.shape().first().copied().unwrap_or(0), w.last_dim());
    let shape = [batch, input.0, input.1, ci];
    let s = Sizes::new(OP, &shape, w.shape(), geometry)?;
    let onto_fits = onto.as_ref().is_none_or(|t| t.shape() == shape);
    if dy.shape() != [batch, s.oh, s.ow, s.co] || !onto_fits {
        let onto = onto.map(|t| t.shape().to_vec());
        let detail = format!("dy is {:?}, the input {shape:?}, onto {onto:?}", dy.shape());
        return Err(EngineError::shape(OP, detail));
    }
    let (kh, kw) = geometry.kernel;
    let (grad, w) = (widened(dy)?, widened(w)?);
    let mut out = match &onto {
        Some(t) => widened(t)?,
        None => vec![0f32; batch * s.h * s.w * ci],
    };
    out.par_chunks_mut(ci.max(1)).enumerate().for_each(|(pixel, row)| {
        let (b, y, x) = (pixel / (s.h * s.w), pixel / s.w % s.h, pixel % s.w);
        for t in 0..kh * kw {
            let Some((oy, ox)) = s.output((y, x), (t / kw, t % kw)) else { continue };
            let from = ((b * s.oh + oy) * s.ow + ox) * s.co;
            for c in 0..s.co {
                let weights = &w[(c * kh * kw + t) * ci..][..ci];
                row.iter_mut().zip(weights).for_each(|(o, w)| *o += grad[from + c] * w);
            }
        }
    });
    Ok(rounded(&shape, &out, dy.dtype()))
}

/// Gradient of the weight, f32 `[Co,kh,kw,Ci]`.
pub(super) fn conv2d_backward_weight(
    x: &Tensor,
    dy: &Tensor,
    geometry: ConvGeometry,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_weight";
    let (kh, kw) = geometry.kernel;
    let shape = [dy.last_dim(), kh, kw, x.last_dim()];
    let s = Sizes::new(OP, x.shape(), &shape, geometry)?;
    if dy.shape() != [s.batch, s.oh, s.ow, s.co] {
        let detail = format!("x is {:?}, dy {:?}, the window {geometry:?}", x.shape(), dy.shape());
        return Err(EngineError::shape(OP, detail));
    }
    let (x, grad) = (widened(x)?, widened(dy)?);
    let mut out = vec![0f32; shape.iter().product()];
    out.par_chunks_mut(s.ci.max(1)).enumerate().for_each(|(at, row)| {
        let (c, t) = (at / (kh * kw), at % (kh * kw));
        for pixel in 0..s.batch * s.oh * s.ow {
            let (b, oy, ox) = (pixel / (s.oh * s.ow), pixel / s.ow % s.oh, pixel % s.ow);
            let Some((y, xx)) = s.input((oy, ox), (t / kw, t % kw)) else { continue };
            let from = ((b * s.h + y) * s.w + xx) * s.ci;
            let f = grad[pixel * s.co + c];
            row.iter_mut().zip(&x[from..]).for_each(|(o, x)| *o += f * x);
        }
    });
    Ok(rounded(&shape, &out, DType::F32))
}
