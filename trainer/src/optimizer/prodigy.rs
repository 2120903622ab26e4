//! Prodigy (Mishchenko & Defazio, arXiv:2306.06101) as prodigyopt's `Prodigy`: Adam whose step size
//! is an estimate of the distance to the solution that only grows.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{common_rate, load, save, sums};
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput, TensorForm};

settings! {
    /// Settings of Prodigy; the defaults are prodigyopt's.
    ProdigySettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Memory of the estimate. Default: the root of the second beta.
        beta3: Option<f64> = None, NotNegative;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, Positive;
        /// Weight decay.
        weight_decay: f64 = 0., NotNegative;
        /// Take it off the weights rather than add it to the gradient.
        decouple: bool = true, Any;
        /// Correct the moments' start from zero, as Adam does.
        use_bias_correction: bool = false, Any;
        /// Leave the learning rate out of the estimate's denominator, for warm-ups.
        safeguard_warmup: bool = false, Any;
        /// First estimate.
        d0: f64 = 1e-6, Positive;
        /// Factor on the estimate.
        d_coef: f64 = 1., Positive;
        /// Largest growth of the estimate in a step, as a factor.
        growth_rate: f64 = f64::INFINITY, Positive;
        /// Estimate from every n-th number of a tensor.
        slice_p: usize = 1, Positive;
    }
    idle: ["fsdp_in_use"]
}

impl Recipe for ProdigySettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let slots = Slots::new(build.forms, |form| self.moments(form));
        let global = Global { k: 0, d: self.d0, d_max: self.d0, d_numerator: 0. };
        Ok(Box::new(Prodigy { settings: *self, global, slots }))
    }

    fn state_bytes(&self) -> f64 {
        8. + 8. / self.slice_p as f64
    }

    fn pace(&self) -> Pace {
        Pace::Estimated
    }
}

impl ProdigySettings {
    fn moments(&self, form: &TensorForm) -> Moments {
        let zeros = |len| vec![0.; len];
        let (all, slice) = (form.len(), form.len().div_ceil(self.slice_p));
        let first = if self.betas.0 > 0. { all } else { 0 };
        let exp_avg = zeros(first);
        Moments { step: 0, exp_avg, exp_avg_sq: zeros(all), s: zeros(slice), p0: zeros(slice) }
    }
}

slot! {
    /// The estimate.
    Global { k: u32, d: f64, d_max: f64, d_numerator: f64, }
}

slot! {
    /// What Prodigy keeps for a tensor.
    Moments {
        step: u32,
        /// Empty where the first beta is 0.
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
        /// Sum of gradients, of the slice.
        s: Vec<f32>,
        /// Weights before the first step, of the slice.
        p0: Vec<f32>,
    }
}

struct Prodigy {
    settings: ProdigySettings,
    global: Global,
    slots: Slots<Moments>,
}

impl Optimize for Prodigy {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let settings = self.settings;
        let lr = common_rate("Prodigy", input)?;
        let (beta1, beta2) = settings.betas;
        let beta3 = settings.beta3.unwrap_or_else(|| beta2.sqrt());
        let d = self.global.d;
        let turn = self.global.k as i32 + 1;
        let correction = match settings.use_bias_correction {
            true => (1. - beta2.powi(turn)).sqrt() / (1. - beta1.powi(turn)),
            false => 1.,
        };
        let dlr = d * lr * correction;
        let order = if settings.slice_p > 1 { Order::File } else { Order::Engine };
        let pull = if settings.safeguard_warmup { d } else { dlr };
        let (take_s, keep_s) = ((d / settings.d0 * pull) as f32, beta3 as f32);
        let l2 = if settings.decouple { 0. } else { settings.weight_decay as f32 };
        let (keep1, take1) = (beta1 as f32, (d * (1. - beta1)) as f32);
        let (keep2, take2) = (beta2 as f32, (d * d * (1. - beta2)) as f32);
        let parts = self.slots.visit(params, input, order, |item| {
            let slot = item.slot;
            let slice = settings.slice_p;
            if slot.step == 0 {
                let first = item.weights.iter().step_by(slice);
                slot.p0.iter_mut().zip(first).for_each(|(place, weight)| *place = *weight);
            }
            if item.lr == 0. {
                return [0.; 2];
            }
            let sliced = item.gradient.iter().zip(item.weights.iter()).step_by(slice);
            let (mut dot, mut size) = (0_f64, 0_f64);
            for ((g, w), (s, p0)) in sliced.zip(slot.s.iter_mut().zip(&slot.p0)) {
                let g = g + l2 * w;
                dot += f64::from(g * (p0 - w));
                *s = *s * keep_s + take_s * g;
                size += f64::from(s.abs());
            }
            let pairs = || item.gradient.iter().zip(item.weights.iter()).map(|(g, w)| g + l2 * w);
            for (m, g) in slot.exp_avg.iter_mut().zip(pairs()) {
                *m = *m * keep1 + take1 * g;
            }
            for (v, g) in slot.exp_avg_sq.iter_mut().zip(pairs()) {
                *v = *v * keep2 + take2 * g * g;
            }
            [d / settings.d0 * dlr * dot, size]
        })?;
        let [numerator, denominator] = sums(&parts);
        if denominator == 0. {
            return Ok(());
        }
        let numerator = self.global.d_numerator * beta3 + numerator;
        self.global.estimate(&settings, numerator, denominator);
        let decay = if settings.decouple { (-settings.weight_decay * dlr) as f32 } else { 0. };
        let eps = (self.global.d * settings.eps) as f32;
        let plain = (-dlr * self.global.d) as f32;
        let step_size = (-dlr) as f32;
        self.slots.visit(params, input, order, |item| {
            let slot = item.slot;
            slot.step += 1;
            let mut first = slot.exp_avg.iter();
            for ((weight, g), v) in item.weights.iter_mut().zip(item.gradient).zip(&slot.exp_avg_sq)
            {
                let gradient = g + l2 * *weight;
                let decayed = *weight + decay * *weight;
                let root = v.sqrt() + eps;
                *weight = match first.next() {
                    Some(m) => decayed + step_size * m / root,
                    None => decayed + plain * gradient / root,
                };
            }
        })?;
        self.global.k += 1;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load("Prodigy", (&mut self.global, &mut self.slots), state)
    }

    fn effective_scale(&self) -> Option<f64> {
        Some(self.global.d)
    }
}

impl Global {
    fn estimate(&mut self, settings: &ProdigySettings, numerator: f64, denominator: f64) {
        let guess = settings.d_coef * numerator / denominator;
        if self.d == settings.d0 {
            self.d = self.d.max(guess);
        }
        self.d_max = self.d_max.max(guess);
        self.d = self.d_max.min(self.d * settings.growth_rate);
        self.d_numerator = numerator;
    }
}
