//! Whole pictures against diffusers' (`tests/data/generate/make_pictures.py`).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use formats::open_tensor_file;

use super::*;
use crate::sampler::SamplerOptions;

/// Largest mean difference of a picture's numbers, 0..1: one step of eight bits.
const MEAN: f64 = 1. / 255.;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

#[test]
fn pictures_are_those_of_diffusers() {
    let options = PipelineOptions::default();
    let model = data("parity/model").display().to_string();
    let pipeline = Pipeline::load(&model, &options).expect("the model");
    let file = open_tensor_file(&data("generate/pictures.safetensors")).expect("the pictures");
    let cases: serde_json::Value =
        serde_json::from_str(&file.metadata()["cases"]).expect("the cases as JSON");
    for (index, case) in cases.as_array().expect("a list").iter().enumerate() {
        let text = |key: &str| case[key].as_str().expect("a text").to_owned();
        let number = |key: &str| case[key].as_u64().expect("a number") as usize;
        let request = Request {
            prompt: text("prompt"),
            negative_prompt: text("negative"),
            width: number("width"),
            height: number("height"),
            seed: number("seed") as u64,
            sampler: text("sampler").parse().expect("a sampler"),
            options: SamplerOptions::new(number("steps")),
            guidance_scale: case["scale"].as_f64().expect("a number") as f32,
            ..Request::default()
        };
        let mut evaluations = 0;
        let picture = pipeline
            .generate(&request, &mut |progress| {
                evaluations = progress.done;
                ControlFlow::Continue(())
            })
            .expect("a picture");
        assert_eq!(evaluations, number("steps"));
        let expected = file.view(&format!("picture.{index}")).expect("the picture").to_f32();
        assert_eq!(picture.rgb.len(), expected.len());
        let sum: f64 =
            picture.rgb.iter().zip(&expected).map(|(x, y)| f64::from((x - y).abs())).sum();
        let mean = sum / expected.len() as f64;
        eprintln!("{}: mean difference {mean:.2e}", text("sampler"));
        assert!(mean <= MEAN, "{}: mean difference {mean}", text("sampler"));
    }
}

#[test]
fn a_prompt_that_does_not_fit_is_said() {
    let model = data("parity/model").display().to_string();
    let pipeline = Pipeline::load(&model, &PipelineOptions::default()).expect("the model");
    let request = Request { prompt: "word ".repeat(80), ..Request::default() };
    let error = pipeline.generate(&request, &mut |_| ControlFlow::Continue(()));
    let message = error.expect_err("80 tokens do not fit").to_string();
    assert!(message.contains("80 tokens, 75 fit"), "{message}");
    assert!(message.contains("--max_embeddings_multiples 2"), "{message}");
}
