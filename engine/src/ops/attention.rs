//! Scaled dot-product attention (flash-style: saves log-sum-exp, no N x N tensor) and embeddings.

use crate::backend::{AttentionKind, AttentionSaved};
use crate::{Ids, Result, Tape, Tensor, Value};

/// Heads and mask of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Number of heads; divides the width.
    pub heads: usize,
    /// Token `i` sees keys `0..=i` only.
    pub causal: bool,
}

impl<'m> Tape<'m> {
    /// Attention of `q` `[B,Tq,C]` over `k`, `v` `[B,Tk,C]`, scores scaled by `1/sqrt(C/heads)`.
    pub fn attention(
        &self,
        q: &Value,
        k: &Value,
        v: &Value,
        shape: AttentionShape,
    ) -> Result<Value> {
        let head_dim = q.tensor().last_dim() / shape.heads.max(1);
        let scale = 1. / (head_dim as f32).sqrt();
        let kind = AttentionKind { heads: shape.heads, scale, causal: shape.causal };
        let backend = q.tensor().device().backend();
        let result = backend.attention(q.tensor(), k.tensor(), v.tensor(), kind)?;
        let (out, lse) = (result.out, result.lse);
        let saved = [q, k, v].map(|value| value.tensor().clone());
        let origins = [q, k, v].map(Value::origin);
        let saved_out = out.clone();
        Ok(self.record(out, &[q, k, v], move |dy, grads| {
            let [q, k, v] = &saved;
            let saved = AttentionSaved { q, k, v, out: &saved_out, lse: &lse };
            let (dq, dk, dv) = dy.device().backend().attention_backward(&dy, &saved, kind)?;
            grads.add(origins[0], dq)?;
            grads.add(origins[1], dk)?;
            grads.add(origins[2], dv)
        }))
    }
}

/// A frozen table of rows.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[N,C]`.
    pub table: Tensor,
}

impl Embedding {
    /// The rows chosen by `ids`: `[ids.len(),C]`.
    pub fn forward(&self, ids: &Ids) -> Result<Value> {
        Ok(Value::constant(self.table.device().backend().embedding(&self.table, ids)?))
    }
}
