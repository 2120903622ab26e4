//! The curves of `torch.optim.lr_scheduler`, in closed form: PyTorch computes most of them from the
//! rate of the step before, which differs by rounding alone.

use std::f64::consts::PI;

/// A class of `torch.optim.lr_scheduler`. Steps are optimizer steps; `floor` is an absolute rate.
#[derive(Clone, Debug, PartialEq)]
pub enum TorchCourse {
    /// `ConstantLR`: `factor` for `total` steps, then 1.
    Constant {
        /// Factor of the first steps.
        factor: f64,
        /// Their number.
        total: usize,
    },
    /// `LinearLR`: from one factor to the other in `total` steps.
    Linear {
        /// First factor.
        start: f64,
        /// Last factor.
        end: f64,
        /// Steps between.
        total: usize,
    },
    /// `ExponentialLR`: times `gamma` in each step.
    Exponential {
        /// Factor of one step.
        gamma: f64,
    },
    /// `PolynomialLR`: the `power` of what is left of `total` steps.
    Polynomial {
        /// Steps to 0.
        total: usize,
        /// Exponent.
        power: f64,
    },
    /// `StepLR`: times `gamma` every `every` steps.
    Step {
        /// Steps between two falls.
        every: usize,
        /// Factor of one fall.
        gamma: f64,
    },
    /// `MultiStepLR`: times `gamma` at each milestone.
    MultiStep {
        /// Steps at which the rate falls, rising.
        milestones: Vec<usize>,
        /// Factor of one fall.
        gamma: f64,
    },
    /// `CosineAnnealingLR`: half a cosine to `floor` in `period` steps, and back up after.
    CosineAnnealing {
        /// Steps to the lowest rate (`T_max`).
        period: usize,
        /// Lowest rate (`eta_min`).
        floor: f64,
    },
    /// `CosineAnnealingWarmRestarts`: half a cosine to `floor`, then from the top again.
    CosineRestarts {
        /// Steps of the first cycle (`T_0`).
        first: usize,
        /// Each cycle is so many times as long as the one before (`T_mult`).
        growth: usize,
        /// Lowest rate (`eta_min`).
        floor: f64,
    },
}

impl TorchCourse {
    /// The rate of a group whose own is `base`, after `step` finished steps.
    pub(super) fn rate(&self, base: f64, step: usize) -> f64 {
        let fallen = |gamma: f64, times: usize| base * gamma.powf(times as f64);
        let half_wave =
            |floor: f64, done: f64| floor + (base - floor) * (1. + (PI * done).cos()) / 2.;
        match self {
            Self::Constant { factor, total } => {
                if step < *total {
                    base * factor
                } else {
                    base
                }
            }
            Self::Linear { start, end, total } => {
                base * (start + (end - start) * step.min(*total) as f64 / *total as f64)
            }
            Self::Exponential { gamma } => fallen(*gamma, step),
            Self::Polynomial { total, power } => {
                base * (1. - step.min(*total) as f64 / *total as f64).powf(*power)
            }
            Self::Step { every, gamma } => fallen(*gamma, step / every),
            Self::MultiStep { milestones, gamma } => {
                fallen(*gamma, milestones.iter().filter(|at| **at <= step).count())
            }
            Self::CosineAnnealing { period, floor } => {
                half_wave(*floor, step as f64 / *period as f64)
            }
            Self::CosineRestarts { first, growth, floor } => {
                let (mut length, mut at) = (*first, step);
                if *growth == 1 {
                    at %= length;
                }
                while at >= length {
                    at -= length;
                    length = length.saturating_mul(*growth);
                }
                half_wave(*floor, at as f64 / length as f64)
            }
        }
    }
}
