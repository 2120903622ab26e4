//! Attention without an N x N tensor.
//!
//! Heads of a size that the tensor core kernels are made for go through `attention.cu` and
//! `attention_backward.cu`, everything else through `attention_plain.cu`, which computes in f32. How
//! the work is cut depends on shapes and the card alone, so that results are the same bits every
//! time.

use super::card::Card;
use super::driver::{Address, Arg};
use crate::backend::{AttentionKind, AttentionOut, AttentionSaved};
use crate::shapes::{AttentionSizes, attention_backward_sizes, attention_sizes};
use crate::{DType, EngineError, Result, Tensor};

/// Head sizes that `attention.cu` has kernels for.
const TENSOR_CORE_DIMS: [usize; 4] = [40, 64, 80, 160];
/// Chunks of 64 elements that `attention_plain.cu` has kernels for.
const PLAIN_CHUNKS: [usize; 3] = [1, 3, 8];
/// Rows that a block of a kernel for tensor cores owns: four warps of 16, or of 32 if it is wide.
const NARROW: usize = 64;
/// Keys of a tile in the forward and in dQ.
const KEYS: usize = 64;
/// Rows and columns of a tile of `attention_plain.cu`.
const PLAIN: usize = 32;
/// Most bytes of partial gradients of keys and values.
const PARTIAL_BYTES: usize = 8 << 20;

/// A checked attention on a card.
struct Plan {
    card: &'static Card,
    sizes: AttentionSizes,
    dtype: DType,
    /// By tensor cores; else chunks of 64 elements.
    kernels: Kernels,
    /// `heads` (and `dim` for plain kernels), `queries`, `keys`, `scale`, `causal`.
    numbers: Vec<Arg>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernels {
    TensorCores,
    Plain { chunks: usize },
}

/// Blocks, threads of a block, shared memory.
type Shape = ([u32; 3], u32, u32);

impl Plan {
    /// `operands` are what is read in whole 16 bytes.
    fn new(
        card: &'static Card,
        sizes: AttentionSizes,
        (op, dtype): (&'static str, DType),
        operands: &[Address],
        kind: AttentionKind,
    ) -> Result<Self> {
        let AttentionSizes { batch, heads, queries, keys, dim } = sizes;
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            let (expected, got) = ("f32, bf16 or f16", format!("{dtype:?}"));
            return Err(EngineError::DType { op, expected, got });
        }
        let aligned = operands.iter().all(|address| address % 16 == 0);
        let half = dtype != DType::F32;
        let kernels = if half && aligned && TENSOR_CORE_DIMS.contains(&dim) {
            Kernels::TensorCores
        } else {
            let chunks = PLAIN_CHUNKS.into_iter().find(|chunks| dim <= chunks * 64);
            let Some(chunks) = chunks else {
                let text = format!("`{op}` on a card takes heads of 512 elements at most: {dim}");
                return Err(EngineError::Unsupported(text));
            };
            Kernels::Plain { chunks }
        };
        let too_large = || EngineError::shape(op, format!("more than a card counts: {sizes:?}"));
        let int = |x: usize| i32::try_from(x).map_err(|_| too_large());
        if batch > 65_535 || heads > 65_535 {
            return Err(too_large());
        }
        // What kernels count in 32 bits: rows rounded up to tiles, and steps of a few rows.
        int((queries.max(keys) + 1024).max(heads * dim * 1024))?;
        let mut numbers = vec![Arg::I32(int(heads)?)];
        if kernels != Kernels::TensorCores {
            numbers.push(Arg::I32(int(dim)?));
        }
        numbers.extend([Arg::I32(int(queries)?), Arg::I32(int(keys)?)]);
        numbers.extend([Arg::F32(kind.scale), Arg::I32(i32::from(kind.causal))]);
        Ok(Self { card, sizes, dtype, kernels, numbers })
    }

    /// Blocks for `tiles` tiles of each head.
    fn grid(&self, tiles: usize) -> [u32; 3] {
        // All three were checked, or are smaller than what was.
        [tiles as u32, self.sizes.heads as u32, self.sizes.batch as u32]
    }

    fn blocks(&self, tiles: usize) -> usize {
        tiles * self.sizes.heads * self.sizes.batch
    }

    fn fills_the_card(&self, tiles: usize) -> bool {
        self.blocks(tiles) >= self.card.facts().processors as usize
    }

    /// Bytes of `rows` rows of a head in shared memory: an odd number of 16-byte chunks each.
    fn shared_rows(&self, rows: usize) -> usize {
        rows * ((self.sizes.dim / 8) | 1) * 16
    }

    /// The kernel of attention.cu or attention_backward.cu whose blocks own rows of `rows` tokens, as
    /// wide as fills the card, and its tiles of each head.
    fn tensor_cores(&self, kind: &str, rows: usize) -> (String, usize) {
        let dim = self.sizes.dim;
        let has_wide = if kind == "keys" { dim == 40 } else { dim <= 80 };
        let wide = rows.div_ceil(2 * NARROW);
        if has_wide && self.fills_the_card(wide) {
            (format!("attention_{kind}_wide_{dim}"), wide)
        } else {
            (format!("attention_{kind}_{dim}"), rows.div_ceil(NARROW))
        }
    }

    fn launch(
        &self,
        (module, kernel): (&'static str, &str),
        shape: Shape,
        tensors: &[Address],
        rest: &[Arg],
    ) -> Result<()> {
        let tensors = tensors.iter().map(|address| Arg::Address(*address));
        let args: Vec<Arg> = tensors.chain(rest.iter().copied()).collect();
        self.card.launch((module, kernel), self.dtype, shape, &args)
    }

    fn forward(&self, tensors: &[Address]) -> Result<()> {
        match self.kernels {
            Kernels::TensorCores => {
                let (kernel, tiles) = self.tensor_cores("forward", self.sizes.queries);
                let shape = (self.grid(tiles), 128, self.shared_rows(4 * KEYS) as u32);
                self.launch(("attention", &kernel), shape, tensors, &self.numbers)
            }
            Kernels::Plain { chunks } => {
                let kernel = format!("attention_plain_forward_{chunks}");
                let floats =
                    PLAIN * (chunks * 64 + 4) + 2 * PLAIN * 68 + PLAIN * (PLAIN + 4) + PLAIN;
                let grid = self.grid(self.sizes.queries.div_ceil(PLAIN));
                let shape = (grid, 256, 4 * floats as u32);
                self.launch(("attention_plain", &kernel), shape, tensors, &self.numbers)
            }
        }
    }

    /// dQ, and `rowsum(dO·O)` into the last but one of `[q, k, v, out, dy, lse, delta, dq]`.
    fn queries(&self, [q, k, v, out, dy, lse, delta, dq]: [Address; 8]) -> Result<()> {
        let AttentionSizes { queries, .. } = self.sizes;
        match self.kernels {
            Kernels::TensorCores => {
                let (kernel, tiles) = self.tensor_cores("queries", queries);
                let shape = (self.grid(tiles), 128, self.shared_rows(4 * KEYS) as u32);
                let tensors = [q, k, v, out, dy, lse, delta, dq];
                self.launch(("attention_backward", &kernel), shape, &tensors, &self.numbers)
            }
            Kernels::Plain { chunks } => {
                let shape = (self.grid(queries.div_ceil(8)), 256, 0);
                let dot = ("attention_plain", "attention_delta");
                self.launch(dot, shape, &[out, dy, delta], &self.numbers[..3])?;
                let kernel = format!("attention_plain_queries_{chunks}");
                let floats = 4 * PLAIN * 68 + PLAIN * (PLAIN + 4);
                let shape = (self.grid(queries.div_ceil(PLAIN)), 256, 4 * floats as u32);
                let tensors = [q, k, v, dy, lse, delta, dq];
                self.launch(("attention_plain", &kernel), shape, &tensors, &self.numbers)
            }
        }
    }

    /// dK and dV from `[q, k, v, dy, lse, delta, dk, dv]`.
    fn keys(&self, tensors: [Address; 8]) -> Result<()> {
        let AttentionSizes { keys, dim, .. } = self.sizes;
        let ((module, kernel), tiles, (threads, shared), query_tile) = match self.kernels {
            Kernels::TensorCores => {
                let (kernel, tiles) = self.tensor_cores("keys", keys);
                // Larger heads go by smaller tiles of queries and keep the keys in shared memory.
                let (query_tile, held) = if dim > 128 { (32, 2 * NARROW) } else { (64, 0) };
                let shared = self.shared_rows(4 * query_tile + held) + 4 * query_tile * 4;
                (("attention_backward", kernel), tiles, (128, shared), query_tile)
            }
            Kernels::Plain { chunks } => {
                let kernel = format!("attention_plain_keys_{chunks}");
                let shared = 4 * (4 * PLAIN * 68 + 2 * PLAIN * (PLAIN + 4));
                (("attention_plain", kernel), keys.div_ceil(PLAIN), (256, shared), PLAIN)
            }
        };
        let splits = self.splits(tiles, query_tile);
        let len = self.sizes.batch * keys * self.sizes.heads * dim;
        let partial = match splits {
            1 => None,
            _ => Some(self.card.empty(&[splits, 2, len], DType::F32)?),
        };
        // Kept until the last kernel that uses it has been started.
        let partial_at = match &partial {
            None => 0,
            Some(partial) => partial.address("attention_backward")?,
        };
        let mut numbers = self.numbers.clone();
        numbers.push(Arg::I32(splits as i32));
        let shape = (self.grid(tiles * splits), threads, shared as u32);
        let [.., dk, dv] = tensors;
        let tensors: Vec<Address> = tensors.into_iter().chain([partial_at]).collect();
        self.launch((module, &kernel), shape, &tensors, &numbers)?;
        if splits > 1 {
            let blocks = (2 * len).div_ceil(256).min(16 * self.card.facts().processors as usize);
            let rest = [Arg::I64(len as i64), Arg::I32(splits as i32)];
            let join = ("attention_plain", "attention_join");
            self.launch(join, ([blocks as u32, 1, 1], 256, 0), &[partial_at, dk, dv], &rest)?;
        }
        Ok(())
    }

    /// Parts that the queries are cut into where the keys alone would not fill the card.
    fn splits(&self, key_tiles: usize, query_tile: usize) -> usize {
        if self.fills_the_card(key_tiles) {
            return 1;
        }
        let AttentionSizes { batch, heads, queries, keys, dim } = self.sizes;
        let wanted = 2 * self.card.facts().processors as usize / self.blocks(key_tiles);
        let fitting = PARTIAL_BYTES / (batch * heads * keys * dim * 8);
        let tiles = queries.div_ceil(query_tile);
        let share = tiles.div_ceil(wanted.min(fitting).clamp(1, tiles));
        // No part without a tile.
        tiles.div_ceil(share)
    }
}

/// Attention of each query over the keys it sees.
pub(super) fn attention(
    card: &'static Card,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: AttentionKind,
) -> Result<AttentionOut> {
    const OP: &str = "attention";
    let sizes = attention_sizes(OP, (q, k, v), kind)?;
    let inputs = [q.address(OP)?, k.address(OP)?, v.address(OP)?];
    let plan = Plan::new(card, sizes, (OP, q.dtype()), &inputs, kind)?;
    let out = card.empty(q.shape(), q.dtype())?;
    let lse = card.empty(&[sizes.batch, sizes.heads, sizes.queries], DType::F32)?;
    let [q, k, v] = inputs;
    plan.forward(&[q, k, v, out.address(OP)?, lse.address(OP)?])?;
    Ok(AttentionOut { out, lse })
}

/// Gradients of q, k and v.
pub(super) fn attention_backward(
    card: &'static Card,
    dy: &Tensor,
    saved: &AttentionSaved,
    kind: AttentionKind,
) -> Result<(Tensor, Tensor, Tensor)> {
    const OP: &str = "attention_backward";
    let AttentionSaved { q, k, v, out, lse } = *saved;
    let sizes = attention_backward_sizes(OP, dy, saved, kind)?;
    let inputs =
        [q.address(OP)?, k.address(OP)?, v.address(OP)?, out.address(OP)?, dy.address(OP)?];
    let plan = Plan::new(card, sizes, (OP, q.dtype()), &inputs, kind)?;
    let dq = card.empty(q.shape(), q.dtype())?;
    let (dk, dv) = (card.empty(k.shape(), k.dtype())?, card.empty(v.shape(), v.dtype())?);
    let delta = card.empty(lse.shape(), DType::F32)?;
    let ([q, k, v, out, dy], lse) = (inputs, lse.address(OP)?);
    let dots = delta.address(OP)?;
    plan.queries([q, k, v, out, dy, lse, dots, dq.address(OP)?])?;
    plan.keys([q, k, v, dy, lse, dots, dk.address(OP)?, dv.address(OP)?])?;
    Ok((dq, dk, dv))
}
