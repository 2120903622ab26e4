//! The learning-rate schedule that the options name: `lr_scheduler` with its settings, or a class of
//! PyTorch with `lr_scheduler_args`.

use super::arguments::{refuse_key, split_pairs};
use super::{LrScheduler, Options};
use crate::lr::{Course, Curve, TorchCourse};
use crate::optimizer::Pace;
use anyhow::{Result, bail};

/// Name of the option in messages.
const ARGS: &str = "lr_scheduler_args";

/// Rate at the end of `polynomial` unless `lr_end` says another, as in transformers.
const POLYNOMIAL_END: f64 = 1e-7;

/// Classes of `torch.optim.lr_scheduler` that are built.
pub const TORCH_SCHEDULES: &[&str] = &[
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "PolynomialLR",
    "StepLR",
    "MultiStepLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
];

impl Options {
    /// Whether the optimizer averages instead of following a schedule (schedule-free).
    pub fn is_schedule_free(&self) -> bool {
        self.has_pace(Pace::ScheduleFree)
    }

    /// Whether the optimizer is an Adafactor that finds its own rate: `relative_step`, its default
    /// here as in sd-scripts, which `warmup_init` implies.
    pub fn is_adafactor_relative(&self) -> bool {
        self.has_pace(Pace::Relative)
    }

    fn has_pace(&self, pace: Pace) -> bool {
        self.choose_optimizer().is_ok_and(|choice| choice.recipe.pace() == pace)
    }

    /// The schedule as the user knows it: its name, or its class.
    pub fn lr_schedule_name(&self) -> &str {
        match self.lr_scheduler_type.as_str() {
            _ if self.is_schedule_free() => "schedule-free",
            _ if self.is_adafactor_relative() => "found by Adafactor",
            "" => self.lr_scheduler.as_str(),
            class => class,
        }
    }

    /// The course of the learning rate. Errors name the setting.
    pub fn read_lr_course(&self) -> Result<Course> {
        let mut args = Args::read(self)?;
        let course = if self.is_schedule_free() {
            return Ok(Course::Constant);
        } else if self.is_adafactor_relative() {
            return Ok(Course::FromOptimizer);
        } else if self.lr_scheduler_type.is_empty() {
            self.named_course(&mut args)?
        } else {
            torch_course(&self.lr_scheduler_type, &mut args)?
        };
        args.finish()?;
        Ok(course)
    }

    fn named_course(&self, args: &mut Args) -> Result<Course> {
        let half_waves = self.lr_scheduler_num_cycles as f64;
        let floor = self.lr_scheduler_min_lr_ratio;
        Ok(match self.lr_scheduler {
            LrScheduler::Constant => Course::Constant,
            LrScheduler::ConstantWithWarmup => Course::ConstantWithWarmup,
            LrScheduler::Linear => Course::Linear,
            LrScheduler::Cosine => {
                Course::Cosine { waves: args.number("num_cycles", 0.5)?, floor: 0. }
            }
            LrScheduler::CosineWithRestarts => Course::CosineWithRestarts { cycles: half_waves },
            LrScheduler::Polynomial => {
                let end = args.number("lr_end", POLYNOMIAL_END)?;
                if self.learning_rate <= end {
                    bail!(
                        "the schedule `polynomial` ends at `lr_end`, which must be below \
                         `learning_rate`: `{end:e}`, `{:e}`",
                        self.learning_rate
                    );
                }
                Course::Polynomial { end: end / self.learning_rate, power: self.lr_scheduler_power }
            }
            LrScheduler::InverseSqrt => {
                if self.lr_scheduler_timescale == Some(0) {
                    bail!("`lr_scheduler_timescale` must be 1 or more: `0`");
                }
                Course::InverseSqrt { timescale: self.lr_scheduler_timescale }
            }
            LrScheduler::CosineWithMinLr => {
                let absolute = args.optional_number("min_lr")?;
                let floor = match (absolute, floor) {
                    (None, Some(floor)) => floor,
                    (Some(rate), None) if self.learning_rate > 0. => rate / self.learning_rate,
                    (Some(_), None) => {
                        bail!("`min_lr` in `{ARGS}` needs a `learning_rate` above 0")
                    }
                    (Some(_), Some(_)) => bail!(
                        "`lr_scheduler_min_lr_ratio` and `min_lr` in `{ARGS}` both set the lowest rate\n\
                         hint: keep one of them"
                    ),
                    (None, None) => bail!(
                        "the schedule `cosine_with_min_lr` needs its lowest rate\n\
                         hint: add `lr_scheduler_min_lr_ratio = 0.1` to end at a tenth of the learning rate"
                    ),
                };
                Course::Cosine { waves: half_waves / 2., floor }
            }
            LrScheduler::WarmupStableDecay => Course::WarmupStableDecay {
                warmup: args.curve("warmup_type", Curve::Linear)?,
                decay: args.curve("decay_type", Curve::Cosine)?,
                waves: half_waves / 2.,
                floor: floor.unwrap_or(0.),
            },
            LrScheduler::PiecewiseConstant => piecewise(args)?,
            LrScheduler::Adafactor => bail!(
                "the schedule `adafactor` shows the rate that Adafactor finds itself: it needs \
                 `optimizer_type = \"Adafactor\"` with `relative_step=True`\n\
                 hint: with `relative_step=False`, `constant_with_warmup` is usual"
            ),
        })
    }
}

/// `1:10,0.1:20,0.01`: factor 1 for the first 10 steps, 0.1 up to step 20, then 0.01.
fn piecewise(args: &mut Args) -> Result<Course> {
    let Some(text) = args.take("step_rules") else {
        bail!(
            "the schedule `piecewise_constant` needs its steps\n\
             hint: add `lr_scheduler_args = [\"step_rules=1:10,0.1:20,0.01\"]` for the full rate up to step \
             10, a tenth up to step 20 and a hundredth after"
        );
    };
    let wrong = || {
        anyhow::anyhow!(
            "`step_rules` in `{ARGS}` must be `factor:step` pairs and a last factor, such as \
             `1:10,0.1:20,0.01`, not: `{text}`"
        )
    };
    let finite = |text: &str| -> Result<f64> {
        text.trim().parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.).ok_or_else(wrong)
    };
    let (pairs, last) = match text.rsplit_once(',') {
        Some((pairs, last)) => (pairs.split(',').collect(), last),
        None => (Vec::new(), text.as_str()),
    };
    let mut rules = std::collections::BTreeMap::new();
    for pair in pairs {
        let (factor, step) = pair.split_once(':').ok_or_else(wrong)?;
        rules.insert(step.trim().parse::<usize>().map_err(|_| wrong())?, finite(factor)?);
    }
    Ok(Course::PiecewiseConstant { rules: rules.into_iter().collect(), last: finite(last)? })
}

/// A class by its name, alone or with its module.
fn torch_course(class: &str, args: &mut Args) -> Result<Course> {
    let name = class.strip_prefix("torch.optim.lr_scheduler.").unwrap_or(class);
    let third = 1. / 3.;
    let course = match name {
        "ConstantLR" => {
            let factor = args.number("factor", third)?;
            TorchCourse::Constant { factor, total: args.count("total_iters", Some(5), 0)? }
        }
        "LinearLR" => TorchCourse::Linear {
            start: args.number("start_factor", third)?,
            end: args.number("end_factor", 1.)?,
            total: args.count("total_iters", Some(5), 1)?,
        },
        "ExponentialLR" => TorchCourse::Exponential { gamma: args.needed("gamma")? },
        "PolynomialLR" => TorchCourse::Polynomial {
            total: args.count("total_iters", Some(5), 1)?,
            power: args.number("power", 1.)?,
        },
        "StepLR" => TorchCourse::Step {
            every: args.count("step_size", None, 1)?,
            gamma: args.number("gamma", 0.1)?,
        },
        "MultiStepLR" => TorchCourse::MultiStep {
            milestones: args.counts("milestones")?,
            gamma: args.number("gamma", 0.1)?,
        },
        "CosineAnnealingLR" => TorchCourse::CosineAnnealing {
            period: args.count("T_max", None, 1)?,
            floor: args.number("eta_min", 0.)?,
        },
        "CosineAnnealingWarmRestarts" => TorchCourse::CosineRestarts {
            first: args.count("T_0", None, 1)?,
            growth: args.count("T_mult", Some(1), 1)?,
            floor: args.number("eta_min", 0.)?,
        },
        _ => bail!(
            "`lr_scheduler_type` is a Python class that is not built here: `{class}`\n\
             hint: there are {}, and every `lr_scheduler`",
            TORCH_SCHEDULES.join(", ")
        ),
    };
    Ok(Course::Torch(course))
}

/// The settings of a schedule; every reader takes its own, [`Args::finish`] refuses what is left.
struct Args {
    pairs: Vec<(String, String)>,
    /// Keys that were asked for.
    known: Vec<&'static str>,
}

impl Args {
    fn read(options: &Options) -> Result<Self> {
        let pairs = split_pairs(ARGS, options.lr_scheduler_args.as_deref())?;
        Ok(Args { pairs, known: Vec::new() })
    }

    /// The text of a key, without Python's quotes.
    fn take(&mut self, key: &'static str) -> Option<String> {
        self.known.push(key);
        let at = self.pairs.iter().position(|(name, _)| name == key)?;
        let value = self.pairs.remove(at).1;
        let inner = ['"', '\''].iter().find_map(|quote| {
            value.strip_prefix(*quote).and_then(|rest| rest.strip_suffix(*quote))
        });
        Some(inner.map_or(value.clone(), str::to_owned))
    }

    fn optional_number(&mut self, key: &'static str) -> Result<Option<f64>> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0. => Ok(Some(number)),
            _ => bail!("`{key}` in `{ARGS}` must be a number, 0 or more, not: `{text}`"),
        }
    }

    fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    fn needed(&mut self, key: &'static str) -> Result<f64> {
        match self.optional_number(key)? {
            Some(number) => Ok(number),
            None => bail!("this schedule needs `{key}` in `{ARGS}`\nhint: add `{key}=0.99`"),
        }
    }

    /// A number of steps; without a default it must be given.
    fn count(&mut self, key: &'static str, default: Option<usize>, least: usize) -> Result<usize> {
        let Some(text) = self.take(key) else {
            let Some(default) = default else {
                bail!("this schedule needs `{key}` in `{ARGS}`\nhint: add `{key}=100`, in steps");
            };
            return Ok(default);
        };
        match text.parse::<usize>() {
            Ok(number) if number >= least => Ok(number),
            _ => {
                bail!("`{key}` in `{ARGS}` must be a whole number, {least} or more, not: `{text}`")
            }
        }
    }

    /// `[100, 200]`, rising.
    fn counts(&mut self, key: &'static str) -> Result<Vec<usize>> {
        let Some(text) = self.take(key) else {
            bail!("this schedule needs `{key}` in `{ARGS}`\nhint: add `{key}=[100,200]`, in steps");
        };
        let inner = text.trim_matches(|c: char| "[]()".contains(c) || c.is_whitespace());
        let parts = inner.split(',').map(str::trim).filter(|part| !part.is_empty());
        let mut counts: Vec<usize> = match parts.map(str::parse).collect() {
            Ok(counts) => counts,
            Err(_) => bail!(
                "`{key}` in `{ARGS}` must be whole numbers, such as `[100,200]`, not: `{text}`"
            ),
        };
        counts.sort_unstable();
        Ok(counts)
    }

    fn curve(&mut self, key: &'static str, default: Curve) -> Result<Curve> {
        match self.take(key).as_deref() {
            None => Ok(default),
            Some("linear") => Ok(Curve::Linear),
            Some("cosine") => Ok(Curve::Cosine),
            Some("1-sqrt") => Ok(Curve::OneMinusSqrt),
            Some(other) => {
                bail!("`{key}` in `{ARGS}` must be linear, cosine or 1-sqrt, not: `{other}`")
            }
        }
    }

    /// Refuses a key that no reader took.
    fn finish(mut self) -> Result<()> {
        match self.take("last_epoch").as_deref() {
            None | Some("-1") => {}
            Some(other) => bail!(
                "`last_epoch` in `{ARGS}` would start the schedule in its middle: `{other}`\n\
                 hint: leave it out; a resumed run goes on where it was"
            ),
        }
        match self.pairs.first() {
            None => Ok(()),
            Some((key, _)) if self.known == ["last_epoch"] => {
                bail!("unknown key in `{ARGS}`: `{key}`\nhint: this schedule has no settings there")
            }
            Some((key, _)) => {
                self.known.retain(|known| *known != "last_epoch");
                refuse_key(ARGS, key, &self.known)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(scheduler: &str, class: &str, args: &[&str]) -> Result<Course> {
        let name = toml::Value::String(scheduler.to_owned());
        Options {
            lr_scheduler: super::super::OptionValue::from_toml(&name).unwrap(),
            lr_scheduler_type: class.to_owned(),
            lr_scheduler_args: Some(args.iter().map(|arg| (*arg).to_owned()).collect()),
            learning_rate: 1e-4,
            ..Options::default()
        }
        .read_lr_course()
    }

    fn fault(scheduler: &str, class: &str, args: &[&str]) -> String {
        course(scheduler, class, args).unwrap_err().to_string()
    }

    #[test]
    fn settings_of_named_schedules() {
        let waves = |args| course("cosine", "", args).unwrap();
        assert_eq!(waves(&["num_cycles=1.5"]), Course::Cosine { waves: 1.5, floor: 0. });
        assert_eq!(waves(&["last_epoch=-1"]), Course::Cosine { waves: 0.5, floor: 0. });
        let end = course("polynomial", "", &["lr_end=1e-5"]).unwrap();
        assert_eq!(end, Course::Polynomial { end: 1e-5 / 1e-4, power: 1. });
        for text in ["step_rules='1:10, 0.5:5,0.1'", "step_rules=0.5:5,1:10,0.1"] {
            let rules = vec![(5, 0.5), (10, 1.)];
            let expected = Course::PiecewiseConstant { rules, last: 0.1 };
            assert_eq!(course("piecewise_constant", "", &[text]).unwrap(), expected);
        }
        assert_eq!(
            course("warmup_stable_decay", "", &["decay_type=\"1-sqrt\""]).unwrap(),
            Course::WarmupStableDecay {
                warmup: Curve::Linear,
                decay: Curve::OneMinusSqrt,
                waves: 0.5,
                floor: 0.
            }
        );
    }

    #[test]
    fn wrong_settings_say_what_to_do() {
        assert!(fault("linear", "", &["num_cycles=2"]).contains("has no settings there"));
        assert!(fault("cosine", "", &["num_cycle=2"]).contains("did you mean `num_cycles`?"));
        assert!(fault("polynomial", "", &["lr_end=1e-3"]).contains("must be below"));
        assert!(fault("cosine_with_min_lr", "", &[]).contains("lr_scheduler_min_lr_ratio = 0.1"));
        assert!(fault("piecewise_constant", "", &[]).contains("step_rules=1:10"));
        assert!(fault("piecewise_constant", "", &["step_rules=1:x,2"]).contains("not: `1:x,2`"));
        assert!(fault("warmup_stable_decay", "", &["decay_type=up"]).contains("not: `up`"));
        assert!(fault("adafactor", "", &[]).contains("optimizer_type = \"Adafactor\""));
        assert!(fault("constant", "OneCycleLR", &[]).contains("there are ConstantLR, LinearLR"));
        assert!(fault("constant", "StepLR", &[]).contains("needs `step_size`"));
        assert!(fault("constant", "StepLR", &["step_size=0"]).contains("1 or more"));
        assert!(fault("constant", "MultiStepLR", &["milestones=[1,a]"]).contains("[100,200]"));
        assert!(fault("constant", "ExponentialLR", &["gamma=nan"]).contains("0 or more"));
        assert!(fault("constant", "StepLR", &["step_size=1", "last_epoch=4"]).contains("middle"));
    }

    #[test]
    fn optimizers_that_choose_for_themselves() {
        let with = |optimizer: &str, args: &[&str]| Options {
            optimizer_type: optimizer.to_owned(),
            optimizer_args: Some(args.iter().map(|arg| (*arg).to_owned()).collect()),
            lr_scheduler: LrScheduler::Linear,
            ..Options::default()
        };
        let course = |optimizer, args| with(optimizer, args).read_lr_course().unwrap();
        assert_eq!(course("AdamWScheduleFree", &[]), Course::Constant);
        assert_eq!(course("AdaFactor", &["scale_parameter=False"]), Course::FromOptimizer);
        assert_eq!(course("adafactor", &["relative_step=False"]), Course::Linear);
        let both = ["relative_step=False", "warmup_init=True"];
        assert_eq!(course("adafactor", &both), Course::FromOptimizer);
    }
}
