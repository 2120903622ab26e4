//! RAdam (Liu et al., arXiv:1908.03265), Adam that begins as momentum until its second moment can be
//! trusted, as PyTorch's `RAdam`.

use anyhow::Result;

use super::settings::settings;
use super::tensors::{EachTensor, Item, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of RAdam; the defaults are PyTorch's.
    RAdamSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Added to the gradient times the weight; with `decoupled_weight_decay` taken off the
        /// weight itself.
        weight_decay: f64 = 0., NotNegative;
        /// Decay as AdamW does.
        decoupled_weight_decay: bool = false, Any;
        /// Climb instead of descend.
        maximize: bool = false, Any;
    }
    idle: ["foreach", "capturable", "differentiable"]
}

impl Recipe for RAdamSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(RAdam(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        8.
    }
}

slot! {
    /// The moments of a tensor.
    Moments { step: u32, exp_avg: Vec<f32>, exp_avg_sq: Vec<f32>, }
}

struct RAdam(RAdamSettings);

impl Rule for RAdam {
    type Slot = Moments;
    const NAME: &'static str = "RAdam";

    fn slot(&self, form: &TensorForm) -> Moments {
        let zeros = || vec![0.; form.len()];
        Moments { step: 0, exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr);
        slot.step += 1;
        let (beta1, beta2) = settings.betas;
        let power = beta2.powi(slot.step as i32);
        let rectified = rectification(beta2, f64::from(slot.step), power)
            .filter(|(length, _)| *length > 5.)
            .map(|(_, factor)| factor * (1. - power).sqrt());
        let size = lr / (1. - beta1.powi(slot.step as i32));
        let sign = if settings.maximize { -1. } else { 1. };
        let (l2, keep) = match settings.decoupled_weight_decay {
            true => (0., (1. - lr * settings.weight_decay) as f32),
            false => (settings.weight_decay as f32, 1.),
        };
        let (take1, keep2, take2) = ((1. - beta1) as f32, beta2 as f32, (1. - beta2) as f32);
        let (size, eps) = ((size * rectified.unwrap_or(1.)) as f32, settings.eps as f32);
        let adaptive = rectified.is_some();
        let moments = slot.exp_avg.iter_mut().zip(&mut slot.exp_avg_sq);
        for ((weight, gradient), (m, v)) in item.weights.iter_mut().zip(item.gradient).zip(moments)
        {
            let gradient = sign * gradient + l2 * *weight;
            *m += take1 * (gradient - *m);
            *v = *v * keep2 + take2 * gradient * gradient;
            let root = if adaptive { v.sqrt() + eps } else { 1. };
            *weight = *weight * keep - size * *m / root;
        }
    }
}

/// Length of the second moment's memory in a step, and where it is above 4 the factor on the step;
/// `power` is `beta2^step`.
pub(super) fn rectification(beta2: f64, step: f64, power: f64) -> Option<(f64, f64)> {
    let longest = 2. / (1. - beta2) - 1.;
    let length = longest - 2. * step * power / (1. - power);
    let now = (length - 4.) * (length - 2.) * longest;
    let end = (longest - 4.) * (longest - 2.) * length;
    (length > 4.).then(|| (length, (now / end).sqrt()))
}
