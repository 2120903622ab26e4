//! D-Adaptation (Defazio & Mishchenko, arXiv:2301.07733) for Adam, as dadaptation's `DAdaptAdam`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation for Adam.
    DAdaptAdamSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, Positive;
        /// Weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Take it off the weights rather than add it to the gradient.
        decouple: bool = false, Any;
        /// Correct the moments' start from zero, as Adam does.
        use_bias_correction: bool = false, Any;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
    }
    idle: ["log_every", "fsdp_in_use"]
}

impl Recipe for DAdaptAdamSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let slots = Slots::new(build.forms, |form| Moments::zeros(form.len()));
        let global = Global { k: 0, d: self.d0, numerator_weighted: 0. };
        Ok(Box::new(DAdaptAdam { settings: *self, global, slots }))
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
    Global { k: u32, d: f64, numerator_weighted: f64, }
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

struct DAdaptAdam {
    settings: DAdaptAdamSettings,
    global: Global,
    slots: Slots<Moments>,
}

impl Optimize for DAdaptAdam {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let settings = self.settings;
        let lr = common_rate("DAdaptAdam", input)?;
        let (beta1, beta2) = settings.betas;
        let (d, turn) = (self.global.d, self.global.k as i32 + 1);
        let correction = match settings.use_bias_correction {
            true => (1. - beta2.powi(turn)).sqrt() / (1. - beta1.powi(turn)),
            false => 1.,
        };
        let dlr = d * lr * correction;
        let beta_s = beta2.sqrt();
        let l2 = if settings.decouple { 0. } else { settings.weight_decay as f32 };
        let eps = settings.eps as f32;
        let (keep1, take1) = (beta1 as f32, (dlr * (1. - beta1)) as f32);
        let (keep2, take2) = (beta2 as f32, (1. - beta2) as f32);
        let (keep_s, take_s) = (beta_s as f32, (dlr * (1. - beta_s)) as f32);
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            if item.lr == 0. {
                return [0.; 2];
            }
            let (mut dot, mut size) = (0_f64, 0_f64);
            let moments = item.slot.exp_avg.iter_mut().zip(&mut item.slot.exp_avg_sq);
            let pairs = item.gradient.iter().zip(item.weights.iter());
            for (((g, w), (m, v)), s) in pairs.zip(moments).zip(&mut item.slot.s) {
                let g = g + l2 * w;
                dot += f64::from(g * (*s / (v.sqrt() + eps)));
                *m = *m * keep1 + take1 * g;
                *v = *v * keep2 + take2 * g * g;
                *s = *s * keep_s + take_s * g;
                size += f64::from(s.abs());
            }
            [dlr * dot, size]
        })?;
        let [numerator, size] = sums(&parts);
        let numerator = beta_s * self.global.numerator_weighted + (1. - beta_s) * numerator;
        if size == 0. {
            return Ok(());
        }
        let guess = numerator / ((1. - beta_s) * size);
        self.global.d = d.max(guess.min(d * settings.growth_rate));
        self.global.numerator_weighted = numerator;
        let decay = if settings.decouple { (-settings.weight_decay * dlr) as f32 } else { 0. };
        self.slots.visit(params, input, Order::Engine, |item| {
            let moments = item.slot.exp_avg.iter().zip(&item.slot.exp_avg_sq);
            for (weight, (m, v)) in item.weights.iter_mut().zip(moments) {
                *weight = *weight + decay * *weight - m / (v.sqrt() + eps);
            }
        })?;
        self.global.k += 1;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptAdam", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
