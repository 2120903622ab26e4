//! D-Adaptation for Lion, as dadaptation's `DAdaptLion`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::lion::sign;
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation for Lion.
    DAdaptLionSettings {
        /// Share of the momentum in a step, and in the next momentum.
        betas: (f64, f64) = (0.9, 0.99), Share;
        /// Decoupled weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
    }
    idle: ["log_every", "fsdp_in_use"]
}

impl Recipe for DAdaptLionSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let zeros = |len| vec![0.; len];
        let slots = Slots::new(build.forms, |form| Moments {
            exp_avg: zeros(form.len()),
            s: zeros(form.len()),
        });
        let global = Global { d: self.d0, numerator_weighted: 0. };
        Ok(Box::new(DAdaptLion { settings: *self, global, slots }))
    }

    fn state_bytes(&self) -> f64 {
        8.
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

slot! {
    /// The estimate.
    Global { d: f64, numerator_weighted: f64, }
}

slot! {
    /// Momentum and weighted sum of steps of a tensor.
    Moments { exp_avg: Vec<f32>, s: Vec<f32>, }
}

struct DAdaptLion {
    settings: DAdaptLionSettings,
    global: Global,
    slots: Slots<Moments>,
}

impl Optimize for DAdaptLion {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let lr = common_rate("DAdaptLion", input)?;
        let (beta1, beta2) = self.settings.betas;
        let d = self.global.d;
        let dlr = d * lr;
        let beta_s = beta2.sqrt();
        let keep = (1. - dlr * self.settings.weight_decay) as f32;
        let (keep1, take1) = (beta1 as f32, (1. - beta1) as f32);
        let (keep2, take2) = (beta2 as f32, ((1. - beta2) * dlr) as f32);
        let (keep_s, take_s) = (beta_s as f32, ((1. - beta_s) * dlr) as f32);
        let step_size = dlr as f32;
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            let (mut dot, mut size) = (0_f64, 0_f64);
            let moments = item.slot.exp_avg.iter_mut().zip(&mut item.slot.s);
            let pairs = item.weights.iter_mut().zip(item.gradient);
            for ((weight, g), (m, s)) in pairs.zip(moments) {
                let direction = sign(*m * keep1 + take1 * g);
                *weight = *weight * keep - step_size * direction;
                *m = *m * keep2 + take2 * g;
                dot += f64::from(direction * *s);
                *s = *s * keep_s + take_s * direction;
                size += f64::from(s.abs());
            }
            [dlr * dot, size]
        })?;
        let [numerator, size] = sums(&parts);
        if size == 0. {
            return Ok(());
        }
        let numerator = beta_s * self.global.numerator_weighted + (1. - beta_s) * numerator;
        if lr > 0. {
            self.global.d = d.max(numerator / ((1. - beta_s) * size));
        }
        self.global.numerator_weighted = numerator;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptLion", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
