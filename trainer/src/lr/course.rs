//! The curves of transformers' and diffusers' schedules, as factors on the learning rate.

use super::TorchCourse;
use std::f64::consts::PI;

/// Form of a rise or fall between 0 and 1 in `warmup_stable_decay`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// Straight.
    Linear,
    /// Along a cosine.
    Cosine,
    /// Along 1 minus a square root: steep first when falling, steep last when rising.
    OneMinusSqrt,
}

/// Course of the learning rate.
#[derive(Clone, Debug, PartialEq)]
pub enum Course {
    /// Always the same, without warm-up.
    Constant,
    /// The same after the warm-up.
    ConstantWithWarmup,
    /// Falls in a line to 0 at the end.
    Linear,
    /// Falls along `waves` waves of a cosine (0.5: a half one) from 1 to `floor`.
    Cosine {
        /// Whole waves over the run.
        waves: f64,
        /// Lowest factor.
        floor: f64,
    },
    /// Falls along a half cosine to 0 and jumps back, `cycles` times.
    CosineWithRestarts {
        /// Half waves over the run.
        cycles: f64,
    },
    /// Falls to `end` as the `power` of what is left of the run.
    Polynomial {
        /// Last factor.
        end: f64,
        /// Exponent.
        power: f64,
    },
    /// Falls as the inverse root of the step.
    InverseSqrt {
        /// Steps after which the rate has fallen to 1/√2; `None`: the warm-up, or 10000 without one.
        timescale: Option<usize>,
    },
    /// Rises from `floor`, stays, and falls to `floor` in the last steps.
    WarmupStableDecay {
        /// Form of the rise.
        warmup: Curve,
        /// Form of the fall.
        decay: Curve,
        /// Whole waves of a cosine fall.
        waves: f64,
        /// Lowest factor.
        floor: f64,
    },
    /// One factor until each step, then the next.
    PiecewiseConstant {
        /// Step at which a factor ends, rising, and the factor.
        rules: Vec<(usize, f64)>,
        /// The factor after all of these.
        last: f64,
    },
    /// Adafactor finds its own rate; the factor stays 1.
    FromOptimizer,
    /// A class of `torch.optim.lr_scheduler`.
    Torch(TorchCourse),
}

impl Course {
    /// Whether `lr_warmup_steps` counts.
    pub fn has_warmup(&self) -> bool {
        !matches!(
            self,
            Course::Constant
                | Course::PiecewiseConstant { .. }
                | Course::FromOptimizer
                | Course::Torch(_)
        )
    }

    /// The factor after `step` finished steps of `total`; [`Course::Torch`] has rates instead of
    /// factors, and 1 here.
    pub(super) fn factor(&self, step: usize, warmup: usize, decay: usize, total: usize) -> f64 {
        if let Course::WarmupStableDecay { .. } = self {
            return self.warmup_stable_decay(step, warmup, decay, total);
        }
        if self.has_warmup() && step < warmup {
            return step as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let done = step.saturating_sub(warmup) as f64 / span;
        match self {
            Course::Constant
            | Course::ConstantWithWarmup
            | Course::FromOptimizer
            | Course::Torch(_)
            | Course::WarmupStableDecay { .. } => 1.,
            Course::Linear => total.saturating_sub(step) as f64 / span,
            // Beyond the end of the run it would rise again.
            Course::Cosine { waves, floor } => {
                let wave = 0.5 * (1. + (PI * waves * 2. * done).cos());
                (wave * (1. - floor) + floor).max(0.)
            }
            Course::CosineWithRestarts { .. } if done >= 1. => 0.,
            Course::CosineWithRestarts { cycles } => {
                (0.5 * (1. + (PI * ((cycles * done) % 1.)).cos())).max(0.)
            }
            Course::Polynomial { end, .. } if step > total => *end,
            Course::Polynomial { end, power } => (1. - end) * (1. - done).powf(*power) + end,
            Course::InverseSqrt { timescale } => {
                let scale = timescale.unwrap_or(if warmup == 0 { 10_000 } else { warmup }) as f64;
                1. / ((step as f64 + (scale - warmup as f64)) / scale).sqrt()
            }
            Course::PiecewiseConstant { rules, last } => {
                rules.iter().find(|(end, _)| step < *end).map_or(*last, |(_, factor)| *factor)
            }
        }
    }

    fn warmup_stable_decay(&self, step: usize, warmup: usize, decay: usize, total: usize) -> f64 {
        let Course::WarmupStableDecay { warmup: rise, decay: fall, waves, floor } = self else {
            return 1.;
        };
        let above = |factor: f64| (factor * (1. - floor) + floor).max(0.);
        if step < warmup {
            let done = step as f64 / warmup as f64;
            return above(match rise {
                Curve::Linear => done,
                Curve::Cosine => 0.5 * (1. - (PI * done).cos()),
                Curve::OneMinusSqrt => 1. - (1. - done).sqrt(),
            });
        }
        let start = total.saturating_sub(decay).max(warmup);
        if step < start {
            return 1.;
        }
        if step >= start + decay {
            return *floor;
        }
        let done = (step - start) as f64 / decay as f64;
        above(match fall {
            Curve::Linear => 1. - done,
            Curve::Cosine => 0.5 * (1. + (PI * waves * 2. * done).cos()),
            Curve::OneMinusSqrt => 1. - done.sqrt(),
        })
    }
}
