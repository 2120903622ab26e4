//! AdamW over a range of flat buffers, and sums into a flat gradient: starts of
//! `kernels/optimizer.cu`.

use super::card::Card;
use super::driver::{Address, Arg};
use crate::backend::AdamWStep;
use crate::cpu::Factors;
use crate::{DType, EngineError, Result, Tensor};

/// `THREADS` of the kernels.
pub(super) const THREADS: usize = 256;

/// Address of an f32 operand on this card.
pub(super) fn plain(op: &'static str, card: &Card, x: &Tensor) -> Result<Address> {
    if x.dtype() != DType::F32 {
        let got = format!("{:?}", x.dtype());
        return Err(EngineError::DType { op, expected: "f32 elements", got });
    }
    if x.device() != card.device() {
        return Err(EngineError::Device { op, got: x.device() });
    }
    x.address(op)
}

/// The same of an operand that changes in place: nothing else may show its storage.
pub(super) fn changing(op: &'static str, card: &Card, x: &mut Tensor) -> Result<Address> {
    if !x.is_unique() {
        return Err(EngineError::shape(op, format!("{x:?} changes in place, but is shared")));
    }
    plain(op, card, x)
}

/// Blocks of [`THREADS`] threads with `each` elements to a thread.
pub(super) fn grid(op: &'static str, len: usize, each: usize) -> Result<([u32; 3], u32, u32)> {
    let Ok(blocks) = i32::try_from(len.div_ceil(THREADS * each)) else {
        return Err(EngineError::shape(op, format!("too large for cards: {len}")));
    };
    Ok(([blocks as u32, 1, 1], THREADS as u32, 0))
}

pub(super) fn adamw(
    card: &'static Card,
    p: &AdamWStep,
    param: &mut Tensor,
    grad: &Tensor,
    moments: (&mut Tensor, &mut Tensor),
) -> Result<()> {
    const OP: &str = "adamw";
    let (m, v) = moments;
    if [param.len(), m.len(), v.len()] != [grad.len(); 3]
        || p.step == 0
        || p.range.start > p.range.end
        || p.range.end > grad.len()
    {
        let detail = format!(
            "range {:?} of {param:?}, gradient {grad:?}, moments {m:?} and {v:?}, step {}",
            p.range, p.step
        );
        return Err(EngineError::shape(OP, detail));
    }
    if p.range.is_empty() {
        return Ok(());
    }
    let start = |address: Address| Arg::Address(address + (p.range.start * 4) as Address);
    let f = Factors::of(p);
    let args = [
        start(changing(OP, card, param)?),
        start(plain(OP, card, grad)?),
        start(changing(OP, card, m)?),
        start(changing(OP, card, v)?),
        Arg::I64(p.range.len() as i64),
        Arg::F32(f.decay),
        Arg::F32(f.step_size),
        Arg::F32(f.root_correction2),
        Arg::F32(f.keep1),
        Arg::F32(f.take1),
        Arg::F32(f.keep2),
        Arg::F32(f.take2),
        Arg::F32(f.eps),
    ];
    card.launch(("optimizer", "adamw_range"), DType::F32, grid(OP, p.range.len(), 1)?, &args)
}

pub(super) fn add_at(
    card: &'static Card,
    flat: &mut Tensor,
    offset: usize,
    x: &Tensor,
) -> Result<()> {
    const OP: &str = "add_at";
    if offset + x.len() > flat.len() {
        return Err(EngineError::shape(OP, format!("{x:?} at {offset} of {flat:?}")));
    }
    if x.is_empty() {
        return Ok(());
    }
    let to = changing(OP, card, flat)? + (offset * 4) as Address;
    let from = plain(OP, card, x)?;
    let vector = to.is_multiple_of(16) && from.is_multiple_of(16);
    let args = [
        Arg::Address(to),
        Arg::Address(from),
        Arg::I64(x.len() as i64),
        Arg::I32(i32::from(vector)),
    ];
    card.launch(("optimizer", "add_at"), DType::F32, grid(OP, x.len(), 4)?, &args)
}
