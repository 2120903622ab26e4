//! D-Adaptation for AdaGrad, as dadaptation's `DAdaptAdaGrad`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation for AdaGrad.
    DAdaptAdaGradSettings {
        /// Share of the last weights in an average; 0 averages nothing.
        momentum: f64 = 0., Share;
        /// Added to the gradient times the weight.
        weight_decay: f64 = 0., NotNegative;
        /// Added to the root of the sum of squares.
        eps: f64 = 1e-6, Positive;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
    }
    idle: ["log_every"]
}

impl Recipe for DAdaptAdaGradSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let slots = Slots::new(build.forms, |form| Path {
            step: 0,
            alphak: vec![1e-6; form.len()],
            sk: vec![0.; form.len()],
            x0: vec![0.; form.len()],
        });
        let global = Global { d: self.d0, gsq_weighted: 0., sksq_weighted: 0., skl1: 0. };
        Ok(Box::new(DAdaptAdaGrad { settings: *self, global, slots }))
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
    Global { d: f64, gsq_weighted: f64, sksq_weighted: f64, skl1: f64, }
}

slot! {
    /// Sum of squares, weighted sum of gradients, and the weights before the first step.
    Path { step: u32, alphak: Vec<f32>, sk: Vec<f32>, x0: Vec<f32>, }
}

struct DAdaptAdaGrad {
    settings: DAdaptAdaGradSettings,
    global: Global,
    slots: Slots<Path>,
}

impl Optimize for DAdaptAdaGrad {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let settings = self.settings;
        let lr = common_rate("DAdaptAdaGrad", input)?;
        let d = self.global.d;
        let dlr = d * lr;
        let (l2, eps, take) = (settings.weight_decay as f32, settings.eps as f32, dlr as f32);
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            let slot = item.slot;
            if slot.step == 0 {
                slot.x0.copy_from_slice(item.weights);
            }
            slot.step += 1;
            let mut sums = [0_f64; 3];
            let path = slot.alphak.iter_mut().zip(&mut slot.sk);
            for ((g, w), (alpha, s)) in item.gradient.iter().zip(item.weights.iter()).zip(path) {
                let g = g + l2 * w;
                let before = (*s * *s / (alpha.sqrt() + eps), s.abs());
                *alpha += g * g;
                let root = alpha.sqrt() + eps;
                *s += take * g;
                sums[0] += f64::from(g * g / root);
                sums[1] += f64::from(*s * *s / root) - f64::from(before.0);
                sums[2] += f64::from(s.abs()) - f64::from(before.1);
            }
            sums
        })?;
        let [gradients, weighted, size] = sums(&parts);
        let (weighted, size) = (self.global.sksq_weighted + weighted, self.global.skl1 + size);
        if size == 0. {
            return Ok(());
        }
        let squares = self.global.gsq_weighted + dlr * dlr * gradients;
        if lr > 0. {
            let guess = (weighted - squares) / size;
            self.global.d = d.max(guess.min(d * settings.growth_rate));
        }
        self.global.gsq_weighted = squares;
        self.global.sksq_weighted = weighted;
        self.global.skl1 = size;
        let (keep, take) = (settings.momentum as f32, (1. - settings.momentum) as f32);
        self.slots.visit(params, input, Order::Engine, |item| {
            let path = item.slot.alphak.iter().zip(&item.slot.sk).zip(&item.slot.x0);
            for (weight, ((alpha, s), x0)) in item.weights.iter_mut().zip(path) {
                *weight = *weight * keep + take * (x0 - s / (alpha.sqrt() + eps));
            }
        })?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptAdaGrad", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
