//! The samplers against diffusers' trajectories (`tests/data/samplers`, made by `make.py` there).

use std::path::Path;
use std::sync::Arc;

use formats::{TensorFile, open_tensor_file};

use super::*;

/// Largest difference of latents, in the largest value that a row or the one before has. Both sides
/// keep latents in f32 (6e-8), diffusers its coefficients as well, among them logarithms whose
/// differences decide how much fresh noise is added: the largest found is 6e-6
/// (dpmsolver++_sde in 50 steps). A wrong coefficient shows as 1e-3 and more, see the tests below.
const LATENTS: f32 = 2e-5;
/// The same from pure noise, which diffusers takes as σ = 4096: the first step is the difference of
/// two numbers 30 times its result, whose factors come from a logarithm (-8.3) in f32. The largest
/// found is 5.5e-5 (dpmsolver).
const LATENTS_FROM_PURE_NOISE: f32 = 1e-4;
/// Largest difference of fractional timesteps: of the logarithm of σ in f32 (2e-7), over its slope
/// in the flattest part of the table (0.004 per timestep). Whole ones are equal.
const TIMESTEPS: f32 = 1e-3;
/// `STRENGTH` of make.py.
const STRENGTH: f64 = 0.55;

struct Reference(Arc<dyn TensorFile>);

/// A run that `make.py` made.
struct Case {
    name: String,
    kind: SamplerKind,
    options: SamplerOptions,
    timesteps: Vec<f32>,
    rows: Vec<Vec<f32>>,
}

impl Reference {
    fn open() -> Self {
        let path = "../tests/data/samplers/trajectories.safetensors";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        Self(open_tensor_file(&path).unwrap())
    }

    fn get(&self, name: &str) -> Vec<f32> {
        self.0.view(name).unwrap().to_f32()
    }

    fn cases(&self) -> Vec<Case> {
        let names = self.0.names();
        let runs = names
            .into_iter()
            .filter(|name| name.ends_with("/epsilon") || name.ends_with("/v_prediction"));
        runs.map(|name| self.case(name)).collect()
    }

    fn case(&self, name: &str) -> Case {
        let [sampler, variant, steps, prediction]: [&str; 4] =
            name.split('/').collect::<Vec<_>>().try_into().unwrap();
        let mut options = SamplerOptions::new(steps.parse().unwrap());
        options.prediction =
            if prediction == "epsilon" { Prediction::Epsilon } else { Prediction::Velocity };
        match variant {
            "plain" => {}
            "karras" => options.karras = true,
            "zero_snr" => options.zero_terminal_snr = true,
            "zero_snr_trailing" => {
                options.zero_terminal_snr = true;
                options.spacing = Some(Spacing::Trailing);
            }
            "leading" => options.spacing = Some(Spacing::Leading),
            "linspace" => options.spacing = Some(Spacing::Linspace),
            "trailing" => options.spacing = Some(Spacing::Trailing),
            "middle" => options.strength = Some(STRENGTH),
            other => panic!("{other}"),
        }
        let rows = self.get(name);
        let timesteps = self.get(&format!("{sampler}/{variant}/{steps}/timesteps"));
        Case {
            name: name.to_owned(),
            kind: sampler.parse().unwrap(),
            options,
            timesteps,
            rows: rows.chunks(self.get("clean").len()).map(<[f32]>::to_vec).collect(),
        }
    }

    /// The latents before the first evaluation and after each one, and the timesteps.
    fn run(&self, kind: SamplerKind, options: &SamplerOptions) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut sampler = Sampler::new(kind, options).unwrap();
        let (clean, noise) = (self.get("clean"), self.get("noise"));
        let mut draws = noise.chunks(clean.len());
        let first = draws.next().unwrap();
        let mut draw = |values: &mut [f32]| values.copy_from_slice(draws.next().unwrap());
        let mut latents = if options.strength.is_some() {
            sampler.add_noise(&clean, first).unwrap()
        } else {
            let mut initial = self.get("initial");
            sampler.scale_initial_noise(&mut initial);
            initial
        };
        let (mut timesteps, mut rows) = (Vec::new(), vec![latents.clone()]);
        while let Some(timestep) = sampler.timestep() {
            timesteps.push(timestep);
            let output = predict(&sampler.scale_input(&latents), timestep, sampler.done());
            sampler.step(&output, &mut latents, &mut draw).unwrap();
            rows.push(latents.clone());
        }
        assert_eq!(timesteps.len(), sampler.evaluations());
        (timesteps, rows)
    }
}

/// `predict` of make.py.
fn predict(scaled: &[f32], timestep: f32, evaluation: usize) -> Vec<f32> {
    let value = |(i, x): (usize, &f32)| {
        let (x, t) = (f64::from(*x), f64::from(timestep));
        let phase = 1.3 * x + 0.011 * t + 0.9 * i as f64 + 0.17 * evaluation as f64;
        (0.7 * x + 0.25 * phase.sin()) as f32
    };
    scaled.iter().enumerate().map(value).collect()
}

fn largest(values: impl IntoIterator<Item = f32>) -> f32 {
    values.into_iter().fold(
        0.,
        |most, value| {
            if value.is_nan() { f32::INFINITY } else { most.max(value.abs()) }
        },
    )
}

/// Largest difference of two trajectories, in the scale of their rows; infinite if they are not of
/// the same length.
fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    if found.len() != expected.len() {
        return f32::INFINITY;
    }
    let rows = found.iter().zip(expected).enumerate();
    largest(rows.map(|(i, (found, row))| {
        let before = &expected[i.saturating_sub(1)];
        let scale = largest(row.iter().chain(before).copied());
        largest(found.iter().zip(row).map(|(a, b)| a - b)) / scale
    }))
}

#[test]
fn trajectories_are_those_of_diffusers() {
    let reference = Reference::open();
    let cases = reference.cases();
    assert!(cases.len() > 250, "the reference lost its runs: {}", cases.len());
    let mut wrong = Vec::new();
    let mut most = (0., String::new());
    for case in &cases {
        let (timesteps, rows) = reference.run(case.kind, &case.options);
        let apart = difference(&rows, &case.rows);
        let margin = if case.options.zero_terminal_snr { LATENTS_FROM_PURE_NOISE } else { LATENTS };
        if apart > margin {
            wrong.push(format!("{}: {apart:e}", case.name));
        }
        if apart > most.0 {
            most = (apart, case.name.clone());
        }
        let same = |(i, (a, b)): (usize, (&f32, &f32))| {
            let is_middle =
                i % 2 == 1 && matches!(case.kind, SamplerKind::Dpm2 | SamplerKind::Dpm2Ancestral);
            let margin = if is_middle || b.fract() != 0. { TIMESTEPS } else { 0. };
            (a - b).abs() <= margin
        };
        if timesteps.len() != case.timesteps.len()
            || !timesteps.iter().zip(&case.timesteps).enumerate().all(same)
        {
            wrong.push(format!("{}: {timesteps:?} for {:?}", case.name, case.timesteps));
        }
    }
    println!("largest difference {:e}: {}", most.0, most.1);
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// How far apart trajectories must lie to be told from each other beyond doubt.
const OTHER: f32 = 10. * LATENTS_FROM_PURE_NOISE;

/// Every sampler's trajectory is told from that of every other, so that the comparison above means
/// something.
#[test]
fn other_samplers_are_noticed() {
    let reference = Reference::open();
    for prediction in ["epsilon", "v_prediction"] {
        for one in SamplerKind::all() {
            let case = reference.case(&format!("{one}/plain/10/{prediction}"));
            for other in SamplerKind::all().filter(|other| *other != one) {
                let (_, rows) = reference.run(other, &case.options);
                let apart = difference(&rows, &case.rows);
                assert!(apart > OTHER, "{one} {other} {prediction}: {apart:e}");
            }
        }
    }
}

#[test]
fn other_options_are_noticed() {
    let reference = Reference::open();
    for case in reference.cases().iter().filter(|case| case.options.spacing.is_none()) {
        let mut changed = vec![SamplerOptions {
            prediction: match case.options.prediction {
                Prediction::Epsilon => Prediction::Velocity,
                Prediction::Velocity => Prediction::Epsilon,
            },
            ..case.options.clone()
        }];
        if case.options.karras {
            changed.push(SamplerOptions { karras: false, ..case.options.clone() });
        }
        if case.options.zero_terminal_snr {
            changed.push(SamplerOptions { zero_terminal_snr: false, ..case.options.clone() });
        }
        for options in changed {
            let (_, rows) = reference.run(case.kind, &options);
            let apart = difference(&rows, &case.rows);
            assert!(apart > OTHER, "{}: {options:?}: {apart:e}", case.name);
        }
    }
}

#[test]
fn every_sampler_takes_any_number_of_steps() {
    let reference = Reference::open();
    for kind in SamplerKind::all() {
        for karras in [false, true] {
            for steps in [1, 2, 3, 4, 49] {
                for strength in [None, Some(0.5), Some(1.)] {
                    let mut options = SamplerOptions::new(steps);
                    options.karras = karras;
                    options.strength = strength;
                    if karras && !kind.offers_karras() || strength == Some(0.5) && steps == 1 {
                        assert!(Sampler::new(kind, &options).is_err(), "{kind} {options:?}");
                        continue;
                    }
                    let (timesteps, rows) = reference.run(kind, &options);
                    let most = largest(rows.last().unwrap().iter().copied());
                    // Heun and DPM-2 overshoot where a step takes nearly all noise away.
                    let limit = if steps < 4 { f32::MAX } else { 10. };
                    assert!(most < limit, "{kind} {options:?}: {rows:?}");
                    let sampler = Sampler::new(kind, &options).unwrap();
                    let left = if strength == Some(0.5) { steps / 2 } else { steps };
                    assert_eq!(sampler.schedule().steps, left, "{kind} {options:?}");
                    let evaluations = match kind {
                        SamplerKind::Heun | SamplerKind::Dpm2 | SamplerKind::Dpm2Ancestral => {
                            2 * left - 1
                        }
                        SamplerKind::Pndm => left + 3 * (left - 1).min(3),
                        _ => left,
                    };
                    assert_eq!(timesteps.len(), evaluations, "{kind} {options:?}");
                    assert_eq!(sampler.schedule().levels.len(), evaluations + 1);
                }
            }
        }
    }
}

/// With a model that knows the picture, every sampler ends at it, from noise or from the middle,
/// with either prediction: what `make.py` cannot say, as its formula knows none.
#[test]
fn a_model_that_knows_the_picture_is_led_to_it() {
    let reference = Reference::open();
    let (clean, noise) = (reference.get("clean"), reference.get("noise"));
    for kind in SamplerKind::all() {
        for prediction in [Prediction::Epsilon, Prediction::Velocity] {
            for strength in [None, Some(0.5)] {
                let mut options = SamplerOptions::new(20);
                options.prediction = prediction;
                options.strength = strength;
                let mut sampler = Sampler::new(kind, &options).unwrap();
                let mut draws = noise.chunks(clean.len());
                let mut latents = draws.next().unwrap().to_vec();
                match strength {
                    None => sampler.scale_initial_noise(&mut latents),
                    Some(_) => latents = sampler.add_noise(&clean, &latents).unwrap(),
                }
                let mut draw = |values: &mut [f32]| values.copy_from_slice(draws.next().unwrap());
                while sampler.timestep().is_some() {
                    let output = knowing(&sampler, prediction, &latents, &clean);
                    let promised = sampler.promised(&output, &latents).unwrap();
                    let off = largest(promised.iter().zip(&clean).map(|(a, b)| a - b));
                    assert!(off < 1e-3, "{kind} {prediction:?}: {off:e}");
                    sampler.step(&output, &mut latents, &mut draw).unwrap();
                }
                // PNDM and DPM-Solver end at the noise of timestep 0.
                let left = 1e-3 + 4. * sampler.level().noise as f32;
                let off = largest(latents.iter().zip(&clean).map(|(a, b)| a - b));
                assert!(off < left, "{kind} {prediction:?} {strength:?}: {off:e}");
            }
        }
    }
}

/// What a model says that knows which picture is in the latents.
fn knowing(
    sampler: &Sampler,
    prediction: Prediction,
    latents: &[f32],
    picture: &[f32],
) -> Vec<f32> {
    let level = sampler.level();
    let value = |(x, p): (&f32, &f32)| {
        let (x, p) = (f64::from(*x), f64::from(*p));
        let noise = (x - level.signal * p) / level.noise;
        let size = level.signal.hypot(level.noise);
        match prediction {
            Prediction::Epsilon => noise as f32,
            Prediction::Velocity => ((level.signal * noise - level.noise * p) / size) as f32,
        }
    };
    latents.iter().zip(picture).map(value).collect()
}

#[test]
fn noise_is_drawn_where_it_is_said_and_decides_the_result() {
    let reference = Reference::open();
    for kind in SamplerKind::all() {
        let run = |value: f32| {
            let mut sampler = Sampler::new(kind, &SamplerOptions::new(5)).unwrap();
            let (mut latents, mut drawn) = (reference.get("initial"), 0);
            sampler.scale_initial_noise(&mut latents);
            let mut draw = |values: &mut [f32]| {
                values.fill(value);
                drawn += 1;
            };
            while let Some(timestep) = sampler.timestep() {
                let output = predict(&sampler.scale_input(&latents), timestep, 0);
                sampler.step(&output, &mut latents, &mut draw).unwrap();
            }
            (latents, drawn)
        };
        let (one, drawn) = run(0.5);
        let draws = match kind {
            SamplerKind::Dpm2Ancestral => 4,
            _ if kind.draws_noise() => 5,
            _ => 0,
        };
        assert_eq!(drawn, draws, "{kind}");
        assert_eq!(run(0.5).0, one, "{kind}");
        assert_eq!(run(-0.5).0 != one, kind.draws_noise(), "{kind}");
    }
}

#[test]
fn what_a_sampler_does_not_offer_is_refused() {
    let said = |kind: SamplerKind, change: fn(&mut SamplerOptions)| {
        let mut options = SamplerOptions::new(10);
        change(&mut options);
        Sampler::new(kind, &options).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        said(SamplerKind::Ddim, |o| o.steps = 0),
        "the number of sampling steps should lie between 1 and 998, it is: 0"
    );
    assert!(said(SamplerKind::Lms, |o| o.steps = 999).ends_with(": 999"));
    let karras = said(SamplerKind::EulerAncestral, |o| o.karras = true);
    assert!(karras.starts_with(
        "this sampler has no Karras spacing: `euler_a`\nhint: these have it: lms, euler,"
    ));
    let snr = said(SamplerKind::Heun, |o| o.zero_terminal_snr = true);
    assert!(
        snr.contains("`heun`\nhint: these can: ddim, ddpm, euler, euler_a, dpmsolver,"),
        "{snr}"
    );
    let pure = said(SamplerKind::Ddim, |o| {
        o.zero_terminal_snr = true;
        o.spacing = Some(Spacing::Trailing);
    });
    assert!(pure.contains("`ddim`\nhint: zero terminal SNR belongs to"), "{pure}");
    assert!(
        said(SamplerKind::DpmSingle, |o| o.spacing = Some(Spacing::Leading))
            .ends_with("`dpmsingle`")
    );
    for strength in [0., 0.05, -1., 1.5, f64::NAN, f64::INFINITY] {
        let options = SamplerOptions { strength: Some(strength), ..SamplerOptions::new(10) };
        let fault = Sampler::new(SamplerKind::Euler, &options).unwrap_err();
        assert!(matches!(fault, SamplerError::Strength { steps: 10, .. }), "{strength}: {fault}");
    }
}

#[test]
fn calls_out_of_turn_are_errors() {
    let mut sampler = Sampler::new(SamplerKind::Euler, &SamplerOptions::new(1)).unwrap();
    let (mut latents, mut noise) = ([1f32, 2.], |_: &mut [f32]| {});
    let short = SamplerError::Length { what: "the prediction", expected: 2, got: 1 };
    assert_eq!(sampler.step(&[0.], &mut latents, &mut noise), Err(short.clone()));
    assert_eq!(sampler.promised(&[0.], &latents), Err(short));
    assert!(sampler.add_noise(&latents, &[0.]).is_err());
    assert_eq!((latents, sampler.done()), ([1., 2.], 0));
    sampler.step(&[0., 0.], &mut latents, &mut noise).unwrap();
    assert_eq!(sampler.timestep(), None);
    let again = sampler.step(&[0., 0.], &mut latents, &mut noise);
    assert_eq!(again, Err(SamplerError::Finished(1)));
    assert_eq!(sampler.add_noise(&latents, &[5., 5.]).unwrap(), latents);
}
