//! SDXL from the config to files and pictures, on the small model in its layout: world sizes agree,
//! its files have sd-scripts' names, samples are made, and what does not fit is refused.
//!
//! - `files`: LoRAs of every naming
//! - `hostile`: bad input
//! - `kinds`: every kind of network, ranks and rates by block
//! - `names`: modules of the full-size model beside sd-scripts'
//! - `pictures`: what changes them, beside diffusers', and the options of `generate`
//! - `tools`: merge, extract, resize and the others

mod files;
mod hostile;
mod kinds;
mod names;
mod pictures;
mod tools;

use crate::equality::distance;
use crate::harness::{Scene, data, lorarun, quoted, text};

fn scene(batch: usize) -> Scene {
    let mut scene = Scene::new();
    let model = data("parity-sdxl/model").display().to_string();
    for (key, value) in [
        ("pretrained_model_name_or_path", quoted(&model)),
        ("train_batch_size", batch.to_string()),
        ("text_encoder_lr", "[1e-4, 2e-4]".to_owned()),
        ("max_train_steps", "6".to_owned()),
    ] {
        scene.set(key, value);
    }
    scene
}

#[test]
fn one_and_two_ranks_train_the_same_lora_under_sd_scripts_names() {
    let one = scene(4).trained(&["--num_processes", "1"]);
    let two = scene(2).trained(&["--num_processes", "2"]);
    // As for SD1: sums in another order, which AdamW makes a relative error of.
    let (error, key) = distance(&two, &one);
    assert!(error <= 1e-4, "{error} at {key}");
    let reference = data("parity-sdxl/lierla/init.safetensors");
    let reference = formats::lora_file::read(&reference).expect("sd-scripts' file");
    assert!(one.tensors.keys().eq(reference.tensors.keys()), "other keys than sd-scripts'");
    assert_eq!(one.metadata["ss_base_model_version"], "sdxl_base_v1-0");
    assert!(one.metadata["modelspec.architecture"].starts_with("stable-diffusion-xl-v1-base"));
    let learnt = |prefix: &str| {
        let ups = one
            .tensors
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && key.ends_with("lora_up.weight"));
        ups.filter(|(_, up)| up.to_f32().iter().any(|x| *x != 0.)).count()
    };
    // The last layer of the first encoder is not run.
    assert_eq!([learnt("lora_te1_"), learnt("lora_te2_"), learnt("lora_unet_")], [66, 24, 192]);
}

#[test]
fn a_run_with_samples_long_captions_and_the_unet_alone_generates() {
    let mut scene = scene(2);
    let prompts = scene.folder.path().join("prompts.txt");
    std::fs::write(&prompts, "sks circle --w 64 --h 64 --s 2 --d 1\n").expect("a file");
    scene.set("sample_prompts", quoted(&prompts.display().to_string()));
    for (key, value) in [
        ("sample_at_first", "true"),
        ("network_train_unet_only", "true"),
        ("max_token_length", "150"),
        ("network_dim", "8"),
        ("max_train_steps", "2"),
    ] {
        scene.set(key, value);
    }
    let file = scene.trained(&["--num_processes", "2"]);
    assert!(file.tensors.keys().all(|key| key.starts_with("lora_unet_")));
    let samples = scene.output_dir().join("sample");
    assert_eq!(samples.read_dir().expect("samples").count(), 1);
    let pictures = scene.folder.path().join("pictures");
    let output = lorarun()
        .args(["generate", "--sdxl", "--steps", "2", "--W", "64", "--H", "64", "--ckpt"])
        .arg(data("parity-sdxl/model"))
        .args(["--prompt", "sks circle --d 1 --ow 128", "--network_weights"])
        .arg(scene.output_dir().join("small.safetensors"))
        .arg("--outdir")
        .arg(&pictures)
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(pictures.read_dir().expect("pictures").count(), 1);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let sd1 = data("parity/lierla/init.safetensors").display().to_string();
    let list = vec!["4"; 22].join(",");
    for (key, value, words) in [
        ("network_weights", quoted(&sd1), "was trained on Stable Diffusion 1.x"),
        ("network_args", format!("['block_dims={list}']"), "block_dims"),
        ("v2", "true".to_owned(), "v2"),
    ] {
        let mut scene = scene(2);
        scene.set(key, value);
        let output = scene.train(&[], &[]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{key}: {said}");
        assert!(said.contains(words), "{key}: {said}");
        assert!(!scene.output_dir().join("small.safetensors").exists(), "{key}");
    }
}
