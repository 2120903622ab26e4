//! Stochastic gradient descent with momentum in 8 bits, as bitsandbytes' `SGD8bit`.
//!
//! bitsandbytes accepts `nesterov` and does nothing with it, so the reference's `SGDNesterov8bit` is
//! plain momentum; it is the same here, for the same files.

use anyhow::Result;

use super::blockwise::{BLOCK, Moment, Signs};
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of SGD in 8 bits.
    Sgd8bitSettings {
        /// Share of the last step's velocity that is kept.
        momentum: f64 = 0.9, Inside;
        /// Added to the gradient times the weight.
        weight_decay: f64 = 0., NotNegative;
        /// Tensors with fewer values keep an f32 velocity.
        min_8bit_size: usize = 4096, Any;
    }
    idle: ["dampening", "nesterov", "args", "percentile_clipping", "block_wise"]
}

impl Recipe for Sgd8bitSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Sgd8bit(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        1. + 4. / BLOCK as f64
    }
}

slot! {
    /// The velocity of a tensor.
    Velocity { state1: Moment, }
}

struct Sgd8bit(Sgd8bitSettings);

impl Rule for Sgd8bit {
    type Slot = Velocity;
    const NAME: &'static str = "SGD8bit";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Velocity {
        Velocity { state1: Moment::zeros(form.len(), Signs::Both, self.0.min_8bit_size) }
    }

    fn update(&self, item: Item<'_, Velocity>) {
        let (momentum, decay) = (self.0.momentum as f32, self.0.weight_decay as f32);
        let lr = item.lr as f32;
        let blocks = item.weights.chunks_mut(BLOCK).zip(item.gradient.chunks(BLOCK));
        for (block, (weights, gradient)) in blocks.enumerate() {
            item.slot.state1.change(block, |velocity| {
                for ((weight, gradient), v) in weights.iter_mut().zip(gradient).zip(velocity) {
                    *v = *v * momentum + (gradient + decay * *weight);
                    *weight -= lr * *v;
                }
            });
        }
    }
}
