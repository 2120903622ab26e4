//! Attention without an N x N tensor.

use super::card::Card;
use crate::backend::{AttentionKind, AttentionOut, AttentionSaved};
use crate::{EngineError, Result, Tensor};

pub(super) fn attention(
    card: &'static Card,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: AttentionKind,
) -> Result<AttentionOut> {
    let _ = (card, q, k, v, kind);
    Err(EngineError::Unsupported("`attention` has no kernel for cards".into()))
}

pub(super) fn attention_backward(
    card: &'static Card,
    dy: &Tensor,
    saved: &AttentionSaved,
    kind: AttentionKind,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _ = (card, dy, saved, kind);
    Err(EngineError::Unsupported("`attention_backward` has no kernel for cards".into()))
}
