//! The norm of a flat gradient, and the factor that unscales and clips it, without a look from the
//! host.

use super::driver::Arg;
use super::elements::{int, long, packed, singles, start_blocks};
use crate::{DType, Device, EngineError, Result, Tensor};

/// Numbers that a block squares, until there are so many that each takes more.
const SQUARES: usize = 4096;
/// Blocks that add up squares at most; the sums of all are added by one more.
const MOST_BLOCKS: usize = 1024;

/// f32 `[2]`: what to multiply the gradient by, and its norm before clipping. The factor is
/// `inverse_scale` (f32 `[1]`, 1 by the loss scale), lowered so that the norm is `max_norm` at most
/// (0 or less: never), as `clip_grad_norm_` does; NaN if the norm is not finite. The norm is summed
/// in f64, in one order.
pub fn clip_factor(gradient: &Tensor, inverse_scale: &Tensor, max_norm: f32) -> Result<Tensor> {
    const OP: &str = "clip_factor";
    if inverse_scale.len() != 1 {
        return Err(EngineError::shape(OP, format!("inverse scale {inverse_scale:?}")));
    }
    let Some(card) = gradient.device().card() else {
        return host_clip_factor(gradient, inverse_scale, max_norm);
    };
    let (from, scale) = (singles(card, OP, gradient)?, singles(card, OP, inverse_scale)?);
    let blocks = gradient.len().div_ceil(SQUARES).clamp(1, MOST_BLOCKS);
    // Sums are f64.
    let sums = card.empty(&[blocks, 2], DType::F32)?;
    let out = card.empty(&[2], DType::F32)?;
    let args = [
        Arg::Address(sums.address(OP)?),
        Arg::Address(from),
        long(gradient.len()),
        Arg::I32(i32::from(packed(DType::F32, 4, &[from]))),
    ];
    start_blocks(card, ("optimizer", "squares_f32"), blocks, &args)?;
    let args = [
        Arg::Address(out.address(OP)?),
        Arg::Address(sums.address(OP)?),
        int(OP, blocks)?,
        Arg::Address(scale),
        Arg::F32(max_norm),
    ];
    start_blocks(card, ("optimizer", "clip_factor_f32"), 1, &args)?;
    Ok(out)
}

fn host_clip_factor(gradient: &Tensor, inverse_scale: &Tensor, max_norm: f32) -> Result<Tensor> {
    const OP: &str = "clip_factor";
    let inverse = f64::from(inverse_scale.elements::<f32>(OP)?[0]);
    let squares = gradient.elements::<f32>(OP)?.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let norm = squares.sqrt() * inverse;
    let wanted = f64::from(max_norm) / (norm + 1e-6);
    let factor = if max_norm > 0. && wanted < 1. { wanted } else { 1. };
    let factor = if (norm as f32).is_finite() { (inverse * factor) as f32 } else { f32::NAN };
    Tensor::from_f32(Device::Cpu, &[2], &[factor, norm as f32], DType::F32)
}
