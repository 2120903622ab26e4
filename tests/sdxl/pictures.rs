//! Pictures of SDXL: LoRAs, second prompts, `clip_skip` and given pictures beside PyTorch
//! (`tests/data/generate/make_sdxl_changes.py`), and what the command makes of its options.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::Device;
use formats::lora_file::{self, SaveAs};
use formats::{Dtype, OwnedTensor, open_tensor_file};
use models::lora::{
    Algorithm, LoraNetwork, Rank, UniformRanks, name_key, sdxl_text_encoder_targets, unet_targets,
};
use models::pipeline::{Picture, Pipeline, PipelineOptions, Request};
use models::sampler::{SamplerKind, SamplerOptions};

use crate::harness::{data, lorarun, text};

fn load() -> Pipeline {
    let model = data("parity-sdxl/model").display().to_string();
    Pipeline::load(&model, &PipelineOptions::default()).expect("the model")
}

/// Numbers in -1..1 that depend on the name alone.
fn numbers(name: &str, len: usize) -> Vec<f32> {
    let mut state = name_key(name) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| next()).collect()
}

/// A C3Lier of rank 2 over all of the model, with numbers that depend on each tensor's key alone.
pub fn c3lier_of_keys(folder: &Path) -> PathBuf {
    let pipeline = load();
    let files = &pipeline.files;
    let second = files.text_encoder_2.as_deref().expect("two text encoders");
    let mut targets = sdxl_text_encoder_targets(&*files.text_encoder, second);
    targets.extend(unet_targets(&*files.unet));
    let rank = Rank::new(2, 1.);
    let rule = UniformRanks { linear: rank, conv: Some(rank) };
    let network = LoraNetwork::new(targets, &rule, Algorithm::LowRank).expect("a network");
    let values = network.initial_values(&mut |_, len| vec![0.5; len]);
    let params = network.parameters(Device::Cpu, values).expect("parameters");
    let mut tensors = network.export(&params, Dtype::F32).expect("tensors");
    for (key, tensor) in tensors.iter_mut().filter(|(key, _)| key.ends_with(".weight")) {
        let len = tensor.shape.iter().product();
        let drawn: Vec<f32> = numbers(key, len).iter().map(|x| 0.3 * x).collect();
        *tensor = OwnedTensor::from_f32(&tensor.shape, &drawn, Dtype::F32).expect("floats");
    }
    let path = folder.join("c3lier.safetensors");
    lora_file::write(&path, &tensors, &Default::default(), SaveAs::Safetensors).expect("a file");
    path
}

/// Mean colours of squares of eight pixels, `[8,8,3]` of a picture of 64x64.
fn cells(picture: &Picture) -> Vec<f32> {
    let mut sums = vec![0.; 8 * 8 * 3];
    for (i, rgb) in picture.rgb.chunks(3).enumerate() {
        let (x, y) = (i % 64 / 8, i / 64 / 8);
        for (sum, value) in sums[(8 * y + x) * 3..].iter_mut().zip(rgb) {
            *sum += value / 64.;
        }
    }
    sums
}

/// Colours that change from left to right, from top to bottom.
fn ramp() -> Picture {
    let at = |i: usize| [(i % 64) as f32 / 64., (i / 64) as f32 / 64., 0.5];
    Picture { width: 64, height: 64, rgb: (0..64 * 64).flat_map(at).collect() }
}

#[test]
fn changes_are_those_of_diffusers() {
    let file = open_tensor_file(&data("generate/sdxl_changes.safetensors")).expect("the pictures");
    let cases: serde_json::Value =
        serde_json::from_str(&file.metadata()["cases"]).expect("the cases as JSON");
    let folder = tempfile::tempdir().expect("a folder");
    for (index, case) in cases.as_array().expect("a list").iter().enumerate() {
        let mut pipeline = load();
        if let Some(lora) = case["lora"].as_str() {
            let path = match lora {
                "c3lier" => c3lier_of_keys(folder.path()),
                _ => data("parity-sdxl/lierla/init.safetensors"),
            };
            let handle = pipeline.add_lora(&path, 1.).expect("it fits");
            let report = pipeline.lora_report(handle).expect("a report");
            assert!(report.unused.is_empty() && report.unknown.is_empty(), "{report:?}");
        }
        let text = |key: &str| case[key].as_str().map(str::to_owned);
        let strength = case["strength"].as_f64();
        let request = Request {
            prompt: "a red circle".into(),
            negative_prompt: "blurry".into(),
            prompt_2: text("prompt_2"),
            negative_prompt_2: text("negative_2"),
            clip_skip: case["clip_skip"].as_u64().map(|skip| skip as usize),
            width: 64,
            height: 64,
            seed: 3,
            sampler: SamplerKind::Euler,
            options: SamplerOptions::new(4),
            guidance_scale: case["scale"].as_f64().expect("a number") as f32,
            image: strength.map(|_| Arc::new(ramp())),
            strength: strength.unwrap_or(0.8),
            ..Request::default()
        };
        let mut watch = |_| ControlFlow::Continue(());
        let picture = pipeline.generate(&request, &mut watch).expect("a picture");
        let expected = file.view(&format!("cells.{index}")).expect("the colours").to_f32();
        let apart = cells(&picture).iter().zip(&expected).map(|(x, y)| (x - y).abs()).sum::<f32>();
        let mean = apart / expected.len() as f32;
        eprintln!("{case}: mean difference {mean:.2e}");
        // The rounding of sums in other orders, grown over the steps; each case differs from the first
        // by 1e-3 and more.
        assert!(mean <= 2e-5, "{case}: mean difference {mean}");
    }
}

/// Makes pictures with the small model; gives their paths and what was said.
pub fn generate(outdir: &Path, more: &[&str]) -> (Vec<PathBuf>, String) {
    let output = lorarun()
        .args(["generate", "--ckpt"])
        .arg(data("parity-sdxl/model"))
        .arg("--outdir")
        .arg(outdir)
        .args(more)
        .args(if more.contains(&"--steps") { &[][..] } else { &["--steps", "2"] })
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{more:?}: {}", text(&output));
    let paths = String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect();
    (paths, text(&output))
}

fn pixels(path: &Path) -> image::RgbImage {
    image::open(path).expect("a picture").to_rgb8()
}

#[test]
fn an_sdxl_makes_1024_pixels_unless_told_otherwise() {
    let folder = tempfile::tempdir().expect("a folder");
    // One side is enough to ask for, the other is the model's.
    let arguments = ["--prompt", "a --d 1", "--W", "64", "--steps", "1", "--scale", "1"];
    let (paths, _) = generate(folder.path(), &arguments);
    assert_eq!(pixels(&paths[0]).dimensions(), (64, 1024));
}

#[test]
fn second_prompts_sizes_and_given_pictures_are_options() {
    let folder = tempfile::tempdir().expect("a folder");
    let count = std::cell::Cell::new(0);
    let small = ["--W", "64", "--H", "64", "--seed", "5", "--scale", "3"];
    let make = |more: &[&str]| {
        // Two files of one second and seed have one name.
        count.set(count.get() + 1);
        let outdir = folder.path().join(count.get().to_string());
        let (paths, said) = generate(&outdir, &[&small, more].concat());
        assert_eq!(paths.len(), 1, "{said}");
        paths[0].clone()
    };
    let plain = make(&["--prompt", "sks circle --n blurred"]);
    let second = make(&["--prompt", "sks circle --n blurred --p2 night --n2 day"]);
    assert_ne!(pixels(&plain), pixels(&second));
    // Options of the command do what those of the prompt do, and the same prompt twice changes nothing.
    let by_option = ["--prompt", "sks circle --n blurred", "--prompt_2", "night"];
    let by_option = make(&[&by_option[..], &["--negative_prompt_2", "day"]].concat());
    assert_eq!(pixels(&second), pixels(&by_option));
    let same = make(&["--prompt", "sks circle --n blurred --p2 sks circle --n2 blurred"]);
    assert_eq!(pixels(&plain), pixels(&same));
    let bytes = std::fs::read(&second).expect("the file");
    let bytes = String::from_utf8_lossy(&bytes);
    for part in ["prompt-2", "night", "negative-prompt-2", "original-height", "crop-left"] {
        assert!(bytes.contains(part), "{part} is not in the file");
    }

    // From a picture, within a mask, and in two stages.
    let prompt = ["--prompt", "sks circle --n blurred"];
    let plain_path = plain.display().to_string();
    let image = ["--image_path", plain_path.as_str(), "--strength", "0.5"];
    let changed = make(&[&prompt[..], &image].concat());
    let mask = folder.path().join("mask.png");
    let half =
        image::GrayImage::from_fn(64, 64, |x, _| image::Luma([if x < 32 { 255 } else { 0 }]));
    half.save(&mask).expect("a saved mask");
    let mask = mask.display().to_string();
    let masked = make(&[&prompt[..], &image, &["--mask_path", &mask]].concat());
    let original = ["--highres_fix_scale", "0.5", "--highres_fix_steps", "2"];
    let wide = ["--prompt", "sks circle --n blurred --w 128 --h 128 --ow 256 --oh 256"];
    let two = make(&[&wide[..], &original].concat());
    assert_eq!(pixels(&two).dimensions(), (128, 128));
    let pictures = [&plain, &changed, &masked].map(|path| pixels(path));
    assert!(pictures[0] != pictures[1] && pictures[1] != pictures[2]);
}

#[test]
fn tiles_of_a_large_picture_are_close_to_the_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let size = ["--prompt", "a --d 1", "--W", "1024", "--H", "64", "--scale", "1", "--steps", "1"];
    let (whole, _) = generate(&folder.path().join("whole"), &size);
    let tiles = [&size[..], &["--vae_slices", "2"]].concat();
    let (tiled, _) = generate(&folder.path().join("tiled"), &tiles);
    let (whole, tiled) = (pixels(&whole[0]), pixels(&tiled[0]));
    let apart = whole.iter().zip(tiled.iter()).map(|(x, y)| f64::from(x.abs_diff(*y))).sum::<f64>();
    let mean = apart / whole.len() as f64;
    // Normalisations see a tile in place of the picture; a tile in a wrong place would be 25 and more.
    assert!(mean > 0. && mean < 10., "{mean}");
}
