//! Bad input with SDXL: each is one clear error with advice, the tool's exit code, and no file.

use std::path::Path;

use formats::lora_file::{self, SaveAs};
use formats::{Dtype, OwnedTensor};

use super::scene;
use crate::harness::{Scene, data, lorarun, quoted, text};

const SDXL_LORA: &str = "parity-sdxl/lierla/init.safetensors";
const SD1_LORA: &str = "parity/lierla/init.safetensors";

/// Runs a tool that must refuse; gives what it said.
fn refused(folder: &Path, code: i32, arguments: &[String]) -> String {
    let before = folder.read_dir().expect("a folder").count();
    let output = lorarun().current_dir(folder).args(arguments).output().expect("lorarun runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(said.contains("error: ") && !said.contains("panicked"), "{arguments:?}: {said}");
    assert_eq!(folder.read_dir().expect("a folder").count(), before, "{arguments:?} left files");
    said
}

fn words(arguments: &str) -> Vec<String> {
    arguments.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_lora_of_another_family_is_refused_everywhere() {
    let folder = tempfile::tempdir().expect("a folder");
    for (model, lora) in [("parity-sdxl/model", SD1_LORA), ("parity/model", SDXL_LORA)] {
        let (model, lora) = (data(model).display().to_string(), data(lora).display().to_string());
        let generate = format!(
            "generate --ckpt {model} --prompt x --steps 1 --outdir out --network_weights {lora}"
        );
        let merge = format!("merge --sd_model {model} --models {lora} --ratios 1 --save_to merged");
        for arguments in [generate, merge] {
            let said = refused(folder.path(), 1, &words(&arguments));
            let names =
                said.contains("Stable Diffusion XL") && said.contains("Stable Diffusion 1.x");
            assert!(names && said.contains("hint: "), "{said}");
        }
        for key in ["network_weights", "base_weights"] {
            let mut scene = Scene::new();
            scene.set("pretrained_model_name_or_path", quoted(&model));
            let value = quoted(&lora);
            scene.set(key, if key == "base_weights" { format!("[{value}]") } else { value });
            let said = told(&scene);
            assert!(said.contains(key) && said.contains("was trained on"), "{said}");
        }
    }
}

/// What a run that must not begin says; exit code 78, no LoRA.
fn told(scene: &Scene) -> String {
    let output = scene.train(&[], &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(!scene.output_dir().join("small.safetensors").exists(), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn block_lists_have_the_models_length() {
    let list = |count: usize| vec!["4"; count].join(",");
    for (is_sdxl, key, count, words) in [
        (true, "block_dims", 22, "23 numbers"),
        (true, "block_dims", 25, "23 numbers (1 for embeddings, 9 down, 3 middle, 9 up"),
        (true, "conv_block_dims", 24, "23 numbers"),
        (false, "block_dims", 23, "25 numbers (12 down, 1 middle, 12 up)"),
        (false, "block_dims", 22, "25 numbers"),
    ] {
        let mut scene = if is_sdxl { scene(4) } else { Scene::new() };
        let dims = if is_sdxl { 23 } else { 25 };
        let args = match key {
            "block_dims" => format!("['block_dims={}']", list(count)),
            _ => format!("['block_dims={}', '{key}={}']", list(dims), list(count)),
        };
        scene.set("network_args", args);
        let said = told(&scene);
        assert!(said.contains(words) && said.contains(&format!("`{key}`")), "{said}");
        assert!(said.contains(&format!("it has: {count}")), "{said}");
    }
}

/// A file with the tensors by which a refiner is known: one text encoder, the second.
#[test]
fn a_refiner_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let zeros = |shape: &[usize]| {
        let count = shape.iter().product();
        OwnedTensor::from_f32(shape, &vec![0.; count], Dtype::F16).expect("halves")
    };
    let tensors = [
        ("model.diffusion_model.input_blocks.0.0.weight", vec![8, 4, 3, 3]),
        ("model.diffusion_model.label_emb.0.0.weight", vec![8, 8]),
        ("conditioner.embedders.0.model.text_projection", vec![8, 8]),
        ("conditioner.embedders.0.model.token_embedding.weight", vec![8, 8]),
        ("first_stage_model.decoder.conv_in.weight", vec![8, 4, 3, 3]),
    ];
    let tensors = tensors.iter().map(|(name, shape)| ((*name).to_owned(), zeros(shape))).collect();
    let path = folder.path().join("refiner.safetensors");
    lora_file::write(&path, &tensors, &Default::default(), SaveAs::Safetensors).expect("a file");
    let mut scene = scene(4);
    scene.set("pretrained_model_name_or_path", quoted(&path.display().to_string()));
    let said = told(&scene);
    assert!(said.contains("refiner") && said.contains("hint: "), "{said}");
    let arguments = words("generate --ckpt refiner.safetensors --prompt x --outdir out");
    let said = refused(folder.path(), 1, &arguments);
    assert!(said.contains("refiner") && said.contains("hint: "), "{said}");
}

#[test]
fn flags_of_other_models_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for (model, flag) in
        [("parity-sdxl/model", "--v1"), ("parity/model", "--sdxl"), ("parity-sdxl/model", "--v2")]
    {
        let model = data(model).display().to_string();
        let arguments =
            format!("generate --ckpt {model} {flag} --prompt x --W 64 --H 64 --outdir out");
        let said = refused(folder.path(), 1, &words(&arguments));
        assert!(said.contains(flag.trim_start_matches('-')) && said.contains("hint: "), "{said}");
    }
}
