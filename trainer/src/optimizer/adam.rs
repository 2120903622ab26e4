//! Adam (Kingma & Ba, arXiv:1412.6980) in PyTorch's order of operations, with its variants:
//! decoupled weight decay (AdamW), the largest second moment so far (AMSGrad), and ascent.

use anyhow::Result;

use super::settings::settings;
use super::tensors::{EachTensor, Item, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of Adam; the defaults are PyTorch's.
    AdamSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Added to the gradient times the weight; with `decoupled_weight_decay` taken off the
        /// weight itself.
        weight_decay: f64 = 0., NotNegative;
        /// Divide by the largest second moment so far.
        amsgrad: bool = false, Any;
        /// Climb instead of descend.
        maximize: bool = false, Any;
        /// Decay as AdamW does.
        decoupled_weight_decay: bool = false, Any;
    }
    idle: ["foreach", "capturable", "differentiable", "fused"]
}

impl Recipe for AdamSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Adam(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        if self.amsgrad { 12. } else { 8. }
    }
}

slot! {
    /// The moments of a tensor.
    Moments {
        step: u32,
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
        /// Empty without `amsgrad`.
        max_exp_avg_sq: Vec<f32>,
    }
}

struct Adam(AdamSettings);

impl Rule for Adam {
    type Slot = Moments;
    const NAME: &'static str = "Adam";

    fn slot(&self, form: &TensorForm) -> Moments {
        let zeros = || vec![0.; form.len()];
        let max_exp_avg_sq = if self.0.amsgrad { zeros() } else { Vec::new() };
        Moments { step: 0, exp_avg: zeros(), exp_avg_sq: zeros(), max_exp_avg_sq }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr);
        slot.step += 1;
        let (beta1, beta2) = settings.betas;
        let correction = |beta: f64| 1. - beta.powi(slot.step as i32);
        let step_size = (lr / correction(beta1)) as f32;
        let root_correction2 = correction(beta2).sqrt() as f32;
        let sign = if settings.maximize { -1. } else { 1. };
        let (l2, keep) = match settings.decoupled_weight_decay {
            true => (0., (1. - lr * settings.weight_decay) as f32),
            false => (settings.weight_decay as f32, 1.),
        };
        let (take1, keep2, take2) = ((1. - beta1) as f32, beta2 as f32, (1. - beta2) as f32);
        let eps = settings.eps as f32;
        let moments = slot.exp_avg.iter_mut().zip(&mut slot.exp_avg_sq);
        let mut largest = slot.max_exp_avg_sq.iter_mut();
        for ((weight, gradient), (m, v)) in item.weights.iter_mut().zip(item.gradient).zip(moments)
        {
            let gradient = sign * gradient + l2 * *weight;
            *m += take1 * (gradient - *m);
            *v = *v * keep2 + take2 * gradient * gradient;
            let second = match largest.next() {
                Some(largest) => {
                    *largest = largest.max(*v);
                    *largest
                }
                None => *v,
            };
            let denominator = second.sqrt() / root_correction2 + eps;
            *weight = *weight * keep - step_size * (*m / denominator);
        }
    }
}
