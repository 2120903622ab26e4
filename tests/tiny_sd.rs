//! The small model that has learnt, and the LoRA that the quickstart teaches it: what its pictures show,
//! as `shapes.rs` reads them.

use std::path::Path;
use std::sync::LazyLock;

use models::pipeline::{Picture, Pipeline, PipelineOptions, Request};
use models::sampler::{SamplerKind, SamplerOptions};

use crate::harness::{lorarun, root, text};
use crate::shapes::{SHAPES, Seen, judge};

/// Share of pictures that must show the object asked for: shape and colour.
const BASE_HITS: f64 = 0.8;
/// Pictures of the new concept that the LoRA must give beyond the base model's, as a share of all.
const MARGIN: f64 = 0.5;
const COLOURS: [&str; 6] = ["red", "green", "blue", "yellow", "purple", "orange"];
const BACKGROUNDS: [&str; 4] = ["white", "black", "gray", "pink"];

fn open(model: &str) -> Pipeline {
    Pipeline::load(model, &PipelineOptions::default()).expect("the small model")
}

fn tiny_sd() -> String {
    root().join("examples/tiny-sd").display().to_string()
}

fn request(prompt: String, seed: u64) -> Request {
    Request {
        prompt,
        width: 64,
        height: 64,
        seed,
        sampler: SamplerKind::Ddim,
        options: SamplerOptions::new(20),
        guidance_scale: 3.,
        ..Request::default()
    }
}

fn pictures(pipeline: &Pipeline, requests: &[Request]) -> Vec<Picture> {
    let made = requests.chunks(8).map(|some| {
        let mut watch = |_| std::ops::ControlFlow::Continue(());
        pipeline.generate_batch(some, &mut watch).expect("pictures")
    });
    made.flatten().collect()
}

fn see(picture: &Picture) -> Seen {
    judge(&picture.to_rgb8(), picture.width)
}

/// Prompts of a shape in every colour, on a background each, with the colour that should be seen.
fn prompts(shape: &str) -> Vec<(String, &'static str)> {
    let of = |(i, colour): (usize, &&'static str)| {
        (format!("a {colour} {shape}, {} background", BACKGROUNDS[i % 4]), *colour)
    };
    COLOURS.iter().enumerate().map(of).collect()
}

#[test]
fn the_small_model_draws_what_it_is_asked_for() {
    let base = &SHAPES[..5];
    let asked: Vec<(String, &str, &str)> = base
        .iter()
        .flat_map(|shape| prompts(shape).into_iter().map(|(p, colour)| (p, *shape, colour)))
        .flat_map(|asked| [asked.clone(), asked])
        .collect();
    let requests: Vec<Request> =
        asked.iter().enumerate().map(|(i, asked)| request(asked.0.clone(), i as u64)).collect();
    let seen: Vec<Seen> = pictures(&open(&tiny_sd()), &requests).iter().map(see).collect();
    let hits = seen.iter().zip(&asked).filter(|(seen, (_, shape, colour))| {
        seen.shape == Some(shape) && seen.colour == Some(colour)
    });
    let share = hits.count() as f64 / asked.len() as f64;
    println!("{} pictures, the object asked for in {share:.2}", asked.len());
    assert!(share >= BASE_HITS, "{share}");
}

/// What the quickstart trains, on one process, once for all tests.
static QUICKSTART: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = lorarun()
        .args(["train", "examples/quickstart/config.toml", "--output_dir"])
        .arg(folder.path())
        .arg("--logging_dir")
        .arg(folder.path().join("logs"))
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    folder
});

fn quickstart_lora() -> std::path::PathBuf {
    QUICKSTART.path().join("rings.safetensors")
}

/// Requests for the new concept in every colour on every background.
fn concept() -> Vec<Request> {
    let pairs = COLOURS.iter().flat_map(|colour| BACKGROUNDS.map(|back| (colour, back)));
    let prompt = |(colour, back)| format!("a {colour} sks shape, {back} background");
    pairs.enumerate().map(|(i, pair)| request(prompt(pair), 100 + i as u64)).collect()
}

/// Share of the pictures that show a ring.
fn rings(pictures: &[Picture]) -> f64 {
    let hits = pictures.iter().filter(|picture| see(picture).shape == Some("ring"));
    hits.count() as f64 / pictures.len() as f64
}

#[test]
fn the_quickstarts_lora_teaches_the_concept_and_multiplier_0_takes_it_away() {
    let requests = concept();
    let mut pipeline = open(&tiny_sd());
    let before = pictures(&pipeline, &requests);
    let lora = pipeline.add_lora(&quickstart_lora(), 1.).expect("the LoRA");
    let after = pictures(&pipeline, &requests);
    let (before_hits, after_hits) = (rings(&before), rings(&after));
    println!("rings: {before_hits:.2} without the LoRA, {after_hits:.2} with it");
    assert!(after_hits >= before_hits + MARGIN, "{before_hits} and {after_hits}");

    pipeline.set_multiplier(lora, 0.).expect("a multiplier");
    assert!(pictures(&pipeline, &requests[..4]) == before[..4], "multiplier 0 changes pictures");
}

#[test]
fn a_merged_model_draws_what_the_applied_lora_draws() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let merged = folder.path().join("merged");
    let output = lorarun()
        .args(["merge", "--sd_model", "examples/tiny-sd", "--ratios", "0.7", "--save_precision"])
        .args(["float", "--models"])
        .arg(quickstart_lora())
        .arg("--save_to")
        .arg(&merged)
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    let requests = &concept()[..8];
    let mut pipeline = open(&tiny_sd());
    pipeline.add_lora(&quickstart_lora(), 0.7).expect("the LoRA");
    let applied = pictures(&pipeline, requests);
    let from_file = pictures(&open(path(&merged)), requests);
    for (applied, merged) in applied.iter().zip(&from_file) {
        let apart = applied.rgb.iter().zip(&merged.rgb).map(|(a, b)| (a - b).abs());
        let mean = apart.sum::<f32>() / applied.rgb.len() as f32;
        // Both add in float32; the order differs, and 20 steps carry it on.
        assert!(mean <= 1e-4, "{mean}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}
