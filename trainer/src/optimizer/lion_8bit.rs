//! Lion with its momentum in 8 bits, as bitsandbytes' `Lion8bit`.

use anyhow::Result;

use super::blockwise::{BLOCK, Moment, Signs};
use super::lion::LionStep;
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of Lion in 8 bits; the defaults are bitsandbytes'.
    Lion8bitSettings {
        /// Share of the momentum in a step, and in the next momentum.
        betas: (f64, f64) = (0.9, 0.99), Share;
        /// Decoupled weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Tensors with fewer values keep an f32 momentum.
        min_8bit_size: usize = 4096, Any;
    }
    idle: ["args", "is_paged", "percentile_clipping", "block_wise"]
}

impl Recipe for Lion8bitSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Lion8bit(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        1. + 4. / BLOCK as f64
    }
}

slot! {
    /// The momentum of a tensor.
    Momentum { state1: Moment, }
}

struct Lion8bit(Lion8bitSettings);

impl Rule for Lion8bit {
    type Slot = Momentum;
    const NAME: &'static str = "Lion8bit";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Momentum {
        Momentum { state1: Moment::zeros(form.len(), Signs::Both, self.0.min_8bit_size) }
    }

    fn update(&self, item: Item<'_, Momentum>) {
        let step = LionStep::new(self.0.betas, item.lr, self.0.weight_decay);
        let blocks = item.weights.chunks_mut(BLOCK).zip(item.gradient.chunks(BLOCK));
        for (block, (weights, gradient)) in blocks.enumerate() {
            item.slot.state1.change(block, |momentum| step.apply(weights, gradient, momentum));
        }
    }
}
