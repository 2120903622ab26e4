//! Group and layer normalisation: how the work is cut, and the starts of `kernels/norm.cu` and
//! `kernels/layer_norm.cu`.
//!
//! A group norm is cut into chunks of pixels by tiles of channels, so that small maps with many
//! channels fill a card as well as large ones with few. The cut depends on shapes alone: results and
//! memory are the same on all cards.

use super::card::Card;
use super::driver::{Address, Arg};
use super::elements;
use crate::backend::GroupNormShape;
use crate::{DType, EngineError, Result, Tensor};

/// `THREADS` of the kernels.
const THREADS: usize = 256;
/// Rows of one block of a layer norm: one for each warp.
const ROWS: usize = THREADS / 32;
/// Packs of channels of a tile at most: a kilobyte of each pixel.
const MOST_PACKS: usize = 64;
/// And at least, where there are: 128 bytes.
const LEAST_PACKS: usize = 8;
/// About so many blocks fill a card.
const BLOCKS: usize = 512;
/// Chunks of an image at most: their sums are joined by each block of the second kernel.
const MOST_CHUNKS: usize = 256;
/// Shared memory that every card gives a block.
const SHARED: usize = 48 << 10;

/// How a group norm is cut; see `Split` in the kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Split {
    batch: usize,
    area: usize,
    channels: usize,
    per_group: usize,
    /// Groups of a tile.
    tile: usize,
    /// Chunks of an image.
    chunks: usize,
    /// Pixels of a chunk.
    chunk: usize,
    /// Channels that are read at once.
    pack: usize,
}

impl Split {
    /// For `[batch, area, channels]`, of which `pack` neighbouring channels can be read at once.
    fn new((batch, area, channels): (usize, usize, usize), groups: usize, pack: usize) -> Self {
        let per_group = channels / groups;
        // Largest first.
        let tiles: Vec<usize> = (1..=groups)
            .rev()
            .filter(|tile| groups.is_multiple_of(*tile) && (tile * per_group).is_multiple_of(pack))
            .collect();
        let packs = |tile: usize| tile * per_group / pack;
        let rows = |tile: usize| (THREADS / packs(tile).min(THREADS)).max(1);
        // Each thread should have two pixels at least.
        let chunks = |tile: usize| area.div_ceil(2 * rows(tile)).clamp(1, MOST_CHUNKS);
        let blocks = |tile: usize| batch * (groups / tile) * chunks(tile);
        let wide = |tile: &&usize| packs(**tile) <= MOST_PACKS;
        let mut tile = tiles.iter().find(wide).or(tiles.last()).copied().unwrap_or(groups);
        for smaller in tiles {
            if smaller < tile && blocks(tile) < BLOCKS && packs(smaller) >= LEAST_PACKS {
                tile = smaller;
            }
        }
        let wanted = BLOCKS.div_ceil(batch * (groups / tile));
        let chunk = area.div_ceil(wanted.clamp(1, chunks(tile)));
        Self { batch, area, channels, per_group, tile, chunks: area.div_ceil(chunk), chunk, pack }
    }

    fn groups(&self) -> usize {
        self.channels / self.per_group
    }

    /// Bytes of shared memory: two numbers of each row and channel of the tile, and of each group.
    fn shared(&self, sums: bool) -> usize {
        let width = self.tile * self.per_group;
        let rows = THREADS / (width / self.pack).min(THREADS);
        let floats = if sums { 2 * rows * width } else { 2 * self.tile };
        (floats + (2 * self.tile).next_multiple_of(4)) * 4
    }

    fn grid(&self, op: &'static str, sums: bool) -> Result<([u32; 3], u32, u32)> {
        let blocks = self.batch * self.chunks;
        if self.shared(sums) > SHARED {
            let detail = format!("groups of {} channels are too wide for cards", self.per_group);
            return Err(EngineError::shape(op, detail));
        }
        let grid = [whole(op, blocks)? as u32, whole(op, self.groups() / self.tile)? as u32, 1];
        Ok((grid, THREADS as u32, self.shared(sums) as u32))
    }

    /// In the order of the signatures, `vector` included.
    fn args(&self, op: &'static str) -> Result<[Arg; 7]> {
        let sizes = [self.area, self.channels, self.per_group, self.tile, self.chunks, self.chunk];
        let mut args = [Arg::I32(i32::from(self.pack > 1)); 7];
        for (arg, size) in args.iter_mut().zip(sizes) {
            *arg = Arg::I32(whole(op, size)?);
        }
        Ok(args)
    }
}

/// A size as the kernels take it.
fn whole(op: &'static str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| EngineError::shape(op, format!("too large for cards: {size}")))
}

/// Address of a gradient or an input, of the type of `like`.
fn operand(op: &'static str, card: &Card, x: &Tensor, like: &Tensor) -> Result<Address> {
    if x.dtype() != like.dtype() {
        let got = format!("{:?} and {:?}", x.dtype(), like.dtype());
        return Err(EngineError::DType { op, expected: "equal types", got });
    }
    elements::floats(card, op, x)
}

/// How many elements may be read at once: 16 bytes, or one.
fn pack_of(dtype: DType, channels: usize, addresses: &[Address]) -> usize {
    if elements::packed(dtype, channels, addresses) { elements::chunk(dtype) } else { 1 }
}

/// Where the result of a backward kernel goes: over `dy`, unless somebody else still reads that.
fn result_for(card: &'static Card, mut dy: Tensor) -> Result<(Tensor, Tensor)> {
    let out = if dy.is_unique() { dy.clone() } else { card.empty(dy.shape(), dy.dtype())? };
    Ok((out, dy))
}

/// `[batch, area, channels]` of `[B,...,C]`, checked.
fn image_sizes(
    op: &'static str,
    x: &Tensor,
    (gamma, beta): (&Tensor, &Tensor),
    groups: usize,
) -> Result<(usize, usize, usize)> {
    let fail = || {
        let detail = format!("{x:?} with {groups} groups, gamma {gamma:?}, beta {beta:?}");
        Err(EngineError::shape(op, detail))
    };
    let &[batch, .., channels] = x.shape() else { return fail() };
    let affine = [gamma.len(), beta.len()] == [channels, channels];
    if x.is_empty() || groups == 0 || channels % groups != 0 || !affine {
        return fail();
    }
    Ok((batch, x.len() / (batch * channels), channels))
}

pub(super) fn group_norm(
    card: &'static Card,
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    shape: GroupNormShape,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "group_norm";
    let sizes = image_sizes(OP, x, (gamma, beta), shape.groups)?;
    let dtype = x.dtype();
    let from = elements::floats(card, OP, x)?;
    let scale = elements::singles(card, OP, gamma)?;
    let shift = elements::singles(card, OP, beta)?;
    let pack = pack_of(dtype, sizes.2, &[from, scale, shift]);
    let split = Split::new(sizes, shape.groups, pack);
    let out = card.empty(x.shape(), dtype)?;
    let stats = card.empty(&[split.batch, shape.groups, 2], DType::F32)?;
    let sums = card.empty(&[split.batch, shape.groups, split.chunks, 2], DType::F32)?;
    let args = split.args(OP)?;
    let mut first = vec![Arg::Address(from), Arg::Address(sums.address(OP)?)];
    first.extend(args);
    card.launch(("norm", "group_norm_stats"), dtype, split.grid(OP, true)?, &first)?;
    let addresses = [out.address(OP)?, from, sums.address(OP)?, stats.address(OP)?, scale, shift];
    let mut second = addresses.map(Arg::Address).to_vec();
    second.extend(args);
    second.extend([Arg::F32(shape.eps), Arg::I32(i32::from(shape.silu))]);
    card.launch(("norm", "group_norm_apply"), dtype, split.grid(OP, false)?, &second)?;
    Ok((out, stats))
}

pub(super) fn group_norm_backward(
    card: &'static Card,
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    affine: (&Tensor, &Tensor),
    shape: GroupNormShape,
) -> Result<Tensor> {
    const OP: &str = "group_norm_backward";
    let sizes = image_sizes(OP, x, affine, shape.groups)?;
    if dy.shape() != x.shape() || stats.len() != sizes.0 * shape.groups * 2 {
        return Err(EngineError::shape(OP, format!("{dy:?}, {x:?}, statistics {stats:?}")));
    }
    let dtype = x.dtype();
    let of_stats = elements::singles(card, OP, stats)?;
    let scale = elements::singles(card, OP, affine.0)?;
    let shift = elements::singles(card, OP, affine.1)?;
    let input = elements::floats(card, OP, x)?;
    let slope = operand(OP, card, &dy, x)?;
    let pack = pack_of(dtype, sizes.2, &[slope, input, scale, shift]);
    let split = Split::new(sizes, shape.groups, pack);
    let (out, _dy) = result_for(card, dy)?;
    let sums = card.empty(&[split.batch, shape.groups, split.chunks, 2], DType::F32)?;
    let (args, silu) = (split.args(OP)?, Arg::I32(i32::from(shape.silu)));
    let addresses = [slope, input, of_stats, scale, shift, sums.address(OP)?];
    let mut first = addresses.map(Arg::Address).to_vec();
    first.extend(args);
    first.push(silu);
    card.launch(("norm", "group_norm_slopes"), dtype, split.grid(OP, true)?, &first)?;
    let addresses = [out.address(OP)?, slope, input, of_stats, scale, shift, sums.address(OP)?];
    let mut second = addresses.map(Arg::Address).to_vec();
    second.extend(args);
    second.push(silu);
    card.launch(("norm", "group_norm_backward"), dtype, split.grid(OP, false)?, &second)?;
    Ok(out)
}

/// Blocks of a layer norm over `rows`.
fn row_grid(op: &'static str, rows: usize) -> Result<([u32; 3], u32, u32)> {
    Ok(([whole(op, rows.div_ceil(ROWS))? as u32, 1, 1], THREADS as u32, 0))
}

fn check_layer(op: &'static str, x: &Tensor, gamma: &Tensor) -> Result<()> {
    if x.is_empty() || gamma.len() != x.last_dim() {
        return Err(EngineError::shape(op, format!("{x:?} with gamma {gamma:?}")));
    }
    Ok(())
}

pub(super) fn layer_norm(
    card: &'static Card,
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "layer_norm";
    check_layer(OP, x, gamma)?;
    check_layer(OP, x, beta)?;
    let dtype = x.dtype();
    let from = elements::floats(card, OP, x)?;
    let scale = elements::singles(card, OP, gamma)?;
    let shift = elements::singles(card, OP, beta)?;
    let pack = pack_of(dtype, x.last_dim(), &[from, scale, shift]);
    let out = card.empty(x.shape(), dtype)?;
    let stats = card.empty(&[x.rows(), 2], DType::F32)?;
    let addresses = [out.address(OP)?, from, stats.address(OP)?, scale, shift];
    let mut args = addresses.map(Arg::Address).to_vec();
    args.extend([
        Arg::I64(x.rows() as i64),
        Arg::I32(whole(OP, x.last_dim())?),
        Arg::I32(i32::from(pack > 1)),
        Arg::F32(eps),
    ]);
    card.launch(("layer_norm", OP), dtype, row_grid(OP, x.rows())?, &args)?;
    Ok((out, stats))
}

pub(super) fn layer_norm_backward(
    card: &'static Card,
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    gamma: &Tensor,
) -> Result<Tensor> {
    const OP: &str = "layer_norm_backward";
    check_layer(OP, x, gamma)?;
    if dy.shape() != x.shape() || stats.len() != x.rows() * 2 {
        return Err(EngineError::shape(OP, format!("{dy:?}, {x:?}, statistics {stats:?}")));
    }
    let dtype = x.dtype();
    let of_stats = elements::singles(card, OP, stats)?;
    let scale = elements::singles(card, OP, gamma)?;
    let input = elements::floats(card, OP, x)?;
    let slope = operand(OP, card, &dy, x)?;
    let pack = pack_of(dtype, x.last_dim(), &[slope, input, scale]);
    let (out, _dy) = result_for(card, dy)?;
    let addresses = [out.address(OP)?, slope, input, of_stats, scale];
    let mut args = addresses.map(Arg::Address).to_vec();
    args.extend([
        Arg::I64(x.rows() as i64),
        Arg::I32(whole(OP, x.last_dim())?),
        Arg::I32(i32::from(pack > 1)),
    ]);
    card.launch(("layer_norm", OP), dtype, row_grid(OP, x.rows())?, &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_covers_the_image_with_whole_groups_and_packs() {
        for (batch, area, channels) in [
            (1, 4096, 320),
            (8, 4096, 320),
            (1, 64, 1280),
            (1, 64, 2560),
            (2, 256, 1920),
            (1, 1024, 960),
            (1, 262_144, 128),
            (1, 1, 32),
            (3, 77, 64),
        ] {
            for pack in [8, 4, 1] {
                let split = Split::new((batch, area, channels), 32, pack);
                let width = split.tile * split.per_group;
                assert!(split.chunks * split.chunk >= area, "{split:?}");
                assert!((split.chunks - 1) * split.chunk < area, "{split:?}");
                assert_eq!((width % pack, channels % width), (0, 0), "{split:?}");
                assert!(split.shared(true) <= SHARED, "{split:?}");
                assert!(split.chunks <= MOST_CHUNKS, "{split:?}");
            }
        }
        let small = Split::new((1, 64, 1280), 32, 8);
        assert!(small.chunks * (32 / small.tile) >= 32, "{small:?}");
    }
}
