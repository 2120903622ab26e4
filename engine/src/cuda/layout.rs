//! Operations that move elements.

use super::card::Card;
use super::driver::{Address, Arg, Stream};
use super::elements::{WIDEST, chunk, floats, long, packed, place, start};
use crate::operands::{
    cut_last, even_image_shape, image_shape, joined_last, joined_rows, table_shape,
};
use crate::{EngineError, Ids, Result, Tensor};

const MODULE: &str = "layout";

/// The largest unit, in bytes, in which all of these addresses and sizes are whole.
fn unit(addresses: &[Address], sizes: &[usize]) -> usize {
    let sizes = sizes.iter().map(|size| *size as Address);
    let all = addresses.iter().copied().chain(sizes).fold(WIDEST as Address, |all, x| all | x);
    1 << all.trailing_zeros()
}

pub(super) fn concat_last(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat_last";
    let shape = joined_last(OP, a, b)?;
    let (left, right) = (floats(card, OP, a)?, floats(card, OP, b)?);
    let out = card.empty(&shape, a.dtype())?;
    let addresses = [out.address(OP)?, left, right];
    move_rows(card, OP, &out, a.last_dim(), addresses)?;
    Ok(out)
}

pub(super) fn split_last(card: &'static Card, x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
    const OP: &str = "split_last";
    let [first, rest] = cut_last(OP, x, at)?;
    let from = floats(card, OP, x)?;
    let (first, rest) = (card.empty(&first, x.dtype())?, card.empty(&rest, x.dtype())?);
    let addresses = [first.address(OP)?, rest.address(OP)?, from];
    move_rows(card, OP, x, at, addresses)?;
    Ok((first, rest))
}

/// Starts a kernel for rows that are in two parts elsewhere, of which the first has `at` elements.
fn move_rows(
    card: &'static Card,
    op: &'static str,
    whole: &Tensor,
    at: usize,
    addresses: [Address; 3],
) -> Result<()> {
    let size = whole.dtype().size();
    let widths = [at * size, (whole.last_dim() - at) * size];
    let unit = unit(&addresses, &widths);
    let units = whole.len() * size / unit;
    let counts = [units, widths[0] / unit, widths[1] / unit].map(long);
    let args = [&addresses.map(Arg::Address)[..], &counts].concat();
    start(card, (MODULE, &format!("{op}_{unit}")), units, &args)
}

pub(super) fn upsample2x(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    const OP: &str = "upsample2x";
    let [b, h, w, c] = image_shape(OP, x)?;
    let from = floats(card, OP, x)?;
    let out = card.empty(&[b, 2 * h, 2 * w, c], x.dtype())?;
    let addresses = [out.address(OP)?, from];
    let size = x.dtype().size();
    let unit = unit(&addresses, &[c * size]);
    let units = x.len() * size / unit;
    let counts = [units, w, c * size / unit].map(long);
    let args = [&addresses.map(Arg::Address)[..], &counts].concat();
    start(card, (MODULE, &format!("{OP}_{unit}")), units, &args)?;
    Ok(out)
}

pub(super) fn upsample2x_backward(card: &'static Card, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "upsample2x_backward";
    let [b, h, w, c] = even_image_shape(OP, dy)?;
    let from = floats(card, OP, dy)?;
    let out = card.empty(&[b, h / 2, w / 2, c], dy.dtype())?;
    let addresses = [out.address(OP)?, from];
    let packed = packed(dy.dtype(), c, &addresses);
    let counts = [out.len(), w / 2, c].map(long);
    let args = [&addresses.map(Arg::Address)[..], &counts, &[Arg::I32(packed.into())]].concat();
    let threads = if packed { out.len() / chunk(dy.dtype()) } else { out.len() };
    start(card, (MODULE, &format!("{OP}_{}", dy.dtype().suffix())), threads, &args)?;
    Ok(out)
}

/// An id outside reads the last row: the host does not see ids that were made on the card.
pub(super) fn embedding(card: &'static Card, table: &Tensor, ids: &Ids) -> Result<Tensor> {
    const OP: &str = "embedding";
    let Ids::Card(ids) = ids else {
        return Err(EngineError::Device { op: OP, got: crate::Device::Cpu });
    };
    let [rows, width] = table_shape(OP, table)?;
    if rows == 0 && !ids.is_empty() {
        return Err(EngineError::shape(OP, "the table has no rows"));
    }
    let (from, numbers) = (floats(card, OP, table)?, place(card, OP, ids)?);
    let out = card.empty(&[ids.len(), width], table.dtype())?;
    let to = out.address(OP)?;
    let size = table.dtype().size();
    let unit = unit(&[to, from], &[width * size]);
    let units = out.len() * size / unit;
    let counts = [units, width * size / unit, rows].map(long);
    let args = [&[to, from, numbers].map(Arg::Address)[..], &counts].concat();
    start(card, (MODULE, &format!("{OP}_{unit}")), units, &args)?;
    Ok(out)
}

pub(super) fn concat_rows(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat_rows";
    let shape = joined_rows(OP, a, b)?;
    let (upper, lower) = (floats(card, OP, a)?, floats(card, OP, b)?);
    let out = card.empty(&shape, a.dtype())?;
    let to = out.address(OP)?;
    let [first, second] = [a, b].map(|t| t.len() * t.dtype().size());
    for (to, from, bytes) in [(to, upper, first), (to + first as Address, lower, second)] {
        if bytes > 0 {
            card.driver().copy(Stream::Compute, to, from, bytes)?;
        }
    }
    Ok(out)
}
