//! CAME (Luo et al., arXiv:2307.02047): Adafactor with a momentum that is trusted less where it
//! disagrees with the updates, as came-pytorch and pytorch-optimizer have it.

use anyhow::Result;

use super::factored::{Factored, rms};
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Recipe, TensorForm};

settings! {
    /// Settings of CAME, under the names of both packages.
    CameSettings {
        /// Decay rates of the update, of its square and of its instability.
        betas: (f64, f64, f64) = (0.9, 0.999, 0.9999), Share;
        /// Weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Take it off the weights rather than add it to the gradient.
        weight_decouple: bool = true, Any;
        /// Decay that the learning rate does not scale.
        fixed_decay: bool = false, Any;
        /// Largest root mean square of an update.
        clip_threshold: f64 = 1., Positive;
        /// Added to squared gradients and to the instability (came-pytorch).
        eps: (f64, f64) = (1e-30, 1e-16), NotNegative;
        /// Added to squared gradients (pytorch-optimizer); before `eps`.
        eps1: Option<f64> = None, NotNegative;
        /// Added to the instability (pytorch-optimizer); before `eps`.
        eps2: Option<f64> = None, NotNegative;
        /// Climb instead of descend.
        maximize: bool = false, Any;
    }
    idle: ["foreach"]
}

impl Recipe for CameSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Came(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        5.
    }
}

slot! {
    /// What CAME keeps for a tensor.
    Moments { exp_avg: Vec<f32>, exp_avg_sq: Factored, exp_avg_res: Factored, }
}

struct Came(CameSettings);

impl Rule for Came {
    type Slot = Moments;
    const NAME: &'static str = "CAME";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Moments {
        let squares = Factored::zeros(form);
        // A tensor with one axis has no instability.
        let none = TensorForm { name: String::new(), file_shape: vec![0] };
        let residual = Factored::zeros(if squares.is_factored() { form } else { &none });
        Moments { exp_avg: vec![0.; form.len()], exp_avg_sq: squares, exp_avg_res: residual }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot, lr) = (&self.0, item.slot, item.lr);
        let (beta1, beta2, beta3) = settings.betas;
        let eps1 = settings.eps1.unwrap_or(settings.eps.0) as f32;
        let eps2 = settings.eps2.unwrap_or(settings.eps.1) as f32;
        let sign = if settings.maximize { -1. } else { 1. };
        let (l2, keep) = match (settings.weight_decouple, settings.fixed_decay) {
            (false, _) => (settings.weight_decay as f32, 1.),
            (true, true) => (0., (1. - settings.weight_decay) as f32),
            (true, false) => (0., (1. - settings.weight_decay * lr) as f32),
        };
        let pairs = item.gradient.iter().zip(item.weights.iter());
        let mut update: Vec<f32> = pairs.map(|(g, w)| sign * g + l2 * w).collect();
        let squares: Vec<f32> = update.iter().map(|g| g * g + eps1).collect();
        slot.exp_avg_sq.add(&squares, beta2);
        slot.exp_avg_sq.divide_root(&mut update);
        let excess = (rms(&update) / settings.clip_threshold).max(1.) as f32;
        update.iter_mut().for_each(|x| *x /= excess);
        let (keep1, take1) = (beta1 as f32, (1. - beta1) as f32);
        for (mean, x) in slot.exp_avg.iter_mut().zip(&update) {
            *mean = *mean * keep1 + take1 * x;
        }
        if slot.exp_avg_sq.is_factored() {
            let pairs = update.iter().zip(&slot.exp_avg);
            let residuals: Vec<f32> = pairs.map(|(x, m)| (x - m) * (x - m) + eps2).collect();
            slot.exp_avg_res.add(&residuals, beta3);
            update.copy_from_slice(&slot.exp_avg);
            slot.exp_avg_res.divide_root(&mut update);
        } else {
            update.copy_from_slice(&slot.exp_avg);
        }
        let lr = lr as f32;
        for (weight, x) in item.weights.iter_mut().zip(&update) {
            *weight = *weight * keep - lr * x;
        }
    }
}
