//! Products that make the weights of composed adapters.

use super::card::Card;
use crate::{EngineError, Result, Tensor};

pub(super) fn multiply(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _ = (card, a, b);
    Err(EngineError::Unsupported("`multiply` has no kernel for cards".into()))
}

pub(super) fn kronecker(card: &'static Card, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let _ = (card, first, second);
    Err(EngineError::Unsupported("`kronecker` has no kernel for cards".into()))
}

pub(super) fn kronecker_backward(
    card: &'static Card,
    dy: &Tensor,
    first: &Tensor,
    second: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let _ = (card, dy, first, second);
    Err(EngineError::Unsupported("`kronecker_backward` has no kernel for cards".into()))
}

pub(super) fn rescale_rows(
    card: &'static Card,
    v: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    let _ = (card, v, magnitude, multiplier);
    Err(EngineError::Unsupported("`rescale_rows` has no kernel for cards".into()))
}

pub(super) fn rescale_rows_backward(
    card: &'static Card,
    dy: &Tensor,
    v: &Tensor,
    norms: &Tensor,
    magnitude: &Tensor,
    multiplier: f32,
) -> Result<(Tensor, Tensor)> {
    let _ = (card, dy, v, norms, magnitude, multiplier);
    Err(EngineError::Unsupported("`rescale_rows_backward` has no kernel for cards".into()))
}
