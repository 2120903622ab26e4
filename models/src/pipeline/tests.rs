//! Whole pictures against diffusers' (`tests/data/generate/make_pictures.py`).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use formats::open_tensor_file;

use super::*;
use crate::sampler::SamplerOptions;

mod changed;
mod loras;

/// Largest mean difference of a picture's numbers, 0..1: the rounding of sums in other orders, grown
/// over the steps. One step of eight bits is 4e-3.
const CLOSE: f64 = 2e-5;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

fn load() -> Pipeline {
    let model = data("parity/model").display().to_string();
    Pipeline::load(&model, &PipelineOptions::default()).expect("the model")
}

/// Makes a picture without looking on.
fn make(pipeline: &Pipeline, request: &Request) -> Result<Picture, PipelineError> {
    pipeline.generate(request, &mut |_| ControlFlow::Continue(()))
}

/// Mean difference.
fn mean_apart(one: &[f32], other: &[f32]) -> f64 {
    assert_eq!(one.len(), other.len());
    let sum: f64 = one.iter().zip(other).map(|(x, y)| f64::from((x - y).abs())).sum();
    sum / one.len() as f64
}

#[test]
fn pictures_are_those_of_diffusers() {
    compare(&load(), "generate/pictures.safetensors");
}

#[test]
fn pictures_of_sdxl_are_those_of_diffusers() {
    let model = data("parity-sdxl/model").display().to_string();
    let pipeline = Pipeline::load(&model, &PipelineOptions::default()).expect("the model");
    compare(&pipeline, "generate/sdxl_pictures.safetensors");
}

/// What SDXL is told: original height and width, top and left, original height and width for the
/// negative prompt.
fn hints(sizes: &serde_json::Value) -> Option<SizeHints> {
    let sizes: Vec<usize> = serde_json::from_value(sizes.clone()).ok()?;
    let [height, width, top, left, negative_height, negative_width] = sizes[..] else {
        return None;
    };
    Some(SizeHints {
        original: [Some(width), Some(height)],
        original_negative: [Some(negative_width), Some(negative_height)],
        crop: [left, top],
    })
}

fn compare(pipeline: &Pipeline, golden: &str) {
    let file = open_tensor_file(&data(golden)).expect("the pictures");
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
            size_ids: hints(&case["sizes"]),
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
        let mean = mean_apart(&picture.rgb, &expected);
        eprintln!("{}: mean difference {mean:.2e}", text("sampler"));
        assert!(mean <= CLOSE, "{}: mean difference {mean}", text("sampler"));
    }
}

#[test]
fn a_prompt_that_does_not_fit_is_said() {
    let request = Request { prompt: "word ".repeat(80), ..Request::default() };
    let message = make(&load(), &request).expect_err("80 tokens do not fit").to_string();
    assert!(message.contains("80 tokens, 75 fit"), "{message}");
    assert!(message.contains("--max_embeddings_multiples 2"), "{message}");
}
