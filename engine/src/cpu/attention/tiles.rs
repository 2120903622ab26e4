//! The walk of one tile of queries over the keys, and of a range of keys over the queries.

use super::product::{Product, TILE, product_columns, product_rows};
use crate::cpu::simd::{Simd, vectorized};
use crate::cpu::transcendental::exp;

/// Keys of a block: a multiple of the rows of a register tile (14, and 8 where three vectors wide).
pub(super) const KEYS: usize = 112;

/// One head as the forward reads it.
pub(super) struct ForwardHead<'a> {
    /// `[blocks][dim][KEYS]`.
    pub k_columns: &'a [f32],
    /// `[keys][padded]`.
    pub v_rows: &'a [f32],
    pub keys: usize,
    pub dim: usize,
    pub padded: usize,
    pub causal: bool,
}

vectorized! {
    /// Updates the running maximum, turns scores into `e^(score - maximum)`, adds them to the running
    /// sum; gives the factors of what was summed before.
    fn soften(scores: &mut [f32], most: &mut [f32; TILE], sum: &mut [f32; TILE]) -> [f32; TILE] {
        let before = *most;
        let mut highest = before;
        for row in scores.chunks_exact(TILE) {
            for (high, score) in highest.iter_mut().zip(row) {
                *high = if *score > *high { *score } else { *high };
            }
        }
        let mut fresh = [0f32; TILE];
        for row in scores.chunks_exact_mut(TILE) {
            for ((score, high), fresh) in row.iter_mut().zip(&highest).zip(&mut fresh) {
                *score = exp(*score - *high);
                *fresh += *score;
            }
        }
        let mut factors = [0f32; TILE];
        for lane in 0..TILE {
            factors[lane] = exp(before[lane] - highest[lane]);
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

    /// Scores to probabilities, their gradients to those of the scores.
    fn harden(scores: &mut [f32], slopes: &mut [f32], lse: &[f32], deltas: &[f32]) {
        for (row, slopes) in scores.chunks_exact_mut(TILE).zip(slopes.chunks_exact_mut(TILE)) {
            for (((score, slope), lse), delta) in row.iter_mut().zip(slopes).zip(lse).zip(deltas) {
                *score = exp(*score - lse);
                *slope = *score * (*slope - delta);
            }
        }
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

/// Attention of the queries from `first` on, `[dim][TILE]` and scaled: `[n][dim]` and `[n]`.
pub(super) fn forward_queries(
    simd: Simd,
    head: &ForwardHead,
    queries: &[f32],
    first: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let ForwardHead { keys, dim, .. } = *head;
    let present = lse.len();
    let mut scores = [0f32; KEYS * TILE];
    let mut sums = vec![0f32; dim * TILE];
    let (mut most, mut total) = ([f32::NEG_INFINITY; TILE], [0f32; TILE]);
    for (block, k_columns) in head.k_columns.chunks_exact(dim * KEYS).enumerate() {
        let key = block * KEYS;
        if head.causal && key >= first + present {
            break;
        }
        let count = KEYS.min(keys - key);
        let scores = &mut scores[..count * TILE];
        let product = Product {
            rows: count,
            columns: columns(present),
            steps: dim,
            a_step: KEYS,
            b_step: TILE,
            c_row: TILE,
            accumulate: false,
        };
        product_columns(simd, &product, k_columns, queries, scores);
        if head.causal && key + count > first {
            hide(scores, key, first);
        }
        let factors = soften(scores, &mut most, &mut total);
        if block > 0 && factors.iter().any(|f| *f != 1.) {
            multiply_rows(&mut sums, &factors);
        }
        let product =
            Product { rows: dim, steps: count, a_step: head.padded, accumulate: true, ..product };
        product_columns(simd, &product, &head.v_rows[key * head.padded..], scores, &mut sums);
    }
    for (query, (out, lse)) in out.chunks_exact_mut(dim).zip(lse).enumerate() {
        let inverse = 1. / total[query];
        for (out, sums) in out.iter_mut().zip(sums.chunks_exact(TILE)) {
            *out = sums[query] * inverse;
        }
        *lse = most[query] + total[query].ln();
    }
}

/// One head as the backward reads it; queries are scaled.
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
    /// `[tiles·TILE]`.
    pub lse: &'a [f32],
    pub queries: usize,
    pub dim: usize,
    pub padded: usize,
    pub causal: bool,
}

/// Gradients of the keys from `first` on, `[n][dim]` each, and what they add to the gradients of
/// the unscaled queries before the factor of the scores: `[tiles][dim][TILE]`.
pub(super) fn backward_keys(
    simd: Simd,
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
            backward_tile(simd, head, (key, count), tile, &mut scratch, dq);
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
    /// `[KEYS][padded]`.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

fn backward_tile(
    simd: Simd,
    head: &BackwardHead,
    keys: (usize, usize),
    tile: usize,
    scratch: &mut KeyScratch,
    dq: &mut [f32],
) {
    let BackwardHead { queries, dim, padded, .. } = *head;
    let ((key, count), query) = (keys, tile * TILE);
    let present = TILE.min(queries - query);
    if head.causal && key >= query + present {
        return;
    }
    let block = key / KEYS * dim * KEYS;
    let columns_at = query * dim;
    let scores = &mut scratch.scores[..count * TILE];
    let slopes = &mut scratch.slopes[..count * TILE];
    let product = Product {
        rows: count,
        columns: columns(present),
        steps: dim,
        a_step: KEYS,
        b_step: TILE,
        c_row: TILE,
        accumulate: false,
    };
    let (q, dy) = (&head.q_columns[columns_at..], &head.dy_columns[columns_at..]);
    product_columns(simd, &product, &head.k_columns[block..], q, scores);
    product_columns(simd, &product, &head.v_columns[block..], dy, slopes);
    if head.causal && key + count > query {
        hide(scores, key, query);
    }
    let lanes = query..query + TILE;
    harden(scores, slopes, &head.lse[lanes.clone()], &head.deltas[lanes]);

    let rows = Product {
        rows: count,
        columns: padded,
        steps: present,
        a_step: 1,
        b_step: padded,
        c_row: padded,
        accumulate: true,
    };
    product_rows(simd, &rows, scores, &head.dy_rows[query * padded..], &mut scratch.dv);
    product_rows(simd, &rows, slopes, &head.q_rows[query * padded..], &mut scratch.dk);
    let onto = Product { rows: dim, steps: count, a_step: padded, accumulate: true, ..product };
    product_columns(simd, &onto, &head.k_rows[key * padded..], slopes, dq);
}
