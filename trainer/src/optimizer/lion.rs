//! Lion (Chen et al., arXiv:2302.06675): steps of one size along the sign of the momentum, as
//! lion-pytorch takes them.

use anyhow::Result;

use super::settings::settings;
use super::tensors::{EachTensor, Item, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of Lion; the defaults are lion-pytorch's.
    LionSettings {
        /// Share of the momentum in a step, and in the next momentum.
        betas: (f64, f64) = (0.9, 0.99), Share;
        /// Decoupled weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Decay that the learning rate does not scale, but its schedule does.
        decoupled_weight_decay: bool = false, Any;
    }
    idle: ["use_triton"]
}

impl Recipe for LionSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let mut settings = *self;
        if self.decoupled_weight_decay && build.learning_rate > 0. {
            settings.weight_decay /= build.learning_rate;
        }
        Ok(Box::new(EachTensor::new(Lion(settings), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        4.
    }
}

slot! {
    /// The momentum of a tensor.
    Momentum { exp_avg: Vec<f32>, }
}

struct Lion(LionSettings);

impl Rule for Lion {
    type Slot = Momentum;
    const NAME: &'static str = "Lion";

    fn slot(&self, form: &TensorForm) -> Momentum {
        Momentum { exp_avg: vec![0.; form.len()] }
    }

    fn update(&self, item: Item<'_, Momentum>) {
        let step = LionStep::new(self.0.betas, item.lr, self.0.weight_decay);
        step.apply(item.weights, item.gradient, &mut item.slot.exp_avg);
    }
}

/// One step of Lion, the numbers of which are the same for a whole tensor.
pub(super) struct LionStep {
    lr: f32,
    keep: f32,
    betas: (f32, f32),
    takes: (f32, f32),
}

impl LionStep {
    pub(super) fn new(betas: (f64, f64), lr: f64, weight_decay: f64) -> Self {
        Self {
            lr: lr as f32,
            keep: (1. - lr * weight_decay) as f32,
            betas: (betas.0 as f32, betas.1 as f32),
            takes: ((1. - betas.0) as f32, (1. - betas.1) as f32),
        }
    }

    pub(super) fn apply(&self, weights: &mut [f32], gradient: &[f32], momentum: &mut [f32]) {
        for ((weight, gradient), m) in weights.iter_mut().zip(gradient).zip(momentum) {
            let direction = sign(*m * self.betas.0 + self.takes.0 * gradient);
            *weight = *weight * self.keep - self.lr * direction;
            *m = *m * self.betas.1 + self.takes.1 * gradient;
        }
    }
}

/// -1, 0 or 1; `f32::signum` has no 0.
pub(super) fn sign(x: f32) -> f32 {
    f32::from(u8::from(x > 0.)) - f32::from(u8::from(x < 0.))
}
