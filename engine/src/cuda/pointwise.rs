//! Casts, sums, products and activations, element by element.

use super::card::Card;
use crate::backend::Activation;
use crate::{DType, EngineError, Result, Tensor};

pub(super) fn cast(card: &'static Card, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let _ = (card, x, dtype);
    Err(EngineError::Unsupported("`cast` has no kernel for cards".into()))
}

pub(super) fn activation(card: &'static Card, kind: Activation, x: &Tensor) -> Result<Tensor> {
    let _ = (card, kind, x);
    Err(EngineError::Unsupported("`activation` has no kernel for cards".into()))
}

pub(super) fn activation_backward(
    card: &'static Card,
    kind: Activation,
    dy: Tensor,
    x: &Tensor,
) -> Result<Tensor> {
    let _ = (card, kind, dy, x);
    Err(EngineError::Unsupported("`activation_backward` has no kernel for cards".into()))
}

pub(super) fn geglu(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    let _ = (card, x);
    Err(EngineError::Unsupported("`geglu` has no kernel for cards".into()))
}

pub(super) fn geglu_backward(card: &'static Card, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    let _ = (card, dy, x);
    Err(EngineError::Unsupported("`geglu_backward` has no kernel for cards".into()))
}

pub(super) fn add(card: &'static Card, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _ = (card, a, b);
    Err(EngineError::Unsupported("`add` has no kernel for cards".into()))
}

pub(super) fn accumulate(card: &'static Card, into: Tensor, x: &Tensor) -> Result<Tensor> {
    let _ = (card, into, x);
    Err(EngineError::Unsupported("`accumulate` has no kernel for cards".into()))
}

pub(super) fn scale(card: &'static Card, x: &Tensor, factor: f32) -> Result<Tensor> {
    let _ = (card, x, factor);
    Err(EngineError::Unsupported("`scale` has no kernel for cards".into()))
}

pub(super) fn sum_rows(card: &'static Card, x: &Tensor) -> Result<Tensor> {
    let _ = (card, x);
    Err(EngineError::Unsupported("`sum_rows` has no kernel for cards".into()))
}

pub(super) fn scale_rows(card: &'static Card, x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let _ = (card, x, factors);
    Err(EngineError::Unsupported("`scale_rows` has no kernel for cards".into()))
}
