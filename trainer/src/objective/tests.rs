//! Noise, target and loss against sd-scripts' functions on given draws
//! (`tests/data/objective`, made by `reference_scripts/make_noise.py`).

use super::*;
use crate::dataset::picture::latent_alpha;
use crate::noise::Octave;
use engine::{DType, Device, LossSpec, Tape, Tensor, Value};
use formats::TensorFile;
use formats::safetensors_file::SafetensorsFile;
use pictures::Pixels;

/// The stored draws and results.
struct Reference {
    cases: serde_json::Value,
    tensors: SafetensorsFile,
}

const CHANNELS: usize = 4;

impl Reference {
    fn open() -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/objective/");
        let text = std::fs::read_to_string(format!("{folder}cases.json")).unwrap();
        Self {
            cases: serde_json::from_str(&text).unwrap(),
            tensors: SafetensorsFile::open(format!("{folder}draws.safetensors").as_ref()).unwrap(),
        }
    }

    /// Values and shape as stored.
    fn stored(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let view = self.tensors.view(name).unwrap();
        (view.to_f32(), view.shape.to_vec())
    }

    /// `[B,C,H,W]` as `[B,H,W,C]`.
    fn nhwc(&self, name: &str) -> (Vec<f32>, [usize; 4]) {
        let (values, shape) = self.stored(name);
        let &[batch, channels, height, width] = &shape[..] else { panic!("{name}: {shape:?}") };
        let pixels = height * width;
        let at = |b: usize, p: usize, c: usize| values[(b * channels + c) * pixels + p];
        let moved = (0..batch)
            .flat_map(|b| (0..pixels).flat_map(move |p| (0..channels).map(move |c| (b, p, c))))
            .map(|(b, p, c)| at(b, p, c))
            .collect();
        (moved, [batch, height, width, channels])
    }

    fn draws(&self, options: &Options) -> Vec<Draw> {
        let (noise, shape) = self.nhwc("noise");
        let (perturbation, _) = self.nhwc("perturbation");
        let (offset, strengths) = (self.stored("offset").0, self.stored("strengths").0);
        let len = noise.len() / shape[0];
        let octave = |sample: usize, number: usize| {
            let name = format!("octave/{sample}/{number}");
            self.tensors.view(&name).ok()?;
            let (noise, [_, height, width, _]) = self.nhwc(&name);
            Some(Octave { size: [height, width], noise })
        };
        let timesteps = self.cases["timesteps"].as_array().unwrap();
        (0..shape[0])
            .map(|sample| {
                let own = sample * len..(sample + 1) * len;
                let timestep = timesteps[sample].as_u64().unwrap() as usize;
                let normals = offset[sample * CHANNELS..(sample + 1) * CHANNELS].to_vec();
                let mut draw = Draw::plain(noise[own.clone()].to_vec(), normals, timestep);
                if options.noise_offset_random_strength {
                    draw.offset_strength = strengths[2 * sample];
                }
                if options.ip_noise_gamma_random_strength {
                    draw.perturbation_strength = strengths[2 * sample + 1];
                }
                draw.perturbation = perturbation[own].to_vec();
                let wanted = options.multires_noise_iterations.unwrap_or(0);
                draw.octaves = (0..wanted).map_while(|number| octave(sample, number)).collect();
                draw
            })
            .collect()
    }

    fn cases(&self, kind: &str) -> Vec<(String, Options, &serde_json::Value)> {
        let all = self.cases["cases"].as_array().unwrap().iter();
        all.filter(|case| case["kind"] == kind)
            .map(|case| {
                let mut options = Options::default();
                for (name, value) in case["options"].as_object().unwrap() {
                    let value = toml::Value::try_from(value).unwrap();
                    let spec = crate::options::find_option(name).unwrap();
                    (spec.assign)(&mut options, &value).unwrap();
                }
                (case["name"].as_str().unwrap().to_owned(), options, case)
            })
            .collect()
    }
}

fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0., f32::max)
}

#[test]
fn noise_and_target_are_those_of_the_reference() {
    let reference = Reference::open();
    let (latents, shape) = reference.nhwc("latents");
    let cases = reference.cases("noise");
    assert!(cases.len() >= 13);
    for (name, options, _) in cases {
        let objective = Objective::from_options(&options).unwrap();
        let draws = reference.draws(&options);
        let noised = objective.prepare(&latents, shape, &draws, &[1. / 3.; 3]).unwrap();
        for (kind, ours) in [("noisy", &noised.noisy), ("target", &noised.target)] {
            let (theirs, _) = reference.nhwc(&format!("{kind}/{name}"));
            let difference = largest_difference(ours, &theirs);
            // Values of size 1 to 4, rounded a handful of times in f32 (2^-24 each).
            assert!(difference < 2e-6, "{name}, {kind}: {difference}");
        }
    }
}

#[test]
fn losses_are_those_of_the_reference() {
    let reference = Reference::open();
    let (latents, shape) = reference.nhwc("latents");
    let (prediction, _) = reference.nhwc("prediction");
    let (target, _) = reference.nhwc("target");
    let (masks, mask_shape) = reference.stored("masks");
    let alphas: Vec<f32> = masks
        .chunks_exact(mask_shape[1] * mask_shape[2])
        .flat_map(|mask| {
            let data = mask.iter().flat_map(|alpha| [0, 0, 0, *alpha as u8]).collect();
            let (height, width) = (mask_shape[1], mask_shape[2]);
            latent_alpha(&Pixels { width, height, channels: 4, data })
        })
        .collect();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let weights: Vec<f32> =
        numbers(&reference.cases["loss_weights"]).iter().map(|x| *x as f32).collect();
    let tensor = |data: &[f32]| Tensor::from_f32(Device::Cpu, &shape, data, DType::F32).unwrap();
    let cases = reference.cases("loss");
    assert!(cases.len() >= 19);
    for (name, options, case) in cases {
        let objective = Objective::from_options(&options).unwrap();
        let draws = reference.draws(&options);
        let mut noised = objective.prepare(&latents, shape, &draws, &weights).unwrap();
        if options.masked_loss {
            noised.weigh_pixels(&alphas).unwrap();
        }
        let Noised { element, delta, weight, mask, .. } = noised;
        let spec = LossSpec::new(Device::Cpu, element, &delta, &weight).unwrap();
        let spec = LossSpec { mask: mask.map(|mask| tensor(&mask)), ..spec };
        let tape = Tape::inference(None);
        let prediction = Value::constant(tensor(&prediction));
        let losses = tape.loss(&prediction, &tensor(&target), &spec).unwrap();
        let losses = losses.tensor().to_vec_f32().unwrap();
        for (ours, theirs) in losses.iter().zip(numbers(&case["losses"])) {
            let difference = (f64::from(*ours) - theirs).abs() / theirs;
            // PyTorch sums in f32 and computes the SNR's weights in f32; ours has f64 sums.
            assert!(difference < 2e-6, "{name}: {ours}, not {theirs} ({difference:e})");
        }
    }
}
