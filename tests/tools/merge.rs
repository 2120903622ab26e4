//! Merges end to end: what a merged model predicts, folders and both kinds of files, metadata, what
//! fits no model.

use std::collections::BTreeMap;
use std::path::Path;

use engine::{DType, Device, Ids, Tape, Tensor};
use formats::{Dtype, OpenOptions, OwnedTensor, open_base_model, open_tensor_file};
use models::{
    ClipConfig, ClipTextModel, NoiseSchedule, ScheduleSettings, Unet, UnetConfig, UnetInput,
    pixel_order, preset,
};

use super::{attempt_in, inputs, read, run_in, scene, write};
use crate::harness::{data, text};

/// Largest difference over largest value.
fn relative(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0_f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).fold(0_f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

/// The noise that a model folder predicts for the inputs of a parity folder, NCHW.
fn prediction(model: &Path, parity: &Path) -> Vec<f32> {
    let inputs = open_tensor_file(&parity.join("inputs.safetensors")).expect("inputs");
    let numbers = |name: &str| inputs.view(name).expect("a tensor").to_f32();
    let path = model.to_str().expect("a path");
    let model = open_base_model(path, &OpenOptions::default()).expect("a model");
    let row = preset(model.family);
    let clip = ClipConfig::resolve(model.text_encoder_config.as_ref(), &*model.text_encoder, row);
    let clip = clip.expect("a text encoder's settings");
    let clip = ClipTextModel::load(&*model.text_encoder, &clip, Device::Cpu, DType::F32);
    let clip = clip.expect("a text encoder");
    let unet = UnetConfig::resolve(model.unet_config.as_ref(), &*model.unet, row);
    let unet = unet.expect("a U-Net's settings");
    let unet = Unet::load(&*model.unet, &unet, Device::Cpu, DType::F32).expect("a U-Net");

    let tape = Tape::inference(None);
    let ids: Vec<u32> = numbers("input_ids").iter().map(|id| *id as u32).collect();
    let ids = Ids::new(Device::Cpu, &ids).expect("tokens");
    let context = clip.forward(&tape, &ids, 77, None).expect("a text");
    let timesteps = &numbers("timesteps")[..2];
    let latents: Vec<f32> = numbers("latents_raw").iter().map(|x| x * 0.18215).collect();
    let (noise, each) = (numbers("noise"), latents.len() / 2);
    let schedule = NoiseSchedule::new(ScheduleSettings::default());
    let noisy = timesteps.iter().enumerate().flat_map(|(image, t)| {
        let part = image * each..(image + 1) * each;
        schedule.add_noise(&latents[part.clone()], &noise[part], *t as usize).expect("noise")
    });
    let noisy: Vec<f32> = noisy.collect();
    let shape = inputs.view("latents_raw").expect("a tensor").shape;
    let [batch, channels, height, width] = shape[..] else { panic!("{shape:?}") };
    let noisy = pixel_order::nhwc_from_nchw(&noisy, channels, height * width);
    let shape = [batch, height, width, channels];
    let noisy = Tensor::from_f32(Device::Cpu, &shape, &noisy, DType::F32).expect("latents");
    let waves = unet.waves(Device::Cpu, timesteps).expect("waves");
    let input = UnetInput { latents: &noisy, waves: &waves, context: &context, added: None };
    let out = unet.forward(&tape, input).expect("a prediction");
    let out = out.tensor().to_vec_f32().expect("numbers");
    pixel_order::nchw_from_nhwc(&out, channels, height * width)
}

#[test]
fn a_merged_model_predicts_what_the_model_with_the_lora_does() {
    // What PyTorch computed with the LoRA beside the model.
    for (parity, case) in [("parity", "lierla"), ("parity", "c3lier"), ("parity-sd2", "lierla")] {
        let scene = tempfile::tempdir().expect("a folder");
        let (parity, merged) = (data(parity), scene.path().join("merged"));
        let arguments = format!(
            "merge --sd_model {} --models {} --ratios 1 --save_to merged",
            parity.join("model").display(),
            parity.join(case).join("init.safetensors").display()
        );
        run_in(scene.path(), &arguments);
        let reference = open_tensor_file(&parity.join(case).join("ref.safetensors"));
        let want = reference.expect("a reference").view("noise_pred").expect("a tensor").to_f32();
        let with = relative(&prediction(&merged, &parity), &want);
        assert!(with <= 1e-4, "{}, {case}: {with:e}", parity.display());
        // And that without it the model predicts something else.
        let without = relative(&prediction(&parity.join("model"), &parity), &want);
        assert!(without > 1e-2, "{}, {case}: {without:e}", parity.display());
    }
}

#[test]
fn a_folder_is_written_whole_with_all_that_is_no_weight() {
    let scene = tempfile::tempdir().expect("a folder");
    let model = data("parity/model");
    let lora = data("lora/lierla_r4.safetensors");
    let merge =
        format!("merge --sd_model {} --models {} --ratios 0.5", model.display(), lora.display());
    run_in(scene.path(), &format!("{merge} --save_to merged --save_precision fp16"));
    let files = |folder: &Path| {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                for entry in std::fs::read_dir(&path).expect("a folder") {
                    let inner = entry.expect("an entry").path();
                    files.push(inner.strip_prefix(folder).expect("within").to_path_buf());
                }
            } else {
                files.push(path.strip_prefix(folder).expect("within").to_path_buf());
            }
        }
        files.sort();
        files
    };
    let merged = scene.path().join("merged");
    assert_eq!(files(&merged), files(&model));
    for file in files(&model) {
        let (ours, theirs) = (merged.join(&file), model.join(&file));
        if file.extension().is_some_and(|ending| ending == "json") {
            assert_eq!(
                std::fs::read(ours).expect("a file"),
                std::fs::read(theirs).expect("a file")
            );
            continue;
        }
        // transformers asks for this mark.
        let opened = open_tensor_file(&ours).expect("a file");
        assert_eq!(opened.metadata()["format"], "pt");
        for (name, tensor) in read(&theirs) {
            let ours = opened.view(&name).expect("the same tensors");
            assert_eq!(ours.shape, tensor.shape, "{name}");
            let changed = ours.to_f32() != tensor.cast(Dtype::F16).expect("floats").to_f32();
            let is_target = name.contains("attn") && name.ends_with("to_q.weight");
            assert!(changed || !is_target, "{name} is as before");
        }
    }
    // Once more over itself: an earlier model is replaced.
    run_in(scene.path(), &format!("{merge} --save_to merged"));
    // A folder of other things is not.
    let photos = scene.path().join("photos");
    std::fs::create_dir(&photos).expect("a folder");
    std::fs::write(photos.join("1.png"), "x").expect("a file");
    let output = attempt_in(scene.path(), &format!("{merge} --save_to photos"));
    assert_eq!(output.status.code(), Some(64), "{}", text(&output));
    assert!(photos.join("1.png").is_file());
}

#[test]
fn both_kinds_of_files_hold_the_same_and_metadata_say_what_was_merged() {
    let scene = scene();
    let merge = "merge --sd_model in/tiny_ldm.safetensors --models in/lierla_r4.safetensors \
                 in/lierla_r8.safetensors --ratios 0.8 -0.3";
    run_in(scene.path(), &format!("{merge} --save_to a.safetensors"));
    run_in(scene.path(), &format!("{merge} --save_to a.ckpt"));
    run_in(scene.path(), &format!("{merge} --no_metadata --save_to b.safetensors"));
    let one = read(&scene.path().join("a.safetensors"));
    assert!(one == read(&scene.path().join("a.ckpt")));
    assert!(one == read(&scene.path().join("b.safetensors")));
    let metadata = |name: &str| -> BTreeMap<String, String> {
        open_tensor_file(&scene.path().join(name)).expect("a file").metadata().clone()
    };
    let said = metadata("a.safetensors");
    assert_eq!(said["modelspec.merged_from"], "tiny_ldm, lora, lora");
    assert_eq!(said["modelspec.architecture"], "stable-diffusion-v1");
    assert_eq!(said["modelspec.title"], "a");
    assert!(metadata("b.safetensors").is_empty());
    // One after the other is the same but for rounding.
    let step = "merge --models in/lierla_r4.safetensors --ratios 0.8 --sd_model";
    run_in(scene.path(), &format!("{step} in/tiny_ldm.safetensors --save_to c.safetensors"));
    let step = "merge --models in/lierla_r8.safetensors --ratios -0.3 --sd_model";
    run_in(scene.path(), &format!("{step} c.safetensors --save_to d.safetensors"));
    for (name, tensor) in read(&scene.path().join("d.safetensors")) {
        assert!(relative(&one[&name].to_f32(), &tensor.to_f32()) <= 1e-6, "{name}");
    }
}

#[test]
fn biases_and_norms_are_merged_too() {
    let scene = scene();
    let of = |shape: &[usize], value: f32| {
        let values = vec![value; shape.iter().product()];
        OwnedTensor::from_f32(shape, &values, Dtype::F32).expect("floats")
    };
    let (norm, layer) =
        ("lora_unet_down_blocks_0_attentions_0_norm", "lora_unet_down_blocks_0_resnets_0_conv1");
    let adapter = BTreeMap::from([
        (format!("{norm}.w_norm"), of(&[32], 0.5)),
        (format!("{norm}.b_norm"), of(&[32], 0.25)),
        (format!("{layer}.diff"), of(&[32, 32, 3, 3], 0.125)),
        (format!("{layer}.diff_b"), of(&[32], 1.0)),
    ]);
    write(&scene.path().join("adapter.safetensors"), &adapter);
    let merge = "merge --sd_model in/tiny_ldm.safetensors --models adapter.safetensors";
    run_in(scene.path(), &format!("{merge} --ratios 2 --save_to out.safetensors"));
    let merged = read(&scene.path().join("out.safetensors"));
    let mut added = BTreeMap::new();
    for (name, tensor) in read(&inputs().join("tiny_ldm.safetensors")) {
        let pairs = tensor.to_f32().into_iter().zip(merged[&name].to_f32());
        let most = pairs.fold(0_f32, |most, (old, new)| most.max(new - old));
        if most != 0.0 {
            added.insert(name, most);
        }
    }
    let unet = "model.diffusion_model.input_blocks.1";
    let expected = [
        (format!("{unet}.0.in_layers.2.bias"), 2.0),
        (format!("{unet}.0.in_layers.2.weight"), 0.25),
        (format!("{unet}.1.norm.bias"), 0.5),
        (format!("{unet}.1.norm.weight"), 1.0),
    ];
    assert!(added.keys().eq(expected.iter().map(|(name, _)| name)), "{added:?}");
    for (name, value) in expected {
        assert!((added[&name] - value).abs() <= 1e-6, "{name}: {}", added[&name]);
    }
}

#[test]
fn what_fits_no_layer_is_said_or_refused() {
    let scene = scene();
    let lora = read(&inputs().join("lierla_r4.safetensors"));
    let renamed = |from: &str, to: &str| {
        lora.iter().map(|(key, tensor)| (key.replace(from, to), tensor.clone())).collect()
    };
    write(&scene.path().join("partly.safetensors"), &renamed("up_blocks_1", "up_blocks_7"));
    let merge = "merge --sd_model in/tiny_ldm.safetensors --save_to out.safetensors --ratios 1";
    let output = run_in(scene.path(), &format!("{merge} --models partly.safetensors"));
    let said = text(&output);
    assert!(said.contains("partly.safetensors` has 36 modules without a place"), "{said}");
    assert!(said.contains("`lora_unet_up_blocks_7_attentions_0_proj_in`"), "{said}");
    assert!(said.contains(" and 26 more"), "{said}");
    std::fs::remove_file(scene.path().join("out.safetensors")).expect("a file");

    write(&scene.path().join("none.safetensors"), &renamed("_blocks_", "_floors_"));
    let none: BTreeMap<_, _> = read(&scene.path().join("none.safetensors"))
        .into_iter()
        .filter(|(key, _)| key.contains("_floors_"))
        .collect();
    write(&scene.path().join("none.safetensors"), &none);
    let output = attempt_in(scene.path(), &format!("{merge} --models none.safetensors"));
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("`none.safetensors` does not fit `in/tiny_ldm.safetensors`"), "{said}");
    assert!(said.contains("`lora_unet_down_floors_0_attentions_0_proj_in`"), "{said}");
    assert!(!scene.path().join("out.safetensors").exists());
}
