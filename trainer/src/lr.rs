//! Learning-rate schedules as pure functions of the step, with the values of transformers'
//! `get_scheduler`.
//!
//! Steps are optimizer steps of the run, however many ranks share it: warm-up does not end earlier
//! with more processes. (sd-scripts on accelerate advances its schedule once per process but leaves
//! a warm-up given in steps as it is, so there two processes halve it.)

use crate::options::{LrScheduler, Options};
use anyhow::{Result, bail};

/// Course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Always the same, without warm-up.
    Constant,
    /// The same after the warm-up.
    ConstantWithWarmup,
    /// Falls in a line to 0 at the end.
    Linear,
    /// Falls along half a cosine to 0 at the end.
    Cosine,
}

/// A schedule for a run of known length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Course after the warm-up.
    pub shape: Shape,
    /// Optimizer steps in which the rate rises from 0.
    pub warmup_steps: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
}

impl Schedule {
    /// The schedule that the options name, for a run of `total_steps` optimizer steps.
    pub fn new(options: &Options, total_steps: usize) -> Result<Self> {
        let shape = match options.lr_scheduler {
            LrScheduler::Constant => Shape::Constant,
            LrScheduler::ConstantWithWarmup => Shape::ConstantWithWarmup,
            LrScheduler::Linear => Shape::Linear,
            LrScheduler::Cosine => Shape::Cosine,
            other => bail!("`lr_scheduler` is not supported yet: `{}`", other.as_str()),
        };
        Ok(Schedule { shape, warmup_steps: options.lr_warmup_steps.of(total_steps), total_steps })
    }

    /// Factor on every learning rate in the step after `step` finished ones: the first step of a
    /// run has `factor(0)`, which is 0 with a warm-up.
    pub fn factor(&self, step: usize) -> f64 {
        if self.shape != Shape::Constant && step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let left = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = step.saturating_sub(self.warmup_steps) as f64 / left;
        match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => self.total_steps.saturating_sub(step) as f64 / left,
            // One half wave over the run; beyond its end it would rise again.
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::IntOrFloat;

    #[test]
    fn factors_are_those_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/options/lr_schedules.json");
        let cases: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = cases.as_array().unwrap();
        assert!(cases.len() >= 12);
        for case in cases {
            let count = |key: &str| case[key].as_u64().unwrap() as usize;
            let name = toml::Value::String(case["scheduler"].as_str().unwrap().to_owned());
            let options = Options {
                lr_scheduler: crate::options::OptionValue::from_toml(&name).unwrap(),
                lr_warmup_steps: IntOrFloat::Steps(count("warmup_steps")),
                ..Options::default()
            };
            let schedule = Schedule::new(&options, count("total_steps")).unwrap();
            let factors = case["factors"].as_array().unwrap();
            assert_eq!(factors.len(), count("total_steps") + 1);
            for (step, factor) in factors.iter().enumerate() {
                let (ours, theirs) = (schedule.factor(step), factor.as_f64().unwrap());
                assert!((ours - theirs).abs() < 1e-12, "{name} step {step}: {ours}, not {theirs}");
            }
        }
    }

    #[test]
    fn warmup_as_a_share_is_rounded_down() {
        let options = Options {
            lr_scheduler: LrScheduler::Linear,
            lr_warmup_steps: IntOrFloat::Share(0.1),
            ..Options::default()
        };
        assert_eq!(Schedule::new(&options, 128).unwrap().warmup_steps, 12);
    }

    #[test]
    fn a_warmup_longer_than_the_run_never_divides_by_zero() {
        for shape in [Shape::ConstantWithWarmup, Shape::Linear, Shape::Cosine] {
            let schedule = Schedule { shape, warmup_steps: 10, total_steps: 4 };
            assert_eq!(schedule.factor(3), 0.3);
            assert!(schedule.factor(11).is_finite());
        }
    }

    #[test]
    fn schedules_that_are_not_built_are_refused() {
        let options = Options { lr_scheduler: LrScheduler::Polynomial, ..Options::default() };
        let message = Schedule::new(&options, 10).unwrap_err().to_string();
        assert_eq!(message, "`lr_scheduler` is not supported yet: `polynomial`");
    }
}
