//! D-Adaptation for gradient descent, as dadaptation's `DAdaptSGD`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation for SGD.
    DAdaptSgdSettings {
        /// Share of the last weights in an average; 0 averages nothing.
        momentum: f64 = 0., Share;
        /// Added to the gradient times the weight.
        weight_decay: f64 = 0., NotNegative;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
    }
    idle: ["log_every", "fsdp_in_use"]
}

impl Recipe for DAdaptSgdSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let zeros = |len| vec![0.; len];
        let slots = Slots::new(build.forms, |form| Path {
            step: 0,
            s: zeros(form.len()),
            x0: zeros(form.len()),
        });
        let global = Global { d: self.d0, numerator_weighted: 0., g0_norm: 0. };
        Ok(Box::new(DAdaptSgd { settings: *self, global, slots }))
    }

    fn state_bytes(&self) -> f64 {
        8.
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

slot! {
    /// The estimate, and the norm of the first gradient (0: there was none yet).
    Global { d: f64, numerator_weighted: f64, g0_norm: f64, }
}

slot! {
    /// Weighted sum of gradients, and the weights before the first step.
    Path { step: u32, s: Vec<f32>, x0: Vec<f32>, }
}

struct DAdaptSgd {
    settings: DAdaptSgdSettings,
    global: Global,
    slots: Slots<Path>,
}

impl Optimize for DAdaptSgd {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let lr = common_rate("DAdaptSGD", input)?;
        if lr == 0. {
            return Ok(());
        }
        if self.global.g0_norm == 0. {
            let parts = self.slots.visit(params, input, Order::Engine, |item| {
                let counts = item.lr > 0.;
                let squares = item.gradient.iter().map(|g| f64::from(g * g));
                [if counts { squares.sum() } else { 0. }]
            })?;
            let [squares] = sums(&parts);
            if squares == 0. {
                return Ok(());
            }
            self.global.g0_norm = squares.sqrt();
        }
        let d = self.global.d;
        let dlr = d * lr / self.global.g0_norm;
        let (l2, take) = (self.settings.weight_decay as f32, dlr as f32);
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            let slot = item.slot;
            if slot.step == 0 {
                slot.x0.copy_from_slice(item.weights);
            }
            slot.step += 1;
            if item.lr == 0. {
                return [0.; 2];
            }
            let (mut dot, mut squares) = (0_f64, 0_f64);
            for ((g, w), s) in item.gradient.iter().zip(item.weights.iter()).zip(&mut slot.s) {
                let g = g + l2 * w;
                dot += f64::from(g * *s);
                *s += take * g;
                squares += f64::from(*s * *s);
            }
            [dlr * dot, squares]
        })?;
        let [dot, squares] = sums(&parts);
        if squares == 0. {
            return Ok(());
        }
        let numerator = self.global.numerator_weighted + dot;
        let guess = 2. * numerator / squares.sqrt();
        self.global.d = d.max(guess.min(d * self.settings.growth_rate));
        self.global.numerator_weighted = numerator;
        let (keep, take) = (self.settings.momentum as f32, (1. - self.settings.momentum) as f32);
        self.slots.visit(params, input, Order::Engine, |item| {
            let path = item.slot.x0.iter().zip(&item.slot.s);
            for (weight, (x0, s)) in item.weights.iter_mut().zip(path) {
                *weight = *weight * keep + take * (x0 - s);
            }
        })?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptSGD", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
