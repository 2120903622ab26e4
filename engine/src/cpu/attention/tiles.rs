//! The walk of one tile of queries over the keys, and of a range of keys over the queries.

use std::f32::consts::{LN_2, LOG2_E};

use half::bf16;

use super::pack::pair;
use super::product::{Arithmetic, Product, TILE, product_columns, product_rows};
use crate::cpu::simd::{Scalar, vectorized};
use crate::cpu::transcendental::exp2;

/// Keys of a block: a multiple of the rows of a register tile (14, and 8 where three vectors wide).
pub(super) const KEYS: usize = 112;

/// One head as the forward reads it. With pairs, `dim` of the columns and the tokens of the rows are
/// half as many (see [`super::pack`]).
pub(super) struct ForwardHead<'a> {
    /// `[blocks][dim][KEYS]`.
    pub k_columns: &'a [f32],
    /// `[keys][padded]`.
    pub v_rows: &'a [f32],
    pub keys: usize,
    pub dim: usize,
    pub padded: usize,
    pub scale: f32,
    pub causal: bool,
    pub arithmetic: Arithmetic,
}

vectorized! {
    /// Updates the running maximum, turns scores into `2^(factor·(score - maximum))`, adds them to
    /// the running sum; gives the factors of what was summed before.
    fn soften(
        scores: &mut [f32],
        most: &mut [f32; TILE],
        sum: &mut [f32; TILE],
        factor: f32,
    ) -> [f32; TILE] {
        let before = *most;
        let mut highest = before;
        for row in scores.chunks_exact(TILE) {
            for (high, score) in highest.iter_mut().zip(row) {
                *high = if *score > *high { *score } else { *high };
            }
        }
        let mut shift = [0f32; TILE];
        shift.iter_mut().zip(&highest).for_each(|(shift, high)| *shift = -(high * factor));
        let mut fresh = [0f32; TILE];
        for row in scores.chunks_exact_mut(TILE) {
            for ((score, shift), fresh) in row.iter_mut().zip(&shift).zip(&mut fresh) {
                *score = exp2(score.mul_add(factor, *shift));
                *fresh += *score;
            }
        }
        let mut factors = [0f32; TILE];
        for lane in 0..TILE {
            factors[lane] = exp2(before[lane].mul_add(factor, shift[lane]));
            sum[lane] = sum[lane] * factors[lane] + fresh[lane];
        }
        *most = highest;
        factors
    }

    fn multiply_rows(rows: &mut [f32], factors: &[f32; TILE]) {
        for row in rows.chunks_exact_mut(TILE) {
            row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
        }
    }

    /// Scores to probabilities, their gradients to those of the scores; `lse` is in base 2.
    fn harden(scores: &mut [f32], slopes: &mut [f32], lse: &[f32], deltas: &[f32], factor: f32) {
        for (row, slopes) in scores.chunks_exact_mut(TILE).zip(slopes.chunks_exact_mut(TILE)) {
            for (((score, slope), lse), delta) in row.iter_mut().zip(slopes).zip(lse).zip(deltas) {
                *score = exp2(score.mul_add(factor, -lse));
                *slope = *score * (*slope - delta);
            }
        }
    }

    /// Pairs of rows as pairs of bf16; a last row alone gets zeros.
    fn pair_rows(out: &mut [f32], rows: &[f32]) {
        let zeros = [0f32; TILE];
        for (out, rows) in out.chunks_exact_mut(TILE).zip(rows.chunks(2 * TILE)) {
            let (first, second) = rows.split_at(TILE);
            let second = if second.is_empty() { &zeros } else { second };
            for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
                *out = pair(*first, *second);
            }
        }
    }

    /// Neighbours in a row as pairs of bf16.
    fn pair_lanes(out: &mut [f32], rows: &[f32]) {
        let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
        out.iter_mut().zip(rows).for_each(|(out, x)| *out = Scalar::from_f32(*x));
    }
}

/// Hides keys behind their queries; the tile starts at key `key` and query `query`.
fn hide(scores: &mut [f32], key: usize, query: usize) {
    for (row, scores) in scores.chunks_exact_mut(TILE).enumerate() {
        let blind = (key + row).saturating_sub(query).min(TILE);
        scores[..blind].fill(f32::NEG_INFINITY);
    }
}

/// Columns worth computing for `present` queries.
fn columns(present: usize) -> usize {
    present.min(TILE).next_multiple_of(16)
}

/// Attention of the queries from `first` on, packed as a block of columns: `[n][dim]` and `[n]`.
pub(super) fn forward_queries(
    head: &ForwardHead,
    queries: &[f32],
    first: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let ForwardHead { keys, dim, padded, arithmetic, .. } = *head;
    let (present, depth) = (lse.len(), arithmetic.depth());
    let factor = head.scale * LOG2_E;
    let (mut scores, mut pairs) = ([0f32; KEYS * TILE], [0f32; KEYS / 2 * TILE]);
    let mut sums = vec![0f32; dim * TILE];
    let (mut most, mut total) = ([f32::NEG_INFINITY; TILE], [0f32; TILE]);
    let size = dim.div_ceil(depth) * KEYS;
    for (block, k_columns) in head.k_columns.chunks_exact(size).enumerate() {
        let key = block * KEYS;
        if head.causal && key >= first + present {
            break;
        }
        let count = KEYS.min(keys - key);
        let scores = &mut scores[..count * TILE];
        let product = Product {
            rows: count,
            columns: columns(present),
            steps: dim.div_ceil(depth),
            a_step: KEYS,
            b_step: TILE,
            c_row: TILE,
            accumulate: false,
        };
        product_columns(arithmetic, &product, k_columns, queries, scores);
        if head.causal && key + count > first {
            hide(scores, key, first);
        }
        let factors = soften(scores, &mut most, &mut total, factor);
        if block > 0 && factors.iter().any(|f| *f != 1.) {
            multiply_rows(&mut sums, &factors);
        }
        let steps = count.div_ceil(depth);
        let weights = if depth == 2 {
            pair_rows(&mut pairs[..steps * TILE], scores);
            &pairs[..steps * TILE]
        } else {
            scores
        };
        let product = Product { rows: dim, steps, a_step: padded, accumulate: true, ..product };
        let values = &head.v_rows[key / depth * padded..];
        product_columns(arithmetic, &product, values, weights, &mut sums);
    }
    for (query, (out, lse)) in out.chunks_exact_mut(dim).zip(lse).enumerate() {
        let inverse = 1. / total[query];
        for (out, sums) in out.iter_mut().zip(sums.chunks_exact(TILE)) {
            *out = sums[query] * inverse;
        }
        *lse = most[query].mul_add(factor, total[query].log2()) * LN_2;
    }
}

/// One head as the backward reads it, packed like a [`ForwardHead`].
pub(super) struct BackwardHead<'a> {
    /// `[keys][padded]`.
    pub k_rows: &'a [f32],
    /// `[blocks][dim][KEYS]`.
    pub k_columns: &'a [f32],
    /// `[blocks][dim][KEYS]`.
    pub v_columns: &'a [f32],
    /// `[queries][padded]`.
    pub q_rows: &'a [f32],
    /// `[tiles][dim][TILE]`.
    pub q_columns: &'a [f32],
    /// `[queries][padded]`.
    pub dy_rows: &'a [f32],
    /// `[tiles][dim][TILE]`.
    pub dy_columns: &'a [f32],
    /// `[tiles·TILE]`.
    pub deltas: &'a [f32],
    /// `[tiles·TILE]`, base 2.
    pub lse: &'a [f32],
    pub queries: usize,
    pub dim: usize,
    pub padded: usize,
    pub scale: f32,
    pub causal: bool,
    pub arithmetic: Arithmetic,
}

/// Gradients of the keys and values from `first` on, `[n][dim]` each, and what they add to the
/// gradients of the queries, `[tiles][dim][TILE]`; the factor `scale` of queries and keys is missing.
pub(super) fn backward_keys(
    head: &BackwardHead,
    first: usize,
    grads: (&mut [f32], &mut [f32]),
    dq: &mut [f32],
) {
    let BackwardHead { dim, padded, .. } = *head;
    dq.fill(0.);
    let mut scratch = KeyScratch {
        scores: vec![0.; KEYS * TILE],
        slopes: vec![0.; KEYS * TILE],
        pairs: vec![0.; KEYS / 2 * TILE],
        dk: vec![0.; KEYS * padded],
        dv: vec![0.; KEYS * padded],
    };
    let (dk, dv) = grads;
    let blocks = dk.chunks_mut(KEYS * dim).zip(dv.chunks_mut(KEYS * dim));
    for (block, (dk, dv)) in blocks.enumerate() {
        let (key, count) = (first + block * KEYS, dk.len() / dim);
        scratch.dk.fill(0.);
        scratch.dv.fill(0.);
        for (tile, dq) in dq.chunks_exact_mut(dim * TILE).enumerate() {
            backward_tile(head, (key, count), tile, &mut scratch, dq);
        }
        for (to, from) in [(dk, &scratch.dk), (dv, &scratch.dv)] {
            for (to, from) in to.chunks_exact_mut(dim).zip(from.chunks_exact(padded)) {
                to.copy_from_slice(&from[..dim]);
            }
        }
    }
}

struct KeyScratch {
    /// `[KEYS][TILE]`.
    scores: Vec<f32>,
    slopes: Vec<f32>,
    /// Half as much.
    pairs: Vec<f32>,
    /// `[KEYS][padded]`.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Adds what a block of keys (first and number) and a tile of queries give each other.
fn backward_tile(
    head: &BackwardHead,
    keys: (usize, usize),
    tile: usize,
    scratch: &mut KeyScratch,
    dq: &mut [f32],
) {
    let BackwardHead { queries, dim, padded, arithmetic, .. } = *head;
    let ((key, count), query) = (keys, tile * TILE);
    let present = TILE.min(queries - query);
    if head.causal && key >= query + present {
        return;
    }
    let depth = arithmetic.depth();
    let height = dim.div_ceil(depth);
    let scores = &mut scratch.scores[..count * TILE];
    let slopes = &mut scratch.slopes[..count * TILE];
    let product = Product {
        rows: count,
        columns: columns(present),
        steps: height,
        a_step: KEYS,
        b_step: TILE,
        c_row: TILE,
        accumulate: false,
    };
    let (q, dy) = (&head.q_columns[query * height..], &head.dy_columns[query * height..]);
    product_columns(arithmetic, &product, &head.k_columns[key * height..], q, scores);
    product_columns(arithmetic, &product, &head.v_columns[key * height..], dy, slopes);
    if head.causal && key + count > query {
        hide(scores, key, query);
    }
    let lanes = query..query + TILE;
    let factor = head.scale * LOG2_E;
    harden(scores, slopes, &head.lse[lanes.clone()], &head.deltas[lanes], factor);

    let rows = Product {
        rows: count,
        columns: padded,
        steps: present.div_ceil(depth),
        a_step: 1,
        b_step: padded,
        c_row: padded,
        accumulate: true,
    };
    let steps = count.div_ceil(depth);
    let onto = Product { rows: dim, steps, a_step: padded, accumulate: true, ..product };
    let dy_rows = &head.dy_rows[query / depth * padded..];
    let q_rows = &head.q_rows[query / depth * padded..];
    let k_rows = &head.k_rows[key / depth * padded..];
    if depth == 1 {
        product_rows(arithmetic, &rows, scores, dy_rows, &mut scratch.dv);
        product_rows(arithmetic, &rows, slopes, q_rows, &mut scratch.dk);
        product_columns(arithmetic, &onto, k_rows, slopes, dq);
    } else {
        let pairs = &mut scratch.pairs[..count * TILE / 2];
        pair_lanes(pairs, scores);
        product_rows(arithmetic, &rows, pairs, dy_rows, &mut scratch.dv);
        pair_lanes(pairs, slopes);
        product_rows(arithmetic, &rows, pairs, q_rows, &mut scratch.dk);
        let pairs = &mut scratch.pairs[..steps * TILE];
        pair_rows(pairs, slopes);
        product_columns(arithmetic, &onto, k_rows, pairs, dq);
    }
}
