//! Optimizers over the flat parameter tensor: one file each, one arm each here.

mod adamw;

use std::ops::Range;

use anyhow::Result;
use engine::ParamStore;

pub use adamw::{AdamW, AdamWSettings};

/// A stretch of the flat tensor that moves with one learning rate in this step.
#[derive(Clone, Debug, PartialEq)]
pub struct Stretch {
    /// Elements of the flat tensor.
    pub range: Range<usize>,
    /// Learning rate of this step.
    pub lr: f32,
}

/// Which optimizer, with its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerSettings {
    /// AdamW with decoupled weight decay.
    AdamW(AdamWSettings),
}

/// An optimizer and its state.
pub enum Optimizer {
    /// AdamW with decoupled weight decay.
    AdamW(AdamW),
}

impl Optimizer {
    /// A fresh state for `params`.
    pub fn new(settings: OptimizerSettings, params: &ParamStore) -> Result<Self> {
        Ok(match settings {
            OptimizerSettings::AdamW(settings) => Self::AdamW(AdamW::new(settings, params)?),
        })
    }

    /// Moves the parameters of `stretches` against `gradient`, which is as long as the flat tensor.
    pub fn step(
        &mut self,
        params: &mut ParamStore,
        gradient: &[f32],
        stretches: &[Stretch],
    ) -> Result<()> {
        match self {
            Self::AdamW(adamw) => adamw.step(params, gradient, stretches),
        }
    }
}

impl OptimizerSettings {
    /// The name that sd-scripts writes into the file's metadata.
    pub fn reference_name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "torch.optim.adamw.AdamW",
        }
    }
}
