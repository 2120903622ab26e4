//! D-Adaptation for Adan, as dadaptation's `DAdaptAdan` and, with a tighter bound for the estimate,
//! `DAdaptAdanIP`.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of D-Adaptation for Adan.
    DAdaptAdanSettings {
        /// Decay rates of the gradient, of its change and of its square.
        betas: (f64, f64, f64) = (0.98, 0.92, 0.99), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, Positive;
        /// Weight decay.
        weight_decay: f64 = 0.02, NotNegative;
        /// Decay before the step instead of after it.
        no_prox: bool = false, Any;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
    }
    idle: ["log_every"]
}

/// The same with the bound by inner products.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DAdaptAdanIpSettings(pub DAdaptAdanSettings);

impl super::Settings for DAdaptAdanIpSettings {
    fn set(&mut self, key: &str, value: &crate::options::Literal) -> Option<Result<(), String>> {
        self.0.set(key, value)
    }

    fn keys(&self) -> &'static [&'static str] {
        self.0.keys()
    }

    fn idle_keys(&self) -> &'static [&'static str] {
        self.0.idle_keys()
    }
}

impl Recipe for DAdaptAdanSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(DAdaptAdan::new(*self, false, build)))
    }

    fn state_bytes(&self) -> f64 {
        20.
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

impl Recipe for DAdaptAdanIpSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(DAdaptAdan::new(self.0, true, build)))
    }

    fn state_bytes(&self) -> f64 {
        self.0.state_bytes()
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

slot! {
    /// The estimate; `weighted` is of squared gradients, or of inner products.
    Global { d: f64, weighted: f64, }
}

slot! {
    /// What Adan keeps for a tensor.
    Moments {
        step: u32,
        exp_avg: Vec<f32>,
        exp_avg_diff: Vec<f32>,
        exp_avg_sq: Vec<f32>,
        s: Vec<f32>,
        pre_grad: Vec<f32>,
    }
}

impl Moments {
    fn zeros(len: usize) -> Self {
        let zeros = || vec![0.; len];
        Self {
            step: 0,
            exp_avg: zeros(),
            exp_avg_diff: zeros(),
            exp_avg_sq: zeros(),
            s: zeros(),
            pre_grad: zeros(),
        }
    }
}

struct DAdaptAdan {
    settings: DAdaptAdanSettings,
    inner_products: bool,
    global: Global,
    slots: Slots<Moments>,
}

impl DAdaptAdan {
    fn new(settings: DAdaptAdanSettings, inner_products: bool, build: &Build) -> Self {
        let slots = Slots::new(build.forms, |form| Moments::zeros(form.len()));
        let global = Global { d: settings.d0, weighted: 0. };
        Self { settings, inner_products, global, slots }
    }

    /// Moves the moments; gives squared gradients, inner products with the sum of gradients, that
    /// sum's squares and its size, the first three divided by the root of the second moment.
    fn gather(&mut self, params: &mut ParamStore, input: &StepInput, dlr: f64) -> Result<[f64; 4]> {
        let (beta1, beta2, beta3) = self.settings.betas;
        let eps = self.settings.eps as f32;
        let (keep1, take1) = (beta1 as f32, (dlr * (1. - beta1)) as f32);
        let (keep2, take2) = (beta2 as f32, (dlr * (1. - beta2)) as f32);
        let (keep3, take3) = (beta3 as f32, (1. - beta3) as f32);
        let take_s = (dlr * (1. - beta3)) as f32;
        let parts = self.slots.visit(params, input, Order::Engine, |item| {
            let slot = item.slot;
            if slot.step == 0 {
                slot.pre_grad.copy_from_slice(item.gradient);
            }
            let mut sums = [0_f64; 4];
            let moments = slot.exp_avg.iter_mut().zip(&mut slot.exp_avg_diff);
            let moments = moments.zip(&mut slot.exp_avg_sq).zip(&mut slot.s).zip(&slot.pre_grad);
            for (g, ((((m, change), v), s), before)) in item.gradient.iter().zip(moments) {
                let difference = g - before;
                let update = g + keep2 * difference;
                let product = g * (*s / (v.sqrt() + eps));
                *m = *m * keep1 + take1 * g;
                *change = *change * keep2 + take2 * difference;
                *v = *v * keep3 + take3 * (update * update);
                *s = *s * keep3 + take_s * g;
                let root = v.sqrt() + eps;
                let values = [g * g / root, product, *s * *s / root, s.abs()];
                sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += f64::from(x));
            }
            sums
        })?;
        Ok(sums(&parts))
    }
}

impl Optimize for DAdaptAdan {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let settings = self.settings;
        let lr = common_rate("DAdaptAdan", input)?;
        let (_, beta2, beta3) = settings.betas;
        let d = self.global.d;
        let dlr = d * lr;
        let [gradients, products, squares, size] = self.gather(params, input, dlr)?;
        if size == 0. {
            return Ok(());
        }
        let (weighted, guess) = if self.inner_products {
            let weighted = beta3 * self.global.weighted + (1. - beta3) * dlr * products;
            (weighted, 2. * (beta3 / (1. - beta3)) * weighted / size)
        } else {
            let weighted = beta3 * self.global.weighted + gradients * dlr * dlr * (1. - beta3);
            (weighted, (squares / (1. - beta3) - weighted) / size)
        };
        if lr > 0. {
            self.global.d = d.max(guess.min(d * settings.growth_rate));
        }
        self.global.weighted = weighted;
        let decay = dlr * settings.weight_decay;
        let (before, after) = match settings.no_prox {
            true => ((1. - decay) as f32, 1.),
            false => (1., (1. + decay) as f32),
        };
        let (share, eps) = (beta2 as f32, settings.eps as f32);
        self.slots.visit(params, input, Order::Engine, |item| {
            let slot = item.slot;
            slot.step += 1;
            let moments = slot.exp_avg.iter().zip(&slot.exp_avg_diff).zip(&slot.exp_avg_sq);
            for (weight, ((m, change), v)) in item.weights.iter_mut().zip(moments) {
                let update = (m + share * change) / (v.sqrt() + eps);
                *weight = (*weight * before - update) / after;
            }
            slot.pre_grad.copy_from_slice(item.gradient);
        })?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("DAdaptAdan", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}
