//! Operations that move elements.

use super::card::Card;
use crate::{EngineError, Ids, Result, Tensor};

pub(super) fn concat_last(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _ = (card, a, b);
    Err(EngineError::Unsupported("`concat_last` has no kernel for cards".into()))
}

pub(super) fn split_last(card: &'static Card, x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
    let _ = (card, x, at);
    Err(EngineError::Unsupported("`split_last` has no kernel for cards".into()))
}

pub(super) fn upsample2x(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    let _ = (card, x);
    Err(EngineError::Unsupported("`upsample2x` has no kernel for cards".into()))
}

pub(super) fn upsample2x_backward(card: &'static Card, dy: &Tensor) -> Result<Tensor> {
    let _ = (card, dy);
    Err(EngineError::Unsupported("`upsample2x_backward` has no kernel for cards".into()))
}

pub(super) fn embedding(card: &'static Card, table: &Tensor, ids: &Ids) -> Result<Tensor> {
    let _ = (card, table, ids);
    Err(EngineError::Unsupported("`embedding` has no kernel for cards".into()))
}

pub(super) fn concat_rows(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _ = (card, a, b);
    Err(EngineError::Unsupported("`concat_rows` has no kernel for cards".into()))
}
