//! LoRA files of every naming on SDXL: to go on from, to make pictures with, to merge; converted there
//! and back. What diffusers makes of them is in `tests/data/reference_scripts/check_diffusers_load.py`
//! and `check_converted_lora.py`.

use std::path::{Path, PathBuf};

use formats::lora_file::{self, LoraFile, SaveAs, Tensors};
use formats::{Dtype, OwnedTensor};

use super::pictures::{c3lier_of_keys, generate};
use super::scene;
use crate::harness::{data, lorarun, quoted, text};

fn read(path: &Path) -> LoraFile {
    lora_file::read(path).expect("a LoRA file")
}

fn run(folder: &Path, arguments: &[&str]) -> String {
    let output = lorarun().current_dir(folder).args(arguments).output().expect("lorarun runs");
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

/// A LoRA of sd-scripts in four namings: its own, PEFT's, diffusers' before PEFT, and sd-scripts' with
/// diffusers' names of the U-Net's layers.
fn namings(folder: &Path) -> Vec<(&'static str, PathBuf)> {
    let kohya = data("parity-sdxl/lierla/init.safetensors");
    let peft = folder.join("peft.safetensors");
    let [from, to] = [&kohya, &peft].map(|path| path.display().to_string());
    run(folder, &["convert", "--model", &from, "--save_to", &to, "--to", "diffusers"]);
    let stored = read(&peft);
    assert!(stored.tensors.keys().any(|key| key.starts_with("text_encoder_2.")));

    // That naming has no alphas: the strength is in the numbers.
    let mut old = Tensors::new();
    for (key, tensor) in &stored.tensors {
        let (name, up) = match key.strip_suffix(".lora_A.weight") {
            Some(name) => (format!("{name}.lora.down.weight"), false),
            None => (key.replace(".lora_B.weight", ".lora.up.weight"), true),
        };
        let scale = if up { 0.25 } else { 1. };
        let values: Vec<f32> = tensor.to_f32().iter().map(|x| x * scale).collect();
        let scaled = OwnedTensor::from_f32(&tensor.shape, &values, Dtype::F32).expect("floats");
        old.insert(name, scaled);
    }
    let before_peft = folder.join("before_peft.safetensors");
    lora_file::write(&before_peft, &old, &Default::default(), SaveAs::Safetensors).expect("a file");

    let mut other = Tensors::new();
    for (key, tensor) in read(&kohya).tensors {
        let key = key
            .replace("lora_unet_input_blocks_4_1_", "lora_unet_down_blocks_1_attentions_0_")
            .replace("lora_unet_middle_block_1_", "lora_unet_mid_block_attentions_0_")
            .replace("lora_unet_output_blocks_5_1_", "lora_unet_up_blocks_1_attentions_2_");
        other.insert(key, tensor);
    }
    let mixed = folder.join("mixed.safetensors");
    lora_file::write(&mixed, &other, &Default::default(), SaveAs::Safetensors).expect("a file");
    vec![
        ("sd-scripts", kohya),
        ("PEFT", peft),
        ("before PEFT", before_peft),
        ("diffusers' blocks", mixed),
    ]
}

#[test]
fn all_namings_train_on_make_the_same_picture_and_merge_to_the_same_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = data("parity-sdxl/model").display().to_string();
    let mut first = None;
    for (naming, path) in namings(folder.path()) {
        let path = path.display().to_string();
        let mut scene = scene(4);
        for (key, value) in [
            ("network_weights", quoted(&path)),
            ("learning_rate", "0.0".to_owned()),
            ("text_encoder_lr", "0.0".to_owned()),
            ("optimizer_args", "['weight_decay=0']".to_owned()),
            ("max_train_steps", "1".to_owned()),
        ] {
            scene.set(key, value);
        }
        let output = scene.train(&[], &[]);
        let said = text(&output);
        assert!(output.status.success() && said.contains("288 modules"), "{naming}: {said}");
        assert!(!said.contains("lacks") && !said.contains("in excess"), "{naming}: {said}");
        let trained = read(&scene.output_dir().join("small.safetensors")).tensors;

        let size = ["--prompt", "sks circle --d 1", "--W", "64", "--H", "64"];
        let with = [&size[..], &["--network_weights", &path]].concat();
        let (pictures, said) = generate(&folder.path().join("pictures"), &with);
        assert!(!said.contains("has no layer"), "{naming}: {said}");
        let picture = image::open(&pictures[0]).expect("a picture").to_rgb8();

        let merged = folder.path().join("merged");
        let merge = ["merge", "--sd_model", &model, "--ratios", "1", "--models", &path];
        let to = merged.display().to_string();
        run(folder.path(), &[&merge[..], &["--save_to", &to]].concat());
        let unet = read(&merged.join("unet/diffusion_pytorch_model.safetensors")).tensors;
        let second = read(&merged.join("text_encoder_2/model.safetensors")).tensors;

        let made = (trained, picture, unet, second);
        let Some(want) = &first else {
            // The run moved nothing, and merging did.
            let init = read(Path::new(&path)).tensors;
            assert!(made.0.iter().all(|(key, tensor)| init[key].to_f32() == tensor.to_f32()));
            let plain = read(&data("parity-sdxl/model/text_encoder_2/model.safetensors")).tensors;
            let numbers = |tensor: &OwnedTensor| tensor.to_f32();
            let moved = plain.iter().filter(|(key, old)| numbers(&made.3[*key]) != numbers(old));
            assert_eq!(moved.count(), 24);
            first = Some(made);
            continue;
        };
        assert!(made.0.keys().eq(want.0.keys()), "{naming}: other keys");
        if naming != "before PEFT" {
            assert!(made.0.iter().all(|(key, tensor)| want.0[key].to_f32() == tensor.to_f32()));
        }
        assert_eq!(made.1, want.1, "{naming}: another picture");
        assert!(made.2 == want.2 && made.3 == want.3, "{naming}: another merged model");
    }
}

#[test]
fn converted_there_and_back_a_lora_is_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    for path in [data("parity-sdxl/lierla/init.safetensors"), c3lier_of_keys(folder.path())] {
        let from = path.display().to_string();
        run(folder.path(), &["convert", "--model", &from, "--save_to", "there.safetensors"]);
        let there = read(&folder.path().join("there.safetensors"));
        let starts = ["unet.", "text_encoder.", "text_encoder_2."];
        assert!(there.tensors.keys().all(|key| starts.iter().any(|start| key.starts_with(start))));
        let back = ["convert", "--model", "there.safetensors", "--save_to", "back.safetensors"];
        run(folder.path(), &back);
        let (back, before) = (read(&folder.path().join("back.safetensors")), read(&path));
        assert!(back.tensors.keys().eq(before.tensors.keys()));
        for (key, tensor) in &before.tensors {
            assert_eq!(back.tensors[key].to_f32(), tensor.to_f32(), "{key}");
        }
    }
}
