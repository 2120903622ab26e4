//! Between interleaved heads `[T,heads·dim]` and the layouts that tiles are computed from.
//!
//! With [`super::product::Arithmetic::Pairs`] an element holds two bf16 that follow each other along
//! the sum it will be part of: two dimensions in columns, two tokens in rows.

use std::f32::consts::LOG2_E;
use std::ops::{Deref, DerefMut};

use half::bf16;
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
    fn widen_row<T: Scalar>(out: &mut [f32], x: &[T]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_f32());
    }

    fn round_row<T: Scalar>(out: &mut [T], x: &[f32], factor: f32) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = T::from_f32(*x * factor));
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

/// Two numbers rounded to bf16 in the bits of an f32, the first in the lower half.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> f32 {
    let bits = |x: f32| u32::from(<bf16 as Scalar>::from_f32(x).to_bits());
    f32::from_bits(bits(first) | bits(second) << 16)
}

/// [`pair`] of numbers that are bf16 already.
#[inline(always)]
fn join<T: Scalar>(first: T, second: T) -> f32 {
    let (first, second) = (first.to_f32().to_bits(), second.to_f32().to_bits());
    f32::from_bits(first >> 16 | second & 0xffff_0000)
}

vectorized! {
    fn pair_row<T: Scalar>(out: &mut [f32], first: &[T], second: &[T]) {
        for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
            *out = join(*first, *second);
        }
    }
}

/// `[heads][T][padded]`, or with pairs of tokens `[heads][T/2][padded]`; the padding is zero.
pub(super) fn pack_rows<T: Scalar>(x: &[T], tokens: usize, s: Sizes) -> Scratch {
    let (width, padded, depth) = (s.heads * s.dim, s.padded(), s.arithmetic.depth());
    let rows = tokens.div_ceil(depth);
    let mut out = Scratch::take(s.heads * rows * padded);
    out.par_chunks_mut(rows * padded).enumerate().for_each(|(head, out)| {
        let token = |t: usize| &x[t * width + head * s.dim..][..s.dim];
        out.par_chunks_mut(TILE * padded).enumerate().for_each(|(tile, out)| {
            for (row, out) in out.chunks_exact_mut(padded).enumerate() {
                let (values, zeros) = out.split_at_mut(s.dim);
                let first = (tile * TILE + row) * depth;
                if depth == 1 {
                    widen_row(values, token(first));
                } else if first + 1 < tokens {
                    pair_row(values, token(first), token(first + 1));
                } else {
                    values
                        .iter_mut()
                        .zip(token(first))
                        .for_each(|(o, x)| *o = join(*x, T::default()));
                }
                zeros.fill(0.);
            }
        });
    });
    out
}

/// `[heads][blocks][dim][block]`, or with pairs of dimensions `[heads][blocks][dim/2][block]`;
/// missing tokens are zero.
pub(super) fn pack_columns<T: Scalar>(x: &[T], tokens: usize, block: usize, s: Sizes) -> Scratch {
    let blocks = tokens.div_ceil(block);
    let size = s.dim.div_ceil(s.arithmetic.depth()) * block;
    let mut out = Scratch::take(s.heads * blocks * size);
    out.par_chunks_mut(size).enumerate().for_each(|(index, out)| {
        let (head, first) = (index / blocks, index % blocks * block);
        gather_columns(out, x, (head, first, tokens), s);
    });
    out
}

/// One block of [`pack_columns`]: head, first token and number of all tokens are given in `of`.
pub(super) fn gather_columns<T: Scalar>(
    out: &mut [f32],
    x: &[T],
    of: (usize, usize, usize),
    s: Sizes,
) {
    let (head, first, tokens) = of;
    let (width, depth) = (s.heads * s.dim, s.arithmetic.depth());
    let block = out.len() / s.dim.div_ceil(depth);
    let present = (tokens - first).min(block);
    if present < block {
        out.fill(0.);
    }
    let row = |token: usize| &x[(first + token) * width + head * s.dim..][..s.dim];
    let mut token = 0;
    while token + 8 <= present {
        let rows: [&[T]; 8] = std::array::from_fn(|i| row(token + i));
        transpose(out, rows, (block, token), depth);
        token += 8;
    }
    for token in token..present {
        transpose(out, [row(token)], (block, token), depth);
    }
}

/// Writes `N` tokens beside each other: `at` is the distance of the dimensions and the first token.
#[inline(always)]
fn transpose<T: Scalar, const N: usize>(
    out: &mut [f32],
    rows: [&[T]; N],
    at: (usize, usize),
    depth: usize,
) {
    let ((block, token), dim) = (at, rows[0].len());
    let rows: [&[T]; N] = std::array::from_fn(|i| &rows[i][..dim]);
    let columns = out.chunks_exact_mut(block).map(|column| &mut column[token..token + N]);
    if depth == 1 {
        for (index, column) in (0..dim).zip(columns) {
            for (to, row) in column.iter_mut().zip(rows) {
                *to = row[index].to_f32();
            }
        }
    } else {
        for (index, column) in (0..dim).step_by(2).zip(columns) {
            for (to, row) in column.iter_mut().zip(rows) {
                // The partner of an odd last dimension is zero.
                *to = join(row[index], row.get(index + 1).copied().unwrap_or_default());
            }
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

/// Log-sum-exp in base 2 as `[heads][tiles·TILE]`, missing queries zero.
pub(super) fn padded_lse(lse: &[f32], s: Sizes) -> Scratch {
    let size = s.query_tiles() * TILE;
    let mut out = Scratch::take(s.heads * size);
    for (out, lse) in out.chunks_exact_mut(size).zip(lse.chunks_exact(s.queries)) {
        out.iter_mut().zip(lse).for_each(|(out, lse)| *out = lse * LOG2_E);
        out[s.queries..].fill(0.);
    }
    out
}

/// `[heads][T][dim]`, times `factor`, to `[T,heads·dim]`.
pub(super) fn interleave<T: Scalar>(out: &mut [T], x: &[f32], s: Sizes, factor: f32) {
    let tokens = x.len() / (s.heads * s.dim);
    let width = s.heads * s.dim;
    out.par_chunks_mut(TILE * width).enumerate().for_each(|(tile, out)| {
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            for (head, out) in out.chunks_exact_mut(s.dim).enumerate() {
                let from = (head * tokens + tile * TILE + token) * s.dim;
                round_row(out, &x[from..from + s.dim], factor);
            }
        }
    });
}

/// Sums `[heads][tasks][tiles][dim][TILE]` over the tasks in order, times `factor`, to
/// `[queries,heads·dim]`.
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
                let columns = sum.chunks_exact(TILE).map(|column| column[token]);
                for (out, sum) in out[head * s.dim..][..s.dim].iter_mut().zip(columns) {
                    *out = T::from_f32(sum * factor);
                }
            }
        }
    });
}
