//! Between interleaved heads `[T,heads·dim]` and the f32 layouts that tiles are computed from.

use std::ops::{Deref, DerefMut};

use rayon::prelude::*;

use super::Sizes;
use super::product::TILE;
use crate::cpu::simd::{Scalar, vectorized};
use crate::pool;

/// A buffer of the pool that goes back to it. Its contents are unspecified at first.
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    pub(super) fn take(len: usize) -> Self {
        Self(pool::take(len))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        pool::give(std::mem::take(&mut self.0));
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

vectorized! {
    fn scaled_row<T: Scalar>(out: &mut [f32], x: &[T], factor: f32) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_f32() * factor);
    }

    fn round_row<T: Scalar>(out: &mut [T], x: &[f32]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = T::from_f32(*x));
    }

    fn dot_rows<T: Scalar>(a: &[T], b: &[T]) -> f32 {
        let mut lanes = [0f32; 8];
        let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
        let rest = a8.remainder().iter().zip(b8.remainder());
        let rest: f32 = rest.map(|(a, b)| a.to_f32() * b.to_f32()).sum();
        for (a, b) in a8.zip(b8) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a.to_f32() * b.to_f32();
            }
        }
        lanes.iter().sum::<f32>() + rest
    }
}

/// `[heads][T][padded]`, times `factor`, the padding zero.
pub(super) fn pack_rows<T: Scalar>(x: &[T], tokens: usize, s: Sizes, factor: f32) -> Scratch {
    let (width, padded) = (s.heads * s.dim, s.padded());
    let mut out = Scratch::take(s.heads * tokens * padded);
    out.par_chunks_mut(tokens * padded).enumerate().for_each(|(head, out)| {
        out.par_chunks_mut(TILE * padded).enumerate().for_each(|(tile, out)| {
            for (token, out) in out.chunks_exact_mut(padded).enumerate() {
                let from = (tile * TILE + token) * width + head * s.dim;
                let (values, zeros) = out.split_at_mut(s.dim);
                scaled_row(values, &x[from..from + s.dim], factor);
                zeros.fill(0.);
            }
        });
    });
    out
}

/// `[heads][blocks][dim][block]`, times `factor`, missing tokens zero; `tokens` is the number of
/// tokens and of those in a block.
pub(super) fn pack_columns<T: Scalar>(
    x: &[T],
    tokens: (usize, usize),
    s: Sizes,
    factor: f32,
) -> Scratch {
    let (tokens, block) = tokens;
    let blocks = tokens.div_ceil(block);
    let mut out = Scratch::take(s.heads * blocks * s.dim * block);
    out.par_chunks_mut(s.dim * block).enumerate().for_each(|(index, out)| {
        let (head, first) = (index / blocks, index % blocks * block);
        gather_columns(out, x, (head, first, tokens), s, factor);
    });
    out
}

/// One block of [`pack_columns`]: head, first token and number of all tokens are given in `of`.
pub(super) fn gather_columns<T: Scalar>(
    out: &mut [f32],
    x: &[T],
    of: (usize, usize, usize),
    s: Sizes,
    factor: f32,
) {
    let (head, first, tokens) = of;
    let (width, block) = (s.heads * s.dim, out.len() / s.dim);
    let present = (tokens - first).min(block);
    if present < block {
        out.fill(0.);
    }
    for token in 0..present {
        let from = (first + token) * width + head * s.dim;
        for (dim, x) in x[from..from + s.dim].iter().enumerate() {
            out[dim * block + token] = x.to_f32() * factor;
        }
    }
}

/// `Σ dy·out` of each head and query: `[heads][tiles·TILE]`, missing queries zero.
pub(super) fn deltas<T: Scalar>(dy: &[T], out: &[T], s: Sizes) -> Scratch {
    let mut deltas = Scratch::take(s.heads * s.query_tiles() * TILE);
    deltas.par_chunks_mut(s.query_tiles() * TILE).enumerate().for_each(|(head, deltas)| {
        deltas.fill(0.);
        for (query, delta) in deltas.iter_mut().take(s.queries).enumerate() {
            let from = (query * s.heads + head) * s.dim;
            *delta = dot_rows(&dy[from..from + s.dim], &out[from..from + s.dim]);
        }
    });
    deltas
}

/// Log-sum-exp as `[heads][tiles·TILE]`, missing queries zero.
pub(super) fn padded_lse(lse: &[f32], s: Sizes) -> Scratch {
    let size = s.query_tiles() * TILE;
    let mut out = Scratch::take(s.heads * size);
    for (out, lse) in out.chunks_exact_mut(size).zip(lse.chunks_exact(s.queries)) {
        out[..s.queries].copy_from_slice(lse);
        out[s.queries..].fill(0.);
    }
    out
}

/// `[heads][T][dim]` to `[T,heads·dim]`.
pub(super) fn interleave<T: Scalar>(out: &mut [T], x: &[f32], tokens: usize, s: Sizes) {
    let width = s.heads * s.dim;
    out.par_chunks_mut(TILE * width).enumerate().for_each(|(tile, out)| {
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            for (head, out) in out.chunks_exact_mut(s.dim).enumerate() {
                let from = (head * tokens + tile * TILE + token) * s.dim;
                round_row(out, &x[from..from + s.dim]);
            }
        }
    });
}

/// Sums `[heads][tasks][tiles][dim][TILE]` over the tasks in order to `[queries,heads·dim]`.
pub(super) fn unpack_queries<T: Scalar>(
    out: &mut [T],
    x: &[f32],
    tasks: usize,
    s: Sizes,
    factor: f32,
) {
    let (width, size) = (s.heads * s.dim, s.dim * TILE);
    let tiles = s.query_tiles();
    out.par_chunks_mut(TILE * width).enumerate().for_each(|(tile, out)| {
        let mut sum = vec![0f32; size];
        for head in 0..s.heads {
            sum.fill(0.);
            for task in 0..tasks {
                let from = ((head * tasks + task) * tiles + tile) * size;
                sum.iter_mut().zip(&x[from..from + size]).for_each(|(s, x)| *s += x);
            }
            for (token, out) in out.chunks_exact_mut(width).enumerate() {
                for (dim, out) in out[head * s.dim..][..s.dim].iter_mut().enumerate() {
                    *out = T::from_f32(sum[dim * TILE + token] * factor);
                }
            }
        }
    });
}
