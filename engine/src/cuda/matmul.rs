//! Matrix products: the vendor library's, with the low-rank part of an adapter.

use super::card::Card;
use crate::backend::Gemm;
use crate::{EngineError, Result, Tensor};

pub(super) fn gemm(card: &'static Card, p: &Gemm) -> Result<Tensor> {
    let _ = (card, p);
    Err(EngineError::Unsupported("`gemm` has no kernel for cards".into()))
}
