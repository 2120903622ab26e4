//! Schedule-free training (Defazio et al., arXiv:2405.15682) as the schedulefree package has it:
//! AdamW, RAdam and SGD that average their weights instead of lowering the learning rate.
//!
//! Gradients are taken at `y` (the weights while training), steps are made from `z`, and the average
//! `x` of all `z` is what is saved and validated. The learning rate is constant but for a warm-up of
//! the optimizer's own, so the weights of the average are the same for every learning rate.

use anyhow::Result;
use engine::ParamStore;

use super::distance::{load, save};
use super::radam::rectification;
use super::settings::settings;
use super::tensors::{Order, Slots, slot};
use super::{Build, Optimize, OptimizerState, Pace, Recipe, StepInput};

settings! {
    /// Settings of schedule-free AdamW.
    AdamWScheduleFreeSettings {
        /// Share of `x` in `y`, and decay rate of the second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Weight decay, at `y`.
        weight_decay: f64 = 0., NotNegative;
        /// Steps in which the learning rate rises.
        warmup_steps: usize = 0, Any;
        /// Step `k` weighs `k^r` in the average.
        r: f64 = 0., Any;
        /// In a warm-up a step weighs its learning rate to this power.
        weight_lr_power: f64 = 2., Any;
    }
    idle: ["foreach"]
}

settings! {
    /// Settings of schedule-free RAdam, which needs no warm-up.
    RAdamScheduleFreeSettings {
        /// Share of `x` in `y`, and decay rate of the second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Weight decay, at `y`.
        weight_decay: f64 = 0., NotNegative;
        /// Step `k` weighs `k^r` in the average.
        r: f64 = 0., Any;
        /// A step weighs its learning rate to this power.
        weight_lr_power: f64 = 2., Any;
        /// Do not move while the second moment is too young.
        silent_sgd_phase: bool = true, Any;
    }
    idle: ["foreach"]
}

settings! {
    /// Settings of schedule-free SGD.
    SgdScheduleFreeSettings {
        /// Share of `x` in `y`.
        momentum: f64 = 0.9, Inside;
        /// Weight decay, at `y`.
        weight_decay: f64 = 0., NotNegative;
        /// Steps in which the learning rate rises.
        warmup_steps: usize = 0, Any;
        /// Step `k` weighs `k^r` in the average.
        r: f64 = 0., Any;
        /// In a warm-up a step weighs its learning rate to this power.
        weight_lr_power: f64 = 2., Any;
    }
    idle: ["foreach"]
}

/// How the learning rate starts.
#[derive(Clone, Copy)]
enum Start {
    /// In a line over so many steps.
    Warmup(usize),
    /// By the rectification of RAdam; the flag keeps still while it is undefined.
    Rectified(bool),
}

/// What the three have in common.
#[derive(Clone, Copy)]
struct Method {
    name: &'static str,
    /// Share of `x` in `y`.
    momentum: f64,
    /// Decay rate and eps of a second moment, where there is one.
    second: Option<(f64, f64)>,
    weight_decay: f64,
    start: Start,
    power_of_step: f64,
    power_of_rate: f64,
}

impl Recipe for AdamWScheduleFreeSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(ScheduleFree::new(
            Method {
                name: "AdamWScheduleFree",
                momentum: self.betas.0,
                second: Some((self.betas.1, self.eps)),
                weight_decay: self.weight_decay,
                start: Start::Warmup(self.warmup_steps),
                power_of_step: self.r,
                power_of_rate: self.weight_lr_power,
            },
            build,
        )))
    }

    fn state_bytes(&self) -> f64 {
        8.
    }

    fn pace(&self) -> Pace {
        Pace::ScheduleFree
    }

    fn fault(&self) -> Option<String> {
        no_average(self.betas.0)
    }
}

impl Recipe for RAdamScheduleFreeSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(ScheduleFree::new(
            Method {
                name: "RAdamScheduleFree",
                momentum: self.betas.0,
                second: Some((self.betas.1, self.eps)),
                weight_decay: self.weight_decay,
                start: Start::Rectified(self.silent_sgd_phase),
                power_of_step: self.r,
                power_of_rate: self.weight_lr_power,
            },
            build,
        )))
    }

    fn state_bytes(&self) -> f64 {
        8.
    }

    fn pace(&self) -> Pace {
        Pace::ScheduleFree
    }

    fn fault(&self) -> Option<String> {
        no_average(self.betas.0)
    }
}

impl Recipe for SgdScheduleFreeSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        Ok(Box::new(ScheduleFree::new(
            Method {
                name: "SGDScheduleFree",
                momentum: self.momentum,
                second: None,
                weight_decay: self.weight_decay,
                start: Start::Warmup(self.warmup_steps),
                power_of_step: self.r,
                power_of_rate: self.weight_lr_power,
            },
            build,
        )))
    }

    fn state_bytes(&self) -> f64 {
        4.
    }

    fn pace(&self) -> Pace {
        Pace::ScheduleFree
    }
}

fn no_average(beta1: f64) -> Option<String> {
    (beta1 == 0.).then(|| "`betas` must begin with more than 0: it divides by it".to_owned())
}

slot! {
    /// Steps and weights of the average; rates are relative to the learning rate.
    Global { k: u32, rate_max: f64, weight_sum: f64, }
}

slot! {
    /// What is kept for a tensor.
    Average {
        step: u32,
        z: Vec<f32>,
        /// Empty for SGD.
        exp_avg_sq: Vec<f32>,
    }
}

struct ScheduleFree {
    method: Method,
    global: Global,
    slots: Slots<Average>,
}

/// The numbers of one step.
struct Turn {
    /// Learning rate, relative to the given one.
    rate: f64,
    /// Share of the new `z` in the average.
    share: f64,
    /// `1 - beta2^k`; `None`: the gradient is not divided by the second moment.
    correction2: Option<f64>,
}

impl ScheduleFree {
    fn new(method: Method, build: &Build) -> Self {
        let slots = Slots::new(build.forms, |form| Average {
            step: 0,
            z: vec![0.; form.len()],
            exp_avg_sq: vec![0.; if method.second.is_some() { form.len() } else { 0 }],
        });
        Self { method, global: Global { k: 0, rate_max: -1., weight_sum: 0. }, slots }
    }

    fn turn(&mut self) -> Turn {
        let (method, global) = (self.method, &mut self.global);
        global.k += 1;
        let step = f64::from(global.k);
        let beta2 = method.second.map_or(0., |(beta2, _)| beta2);
        let power = beta2.powi(global.k as i32);
        let mut correction2 = method.second.map(|_| 1. - power);
        let rate = match method.start {
            Start::Warmup(steps) if step < steps as f64 + 1. => step / steps as f64,
            Start::Warmup(_) => 1.,
            Start::Rectified(silent) => {
                let rectified = rectification(beta2, step, power);
                if rectified.is_none() {
                    correction2 = None;
                }
                rectified.map_or(f64::from(u8::from(!silent)), |(_, factor)| factor)
            }
        };
        global.rate_max = global.rate_max.max(rate);
        let weight = step.powf(method.power_of_step) * global.rate_max.powf(method.power_of_rate);
        global.weight_sum += weight;
        let share = if global.weight_sum == 0. { 0. } else { weight / global.weight_sum };
        Turn { rate, share, correction2 }
    }
}

impl Optimize for ScheduleFree {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let turn = self.turn();
        let method = self.method;
        let (beta2, eps) = method.second.unwrap_or((0., 0.));
        let (keep2, take2) = (beta2 as f32, (1. - beta2) as f32);
        let (correction2, eps) = (turn.correction2.map(|c| c as f32), eps as f32);
        let (decay, share) = (method.weight_decay as f32, turn.share as f32);
        let pull = method.momentum * (1. - turn.share) - 1.;
        self.slots.visit(params, input, Order::Engine, |item| {
            let slot = item.slot;
            if slot.step == 0 {
                slot.z.copy_from_slice(item.weights);
            }
            slot.step += 1;
            let lr = item.lr * turn.rate;
            let (of_y, of_z) = ((lr * pull) as f32, lr as f32);
            let mut second = slot.exp_avg_sq.iter_mut();
            for ((y, g), z) in item.weights.iter_mut().zip(item.gradient).zip(&mut slot.z) {
                let mut gradient = *g;
                if let Some(v) = second.next() {
                    *v = *v * keep2 + take2 * g * g;
                    if let Some(correction) = correction2 {
                        gradient /= (*v / correction).sqrt() + eps;
                    }
                }
                gradient += decay * *y;
                *y = lerp(*y, *z, share) + of_y * gradient;
                *z -= of_z * gradient;
            }
        })?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        save(&self.global, &self.slots)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        load(self.method.name, (&mut self.global, &mut self.slots), state)
    }

    fn evaluation_weights(&self, params: &ParamStore) -> Result<Option<Vec<f32>>> {
        let mut weights = params.flat().to_vec_f32()?;
        let share = (1. - 1. / self.method.momentum) as f32;
        let mut start = 0;
        for (form, slot) in self.slots.iter() {
            let part = &mut weights[start..start + form.len()];
            if slot.step > 0 {
                part.iter_mut().zip(&slot.z).for_each(|(y, z)| *y = lerp(*y, *z, share));
            }
            start += form.len();
        }
        Ok(Some(weights))
    }
}

/// From `a` to `b`, exact at both ends as PyTorch's.
fn lerp(a: f32, b: f32, share: f32) -> f32 {
    if share.abs() < 0.5 { a + share * (b - a) } else { b - (b - a) * (1. - share) }
}
