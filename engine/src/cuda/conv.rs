//! Convolutions: the vendor library's, or windows laid out for a matrix product.

use super::card::Card;
use crate::backend::{Conv, ConvGeometry};
use crate::{EngineError, Result, Tensor};

pub(super) fn conv2d(card: &'static Card, p: &Conv) -> Result<Tensor> {
    let _ = (card, p);
    Err(EngineError::Unsupported("`conv2d` has no kernel for cards".into()))
}

pub(super) fn conv2d_backward_input(
    card: &'static Card,
    dy: &Tensor,
    w: &Tensor,
    geometry: ConvGeometry,
    input: (usize, usize),
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let _ = (card, dy, w, geometry, input, onto);
    Err(EngineError::Unsupported("`conv2d_backward_input` has no kernel for cards".into()))
}

pub(super) fn conv2d_backward_weight(
    card: &'static Card,
    x: &Tensor,
    dy: &Tensor,
    geometry: ConvGeometry,
) -> Result<Tensor> {
    let _ = (card, x, dy, geometry);
    Err(EngineError::Unsupported("`conv2d_backward_weight` has no kernel for cards".into()))
}
