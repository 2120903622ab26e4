//! Convolutions: the vendor library's, or windows laid out for a matrix product.
//!
//! A 1x1 window is a matrix product. Where the library has no convolution (it is missing, or the
//! padding differs between the sides), the windows of a part of the pixels at a time are copied into
//! rows; the way back adds up, for each input pixel, the windows that saw it, in a fixed order.

use super::card::Card;
use super::driver::{Arg, Convolution, Direction, Matmul, Matrix};
use super::matmul::{add_low_rank, in_type};
use crate::backend::{Backend, Conv, ConvGeometry, Gemm};
use crate::shapes::{ConvSizes, check_added, check_low_rank};
use crate::{DType, EngineError, Result, Tensor};

/// Bytes of windows laid out at a time, unless one image needs more.
const WINDOW_BYTES: usize = 64 << 20;
/// Threads of a block.
const BLOCK: u32 = 256;

/// See [`Conv`]: `[B,OH,OW,Co]`.
pub(super) fn conv2d(card: &'static Card, p: &Conv) -> Result<Tensor> {
    const OP: &str = "conv2d";
    let s = ConvSizes::new(OP, p.x.shape(), p.w.shape(), p.geometry)?;
    let rows = s.batch * s.oh * s.ow;
    check_low_rank(OP, p.low_rank.as_ref(), rows, s.co)?;
    check_added(OP, "bias", p.bias, 1, s.co)?;
    check_added(OP, "per_image", p.per_image, s.batch, s.co)?;
    check_added(OP, "residual", p.residual, rows, s.co)?;
    let dtype = p.x.dtype();
    let shape = [s.batch, s.oh, s.ow, s.co];
    if s.is_pointwise() {
        let w = p.w.reshape(&[s.co, s.ci])?;
        let product =
            Gemm { bias: p.bias, residual: p.residual, ..Gemm::new(p.x, false, &w, true) };
        let y = card.gemm(&Gemm { low_rank: p.low_rank, ..product })?.reshape(&shape)?;
        finish(card, &s, &y, [None, p.per_image, None])?;
        return Ok(y);
    }
    let w = in_type(card, p.w, dtype)?;
    let y = card.empty(&shape, dtype)?;
    let call = call(&s, Direction::Forward, [p.x, &w, &y])?;
    if !card.driver().convolve(&call)? {
        for part in parts(rows, s.taps() * s.ci * dtype.size()) {
            let windows = lay_out(card, &s, p.x, &part)?;
            let out = y.view(part.start * s.co, &[part.len(), s.co])?;
            card.driver().matmul(&Matmul {
                m: part.len(),
                n: s.co,
                k: s.taps() * s.ci,
                a: Matrix { address: windows.address(OP)?, dtype, transposed: false },
                b: Matrix { address: w.address(OP)?, dtype, transposed: true },
                alpha: 1.,
                c: None,
                bias: None,
                d: out.address(OP)?,
                d_dtype: dtype,
            })?;
        }
    }
    let mut bias = p.bias;
    if let Some(low_rank) = &p.low_rank {
        // The second product passes over the output anyway: it takes the bias along.
        let bias = bias.take().map(|bias| in_type(card, bias, dtype)).transpose()?;
        let address = bias.as_ref().map(|bias| bias.address(OP)).transpose()?;
        add_low_rank(card, low_rank, dtype, (rows, s.co), address, &y)?;
    }
    finish(card, &s, &y, [bias, p.per_image, p.residual])?;
    Ok(y)
}

/// Gradient of the input `[B,H,W,Ci]`, added to `onto`.
pub(super) fn conv2d_backward_input(
    card: &'static Card,
    dy: &Tensor,
    w: &Tensor,
    geometry: ConvGeometry,
    input: (usize, usize),
    onto: Option<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_input";
    let (batch, ci) = (dy.shape().first().copied().unwrap_or(0), w.last_dim());
    let shape = [batch, input.0, input.1, ci];
    let s = ConvSizes::new(OP, &shape, w.shape(), geometry)?;
    let onto_fits = onto.as_ref().is_none_or(|t| t.shape() == shape && t.dtype() == dy.dtype());
    if dy.shape() != [batch, s.oh, s.ow, s.co] || !onto_fits {
        let detail = format!("dy is {dy:?}, the input {shape:?}, onto {onto:?}");
        return Err(EngineError::shape(OP, detail));
    }
    let dtype = dy.dtype();
    let w = in_type(card, w, dtype)?;
    if s.is_pointwise() {
        let w = w.reshape(&[s.co, s.ci])?;
        let product = Gemm { residual: onto.as_ref(), ..Gemm::new(dy, false, &w, false) };
        return card.gemm(&product)?.reshape(&shape);
    }
    let accumulate = onto.is_some();
    let dx = match onto {
        Some(mut onto) => {
            if onto.is_unique() {
                onto
            } else {
                card.copied(&onto)?
            }
        }
        None => card.empty(&shape, dtype)?,
    };
    let call = call(&s, Direction::BackwardInput { accumulate }, [&dx, &w, dy])?;
    if card.driver().convolve(&call)? {
        return Ok(dx);
    }
    let (pixels, k) = (s.oh * s.ow, s.taps() * s.ci);
    let images = (WINDOW_BYTES / (pixels * k * DType::F32.size()).max(1)).clamp(1, batch.max(1));
    for first in (0..batch).step_by(images) {
        let count = images.min(batch - first);
        let windows = card.empty(&[count * pixels, k], DType::F32)?;
        let part = dy.view(first * pixels * s.co, &[count * pixels, s.co])?;
        card.driver().matmul(&Matmul {
            m: count * pixels,
            n: k,
            k: s.co,
            a: Matrix { address: part.address(OP)?, dtype, transposed: false },
            b: Matrix { address: w.address(OP)?, dtype, transposed: false },
            alpha: 1.,
            c: None,
            bias: None,
            d: windows.address(OP)?,
            d_dtype: DType::F32,
        })?;
        let out = dx.view(first * s.h * s.w * s.ci, &[count, s.h, s.w, s.ci])?;
        let mut args = vec![Arg::Address(windows.address(OP)?), Arg::Address(out.address(OP)?)];
        args.extend([Arg::I32(count as i32), Arg::I32(i32::from(accumulate))]);
        args.extend(sizes(&s));
        card.launch(("conv", "add_windows"), dtype, (grid(out.len()), BLOCK, 0), &args)?;
    }
    Ok(dx)
}

/// Gradient of the weight, f32 `[Co,kh,kw,Ci]`.
pub(super) fn conv2d_backward_weight(
    card: &'static Card,
    x: &Tensor,
    dy: &Tensor,
    geometry: ConvGeometry,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_weight";
    let (kh, kw) = geometry.kernel;
    let shape = [dy.last_dim(), kh, kw, x.last_dim()];
    let s = ConvSizes::new(OP, x.shape(), &shape, geometry)?;
    if dy.shape() != [s.batch, s.oh, s.ow, s.co] {
        let detail = format!("x is {:?}, dy {:?}, the window {geometry:?}", x.shape(), dy.shape());
        return Err(EngineError::shape(OP, detail));
    }
    let dtype = dy.dtype();
    if s.is_pointwise() {
        let product = Gemm { out: DType::F32, ..Gemm::new(dy, true, x, false) };
        return card.gemm(&product)?.reshape(&shape);
    }
    let dw = card.empty(&shape, DType::F32)?;
    let (rows, k) = (s.batch * s.oh * s.ow, s.taps() * s.ci);
    for part in parts(rows, k * dtype.size()) {
        let windows = lay_out(card, &s, x, &part)?;
        let of_part = dy.view(part.start * s.co, &[part.len(), s.co])?;
        let d = dw.address(OP)?;
        card.driver().matmul(&Matmul {
            m: s.co,
            n: k,
            k: part.len(),
            a: Matrix { address: of_part.address(OP)?, dtype, transposed: true },
            b: Matrix { address: windows.address(OP)?, dtype, transposed: false },
            alpha: 1.,
            c: (part.start > 0).then_some(d),
            bias: None,
            d,
            d_dtype: DType::F32,
        })?;
    }
    Ok(dw)
}

/// The library's view of a convolution.
fn call(s: &ConvSizes, direction: Direction, [x, w, y]: [&Tensor; 3]) -> Result<Convolution> {
    const OP: &str = "conv2d";
    Ok(Convolution {
        direction,
        x: x.address(OP)?,
        w: w.address(OP)?,
        y: y.address(OP)?,
        dtype: x.dtype(),
        input: [s.batch, s.h, s.w, s.ci],
        output: [s.batch, s.oh, s.ow, s.co],
        kernel: s.geometry.kernel,
        stride: s.geometry.stride,
        pad_before: s.geometry.pad_before,
        pad_after: s.geometry.pad_after,
    })
}

/// Rows of windows in parts that fit [`WINDOW_BYTES`].
fn parts(rows: usize, row_bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (WINDOW_BYTES / row_bytes.max(1)).clamp(1, rows.max(1));
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

/// The windows of output pixels `part`, `[part, kh·kw·Ci]` in the type of `x`.
fn lay_out(
    card: &'static Card,
    s: &ConvSizes,
    x: &Tensor,
    part: &std::ops::Range<usize>,
) -> Result<Tensor> {
    const OP: &str = "conv2d";
    let windows = card.empty(&[part.len(), s.taps() * s.ci], x.dtype())?;
    let mut args = vec![Arg::Address(x.address(OP)?), Arg::Address(windows.address(OP)?)];
    args.extend([Arg::I64(part.start as i64), Arg::I64(part.len() as i64)]);
    args.extend(sizes(s));
    // One thread per channel of a tap, or per 16 bytes of them.
    card.launch(("conv", "windows"), x.dtype(), (grid(windows.len()), BLOCK, 0), &args)?;
    Ok(windows)
}

/// Adds bias `[Co]`, the shift of each image `[B,Co]` and the residual `[B,OH,OW,Co]` to `y`.
fn finish(
    card: &'static Card,
    s: &ConvSizes,
    y: &Tensor,
    added: [Option<&Tensor>; 3],
) -> Result<()> {
    const OP: &str = "conv2d";
    if added.iter().all(Option::is_none) {
        return Ok(());
    }
    let dtype = y.dtype();
    let added = added.map(|t| t.map(|t| in_type(card, t, dtype)).transpose());
    let mut args = vec![Arg::Address(y.address(OP)?)];
    let mut held = Vec::new();
    for t in added {
        let t = t?;
        args.push(Arg::Address(t.as_ref().map_or(Ok(0), |t| t.address(OP))?));
        held.extend(t);
    }
    args.extend([
        Arg::I64(y.len() as i64),
        Arg::I32(s.co as i32),
        Arg::I64((s.oh * s.ow * s.co) as i64),
    ]);
    card.launch(("conv", "finish"), dtype, (grid(y.len()), BLOCK, 0), &args)
}

/// Sizes as the kernels take them.
fn sizes(s: &ConvSizes) -> [Arg; 9] {
    let g = s.geometry;
    let (kh, kw) = g.kernel;
    [s.h, s.w, s.ci, s.oh, s.ow, kh, kw, g.stride, g.pad_before].map(|n| Arg::I32(n as i32))
}

/// Blocks for `count` elements; kernels step over what is left.
fn grid(count: usize) -> [u32; 3] {
    [count.div_ceil(BLOCK as usize * 4).clamp(1, 1 << 20) as u32, 1, 1]
}
