//! The schedules against transformers, diffusers and PyTorch.

use super::*;
use crate::options::{IntOrFloat, LrScheduler, OptionValue};

/// Options from the keys of a case in `lr_schedules.json`.
fn options_of(case: &serde_json::Value) -> Options {
    let count = |key: &str| case[key].as_u64().map(|number| number as usize);
    let python = |value: &serde_json::Value| match value.as_str() {
        Some(text) => format!("'{text}'"),
        None => value.to_string(),
    };
    let args = case["args"].as_object().into_iter().flatten();
    let args = args.map(|(key, value)| format!("{key}={}", python(value))).collect();
    let name = toml::Value::String(case["scheduler"].as_str().unwrap_or("constant").to_owned());
    Options {
        learning_rate: 1e-3,
        lr_scheduler: OptionValue::from_toml(&name).unwrap(),
        lr_warmup_steps: IntOrFloat::Steps(count("warmup_steps").unwrap_or(0)),
        lr_decay_steps: IntOrFloat::Steps(count("decay_steps").unwrap_or(0)),
        lr_scheduler_num_cycles: count("num_cycles").unwrap_or(1),
        lr_scheduler_power: case["power"].as_f64().unwrap_or(1.),
        lr_scheduler_timescale: count("timescale"),
        lr_scheduler_min_lr_ratio: case["min_lr_ratio"].as_f64(),
        lr_scheduler_type: case["class"].as_str().unwrap_or_default().to_owned(),
        lr_scheduler_args: Some(args),
        ..Options::default()
    }
}

#[test]
fn rates_are_those_of_the_references() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/options/lr_schedules.json");
    let cases: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 50);
    let mut classes = std::collections::BTreeSet::new();
    for case in cases {
        let named = |key: &str| case[key].as_str().map(str::to_owned);
        let name = named("scheduler").or(named("class")).unwrap();
        let total = case["total_steps"].as_u64().unwrap() as usize;
        let schedule = Schedule::new(&options_of(case), total).unwrap();
        for (base, rates) in [1e-3, 2.5e-4].into_iter().zip(case["rates"].as_array().unwrap()) {
            let rates = rates.as_array().unwrap();
            assert_eq!(rates.len(), total + 1);
            for (step, theirs) in rates.iter().enumerate() {
                let (ours, theirs) = (schedule.rate(base, step), theirs.as_f64().unwrap());
                // Relative to the group's own rate: PyTorch's classes go from step to step and
                // carry the rounding of every step before, also where the rate is near 0.
                let difference = (ours - theirs).abs() / base;
                assert!(difference < 1e-12, "{case:.100} step {step}: {ours}, not {theirs}");
            }
            let factor = schedule.factor(total / 2) * 1e-3;
            assert!((factor - schedule.rate(1e-3, total / 2)).abs() < 1e-15, "{name}");
        }
        classes.insert(name);
    }
    // Every schedule but Adafactor's own, which the optimizer makes, and every class.
    let all = LrScheduler::WORDS.iter().chain(crate::options::TORCH_SCHEDULES);
    let missing: Vec<_> = all.filter(|name| !classes.contains(**name)).collect();
    assert_eq!(missing, [&"adafactor"]);
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
fn a_warmup_longer_than_the_run_is_refused() {
    let options = |lr_scheduler, warmup, decay| Options {
        lr_scheduler,
        lr_warmup_steps: IntOrFloat::Steps(warmup),
        lr_decay_steps: IntOrFloat::Steps(decay),
        ..Options::default()
    };
    let text = |options| Schedule::new(&options, 20).unwrap_err().to_string();
    assert_eq!(
        text(options(LrScheduler::Cosine, 21, 0)),
        "`lr_warmup_steps` is longer than the run of 20 steps: 21\n\
         hint: lower `lr_warmup_steps`, or give a share of the run, such as `0.1`"
    );
    let both = text(options(LrScheduler::WarmupStableDecay, 15, 6));
    assert!(both.starts_with("`lr_warmup_steps` and `lr_decay_steps` are longer"), "{both}");
    assert!(text(options(LrScheduler::WarmupStableDecay, 0, 21)).contains("`lr_decay_steps` is"));
    // A warm-up of exactly the run, and a decay that this schedule does not read.
    Schedule::new(&options(LrScheduler::Linear, 20, 30), 20).unwrap();
}

#[test]
fn nothing_divides_by_zero() {
    for case in [
        serde_json::json!({"scheduler": "polynomial", "warmup_steps": 4}),
        serde_json::json!({"scheduler": "cosine_with_restarts", "warmup_steps": 4}),
        serde_json::json!({"scheduler": "inverse_sqrt"}),
        serde_json::json!({"scheduler": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 2}),
        serde_json::json!({"class": "CosineAnnealingWarmRestarts", "args": {"T_0": 1}}),
    ] {
        let schedule = Schedule::new(&options_of(&case), 4).unwrap();
        let rates: Vec<f64> = (0..9).map(|step| schedule.rate(1e-3, step)).collect();
        assert!(rates.iter().all(|rate| (0. ..=1.1e-3).contains(rate)), "{case}: {rates:?}");
    }
}
