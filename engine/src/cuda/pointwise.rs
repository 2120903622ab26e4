//! Casts, sums, products and activations, element by element.

use super::card::Card;
use super::driver::{Address, Arg};
use super::elements::{chunk, floats, int, long, packed, place, singles, start, start_blocks};
use crate::backend::Activation;
use crate::operands::{check_factors, check_gated, check_same, halved, images_of_rows};
use crate::{DType, EngineError, Result, Tensor};

const MODULE: &str = "pointwise";

/// Chunks side by side, and rows below each other, that a block of `sum_rows` takes at a time.
const LANES: usize = 16;
/// Blocks that keep any card busy; no more are made by cutting sums into parts. Not the number that
/// fits this card, so that all cards give the same bits.
const BUSY: usize = 512;

/// Name of `kernel` for elements of the type of `x`.
fn kernel_for(kernel: &str, x: &Tensor) -> String {
    format!("{kernel}_{}", x.dtype().suffix())
}

/// Starts a kernel whose threads take a chunk of the elements of `x` each.
fn start_chunks(card: &'static Card, kernel: &str, x: &Tensor, args: &[Arg]) -> Result<()> {
    let threads = x.len().div_ceil(chunk(x.dtype()));
    start(card, (MODULE, &kernel_for(kernel, x)), threads, args)
}

/// Another element type; to 8 bits with a scale for each row.
pub(super) fn cast(card: &'static Card, x: &Tensor, dtype: DType) -> Result<Tensor> {
    const OP: &str = "cast";
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    if let Some(got) = [x.dtype(), dtype].into_iter().find(|dtype| *dtype == DType::U32) {
        let got = format!("{got:?}");
        return Err(EngineError::DType { op: OP, expected: "floating-point elements", got });
    }
    let from = place(card, OP, x)?;
    let out = card.empty(x.shape(), dtype)?;
    let mut args = vec![Arg::Address(out.address(OP)?), Arg::Address(from), long(x.len())];
    let scaled = match (dtype, x.dtype()) {
        (DType::F8, _) => Some(find_scales(card, x, &out)?),
        (_, DType::F8) => Some(x.scales(OP)?),
        _ => None,
    };
    if let Some((scales, width, before)) = scaled {
        args.extend([Arg::Address(scales), long(width), long(before)]);
    }
    let kernel = format!("{OP}_{}_{}", x.dtype().suffix(), dtype.suffix());
    let threads = x.len().div_ceil(chunk(x.dtype()).min(chunk(dtype)));
    start(card, (MODULE, &kernel), threads, &args)?;
    Ok(out)
}

/// Writes the scale that each row of `x` needs to those of `out`; gives what [`Tensor::scales`] does.
fn find_scales(card: &'static Card, x: &Tensor, out: &Tensor) -> Result<(Address, usize, usize)> {
    const OP: &str = "cast";
    let from = Arg::Address(floats(card, OP, x)?);
    let (scales, width, before) = out.scales(OP)?;
    let rows = x.len().checked_div(width).unwrap_or(0);
    start_blocks(
        card,
        (MODULE, &kernel_for("find_scales", x)),
        rows,
        &[Arg::Address(scales), from, long(width)],
    )?;
    Ok((scales, width, before))
}

fn name(kind: Activation) -> &'static str {
    match kind {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::QuickGelu => "quick_gelu",
    }
}

pub(super) fn activation(card: &'static Card, kind: Activation, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "activation";
    let from = floats(card, OP, x)?;
    let out = card.empty(x.shape(), x.dtype())?;
    let args = [Arg::Address(out.address(OP)?), Arg::Address(from), long(x.len())];
    start_chunks(card, name(kind), x, &args)?;
    Ok(out)
}

/// In place of `dy` when nothing shares it.
pub(super) fn activation_backward(
    card: &'static Card,
    kind: Activation,
    mut dy: Tensor,
    x: &Tensor,
) -> Result<Tensor> {
    const OP: &str = "activation_backward";
    check_same(OP, &dy, x)?;
    let (above, from) = (floats(card, OP, &dy)?, floats(card, OP, x)?);
    let out = if dy.is_unique() { dy.clone() } else { card.empty(x.shape(), x.dtype())? };
    let addresses = [out.address(OP)?, above, from].map(Arg::Address);
    let [to, above, from] = addresses;
    start_chunks(card, &format!("{}_backward", name(kind)), x, &[to, above, from, long(x.len())])?;
    Ok(out)
}

pub(super) fn geglu(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "geglu";
    let (width, shape) = halved(OP, x)?;
    let from = floats(card, OP, x)?;
    let out = card.empty(&shape, x.dtype())?;
    let to = out.address(OP)?;
    let packed = packed(x.dtype(), width, &[from, to]);
    let chunks = if packed { out.len() / chunk(x.dtype()) } else { out.len() };
    let counts = [long(chunks), long(width), Arg::I32(packed.into())];
    let args = [&[to, from].map(Arg::Address)[..], &counts].concat();
    start(card, (MODULE, &kernel_for(OP, x)), chunks, &args)?;
    Ok(out)
}

pub(super) fn geglu_backward(card: &'static Card, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "geglu_backward";
    let width = check_gated(OP, dy, x)?;
    let (above, from) = (floats(card, OP, dy)?, floats(card, OP, x)?);
    let out = card.empty(x.shape(), x.dtype())?;
    let addresses = [out.address(OP)?, above, from];
    let packed = packed(x.dtype(), width, &addresses);
    let chunks = if packed { dy.len() / chunk(x.dtype()) } else { dy.len() };
    let counts = [long(chunks), long(width), Arg::I32(packed.into())];
    let args = [&addresses.map(Arg::Address)[..], &counts].concat();
    start(card, (MODULE, &kernel_for(OP, x)), chunks, &args)?;
    Ok(out)
}

/// `out = a + b`, where `out` may be one of them.
fn add_into(
    card: &'static Card,
    op: &'static str,
    out: &Tensor,
    a: &Tensor,
    b: &Tensor,
) -> Result<()> {
    let addresses = [out.address(op)?, floats(card, op, a)?, floats(card, op, b)?];
    let args = [&addresses.map(Arg::Address)[..], &[long(a.len())]].concat();
    start_chunks(card, "add", a, &args)
}

pub(super) fn add(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "add";
    check_same(OP, a, b)?;
    let out = card.empty(a.shape(), a.dtype())?;
    add_into(card, OP, &out, a, b)?;
    Ok(out)
}

/// In place of `into` when nothing shares it.
pub(super) fn accumulate(card: &'static Card, mut into: Tensor, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "accumulate";
    check_same(OP, &into, x)?;
    if !into.is_unique() {
        return add(card, &into, x);
    }
    add_into(card, OP, &into, &into, x)?;
    Ok(into)
}

pub(super) fn scale(card: &'static Card, x: &Tensor, factor: f32) -> Result<Tensor> {
    const OP: &str = "scale";
    let from = floats(card, OP, x)?;
    let out = card.empty(x.shape(), x.dtype())?;
    let to = Arg::Address(out.address(OP)?);
    start_chunks(card, OP, x, &[to, Arg::Address(from), long(x.len()), Arg::F32(factor)])?;
    Ok(out)
}

pub(super) fn scale_rows(card: &'static Card, x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    const OP: &str = "scale_rows";
    let width = check_factors(OP, x, factors)?;
    let addresses = [floats(card, OP, x)?, singles(card, OP, factors)?];
    let out = card.empty(x.shape(), x.dtype())?;
    let [from, factors] = addresses.map(Arg::Address);
    let to = Arg::Address(out.address(OP)?);
    start_chunks(card, OP, x, &[to, from, factors, long(x.len()), long(width)])?;
    Ok(out)
}

/// Where one block for each tile of columns leaves the card idle, the rows are cut into parts whose
/// sums are added in order by a second kernel.
pub(super) fn sum_rows(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "sum_rows";
    let (batch, area, width) = images_of_rows(OP, x)?;
    let from = floats(card, OP, x)?;
    let out = card.empty(&[batch, width], x.dtype())?;
    let to = Arg::Address(out.address(OP)?);
    let packed = packed(x.dtype(), width, &[from]);
    let columns = LANES * if packed { chunk(x.dtype()) } else { 1 };
    let tiles = width.div_ceil(columns);
    let most = area.div_ceil(4 * LANES).max(1);
    let splits = BUSY.checked_div(tiles * batch).unwrap_or(1).clamp(1, most);
    let parts = match splits {
        1 => None,
        _ => Some(card.empty(&[batch, splits, width], DType::F32)?),
    };
    let parts_at = Arg::Address(parts.as_ref().map_or(Ok(0), |parts| parts.address(OP))?);
    let split_count = int(OP, splits)?;
    let sizes = [long(area), long(width), int(OP, tiles)?, split_count, Arg::I32(packed.into())];
    let args = [&[to, parts_at, Arg::Address(from)][..], &sizes].concat();
    start_blocks(card, (MODULE, &kernel_for(OP, x)), tiles * splits * batch, &args)?;
    if parts.is_some() {
        let args = [to, parts_at, long(out.len()), long(width), split_count];
        start(card, (MODULE, &kernel_for("sum_parts", x)), out.len(), &args)?;
    }
    Ok(out)
}
