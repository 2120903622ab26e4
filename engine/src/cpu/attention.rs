//! Scaled dot-product attention that never holds an N x N tensor.

use rayon::prelude::*;

use super::simd::{Scalar, with_scalar};
use crate::backend::{AttentionKind, AttentionOut, AttentionSaved};
use crate::{EngineError, Result, Tensor, pool};

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    dim: usize,
}

fn sizes(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Sizes> {
    let fail = || Err(EngineError::shape(op, format!("q {q:?}, k {k:?}, v {v:?}, {heads} heads")));
    let (&[batch, queries, width], &[kb, keys, kw]) = (q.shape(), k.shape()) else {
        return fail();
    };
    let types = q.dtype() == k.dtype() && k.dtype() == v.dtype();
    let split = heads > 0 && width > 0 && width % heads == 0;
    if !types || !split || (kb, kw) != (batch, width) || k.shape() != v.shape() || k.is_empty() {
        return fail();
    }
    Ok(Sizes { batch, heads, queries, keys, dim: width / heads })
}

/// `[B,T,heads·dim]` to f32 `[B·heads,T,dim]`.
fn by_head<T: Scalar>(x: &[T], tokens: usize, s: Sizes) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut((tokens * s.dim).max(1)).enumerate().for_each(|(bh, out)| {
        let (b, h) = (bh / s.heads, bh % s.heads);
        for (t, out) in out.chunks_exact_mut(s.dim).enumerate() {
            let from = ((b * tokens + t) * s.heads + h) * s.dim;
            out.iter_mut().zip(&x[from..from + s.dim]).for_each(|(o, x)| *o = x.to_f32());
        }
    });
    out
}

/// The way back from [`by_head`].
fn interleave<T: Scalar>(x: &[f32], tokens: usize, s: Sizes) -> Vec<T> {
    let mut out = pool::take::<T>(x.len());
    out.par_chunks_mut(s.heads * s.dim).enumerate().for_each(|(row, out)| {
        let (b, t) = (row / tokens, row % tokens);
        for (h, out) in out.chunks_exact_mut(s.dim).enumerate() {
            let from = ((b * s.heads + h) * tokens + t) * s.dim;
            out.iter_mut().zip(&x[from..from + s.dim]).for_each(|(o, x)| *o = T::from_f32(*x));
        }
    });
    out
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f32], x: &[f32], factor: f32) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += x * factor);
}

/// Attention of each query over the keys it sees.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: AttentionKind,
) -> Result<AttentionOut> {
    const OP: &str = "attention";
    let s = sizes(OP, q, k, v, kind.heads)?;
    with_scalar!(q.dtype(), T => {
        let qs = by_head::<T>(&q.elements(OP)?, s.queries, s);
        let ks = by_head::<T>(&k.elements(OP)?, s.keys, s);
        let vs = by_head::<T>(&v.elements(OP)?, s.keys, s);
        let mut out = vec![0f32; qs.len()];
        let mut lse = pool::take::<f32>(s.batch * s.heads * s.queries);
        out.par_chunks_mut(s.dim).zip(&mut lse).enumerate().for_each(|(row, (out, lse))| {
            let (bh, t) = (row / s.queries, row % s.queries);
            let seen = if kind.causal { s.keys.min(t + 1) } else { s.keys };
            let at = bh * s.keys * s.dim;
            let keys = ks[at..at + seen * s.dim].chunks_exact(s.dim);
            let query = &qs[row * s.dim..][..s.dim];
            let scores: Vec<f32> = keys.map(|k| dot(query, k) * kind.scale).collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = scores.iter().map(|s| (s - max).exp()).sum();
            for (score, v) in scores.iter().zip(vs[at..].chunks_exact(s.dim)) {
                add_scaled(out, v, (score - max).exp() / sum);
            }
            *lse = max + sum.ln();
        });
        let out = Tensor::from_pooled(q.shape(), interleave::<T>(&out, s.queries, s));
        Ok(AttentionOut { out, lse: Tensor::from_pooled(&[s.batch, s.heads, s.queries], lse) })
    })
}

/// Gradients of q, k and v.
pub(super) fn attention_backward(
    dy: &Tensor,
    saved: &AttentionSaved,
    kind: AttentionKind,
) -> Result<(Tensor, Tensor, Tensor)> {
    const OP: &str = "attention_backward";
    let AttentionSaved { q, k, v, out, lse } = *saved;
    let s = sizes(OP, q, k, v, kind.heads)?;
    let fits = |t: &Tensor| t.shape() == q.shape() && t.dtype() == q.dtype();
    if !fits(dy) || !fits(out) || lse.shape() != [s.batch, s.heads, s.queries] {
        let detail = format!("q {q:?}, dy {dy:?}, out {out:?}, lse {lse:?}");
        return Err(EngineError::shape(OP, detail));
    }
    let lse = lse.elements::<f32>(OP)?;
    let lse: &[f32] = &lse;
    with_scalar!(q.dtype(), T => {
        let qs = by_head::<T>(&q.elements(OP)?, s.queries, s);
        let ks = by_head::<T>(&k.elements(OP)?, s.keys, s);
        let vs = by_head::<T>(&v.elements(OP)?, s.keys, s);
        let os = by_head::<T>(&out.elements(OP)?, s.queries, s);
        let dys = by_head::<T>(&dy.elements(OP)?, s.queries, s);
        let mut dq = vec![0f32; qs.len()];
        let (mut dk, mut dv) = (vec![0f32; ks.len()], vec![0f32; ks.len()]);
        let (d, per_head) = (s.dim, s.keys * s.dim);
        dq.par_chunks_mut((s.queries * d).max(1))
            .zip(dk.par_chunks_mut(per_head))
            .zip(dv.par_chunks_mut(per_head))
            .enumerate()
            .for_each(|(bh, ((dq, dk), dv))| {
                for (t, dq) in dq.chunks_exact_mut(d).enumerate() {
                    let row = bh * s.queries + t;
                    let (query, dy) = (&qs[row * d..][..d], &dys[row * d..][..d]);
                    let delta = dot(dy, &os[row * d..][..d]);
                    let seen = if kind.causal { s.keys.min(t + 1) } else { s.keys };
                    for j in 0..seen {
                        let (k, v) = (&ks[bh * per_head + j * d..][..d], &vs[bh * per_head + j * d..][..d]);
                        let p = (dot(query, k) * kind.scale - lse[row]).exp();
                        let ds = p * (dot(dy, v) - delta) * kind.scale;
                        add_scaled(&mut dv[j * d..][..d], dy, p);
                        add_scaled(&mut dk[j * d..][..d], query, ds);
                        add_scaled(dq, k, ds);
                    }
                }
            });
        let dq = Tensor::from_pooled(q.shape(), interleave::<T>(&dq, s.queries, s));
        let dk = Tensor::from_pooled(k.shape(), interleave::<T>(&dk, s.keys, s));
        let dv = Tensor::from_pooled(v.shape(), interleave::<T>(&dv, s.keys, s));
        Ok((dq, dk, dv))
    })
}
