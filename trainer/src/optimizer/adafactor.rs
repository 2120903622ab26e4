//! Adafactor (Shazeer & Stern, arXiv:1804.04235) as transformers' `Adafactor`: a factored second
//! moment, updates clipped by their size, and by default a learning rate of its own.

use anyhow::Result;

use super::factored::{Factored, rms};
use super::settings::settings;
use super::tensors::{EachTensor, Item, Order, Rule, slot};
use super::{Build, Optimize, Pace, Recipe, TensorForm};

settings! {
    /// Settings of Adafactor; the defaults are transformers'.
    AdafactorSettings {
        /// Added to squared gradients; the least size of weights that scales a step.
        eps: (f64, f64) = (1e-30, 1e-3), NotNegative;
        /// Largest root mean square of an update.
        clip_threshold: f64 = 1., Positive;
        /// The second moment's memory in step t is `1 - t^decay_rate`.
        decay_rate: f64 = -0.8, Any;
        /// Decay rate of a first moment; none by default.
        beta1: Option<f64> = None, Share;
        /// Decoupled weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Scale steps by the size of the weights.
        scale_parameter: bool = true, Any;
        /// Take `1/sqrt(t)`, 0.01 at most, as the learning rate.
        relative_step: bool = true, Any;
        /// Let the relative step rise from 1e-6 by 1e-6 a step.
        warmup_init: bool = false, Any;
    }
    idle: []
}

impl Recipe for AdafactorSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(EachTensor::new(Adafactor(*self), build.forms)))
    }

    fn state_bytes(&self) -> f64 {
        // Means of rows and columns are a small share of the tensor.
        if self.beta1.is_some() { 4.5 } else { 0.5 }
    }

    fn pace(&self) -> Pace {
        if self.relative_step { Pace::Relative } else { Pace::Given }
    }

    fn complete(&mut self) -> Vec<(&'static str, &'static str)> {
        if self.warmup_init && !self.relative_step {
            self.relative_step = true;
            return vec![("relative_step", "True")];
        }
        Vec::new()
    }
}

slot! {
    /// What Adafactor keeps for a tensor.
    Moments {
        step: u32,
        /// Empty without `beta1`.
        exp_avg: Vec<f32>,
        exp_avg_sq: Factored,
        /// Learning rate of the last step.
        rate: f64,
    }
}

struct Adafactor(AdafactorSettings);

impl Adafactor {
    fn rate(&self, step: u32, lr: f64, weights: &[f32]) -> f64 {
        let step = f64::from(step);
        let rate = match (self.0.relative_step, self.0.warmup_init) {
            (false, _) => lr,
            (true, warmup) => (if warmup { 1e-6 * step } else { 1e-2 }).min(1. / step.sqrt()),
        };
        if self.0.scale_parameter { rate * rms(weights).max(self.0.eps.1) } else { rate }
    }
}

impl Rule for Adafactor {
    type Slot = Moments;
    const NAME: &'static str = "Adafactor";
    const ORDER: Order = Order::File;

    fn slot(&self, form: &TensorForm) -> Moments {
        let len = if self.0.beta1.is_some() { form.len() } else { 0 };
        let exp_avg = vec![0.; len];
        Moments { step: 0, exp_avg, exp_avg_sq: Factored::zeros(form), rate: 0. }
    }

    fn update(&self, item: Item<'_, Moments>) {
        let (settings, slot) = (&self.0, item.slot);
        slot.step += 1;
        slot.rate = self.rate(slot.step, item.lr, item.weights);
        let decay = 1. - f64::from(slot.step).powf(settings.decay_rate);
        let eps = settings.eps.0 as f32;
        let squares: Vec<f32> = item.gradient.iter().map(|g| g * g + eps).collect();
        slot.exp_avg_sq.add(&squares, decay);
        let mut update = item.gradient.to_vec();
        slot.exp_avg_sq.divide_root(&mut update);
        let excess = (rms(&update) / settings.clip_threshold).max(1.) as f32;
        let rate = slot.rate as f32;
        update.iter_mut().for_each(|x| *x = *x / excess * rate);
        if let Some(beta) = settings.beta1 {
            let (keep, take) = (beta as f32, (1. - beta) as f32);
            for (mean, x) in slot.exp_avg.iter_mut().zip(&mut update) {
                *mean = *mean * keep + take * *x;
                *x = *mean;
            }
        }
        let decay = (settings.weight_decay * slot.rate) as f32;
        for (weight, x) in item.weights.iter_mut().zip(&update) {
            *weight = (*weight - decay * *weight) - x;
        }
    }

    fn own_rate(&self, slot: &Moments) -> Option<f64> {
        self.0.relative_step.then_some(slot.rate)
    }
}
