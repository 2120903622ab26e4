//! Operands and starts of kernels whose threads each take a chunk of elements.

use super::card::Card;
use super::driver::{Address, Arg, Launch};
use crate::{DType, EngineError, Result, Tensor};

/// Threads of a block.
pub(super) const BLOCK: usize = 256;

/// Bytes of the widest access of a thread.
pub(super) const WIDEST: usize = 16;

/// Blocks along one axis of a grid.
const MOST_BLOCKS: usize = i32::MAX as usize;

/// Elements of type `dtype` that one access reads.
pub(super) fn chunk(dtype: DType) -> usize {
    WIDEST / dtype.size()
}

/// Whether numbers of this type can be computed with.
fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// Where `x` lies in the memory of this card.
pub(super) fn place(card: &Card, op: &'static str, x: &Tensor) -> Result<Address> {
    if x.device() != card.device() {
        return Err(EngineError::Device { op, got: x.device() });
    }
    x.address(op)
}

/// Where the elements of `x` are, which are f32, bf16 or f16.
pub(super) fn floats(card: &Card, op: &'static str, x: &Tensor) -> Result<Address> {
    if !is_float(x.dtype()) {
        let got = format!("{:?}", x.dtype());
        return Err(EngineError::DType { op, expected: "f32, bf16 or f16 elements", got });
    }
    place(card, op, x)
}

/// Where the elements of `x` are, which are f32.
pub(super) fn singles(card: &Card, op: &'static str, x: &Tensor) -> Result<Address> {
    if x.dtype() != DType::F32 {
        let got = format!("{:?}", x.dtype());
        return Err(EngineError::DType { op, expected: "f32 elements", got });
    }
    place(card, op, x)
}

/// Where rows of `width` elements of type `dtype` begin at an address for wide accesses, and hold a
/// whole number of them.
pub(super) fn packed(dtype: DType, width: usize, addresses: &[Address]) -> bool {
    let aligned = addresses.iter().all(|address| address % WIDEST as Address == 0);
    aligned && width.is_multiple_of(chunk(dtype))
}

/// A count for a kernel.
pub(super) fn long(count: usize) -> Arg {
    // No memory holds more elements.
    Arg::I64(count as i64)
}

/// A count for a kernel that takes it as `int`.
pub(super) fn int(op: &'static str, count: usize) -> Result<Arg> {
    i32::try_from(count)
        .map(Arg::I32)
        .map_err(|_| EngineError::shape(op, format!("{count} is too large an axis for a card")))
}

/// Starts `kernel` of `module` with at least `threads` threads; with none, nothing is done.
pub(super) fn start(
    card: &Card,
    (module, kernel): (&'static str, &str),
    threads: usize,
    args: &[Arg],
) -> Result<()> {
    start_blocks(card, (module, kernel), threads.div_ceil(BLOCK), args)
}

/// Starts `kernel` of `module` with `blocks` blocks; with none, nothing is done.
pub(super) fn start_blocks(
    card: &Card,
    (module, kernel): (&'static str, &str),
    blocks: usize,
    args: &[Arg],
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    if blocks > MOST_BLOCKS {
        return Err(EngineError::shape(module, format!("{blocks} blocks for `{kernel}`")));
    }
    let (grid, block) = ([blocks as u32, 1, 1], BLOCK as u32);
    card.driver().launch(&Launch { module, kernel, grid, block, shared: 0, args })
}
