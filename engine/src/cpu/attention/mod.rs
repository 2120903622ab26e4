//! Scaled dot-product attention that never holds an N x N tensor.
//!
//! Tiles of 64 queries walk over blocks of keys with a running maximum and sum (Dao et al.,
//! arXiv:2205.14135). Scores are kept transposed, queries along the vector lanes: the statistics of
//! a query then need no sum across lanes, and a head may have any size without padding. The backward
//! recomputes the probabilities from the saved log-sum-exp; a task owns a range of keys and adds the
//! queries' gradients to a buffer of its own, and these are joined in a fixed order. How the work is
//! cut depends on the shapes alone.

mod lanes;
mod pack;
mod product;
mod tiles;

use rayon::prelude::*;

use self::pack::{Scratch, interleave, pack_columns, pack_rows, unpack_queries};
use self::product::{Arithmetic, TILE};
use self::tiles::{BackwardHead, ForwardHead, KEYS, backward_keys, forward_queries};
use super::simd::{Scalar, with_scalar};
use crate::backend::{AttentionKind, AttentionOut, AttentionSaved};
use crate::shapes::{AttentionSizes, attention_backward_sizes, attention_sizes};
use crate::{DType, Result, Tensor, pool};

/// Tasks that a backward over few heads is cut into.
const BACKWARD_TASKS: usize = 16;

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    /// Elements of a head.
    dim: usize,
    arithmetic: Arithmetic,
}

impl Sizes {
    fn of(sizes: AttentionSizes, dtype: DType) -> Self {
        let AttentionSizes { batch, heads, queries, keys, dim } = sizes;
        Self { batch, heads, queries, keys, dim, arithmetic: Arithmetic::of(dtype) }
    }

    /// Elements of a sample's queries and of its keys.
    fn samples(&self) -> (usize, usize) {
        let width = self.heads * self.dim;
        (self.queries * width, self.keys * width)
    }

    /// The head size rounded up to whole half vectors.
    fn padded(&self) -> usize {
        self.dim.next_multiple_of(8)
    }

    fn key_blocks(&self) -> usize {
        self.keys.div_ceil(KEYS)
    }

    fn query_tiles(&self) -> usize {
        self.queries.div_ceil(TILE)
    }
}

/// Attention of each query over the keys it sees.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: AttentionKind,
) -> Result<AttentionOut> {
    const OP: &str = "attention";
    let s = Sizes::of(attention_sizes(OP, (q, k, v), kind)?, q.dtype());
    with_scalar!(q.dtype(), T => {
        let (qs, ks, vs) = (q.elements::<T>(OP)?, k.elements::<T>(OP)?, v.elements::<T>(OP)?);
        let mut out = pool::take::<T>(q.len());
        let mut lse = pool::take::<f32>(s.batch * s.heads * s.queries);
        let (of_q, of_k) = s.samples();
        for b in 0..s.batch {
            let (keys, queries) = (b * of_k..(b + 1) * of_k, b * of_q..(b + 1) * of_q);
            let lse = &mut lse[b * s.heads * s.queries..][..s.heads * s.queries];
            let inputs = [&qs[queries.clone()], &ks[keys.clone()], &vs[keys]];
            forward_sample(inputs, &mut out[queries], lse, (s, kind));
        }
        let out = Tensor::from_pooled(q.shape(), out);
        Ok(AttentionOut { out, lse: Tensor::from_pooled(&[s.batch, s.heads, s.queries], lse) })
    })
}

fn forward_sample<T: Scalar>(
    [q, k, v]: [&[T]; 3],
    out: &mut [T],
    lse: &mut [f32],
    how: (Sizes, AttentionKind),
) {
    let (s, kind) = how;
    let k_columns = pack_columns(k, s.keys, KEYS, s);
    let v_rows = pack_rows(v, s.keys, s);
    let mut results = Scratch::take(s.heads * s.queries * s.dim);
    results
        .par_chunks_mut(s.queries * s.dim)
        .zip(lse.par_chunks_mut(s.queries))
        .enumerate()
        .for_each(|(head, (results, lse))| {
            let keys = ForwardHead {
                k_columns: part(&k_columns, head, s.heads),
                v_rows: part(&v_rows, head, s.heads),
                keys: s.keys,
                dim: s.dim,
                padded: s.padded(),
                scale: kind.scale,
                causal: kind.causal,
                arithmetic: s.arithmetic,
            };
            results
                .par_chunks_mut(TILE * s.dim)
                .zip(lse.par_chunks_mut(TILE))
                .enumerate()
                .for_each(|(tile, (results, lse))| {
                    let mut queries = vec![0f32; s.dim.div_ceil(s.arithmetic.depth()) * TILE];
                    let first = tile * TILE;
                    pack::gather_columns(&mut queries, q, (head, first, s.queries), s);
                    forward_queries(&keys, &queries, first, results, lse);
                });
        });
    interleave(out, &results, s, 1.);
}

/// One of `count` equal parts.
fn part(x: &[f32], index: usize, count: usize) -> &[f32] {
    let size = x.len() / count;
    &x[index * size..(index + 1) * size]
}

/// Gradients of q, k and v.
pub(super) fn attention_backward(
    dy: &Tensor,
    saved: &AttentionSaved,
    kind: AttentionKind,
) -> Result<(Tensor, Tensor, Tensor)> {
    const OP: &str = "attention_backward";
    let AttentionSaved { q, k, v, out, lse } = *saved;
    let s = Sizes::of(attention_backward_sizes(OP, dy, saved, kind)?, q.dtype());
    let lse = lse.elements::<f32>(OP)?;
    with_scalar!(q.dtype(), T => {
        let (qs, ks, vs) = (q.elements::<T>(OP)?, k.elements::<T>(OP)?, v.elements::<T>(OP)?);
        let (outs, dys) = (out.elements::<T>(OP)?, dy.elements::<T>(OP)?);
        let mut dq = pool::take::<T>(q.len());
        let (mut dk, mut dv) = (pool::take::<T>(k.len()), pool::take::<T>(v.len()));
        let (of_q, of_k) = s.samples();
        for b in 0..s.batch {
            let (queries, keys) = (b * of_q..(b + 1) * of_q, b * of_k..(b + 1) * of_k);
            let sample = Sample {
                q: &qs[queries.clone()],
                k: &ks[keys.clone()],
                v: &vs[keys.clone()],
                out: &outs[queries.clone()],
                dy: &dys[queries.clone()],
                lse: &lse[b * s.heads * s.queries..][..s.heads * s.queries],
            };
            let grads = [&mut dq[queries], &mut dk[keys.clone()], &mut dv[keys]];
            backward_sample(&sample, grads, s, kind);
        }
        Ok((
            Tensor::from_pooled(q.shape(), dq),
            Tensor::from_pooled(k.shape(), dk),
            Tensor::from_pooled(v.shape(), dv),
        ))
    })
}

/// What the backward of one sample reads.
struct Sample<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    out: &'a [T],
    dy: &'a [T],
    lse: &'a [f32],
}

fn backward_sample<T: Scalar>(
    x: &Sample<T>,
    [dq, dk, dv]: [&mut [T]; 3],
    s: Sizes,
    kind: AttentionKind,
) {
    let k_rows = pack_rows(x.k, s.keys, s);
    let k_columns = pack_columns(x.k, s.keys, KEYS, s);
    let v_columns = pack_columns(x.v, s.keys, KEYS, s);
    let q_rows = pack_rows(x.q, s.queries, s);
    let q_columns = pack_columns(x.q, s.queries, TILE, s);
    let dy_rows = pack_rows(x.dy, s.queries, s);
    let dy_columns = pack_columns(x.dy, s.queries, TILE, s);
    let deltas = pack::deltas(x.dy, x.out, s);
    let lse = pack::padded_lse(x.lse, s);

    let blocks = s.key_blocks().div_ceil(BACKWARD_TASKS.div_ceil(s.heads).min(s.key_blocks()));
    let tasks = s.key_blocks().div_ceil(blocks);
    let queries = s.query_tiles() * TILE * s.dim;
    let mut dk_rows = Scratch::take(s.heads * s.keys * s.dim);
    let mut dv_rows = Scratch::take(s.heads * s.keys * s.dim);
    let mut dq_columns = Scratch::take(s.heads * tasks * queries);
    dk_rows
        .par_chunks_mut(s.keys * s.dim)
        .zip(dv_rows.par_chunks_mut(s.keys * s.dim))
        .zip(dq_columns.par_chunks_mut(tasks * queries))
        .enumerate()
        .for_each(|(head, ((dk, dv), dq))| {
            let of = |x| part(x, head, s.heads);
            let head = BackwardHead {
                k_rows: of(&k_rows),
                k_columns: of(&k_columns),
                v_columns: of(&v_columns),
                q_rows: of(&q_rows),
                q_columns: of(&q_columns),
                dy_rows: of(&dy_rows),
                dy_columns: of(&dy_columns),
                deltas: of(&deltas),
                lse: of(&lse),
                queries: s.queries,
                dim: s.dim,
                padded: s.padded(),
                scale: kind.scale,
                causal: kind.causal,
                arithmetic: s.arithmetic,
            };
            let keys = blocks * KEYS;
            dk.par_chunks_mut(keys * s.dim)
                .zip(dv.par_chunks_mut(keys * s.dim))
                .zip(dq.par_chunks_mut(queries))
                .enumerate()
                .for_each(|(task, ((dk, dv), dq))| {
                    backward_keys(&head, task * keys, (dk, dv), dq);
                });
        });
    interleave(dk, &dk_rows, s, kind.scale);
    interleave(dv, &dv_rows, s, 1.);
    unpack_queries(dq, &dq_columns, tasks, s, kind.scale);
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::simd::Simd;

    fn noise<T: Scalar>(len: usize, seed: usize) -> Vec<T> {
        let number = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504. - 1.;
        (0..len).map(|i| T::from_f32(bf16::from_f32(number(i)).to_f32())).collect()
    }

    /// Output and gradients of one sample.
    fn run<T: Scalar>(s: Sizes, causal: bool) -> Vec<f32> {
        let kind = AttentionKind { heads: s.heads, scale: 0.3, causal };
        let (of_q, of_k) = s.samples();
        let (q, k, v) = (noise::<T>(of_q, 1), noise::<T>(of_k, 2), noise::<T>(of_k, 3));
        let (dy, mut out) = (noise::<T>(of_q, 4), noise::<T>(of_q, 5));
        let mut lse = vec![0.; s.heads * s.queries];
        forward_sample([&q, &k, &v], &mut out, &mut lse, (s, kind));
        let [mut dq, mut dk, mut dv] = [of_q, of_k, of_k].map(|len| noise::<T>(len, 6));
        let sample = Sample { q: &q, k: &k, v: &v, out: &out, dy: &dy, lse: &lse };
        backward_sample(&sample, [&mut dq, &mut dk, &mut dv], s, kind);
        [out, dq, dk, dv].concat().into_iter().map(Scalar::to_f32).collect()
    }

    #[test]
    fn every_arithmetic_gives_the_same_results() {
        let best = Simd::detected();
        let sets = [Simd::Avx512, Simd::Avx2, Simd::Portable];
        let from = sets.iter().position(|s| *s == best).unwrap();
        for (queries, keys, heads, dim) in [(70, 115, 2, 40), (33, 5, 1, 7), (64, 230, 3, 24)] {
            for causal in [false, true] {
                let with = |arithmetic| Sizes { batch: 1, heads, queries, keys, dim, arithmetic };
                let portable = with(Arithmetic::Single(Simd::Portable));
                let want = run::<f32>(portable, causal);
                let close = |got: Vec<f32>, tolerance: f32| {
                    for (got, want) in got.iter().zip(&want) {
                        assert!((got - want).abs() < tolerance, "{got} {want}, {queries} {keys}");
                    }
                };
                for simd in &sets[from..] {
                    close(run::<f32>(with(Arithmetic::Single(*simd)), causal), 2e-5);
                    close(run::<bf16>(with(Arithmetic::Single(*simd)), causal), 3e-2);
                }
                close(run::<bf16>(with(Arithmetic::of(DType::BF16)), causal), 3e-2);
            }
        }
    }
}
