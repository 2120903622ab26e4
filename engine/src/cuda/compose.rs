//! Products that make the weights of composed adapters; f32 throughout.

use super::card::Card;
use super::driver::{Address, Arg};
use super::elements::{BLOCK, chunk, int, long, packed, singles, start, start_blocks};
use crate::operands::{KroneckerSizes, check_same, row_length};
use crate::{DType, Result, Tensor};

const MODULE: &str = "compose";

/// Blocks that keep any card busy; no more are made by cutting sums into parts. Not the number that
/// fits this card, so that all cards give the same bits.
const BUSY: usize = 512;

pub(super) fn multiply(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "multiply";
    check_same(OP, a, b)?;
    let (left, right) = (singles(card, OP, a)?, singles(card, OP, b)?);
    let out = card.empty(a.shape(), DType::F32)?;
    let addresses = [out.address(OP)?, left, right];
    let args = [&addresses.map(Arg::Address)[..], &[long(a.len())]].concat();
    start(card, (MODULE, "multiply_f32"), a.len().div_ceil(chunk(DType::F32)), &args)?;
    Ok(out)
}

pub(super) fn kronecker(card: &'static Card, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    const OP: &str = "kronecker";
    let s = KroneckerSizes::new(OP, first, second)?;
    let (left, right) = (singles(card, OP, first)?, singles(card, OP, second)?);
    let out = card.empty(&s.shape(), DType::F32)?;
    let addresses = [out.address(OP)?, left, right].map(Arg::Address);
    let sizes = [long(out.len()), int(OP, s.b)?, int(OP, s.c)?, int(OP, s.window)?, int(OP, s.d)?];
    let args = [&addresses[..], &sizes].concat();
    start(card, (MODULE, "kronecker_f32"), out.len().div_ceil(chunk(DType::F32)), &args)?;
    Ok(out)
}

/// Where sums go whose operands are cut into `splits` parts.
struct Parts {
    sums: Tensor,
    parts: Option<Tensor>,
    splits: usize,
}

impl Parts {
    fn new(card: &'static Card, shape: &[usize], splits: usize) -> Result<Self> {
        let sums = card.empty(shape, DType::F32)?;
        let parts = match splits {
            1 => None,
            _ => Some(card.empty(&[splits, sums.len()], DType::F32)?),
        };
        Ok(Self { sums, parts, splits })
    }

    /// Where the parts belong; with one part, the sums.
    fn address(&self, op: &'static str) -> Result<Address> {
        self.parts.as_ref().unwrap_or(&self.sums).address(op)
    }

    /// The sums, when the parts have been made.
    fn added(self, card: &'static Card, op: &'static str) -> Result<Tensor> {
        if let Some(parts) = &self.parts {
            let addresses = [self.sums.address(op)?, parts.address(op)?].map(Arg::Address);
            let sizes = [long(self.sums.len()), int(op, self.splits)?];
            let args = [&addresses[..], &sizes].concat();
            start(card, (MODULE, "kronecker_parts_f32"), self.sums.len(), &args)?;
        }
        Ok(self.sums)
    }
}

pub(super) fn kronecker_backward(
    card: &'static Card,
    dy: &Tensor,
    first: &Tensor,
    second: &Tensor,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "kronecker_backward";
    let s = KroneckerSizes::new(OP, first, second)?;
    s.check_gradient(OP, dy)?;
    let (left, right) = (singles(card, OP, first)?, singles(card, OP, second)?);
    let above = Arg::Address(singles(card, OP, dy)?);
    let (elements, rows) = (first.len(), s.c * s.window);
    let (count, b, d) = (int(OP, elements)?, int(OP, s.b)?, int(OP, s.d)?);

    // Parts of less than a few elements to a thread are not worth a block.
    let most = (second.len() / (4 * BLOCK)).clamp(1, rows);
    let splits = (BUSY / elements).clamp(1, most);
    let of_first = Parts::new(card, first.shape(), splits)?;
    let to = Arg::Address(of_first.address(OP)?);
    let args = [to, above, Arg::Address(right), count, b, long(rows), d, int(OP, splits)?];
    start_blocks(card, (MODULE, "kronecker_first_f32"), elements * splits, &args)?;

    let tiles = second.len().div_ceil(BLOCK);
    let splits = (BUSY / tiles).clamp(1, elements.div_ceil(8));
    let of_second = Parts::new(card, second.shape(), splits)?;
    let to = Arg::Address(of_second.address(OP)?);
    let sizes = [count, b, long(second.len()), d, int(OP, tiles)?, int(OP, splits)?];
    let args = [&[to, above, Arg::Address(left)][..], &sizes].concat();
    start_blocks(card, (MODULE, "kronecker_second_f32"), tiles * splits, &args)?;
    Ok((of_first.added(card, OP)?, of_second.added(card, OP)?))
}

pub(super) fn rescale_rows(
    card: &'static Card,
    v: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "rescale_rows";
    let length = row_length(OP, v, magnitude)?;
    let (from, m) = (singles(card, OP, v)?, singles(card, OP, magnitude)?);
    let out = card.empty(v.shape(), DType::F32)?;
    let norms = card.empty(magnitude.shape(), DType::F32)?;
    let addresses = [out.address(OP)?, norms.address(OP)?, from, m].map(Arg::Address);
    let packed = packed(DType::F32, length, &[from]);
    let sizes = [long(length), Arg::F32(multiplier), Arg::I32(packed.into())];
    let args = [&addresses[..], &sizes].concat();
    start_blocks(card, (MODULE, "rescale_rows_f32"), v.len() / length, &args)?;
    Ok((out, norms))
}

pub(super) fn rescale_rows_backward(
    card: &'static Card,
    dy: &Tensor,
    v: &Tensor,
    norms: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "rescale_rows_backward";
    check_same(OP, dy, v)?;
    check_same(OP, norms, magnitude)?;
    let length = row_length(OP, v, magnitude)?;
    let (above, from) = (singles(card, OP, dy)?, singles(card, OP, v)?);
    let (norms, m) = (singles(card, OP, norms)?, singles(card, OP, magnitude)?);
    let of_v = card.empty(v.shape(), DType::F32)?;
    let of_m = card.empty(magnitude.shape(), DType::F32)?;
    let to = [of_v.address(OP)?, of_m.address(OP)?];
    let packed = packed(DType::F32, length, &[above, from]);
    let sizes = [long(length), Arg::F32(multiplier), Arg::I32(packed.into())];
    let from = [above, from, norms, m].map(Arg::Address);
    let args = [&to.map(Arg::Address)[..], &from, &sizes].concat();
    start_blocks(card, (MODULE, "rescale_rows_backward_f32"), v.len() / length, &args)?;
    Ok((of_v, of_m))
}
