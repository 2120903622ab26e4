//! Stochastic gradient descent with momentum, Nesterov's too (Sutskever et al., 2013), as PyTorch's
//! `SGD`.

use anyhow::Result;

use super::settings::settings;
use super::tensors::{EachTensor, Item, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of SGD; the defaults are PyTorch's.
    SgdSettings {
        /// Share of the last step's velocity that is kept.
        momentum: f64 = 0., NotNegative;
        /// Share of the gradient that does not enter the velocity.
        dampening: f64 = 0., Any;
        /// Added to the gradient times the weight.
        weight_decay: f64 = 0., NotNegative;
        /// Look ahead along the velocity.
        nesterov: bool = false, Any;
        /// Climb instead of descend.
        maximize: bool = false, Any;
    }
    idle: ["foreach", "differentiable", "fused"]
}

impl Recipe for SgdSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Sgd(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        if self.momentum == 0. { 0. } else { 4. }
    }

    fn fault(&self) -> Option<String> {
        let fits = !self.nesterov || (self.momentum > 0. && self.dampening == 0.);
        (!fits).then(|| "`nesterov` needs a `momentum` above 0 and no `dampening`".to_owned())
    }
}

slot! {
    /// The velocity of a tensor.
    Velocity {
        step: u32,
        /// Empty without momentum.
        momentum_buffer: Vec<f32>,
    }
}

struct Sgd(SgdSettings);

impl Rule for Sgd {
    type Slot = Velocity;
    const NAME: &'static str = "SGD";

    fn slot(&self, form: &TensorForm) -> Velocity {
        let len = if self.0.momentum == 0. { 0 } else { form.len() };
        Velocity { step: 0, momentum_buffer: vec![0.; len] }
    }

    fn update(&self, item: Item<'_, Velocity>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr as f32);
        slot.step += 1;
        let first = slot.step == 1;
        let momentum = settings.momentum as f32;
        let take = if first { 1. } else { (1. - settings.dampening) as f32 };
        let sign = if settings.maximize { -1. } else { 1. };
        let l2 = settings.weight_decay as f32;
        let pairs = item.weights.iter_mut().zip(item.gradient);
        if slot.momentum_buffer.is_empty() {
            for (weight, gradient) in pairs {
                *weight -= lr * (sign * gradient + l2 * *weight);
            }
            return;
        }
        // PyTorch's first velocity is the gradient itself; the buffer is zero then.
        for ((weight, gradient), velocity) in pairs.zip(&mut slot.momentum_buffer) {
            let gradient = sign * gradient + l2 * *weight;
            *velocity = *velocity * momentum + take * gradient;
            let step = match settings.nesterov {
                true => gradient + momentum * *velocity,
                false => *velocity,
            };
            *weight -= lr * step;
        }
    }
}
