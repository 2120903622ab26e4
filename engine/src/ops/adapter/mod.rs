//! Trainable updates of frozen layers, one file per way of computing them.
//!
//! A layer asks [`activate`] for its adapter's part of the forward pass and [`Active::backward`] for
//! that of the backward pass. The layer hands in the one thing that depends on its kind: how a weight
//! is applied to the input, and how a weight's gradient comes from input and output gradient.

mod composed;
mod draws;
mod factor;
mod low_rank;
mod nested;

pub use composed::{ComposedAdapter, Magnitude, Update};
pub use draws::{Drawn, Draws, Dropouts};
pub use factor::Factor;
pub use low_rank::LowRankAdapter;
pub use nested::NestedAdapter;

use crate::backend::LowRank;
use crate::tape::Gradients;
use crate::{Result, Tape, Tensor, Value};

/// A trainable update of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Adapter {
    /// A product of two thin matrices, computed beside the frozen weight.
    LowRank(LowRankAdapter),
    /// The same, trained in blocks of ranks.
    Nested(NestedAdapter),
    /// A weight made of small tensors in place of the frozen one.
    Composed(ComposedAdapter),
}

/// The adapter of a layer at work on one input.
pub(super) enum Active {
    /// There is none.
    Frozen,
    LowRank(Box<low_rank::Active>),
    Nested(Box<nested::Active>),
    Composed(Box<composed::Active>),
}

/// What the gradient of a layer's input needs of its adapter.
#[derive(Default)]
pub(super) struct Through {
    /// Gradient of the hidden values of a low-rank product.
    hidden: Option<Tensor>,
    /// The weight in place of the frozen one.
    weight: Option<Tensor>,
}

impl Through {
    /// The weight that was applied, given the layer's own.
    pub(super) fn weight<'a>(&'a self, frozen: &'a Tensor) -> &'a Tensor {
        self.weight.as_ref().unwrap_or(frozen)
    }
}

/// Starts the adapter of a layer with the weight `frozen` on `x`; `apply` applies a weight of the
/// layer's kind to `x`.
pub(super) fn activate(
    adapter: Option<&Adapter>,
    tape: &Tape,
    x: &Value,
    frozen: &Tensor,
    apply: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Active> {
    match adapter {
        None => Ok(Active::Frozen),
        Some(Adapter::LowRank(adapter)) if adapter.dropouts.skips(tape, adapter.module) => {
            Ok(Active::Frozen)
        }
        Some(Adapter::LowRank(adapter)) => {
            adapter.activate(tape, x, apply).map(|active| Active::LowRank(Box::new(active)))
        }
        Some(Adapter::Nested(adapter)) => {
            adapter.activate(tape, x, apply).map(|active| Active::Nested(Box::new(active)))
        }
        Some(Adapter::Composed(adapter)) if adapter.dropouts.skips(tape, adapter.module) => {
            Ok(Active::Frozen)
        }
        Some(Adapter::Composed(adapter)) => {
            adapter.activate(tape, x, frozen).map(|active| Active::Composed(Box::new(active)))
        }
    }
}

impl Active {
    /// The weight to apply where it is not the frozen one. Made on each call, to be dropped after use.
    pub(super) fn weight(&self) -> Result<Option<Tensor>> {
        match self {
            Active::Composed(active) => active.weight().map(Some),
            Active::Frozen | Active::LowRank(_) | Active::Nested(_) => Ok(None),
        }
    }

    /// The product that the layer adds to its own.
    pub(super) fn low_rank(&self) -> Option<LowRank<'_>> {
        match self {
            Active::LowRank(active) => Some(active.low_rank()),
            Active::Nested(active) => Some(active.low_rank()),
            Active::Frozen | Active::Composed(_) => None,
        }
    }

    /// The trainable inputs of the layer.
    pub(super) fn params(&self) -> &[Value] {
        match self {
            Active::Frozen => &[],
            Active::LowRank(active) => active.params(),
            Active::Nested(active) => active.params(),
            Active::Composed(active) => active.params(),
        }
    }

    /// Adds the gradients of the parameters. `weight_gradient(x, d)` is the f32 gradient of a weight
    /// of the layer's kind that was applied to `x`, given that of its output; `for_input` says
    /// whether the layer's input needs a gradient.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        for_input: bool,
        weight_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Through> {
        match self {
            Active::Frozen => Ok(Through::default()),
            Active::LowRank(active) => {
                let hidden = active.backward(dy, grads, weight_gradient)?;
                Ok(Through { hidden: Some(hidden), weight: None })
            }
            Active::Nested(active) => {
                let hidden = active.backward(dy, grads, weight_gradient)?;
                Ok(Through { hidden: Some(hidden), weight: None })
            }
            Active::Composed(active) => {
                let weight = active.backward(dy, grads, for_input, weight_gradient)?;
                Ok(Through { hidden: None, weight })
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
            Active::Nested(active) => through.hidden.as_ref().map(|dh| (dh, active.down())),
            Active::Frozen | Active::Composed(_) => None,
        }
    }
}
