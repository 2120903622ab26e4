//! Optimizers over the flat parameter tensor: one file each, one arm each here.
//!
//! A tensor that no gradient reached in a step is not in the step's list and stays as it is, without
//! weight decay too, as PyTorch leaves parameters whose gradient is `None`.

mod adamw;
pub(crate) mod state;

use std::ops::Range;

use anyhow::Result;
use engine::{ParamId, ParamStore};
use models::lora::LoraNetwork;

pub use adamw::{AdamW, AdamWSettings};
pub use state::OptimizerState;

/// A tensor that moves in this step.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorStep {
    /// Which one.
    pub id: ParamId,
    /// Its elements of the flat tensor.
    pub range: Range<usize>,
    /// Learning rate of this step.
    pub lr: f32,
}

/// What a step is made from.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// As long as the flat tensor.
    pub gradient: &'a [f32],
    /// Tensors that a gradient reached, in the order of their ids.
    pub tensors: &'a [TensorStep],
    /// Learning rate now by base learning rate.
    pub schedule_factor: f64,
}

/// Shape and name of a tensor, for optimizers that look at rows and columns.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorForm {
    /// Its key in files.
    pub name: String,
    /// Its shape in files: `[out, in]`, `[out, in, kh, kw]`.
    pub file_shape: Vec<usize>,
}

impl TensorForm {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.file_shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The forms of a network's tensors, in the order of [`ParamId`].
    pub fn of(network: &LoraNetwork) -> Vec<Self> {
        let form = |id| Self { name: network.key(id), file_shape: network.file_shape(id).to_vec() };
        (0..network.param_count()).map(|id| form(ParamId(id))).collect()
    }
}

/// An optimizer and its state.
pub trait Optimize: Send {
    /// Moves the tensors of the step against the gradient.
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()>;

    /// Everything to go on from.
    fn state(&self) -> Result<OptimizerState>;

    /// Goes on from a state of [`Optimize::state`]; the error names what does not fit.
    fn load_state(&mut self, state: OptimizerState) -> Result<()>;

    /// The estimate `d` of optimizers that find their own learning rate, for the logs.
    fn effective_scale(&self) -> Option<f64> {
        None
    }

    /// The flat weights to save and to validate with, where they differ from those trained on.
    fn evaluation_weights(&self, _params: &ParamStore) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// Which optimizer, with its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerSettings {
    /// AdamW with decoupled weight decay.
    AdamW(AdamWSettings),
}

impl OptimizerSettings {
    /// The optimizer with a fresh state for `params`.
    pub fn build(&self, params: &ParamStore, forms: &[TensorForm]) -> Result<Box<dyn Optimize>> {
        Ok(match self {
            Self::AdamW(settings) => Box::new(AdamW::new(*settings, params, forms)?),
        })
    }

    /// The name that sd-scripts writes into the file's metadata.
    pub fn reference_name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "torch.optim.adamw.AdamW",
        }
    }
}
