//! AdamW with both moments in 8 bits, as bitsandbytes' `AdamW8bit` and `Adam8bit`.

use anyhow::Result;
use engine::cuda::flat::{AdamWRule, Moments as Kept};

use super::blockwise::{BLOCK, Moment, Signs};
use super::on_card::CardAdamW;
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of AdamW in 8 bits; the defaults are bitsandbytes'.
    AdamW8bitSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Decoupled weight decay.
        weight_decay: f64 = 0.01, NotNegative;
        /// Tensors with fewer values keep f32 moments.
        min_8bit_size: usize = 4096, Any;
    }
    // bitsandbytes accepts the first two and does nothing with them; the others it has dropped.
    idle: ["amsgrad", "optim_bits", "args", "is_paged", "percentile_clipping", "block_wise"]
}

impl Recipe for AdamW8bitSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        if build.params.device().card().is_some() {
            let Self { betas, eps, weight_decay, min_8bit_size: min_size } = *self;
            let moments = Kept::Eight { min_size };
            let rule = AdamWRule { betas, eps, weight_decay, moments };
            return Ok(Box::new(CardAdamW::new(rule, build)?));
        }
        Ok(Box::new(EachTensor::new(AdamW8bit(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        2. + 8. / BLOCK as f64
    }
}

slot! {
    /// The moments of a tensor.
    Moments { step: u32, state1: Moment, state2: Moment, }
}

struct AdamW8bit(AdamW8bitSettings);

impl Rule for AdamW8bit {
    type Slot = Moments;
    const NAME: &'static str = "AdamW8bit";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Moments {
        let zeros = |signs| Moment::zeros(form.len(), signs, self.0.min_8bit_size);
        Moments { step: 0, state1: zeros(Signs::Both), state2: zeros(Signs::Positive) }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr);
        slot.step += 1;
        let (beta1, beta2) = settings.betas;
        let correction = |beta: f64| 1. - beta.powi(slot.step as i32);
        let step_size = (lr / correction(beta1)) as f32;
        let root_correction2 = correction(beta2).sqrt() as f32;
        let keep = (1. - lr * settings.weight_decay) as f32;
        let ((keep1, take1), (keep2, take2)) =
            ((beta1 as f32, (1. - beta1) as f32), (beta2 as f32, (1. - beta2) as f32));
        let eps = settings.eps as f32;
        let blocks = item.weights.chunks_mut(BLOCK).zip(item.gradient.chunks(BLOCK));
        for (block, (weights, gradient)) in blocks.enumerate() {
            slot.state1.change(block, |first| {
                slot.state2.change(block, |second| {
                    let moments = first.iter_mut().zip(second);
                    for ((weight, gradient), (m, v)) in
                        weights.iter_mut().zip(gradient).zip(moments)
                    {
                        *m = *m * keep1 + take1 * gradient;
                        *v = *v * keep2 + take2 * gradient * gradient;
                        let denominator = v.sqrt() / root_correction2 + eps;
                        *weight = *weight * keep - step_size * *m / denominator;
                    }
                });
            });
        }
    }
}
