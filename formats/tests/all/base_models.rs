//! Every layout of a base model gives the same tensors under the same names.

use std::fs;
use std::path::{Path, PathBuf};

use formats::{
    BaseModel, Dtype, Family, FormatError, OpenOptions, OwnedTensor, Weights, open_base_model,
};
use serde_json::json;

use crate::layouts::{components, write_folder, write_single_file};
use crate::support::{Tensors, component, data, ldm_model, save};

fn open(path: &Path) -> Result<BaseModel, FormatError> {
    open_base_model(path.to_str().unwrap(), &OpenOptions::default())
}

fn text_of(error: Result<BaseModel, FormatError>) -> String {
    error.unwrap_err().to_string()
}

/// Same names, shapes, types and bytes.
fn assert_same(weights: &dyn Weights, expected: &Tensors, what: &str) {
    assert_eq!(weights.names(), expected.keys().cloned().collect::<Vec<_>>(), "{what}");
    for (name, tensor) in expected {
        let view = weights.get(name).unwrap();
        assert_eq!(weights.shape(name).unwrap(), tensor.shape, "{what} {name}");
        assert_eq!(view.shape, tensor.shape, "{what} {name}");
        assert_eq!(view.dtype, tensor.dtype, "{what} {name}");
        assert!(view.data == tensor.data, "{what} {name}");
        assert!(matches!(view.data, std::borrow::Cow::Borrowed(_)), "{what} {name} is copied");
    }
}

fn assert_is(model: &BaseModel, set: &str) {
    assert_same(model.unet.as_ref(), &component(set, "unet"), "unet");
    assert_same(model.text_encoder.as_ref(), &component(set, "text_encoder"), "text_encoder");
    assert_same(model.vae.as_ref(), &component(set, "vae"), "vae");
}

/// A copy of the small model's folder that a test may change.
fn copy_of(set: &str, to: &Path) -> PathBuf {
    let to = to.join("model");
    for folder in ["unet", "text_encoder", "vae", "scheduler"] {
        fs::create_dir_all(to.join(folder)).unwrap();
        for entry in fs::read_dir(data(&format!("{set}/model/{folder}"))).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(folder).join(entry.file_name())).unwrap();
        }
    }
    to
}

#[test]
fn diffusers_folders_open_with_their_configs() {
    for (set, family, prediction) in
        [("parity", Family::Sd1, "epsilon"), ("parity-sd2", Family::Sd2, "v_prediction")]
    {
        let model = open(&data(&format!("{set}/model"))).unwrap();
        assert_eq!(model.family, family);
        assert_eq!(model.prediction_type(), Some(prediction));
        assert_eq!(model.name, "model");
        assert_eq!(model.identity.sha256().unwrap(), None);
        assert_eq!(model.unet_config.as_ref().unwrap()["cross_attention_dim"], 32);
        assert_eq!(model.vae_config.as_ref().unwrap()["scaling_factor"], 0.18215);
        assert!(model.text_encoder_config.is_some());
        assert!(model.tokenizer_dir.is_none());
        assert!(model.notes.is_empty(), "{:?}", model.notes);
        assert_is(&model, set);
    }
}

#[test]
fn a_single_file_equals_the_folder_it_was_made_from() {
    for (set, family) in [("parity", Family::Sd1), ("parity-sd2", Family::Sd2)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut tensors = ldm_model(set);
        let scalar = OwnedTensor::scalar(1.0, Dtype::F32).unwrap();
        for ignored in [
            "model_ema.diffusion_modelinput_blocks00weight",
            "alphas_cumprod",
            "first_stage_model.loss.logvar",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
        ] {
            if set == "parity" || !ignored.starts_with("cond") {
                tensors.insert(ignored.to_owned(), scalar.clone());
            }
        }
        save(&path, &tensors);
        let model = open(&path).unwrap();
        assert_eq!(model.family, family);
        assert_eq!(model.name, "model.safetensors");
        assert!(model.identity.sha256().unwrap().is_some());
        assert!(model.notes.is_empty(), "{:?}", model.notes);
        assert_is(&model, set);
    }
}

#[test]
fn the_keys_of_a_real_ldm_file_map_onto_all_names() {
    // `ldm_keys.txt` lists the keys of a checkpoint that the reference converted.
    let listed = fs::read_to_string(data("formats/ldm_keys.txt")).unwrap();
    let made: Vec<String> = ldm_model("parity").into_keys().collect();
    assert_eq!(made, listed.lines().collect::<Vec<_>>());
}

#[test]
fn pickled_checkpoints_open_with_and_without_the_state_dict_level() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.ckpt");
    let mut bytes = Vec::new();
    formats::pickle::write_pickle(&mut bytes, &ldm_model("parity")).unwrap();
    fs::write(&path, bytes).unwrap();
    assert_is(&open(&path).unwrap(), "parity");
    // The nested level itself is read in `checkpoints::nested_flat_...`.
}

#[test]
fn text_encoders_are_found_under_every_known_prefix() {
    let text = "cond_stage_model.transformer.text_model.";
    for prefix in
        ["cond_stage_model.transformer.", "cond_stage_model.text_model.", "cond_stage_model."]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let renamed: Tensors = ldm_model("parity")
            .into_iter()
            .map(|(name, tensor)| match name.strip_prefix(text) {
                Some(rest) => (format!("{prefix}{rest}"), tensor),
                None => (name, tensor),
            })
            .collect();
        save(&path, &renamed);
        assert_is(&open(&path).unwrap(), "parity");
    }
}

#[test]
fn old_vae_attention_names_become_the_present_ones() {
    let folder = tempfile::tempdir().unwrap();
    let dir = copy_of("parity", folder.path());
    let renamed: Tensors = component("parity", "vae")
        .into_iter()
        .map(|(name, tensor)| {
            let old =
                [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
            let name = old.iter().fold(name, |name, (new, old)| name.replace(new, old));
            (name, tensor)
        })
        .collect();
    assert!(renamed.contains_key("encoder.mid_block.attentions.0.query.weight"));
    save(&dir.join("vae/diffusion_pytorch_model.safetensors"), &renamed);
    assert_is(&open(&dir).unwrap(), "parity");
}

#[test]
fn another_vae_can_be_a_file_of_either_layout_or_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    // A VAE that differs in one value.
    let mut vae = component("parity", "vae");
    vae.get_mut("quant_conv.bias").unwrap().data[0] ^= 1;
    let mut ldm: Tensors = ldm_model("parity")
        .into_iter()
        .filter_map(|(name, tensor)| {
            Some((name.strip_prefix("first_stage_model.")?.to_owned(), tensor))
        })
        .collect();
    ldm.get_mut("quant_conv.bias").unwrap().data[0] ^= 1;
    let with_prefix =
        ldm.iter().map(|(n, t)| (format!("first_stage_model.{n}"), t.clone())).collect();
    let dir = folder.path().join("vae");
    fs::create_dir(&dir).unwrap();
    save(&folder.path().join("bare.safetensors"), &ldm);
    save(&folder.path().join("prefixed.safetensors"), &with_prefix);
    save(&dir.join("diffusion_pytorch_model.safetensors"), &vae);
    fs::copy(data("parity/model/vae/config.json"), dir.join("config.json")).unwrap();

    for (given, has_config) in [
        ("bare.safetensors", false),
        ("prefixed.safetensors", false),
        ("vae", true),
        ("vae/diffusion_pytorch_model.safetensors", true),
        // A whole model with a `vae` folder.
        (".", true),
    ] {
        let options = OpenOptions {
            vae: Some(folder.path().join(given).to_str().unwrap().to_owned()),
            ..OpenOptions::default()
        };
        let model = open_base_model(data("parity/model").to_str().unwrap(), &options).unwrap();
        assert_same(model.vae.as_ref(), &vae, given);
        assert_eq!(model.vae_config.is_some(), has_config, "{given}");
        let identity = model.vae_identity.unwrap();
        assert_eq!(identity.legacy_hash().unwrap().is_some(), given.ends_with(".safetensors"));
    }
}

#[test]
fn a_file_without_vae_needs_another_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut tensors = ldm_model("parity");
    tensors.retain(|name, _| !name.starts_with("first_stage_model."));
    save(&path, &tensors);
    let text = text_of(open(&path));
    assert!(text.contains("holds no VAE") && text.contains("hint: give one with `vae`"), "{text}");
    let options = OpenOptions {
        vae: Some(data("parity/model/vae").to_str().unwrap().to_owned()),
        ..OpenOptions::default()
    };
    let model = open_base_model(path.to_str().unwrap(), &options).unwrap();
    assert_is(&model, "parity");
}

#[test]
fn variants_are_chosen_or_fallen_back_to_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let dir = copy_of("parity", folder.path());
    let plain = dir.join("unet/diffusion_pytorch_model.safetensors");
    let fp16 = dir.join("unet/diffusion_pytorch_model.fp16.safetensors");
    fs::rename(&plain, &fp16).unwrap();
    // No plain U-Net: fp16 is taken, and said.
    let model = open(&dir).unwrap();
    assert_is(&model, "parity");
    assert_eq!(model.notes.len(), 1);
    assert!(model.notes[0].contains("diffusion_pytorch_model.fp16.safetensors"));
    // fp16 asked for: the other components fall back, and it is said.
    let with = |variant: &str| {
        let options = OpenOptions { variant: Some(variant.to_owned()), ..OpenOptions::default() };
        open_base_model(dir.to_str().unwrap(), &options)
    };
    let model = with("fp16").unwrap();
    assert_is(&model, "parity");
    assert_eq!(model.notes.len(), 2, "{:?}", model.notes);
    // A variant that nothing has.
    let text = text_of(with("ema"));
    assert!(text.contains("`ema`") || text.contains(".ema."), "{text}");
    // Both there: the plain one by default, the variant when asked.
    let mut changed = component("parity", "unet");
    changed.get_mut("conv_in.bias").unwrap().data[0] ^= 1;
    save(&plain, &changed);
    assert_same(open(&dir).unwrap().unet.as_ref(), &changed, "plain");
    assert_is(&with("fp16").unwrap(), "parity");
}

#[test]
fn bin_files_and_shards_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let dir = copy_of("parity", folder.path());
    fs::remove_file(dir.join("text_encoder/model.safetensors")).unwrap();
    let mut bytes = Vec::new();
    formats::pickle::write_pickle(&mut bytes, &component("parity", "text_encoder")).unwrap();
    fs::write(dir.join("text_encoder/pytorch_model.bin"), bytes).unwrap();

    let (mut first, mut second) = (Tensors::new(), Tensors::new());
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in component("parity", "unet").into_iter().enumerate() {
        let (shard, file) = if index % 2 == 0 { (&mut first, "a") } else { (&mut second, "b") };
        map.insert(name.clone(), json!(format!("{file}.safetensors")));
        shard.insert(name, tensor);
    }
    fs::remove_file(dir.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    save(&dir.join("unet/a.safetensors"), &first);
    save(&dir.join("unet/b.safetensors"), &second);
    let index = dir.join("unet/diffusion_pytorch_model.safetensors.index.json");
    let write_index = |map: &serde_json::Map<_, _>| {
        fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    };
    write_index(&map);
    assert_is(&open(&dir).unwrap(), "parity");

    map.insert("conv_in.bias".into(), json!("../vae/diffusion_pytorch_model.safetensors"));
    write_index(&map);
    let text = text_of(open(&dir));
    assert!(text.contains("is no plain name"), "{text}");
    map.insert("conv_in.bias".into(), json!("b.safetensors"));
    write_index(&map);
    assert!(text_of(open(&dir)).contains("`conv_in.bias`"));
}

#[test]
fn v2_against_the_model_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    save(&file, &ldm_model("parity"));
    let with = |path: &Path, v2| {
        let options = OpenOptions { v2: Some(v2), ..OpenOptions::default() };
        open_base_model(path.to_str().unwrap(), &options)
    };
    let text = text_of(with(&file, true));
    assert!(text.starts_with("`v2 = true` contradicts the model `"), "{text}");
    assert!(text.contains("Stable Diffusion 1.x: its text encoder is CLIP ViT"), "{text}");
    assert!(text.contains("\nhint: remove `v2`"), "{text}");
    let text = text_of(with(&data("parity-sd2/model"), false));
    assert!(text.contains("Stable Diffusion 2.x") && text.contains("is a Linear"), "{text}");
    assert!(with(&data("parity-sd2/model"), true).is_ok());
    assert!(with(&file, false).is_ok());
}

#[test]
fn sdxl_opens_as_a_file_and_as_a_folder_without_its_refiner() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = (folder.path().join("xl.safetensors"), folder.path().join("model"));
    write_single_file(&file, "sdxl");
    write_folder(&dir, "sdxl");
    for path in [&file, &dir] {
        let model = open(path).unwrap();
        assert_eq!(model.family, Family::Sdxl);
        let second = model.text_encoder_2.as_deref().unwrap();
        for (component, weights) in [
            ("unet", model.unet.as_ref()),
            ("text_encoder", model.text_encoder.as_ref()),
            ("text_encoder_2", second),
            ("vae", model.vae.as_ref()),
        ] {
            let expected = components("sdxl").remove(component).unwrap();
            let what = format!("{component} of {}", path.display());
            assert_eq!(weights.names(), expected.keys().cloned().collect::<Vec<_>>(), "{what}");
            for (name, shape) in expected {
                assert_eq!(weights.shape(&name), Some(shape), "{what}: {name}");
            }
        }
    }
    fs::remove_dir_all(dir.join("text_encoder")).unwrap();
    let text = text_of(open(&dir));
    assert!(text.contains("it is the refiner of SDXL") && text.contains("\nhint: "), "{text}");
    let tensor = OwnedTensor::from_f32(&[2, 2], &[0.0; 4], Dtype::F16).unwrap();
    let name = "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight";
    let mut refiner = Tensors::from([(name.to_owned(), tensor.clone())]);
    refiner.insert("model.diffusion_model.input_blocks.0.0.weight".into(), tensor);
    save(&file, &refiner);
    let text = text_of(open(&file));
    assert!(text.contains("it is the refiner of SDXL") && text.contains(name), "{text}");
}

#[test]
fn files_that_are_no_model_are_named_for_what_they_are() {
    let cases = [
        ("parity/lierla/init.safetensors", "it is a LoRA"),
        ("parity/model/unet/diffusion_pytorch_model.safetensors", "it is a U-Net alone"),
        ("parity/model/text_encoder/model.safetensors", "it is a text encoder alone"),
        ("parity/model/vae/diffusion_pytorch_model.safetensors", "it is a VAE alone"),
        ("parity/inputs.safetensors", "it has no U-Net"),
    ];
    for (path, expected) in cases {
        let text = text_of(open(&data(path)));
        assert!(text.contains(expected) && text.contains("hint: "), "{text}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut tensors = ldm_model("parity");
    let norm = "cond_stage_model.transformer.text_model.final_layer_norm.weight";
    tensors.insert(norm.into(), OwnedTensor::from_f32(&[48], &[1.0; 48], Dtype::F16).unwrap());
    save(&path, &tensors);
    let text = text_of(open(&path));
    assert!(text.contains("expects text of width 32") && text.contains("gives width 48"), "{text}");

    let mut tensors = ldm_model("parity");
    let wide = OwnedTensor::from_f32(&[32, 9, 3, 3], &vec![0.0; 32 * 81], Dtype::F16).unwrap();
    tensors.insert("model.diffusion_model.input_blocks.0.0.weight".into(), wide);
    save(&path, &tensors);
    let text = text_of(open(&path));
    assert!(text.contains("9 input channels"), "{text}");
}

#[test]
fn unknown_tensors_are_ignored_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut tensors = ldm_model("parity");
    let extra = OwnedTensor::scalar(1.0, Dtype::F16).unwrap();
    tensors.insert("model.diffusion_model.input_blocks.1.0.extra".into(), extra);
    save(&path, &tensors);
    let model = open(&path).unwrap();
    assert_eq!(model.notes.len(), 1);
    assert!(model.notes[0].contains("`model.diffusion_model.input_blocks.1.0.extra`"));
    assert_is(&model, "parity");
}

#[test]
fn missing_models_and_missing_parts_are_named() {
    let text = text_of(open_base_model("/no/such/model.safetensors", &OpenOptions::default()));
    assert!(text.starts_with("model not found: `/no/such/model.safetensors`\nhint: "), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let dir = copy_of("parity", folder.path());
    fs::remove_file(dir.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    let text = text_of(open(&dir));
    assert!(text.contains("lacks `vae/diffusion_pytorch_model.safetensors`"), "{text}");
    let text = text_of(open(folder.path()));
    assert!(text.contains("lacks `unet/diffusion_pytorch_model.safetensors`"), "{text}");
    let model = open(&data("parity/model")).unwrap();
    let text = model.unet.get("no.such.tensor").unwrap_err().to_string();
    assert!(
        text.contains("diffusion_pytorch_model.safetensors") && text.contains("`no.such.tensor`")
    );
}
