//! AdEMAMix (Pagliardini et al., arXiv:2409.03137), AdamW with a second, slower mean of gradients, as
//! bitsandbytes' `AdEMAMix` and, with the moments in 8 bits, `AdEMAMix8bit`.

use anyhow::Result;

use super::blockwise::{BLOCK, Moment, Signs};
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

/// More values than any tensor has: no moment in 8 bits.
pub(super) const NEVER: usize = usize::MAX;

settings! {
    /// Settings of AdEMAMix; the defaults are bitsandbytes', in 8 bits.
    AdEmaMixSettings {
        /// Decay rates of the fast mean, of the second moment and of the slow mean.
        betas: (f64, f64, f64) = (0.9, 0.999, 0.9999), Share;
        /// Weight of the slow mean.
        alpha: f64 = 5., NotNegative;
        /// Steps in which `alpha` rises from 0.
        t_alpha: Option<f64> = None, NotNegative;
        /// Steps in which the third beta rises from the first.
        t_beta3: Option<f64> = None, NotNegative;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Decoupled weight decay.
        weight_decay: f64 = 0.01, NotNegative;
        /// Tensors with fewer values keep f32 moments.
        min_8bit_size: usize = 4096, Any;
    }
    idle: ["optim_bits", "is_paged"]
}

impl Recipe for AdEmaMixSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(AdEmaMix(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        if self.min_8bit_size == NEVER { 12. } else { 3. + 12. / BLOCK as f64 }
    }

    fn fault(&self) -> Option<String> {
        let (beta1, _, beta3) = self.betas;
        let zero = self.t_beta3.is_some_and(|steps| steps > 0.) && (beta1 == 0. || beta3 == 0.);
        zero.then(|| "`t_beta3` needs a first and a third beta above 0".to_owned())
    }
}

slot! {
    /// The moments of a tensor.
    Moments { step: u32, fast: Moment, slow: Moment, state2: Moment, }
}

struct AdEmaMix(AdEmaMixSettings);

impl AdEmaMix {
    /// Weight and decay rate of the slow mean in a step, counted from 1.
    fn slow_mean(&self, step: f64) -> (f64, f64) {
        let (beta1, _, beta3) = self.0.betas;
        let alpha = match self.0.t_alpha.filter(|steps| *steps > 0.) {
            Some(steps) => (step * self.0.alpha / steps).min(self.0.alpha),
            None => self.0.alpha,
        };
        let beta = match self.0.t_beta3.filter(|steps| *steps > 0.) {
            Some(steps) => {
                let (first, last, share) = (beta1.ln(), beta3.ln(), step / steps);
                (first * last / ((1. - share) * last + share * first)).exp().min(beta3)
            }
            None => beta3,
        };
        (alpha, beta)
    }
}

impl Rule for AdEmaMix {
    type Slot = Moments;
    const NAME: &'static str = "AdEMAMix";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Moments {
        let zeros = |signs| Moment::zeros(form.len(), signs, self.0.min_8bit_size);
        let (fast, slow) = (zeros(Signs::Both), zeros(Signs::Both));
        Moments { step: 0, fast, slow, state2: zeros(Signs::Positive) }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr);
        slot.step += 1;
        let (beta1, beta2, _) = settings.betas;
        let (alpha, beta3) = self.slow_mean(f64::from(slot.step));
        let correction = |beta: f64| 1. - beta.powi(slot.step as i32);
        let correction1 = correction(beta1) as f32;
        let root_correction2 = correction(beta2).sqrt() as f32;
        let keep = (1. - lr * settings.weight_decay) as f32;
        let decay = |beta: f64| (beta as f32, (1. - beta) as f32);
        let [(keep1, take1), (keep2, take2), (keep3, take3)] = [beta1, beta2, beta3].map(decay);
        let (lr, alpha, eps) = (lr as f32, alpha as f32, settings.eps as f32);
        let blocks = item.weights.chunks_mut(BLOCK).zip(item.gradient.chunks(BLOCK));
        for (block, (weights, gradient)) in blocks.enumerate() {
            let mut update = |fast: &mut [f32], slow: &mut [f32], second: &mut [f32]| {
                let means = fast.iter_mut().zip(slow).zip(second);
                for ((weight, g), ((m, slow), v)) in weights.iter_mut().zip(gradient).zip(means) {
                    *m = *m * keep1 + take1 * g;
                    *slow = *slow * keep3 + take3 * g;
                    *v = *v * keep2 + take2 * g * g;
                    let mixed = *m / correction1 + alpha * *slow;
                    let root = v.sqrt() / root_correction2 + eps;
                    *weight = *weight * keep - lr * (mixed / root);
                }
            };
            slot.fast.change(block, |fast| {
                slot.slow.change(block, |slow| {
                    slot.state2.change(block, |second| update(fast, slow, second));
                });
            });
        }
    }
}
