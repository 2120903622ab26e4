//! Optimizers over the flat parameter tensor: one file each, and one line each in [`registry`].
//!
//! A tensor that no gradient reached in a step is not in the step's list and stays as it is, without
//! weight decay too, as PyTorch leaves parameters whose gradient is `None`.

mod adafactor;
mod adam;
mod adamw;
mod adamw_8bit;
mod ademamix;
mod blockwise;
mod came;
mod dadapt_adagrad;
mod dadapt_adam;
mod dadapt_adam_preprint;
mod dadapt_adan;
mod dadapt_lion;
mod dadapt_sgd;
mod distance;
mod factored;
mod lion;
mod lion_8bit;
mod on_card;
mod prodigy;
mod radam;
pub mod registry;
mod schedule_free;
mod settings;
mod sgd;
mod sgd_8bit;
pub(crate) mod state;
mod tensors;
#[cfg(test)]
mod tests;

use std::ops::Range;

use anyhow::Result;
use engine::{ParamId, ParamStore, Tensor};
use models::lora::LoraNetwork;

pub use adamw::AdamWSettings;
pub use registry::{Choice, choose};
pub use settings::Settings;
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

    /// Channels and pixels of a kernel in files, both 1 where the engine has the same order.
    fn kernel(&self) -> (usize, usize) {
        match self.file_shape[..] {
            [_, input, height, width] if height * width > 1 => (input, height * width),
            _ => (1, 1),
        }
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

    /// The learning rate of a tensor's last step, where the optimizer chose it by itself.
    fn own_rate(&self, _id: ParamId) -> Option<f64> {
        None
    }

    /// The same step as work for a card alone, where the optimizer has it.
    fn on_card(&mut self) -> Option<&mut dyn CardStep> {
        None
    }

    /// The flat weights to save and to validate with, where they differ from those trained on.
    fn evaluation_weights(&self, _params: &ParamStore) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// An optimizer's step whose gradient never leaves the card, and that can be captured.
pub trait CardStep {
    /// Before the work of a step is given: the learning rates of the tensors that move in it.
    fn prepare(&mut self, tensors: &[TensorStep]) -> Result<()>;

    /// Gives the card the work: moves the tensors whose `touched` (f32, one each) is above 0 against
    /// `gradient` times the first number of `clip`. If that is NaN nothing moves.
    fn give(
        &mut self,
        params: &mut ParamStore,
        gradient: &Tensor,
        touched: &Tensor,
        clip: &Tensor,
    ) -> engine::Result<()>;

    /// The step has happened, to these tensors.
    fn confirm(&mut self, touched: &[bool]);
}

/// What an optimizer is built for.
#[derive(Clone, Copy)]
pub struct Build<'a> {
    /// The parameters.
    pub params: &'a ParamStore,
    /// Their forms, in the order of [`ParamId`].
    pub forms: &'a [TensorForm],
    /// `learning_rate` of the config.
    pub learning_rate: f64,
}

/// Where the learning rate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// From the config and its schedule.
    Given,
    /// The optimizer estimates it; the config's is a factor on the estimate, 1.0 by rule.
    Estimated,
    /// From the number of steps (Adafactor's relative step); the config's does not count.
    Relative,
    /// From the config, without a schedule.
    ScheduleFree,
}

/// The settings of one optimizer, from which it is built.
pub trait Recipe: Settings + Send + Sync {
    /// The optimizer with a fresh state.
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>>;

    /// Bytes of state per trainable number, about.
    fn state_bytes(&self) -> f64;

    /// Where the learning rate comes from.
    fn pace(&self) -> Pace {
        Pace::Given
    }

    /// What is wrong with the settings together.
    fn fault(&self) -> Option<String> {
        None
    }

    /// Changes settings that others imply, as the reference does; gives key and new value.
    fn complete(&mut self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }
}
