//! AdamW over a range of flat buffers, and sums into a flat gradient: starts of
//! `kernels/optimizer.cu`.

use super::card::Card;
use super::driver::{Address, Arg};
use super::elements::{long, packed, singles, start};
use crate::backend::AdamWStep;
use crate::cpu::Factors;
use crate::{DType, EngineError, Result, Tensor};

/// Address of an f32 operand that changes in place: nothing else may show its storage.
pub(super) fn changing(op: &'static str, card: &Card, x: &mut Tensor) -> Result<Address> {
    if !x.is_unique() {
        return Err(EngineError::shape(op, format!("{x:?} changes in place, but is shared")));
    }
    singles(card, op, x)
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
    let first = |address: Address| Arg::Address(address + (p.range.start * 4) as Address);
    let f = Factors::of(p);
    let args = [
        first(changing(OP, card, param)?),
        first(singles(card, OP, grad)?),
        first(changing(OP, card, m)?),
        first(changing(OP, card, v)?),
        long(p.range.len()),
        Arg::F32(f.decay),
        Arg::F32(f.step_size),
        Arg::F32(f.root_correction2),
        Arg::F32(f.keep1),
        Arg::F32(f.take1),
        Arg::F32(f.keep2),
        Arg::F32(f.take2),
        Arg::F32(f.eps),
    ];
    start(card, ("optimizer", "adamw_range_f32"), p.range.len(), &args)
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
    changing(OP, card, flat)?;
    add_onto(card, &flat.view(offset, x.shape())?, x)
}

/// `place += x`, f32, where the place belongs to whoever sums there and is written by nobody else.
pub(super) fn add_onto(card: &'static Card, place: &Tensor, x: &Tensor) -> Result<()> {
    const OP: &str = "add_at";
    if x.is_empty() {
        return Ok(());
    }
    let to = singles(card, OP, place)?;
    let from = singles(card, OP, x)?;
    let vector = packed(DType::F32, 4, &[to, from]);
    let args = [Arg::Address(to), Arg::Address(from), long(x.len()), Arg::I32(i32::from(vector))];
    start(card, ("optimizer", "add_at_f32"), x.len().div_ceil(4), &args)
}
