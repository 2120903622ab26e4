//! AdamW over one flat buffer.

use super::card::Card;
use crate::backend::AdamWStep;
use crate::{EngineError, Result, Tensor};

pub(super) fn adamw(
    card: &'static Card,
    p: &AdamWStep,
    param: &mut Tensor,
    grad: &Tensor,
    moments: (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let _ = (card, p, param, grad, moments);
    Err(EngineError::Unsupported("`adamw` has no kernel for cards".into()))
}
