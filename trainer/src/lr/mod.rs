//! Learning-rate schedules as pure functions of the step, with the values of transformers,
//! diffusers and PyTorch.
//!
//! Steps are optimizer steps of the run, however many ranks share it: warm-up does not end earlier
//! with more processes. (sd-scripts on accelerate advances its schedule once per process but leaves
//! a warm-up given in steps as it is, so there two processes halve it.)
//!
//! - `course`: the curves · `torch`: the curves of PyTorch's classes · `tests`: against the references
//!
//! Which curve a run takes is read in `crate::options` (`scheduler_args.rs`).

mod course;
#[cfg(test)]
mod tests;
mod torch;

pub use course::{Course, Curve};
pub use torch::TorchCourse;

use crate::options::Options;
use anyhow::{Result, bail};

/// A schedule for a run of known length.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Course of the rate.
    pub course: Course,
    /// Optimizer steps in which the rate rises from 0.
    pub warmup_steps: usize,
    /// Optimizer steps in which the rate falls at the end (`warmup_stable_decay`).
    pub decay_steps: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// `learning_rate`, which [`Schedule::factor`] is relative to.
    pub learning_rate: f64,
}

impl Schedule {
    /// The schedule that the options name, for a run of `total_steps` optimizer steps.
    ///
    /// # Errors
    /// Settings that the schedule does not have; a warm-up (and decay) longer than the run.
    pub fn new(options: &Options, total_steps: usize) -> Result<Self> {
        let schedule = Schedule {
            course: options.read_lr_course()?,
            warmup_steps: options.lr_warmup_steps.of(total_steps),
            decay_steps: options.lr_decay_steps.of(total_steps),
            total_steps,
            learning_rate: options.learning_rate,
        };
        schedule.refuse_longer_than_run()?;
        Ok(schedule)
    }

    fn refuse_longer_than_run(&self) -> Result<()> {
        let decay = match self.course {
            Course::WarmupStableDecay { .. } => self.decay_steps,
            _ => 0,
        };
        let warmup = if self.course.has_warmup() { self.warmup_steps } else { 0 };
        if warmup.saturating_add(decay) <= self.total_steps {
            return Ok(());
        }
        let (what, name) = match (warmup, decay) {
            (_, 0) => ("`lr_warmup_steps` is", "`lr_warmup_steps`"),
            (0, _) => ("`lr_decay_steps` is", "`lr_decay_steps`"),
            _ => ("`lr_warmup_steps` and `lr_decay_steps` are", "both"),
        };
        bail!(
            "{what} longer than the run of {} steps: {}\n\
             hint: lower {name}, or give a share of the run, such as `0.1`",
            self.total_steps,
            warmup.saturating_add(decay)
        )
    }

    /// The learning rate, of a group whose own is `base`, in the step after `step` finished ones:
    /// the first step of a run has `rate(base, 0)`.
    pub fn rate(&self, base: f64, step: usize) -> f64 {
        match &self.course {
            Course::Torch(course) => course.rate(base, step),
            _ => base * self.course_factor(step),
        }
    }

    /// Factor on `learning_rate` in the step after `step` finished ones: the first step of a run
    /// has `factor(0)`, which is 0 with a warm-up. Where a lowest rate is given in absolute
    /// numbers, other rates than `learning_rate` have other factors: see [`Schedule::rate`].
    pub fn factor(&self, step: usize) -> f64 {
        match &self.course {
            Course::Torch(course) if self.learning_rate == 0. => course.rate(1., step),
            Course::Torch(course) => course.rate(self.learning_rate, step) / self.learning_rate,
            _ => self.course_factor(step),
        }
    }

    fn course_factor(&self, step: usize) -> f64 {
        self.course.factor(step, self.warmup_steps, self.decay_steps, self.total_steps)
    }
}
