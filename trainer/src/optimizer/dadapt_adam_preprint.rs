//! D-Adaptation for Adam as in the preprint's first version, dadaptation's `DAdaptAdamPreprint`:
//! what the reference means by `DAdaptation`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation's preprint for Adam.
    DAdaptAdamPreprintSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, Positive;
        /// Weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Take it off the weights rather than add it to the gradient.
        decouple: bool = false, Any;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
    }
    idle: ["log_every", "fsdp_in_use"]
}

impl Recipe for DAdaptAdamPreprintSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let slots = Slots::new(build.forms, |form| Moments::zeros(form.len()));
        let global = Global { d: self.d0, gsq_weighted: 0. };
        Ok(Box::new(DAdaptAdamPreprint { settings: *self, global, slots }))
    }

    fn state_bytes(&self) -> f64 {
        12.
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

slot! {
    /// The estimate.
    Global { d: f64, gsq_weighted: f64, }
}

slot! {
    /// Moments and weighted sum of gradients of a tensor.
    Moments { exp_avg: Vec<f32>, exp_avg_sq: Vec<f32>, s: Vec<f32>, }
}

impl Moments {
    fn zeros(len: usize) -> Self {
        let zeros = || vec![0.; len];
        Self { exp_avg: zeros(), exp_avg_sq: zeros(), s: zeros() }
    }
}

struct DAdaptAdamPreprint {
    settings: DAdaptAdamPreprintSettings,
    global: Global,
    slots: Slots<Moments>,
}

impl Optimize for DAdaptAdamPreprint {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let settings = self.settings;
        let lr = common_rate("DAdaptAdamPreprint", input)?;
        let (beta1, beta2) = settings.betas;
        let d = self.global.d;
        let dlr = d * lr;
        let l2 = if settings.decouple { 0. } else { settings.weight_decay as f32 };
        let eps = settings.eps as f32;
        let (keep1, take1) = (beta1 as f32, (dlr * (1. - beta1)) as f32);
        let (keep2, take2) = (beta2 as f32, (1. - beta2) as f32);
        let take_s = (dlr * (1. - beta2)) as f32;
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            if item.lr == 0. {
                return [0.; 3];
            }
            let mut sums = [0_f64; 3];
            let moments = item.slot.exp_avg.iter_mut().zip(&mut item.slot.exp_avg_sq);
            let pairs = item.gradient.iter().zip(item.weights.iter());
            for (((g, w), (m, v)), s) in pairs.zip(moments).zip(&mut item.slot.s) {
                let g = g + l2 * w;
                *m = *m * keep1 + take1 * g;
                *v = *v * keep2 + take2 * (g * g);
                *s = *s * keep2 + take_s * g;
                let root = v.sqrt() + eps;
                let values = [g * g / root, *s * *s / root, s.abs()];
                sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += f64::from(x));
            }
            sums
        })?;
        let [gradients, weighted, size] = sums(&parts);
        if size == 0. {
            return Ok(());
        }
        let squares = beta2 * self.global.gsq_weighted + gradients * dlr * dlr * (1. - beta2);
        let guess = (weighted / (1. - beta2) - squares) / size;
        self.global.d = d.max(guess.min(d * settings.growth_rate));
        self.global.gsq_weighted = squares;
        let decay = if settings.decouple { (-settings.weight_decay * dlr) as f32 } else { 0. };
        self.slots.visit(params, input, Order::Engine, |item| {
            let decay = if item.lr > 0. { decay } else { 0. };
            let moments = item.slot.exp_avg.iter().zip(&item.slot.exp_avg_sq);
            for (weight, (m, v)) in item.weights.iter_mut().zip(moments) {
                *weight = *weight + decay * *weight - m / (v.sqrt() + eps);
            }
        })?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptAdamPreprint", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
