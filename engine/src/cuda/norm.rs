//! Group and layer normalisation.

use super::card::Card;
use crate::backend::GroupNormShape;
use crate::{EngineError, Result, Tensor};

pub(super) fn group_norm(
    card: &'static Card,
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    shape: GroupNormShape,
) -> Result<(Tensor, Tensor)> {
    let _ = (card, x, gamma, beta, shape);
    Err(EngineError::Unsupported("`group_norm` has no kernel for cards".into()))
}

pub(super) fn group_norm_backward(
    card: &'static Card,
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    affine: (&Tensor, &Tensor),
    shape: GroupNormShape,
) -> Result<Tensor> {
    let _ = (card, dy, x, stats, affine, shape);
    Err(EngineError::Unsupported("`group_norm_backward` has no kernel for cards".into()))
}

pub(super) fn layer_norm(
    card: &'static Card,
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let _ = (card, x, gamma, beta, eps);
    Err(EngineError::Unsupported("`layer_norm` has no kernel for cards".into()))
}

pub(super) fn layer_norm_backward(
    card: &'static Card,
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    gamma: &Tensor,
) -> Result<Tensor> {
    let _ = (card, dy, x, stats, gamma);
    Err(EngineError::Unsupported("`layer_norm_backward` has no kernel for cards".into()))
}
