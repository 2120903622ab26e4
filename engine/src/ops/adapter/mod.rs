//! Trainable updates of frozen layers, one file per way of computing them.
//!
//! A layer asks [`activate`] for its adapter's part of the forward pass and [`Active::backward`] for
//! that of the backward pass. The layer hands in the one thing that depends on its kind: how a weight
//! is applied to the input, and how a weight's gradient comes from input and output gradient.

mod low_rank;

pub use low_rank::LowRankAdapter;

use crate::backend::LowRank;
use crate::tape::Gradients;
use crate::{Result, Tape, Tensor, Value};

/// A trainable update of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Adapter {
    /// A product of two thin matrices, computed beside the frozen weight.
    LowRank(LowRankAdapter),
}

/// An adapter at work on one input.
pub(super) enum Active {
    LowRank(low_rank::Active),
}

/// What reaches the input of a layer through its adapter.
pub(super) struct Through {
    /// Gradient of the hidden values of a low-rank product.
    hidden: Option<Tensor>,
}

/// Starts the adapter of a layer, if it has one, on `x`; `apply` applies a weight of the layer's kind
/// to `x`.
pub(super) fn activate(
    adapter: Option<&Adapter>,
    tape: &Tape,
    x: &Value,
    apply: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Option<Active>> {
    adapter
        .map(|adapter| match adapter {
            Adapter::LowRank(adapter) => adapter.activate(tape, x, apply).map(Active::LowRank),
        })
        .transpose()
}

impl Active {
    /// The product that the layer adds to its own.
    pub(super) fn low_rank(&self) -> Option<LowRank<'_>> {
        match self {
            Active::LowRank(active) => Some(active.low_rank()),
        }
    }

    /// The trainable inputs of the layer.
    pub(super) fn params(&self) -> &[Value] {
        match self {
            Active::LowRank(active) => active.params(),
        }
    }

    /// Adds the gradients of the parameters. `weight_gradient(x, d)` is the f32 gradient of a weight
    /// of the layer's kind that was applied to `x`, given that of its output.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        weight_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Through> {
        match self {
            Active::LowRank(active) => {
                let hidden = active.backward(dy, grads, weight_gradient)?;
                Ok(Through { hidden: Some(hidden) })
            }
        }
    }

    /// The gradient of the hidden values, and the weight that leads from them to the input.
    pub(super) fn input_term<'a>(
        &'a self,
        through: &'a Through,
    ) -> Option<(&'a Tensor, &'a Tensor)> {
        match self {
            Active::LowRank(active) => through.hidden.as_ref().map(|dh| (dh, active.down())),
        }
    }
}
