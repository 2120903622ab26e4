//! Models for offline work: where every layer lies, in files and folders of all three families.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use formats::model_files::{ComponentKind, Container, LayerTarget, ModelFiles};
use formats::{Dtype, Family, OwnedTensor, Weights};
use serde_json::{Value, json};

use crate::layouts::{components, rows, write_folder, write_single_file};
use crate::support::{Tensors, component, data, ldm_model, save};

const KINDS: [ComponentKind; 4] = [
    ComponentKind::Unet,
    ComponentKind::TextEncoder,
    ComponentKind::TextEncoder2,
    ComponentKind::Vae,
];

const FAMILIES: [(&str, Family); 3] =
    [("sd1", Family::Sd1), ("sd2", Family::Sd2), ("sdxl", Family::Sdxl)];

fn error_of(path: &Path) -> String {
    ModelFiles::open(path).unwrap_err().to_string()
}

/// (layers of `networks.lora`, those of `conv_dim`) by the beginning of their names.
fn counts(model: &ModelFiles) -> BTreeMap<&str, (usize, usize)> {
    let mut counts = BTreeMap::new();
    for layer in model.layers() {
        let prefix = ["lora_te_", "lora_te1_", "lora_te2_", "lora_unet_"];
        let prefix = prefix.into_iter().find(|prefix| layer.name.starts_with(prefix)).unwrap();
        let (attention, resnet) = counts.entry(prefix).or_default();
        match layer.target {
            LayerTarget::Attention => *attention += 1,
            LayerTarget::Resnet => *resnet += 1,
            LayerTarget::Outer => {}
        }
    }
    counts
}

#[test]
fn full_size_models_have_the_names_of_diffusers_and_the_layers_of_kohya() {
    let folder = tempfile::tempdir().unwrap();
    for (name, family) in FAMILIES {
        let file = folder.path().join(format!("{name}.safetensors"));
        write_single_file(&file, name);
        let dir = folder.path().join(name);
        write_folder(&dir, name);
        let expected = components(name);
        let single = ModelFiles::open(&file).unwrap();
        let opened = ModelFiles::open(&dir).unwrap();
        for (model, container) in [(&single, Container::SingleFile), (&opened, Container::Folder)] {
            assert_eq!((model.family, model.container), (family, container));
            assert!(model.notes.is_empty(), "{:?}", model.notes);
            for kind in KINDS {
                let component = model.component(kind);
                assert_eq!(component.is_some(), expected.contains_key(kind.folder()));
                let Some(component) = component else { continue };
                let expected = &expected[kind.folder()];
                assert!(component.names().iter().eq(expected.keys()), "{name} {kind:?}");
                for (name, shape) in expected {
                    assert_eq!(component.shape(name).as_ref(), Some(shape), "{name}");
                }
            }
            let unet = if family == Family::Sdxl { (722, 66) } else { (192, 86) };
            let text = match family {
                Family::Sd1 => vec![("lora_te_", (72, 0))],
                Family::Sd2 => vec![("lora_te_", (138, 0))],
                Family::Sdxl => vec![("lora_te1_", (72, 0)), ("lora_te2_", (192, 0))],
            };
            let mut expected = BTreeMap::from([("lora_unet_", unet)]);
            expected.extend(text);
            assert_eq!(counts(model), expected);
        }
        // The same layers, wherever they are stored.
        let told = |model: &ModelFiles| {
            let layers = model.layers().iter();
            layers.map(|l| (l.name.clone(), l.component, l.shape.clone(), l.target)).collect()
        };
        let (a, b): (Vec<_>, Vec<_>) = (told(&single), told(&opened));
        assert_eq!(a, b);
    }
}

#[test]
fn every_module_that_kohya_writes_is_a_layer_that_fits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sd1.safetensors");
    write_single_file(&file, "sd1");
    let model = ModelFiles::open(&file).unwrap();
    for (set, with_conv) in [
        ("lierla_r4", false),
        ("c3lier_r4_conv4", true),
        ("dylora_r16_u4", false),
        ("block_lr_dims", false),
    ] {
        let text = fs::read_to_string(data(&format!("keys/{set}.json"))).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        let mut seen = BTreeSet::new();
        for (key, shape) in golden["shapes"].as_object().unwrap() {
            let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
            let (module, part) = key.split_once('.').unwrap();
            let layer = model.layer(module).unwrap_or_else(|| panic!("{set}: {key}"));
            assert_eq!(layer.name, module);
            match part {
                "lora_up.weight" => assert_eq!(layer.shape[0], shape[0], "{key}"),
                "lora_down.weight" => assert_eq!(layer.shape[1..], shape[1..], "{key}"),
                _ => {}
            }
            let resnet = layer.target == LayerTarget::Resnet;
            assert!(layer.target == LayerTarget::Attention || with_conv && resnet, "{key}");
            seen.insert(module);
        }
        if set != "block_lr_dims" {
            let all = model.layers().iter().filter(|layer| match layer.target {
                LayerTarget::Attention => true,
                LayerTarget::Resnet => with_conv,
                LayerTarget::Outer => false,
            });
            assert_eq!(seen.len(), all.count(), "{set}");
        }
    }
}

#[test]
fn names_of_sdxl_are_the_keys_of_its_file_and_have_aliases() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sdxl.safetensors");
    write_single_file(&file, "sdxl");
    let model = ModelFiles::open(&file).unwrap();
    let mut found = 0;
    for row in rows("sdxl") {
        let Some(rest) = row.key.strip_prefix("model.diffusion_model.") else { continue };
        let Some(module) = rest.strip_suffix(".weight") else { continue };
        let name = format!("lora_unet_{}", module.replace('.', "_"));
        let layer = model.layer(&name);
        assert_eq!(layer.is_some(), row.shape.len() > 1, "{name}");
        let Some(layer) = layer else { continue };
        assert_eq!((&layer.place.key, &layer.shape), (&row.key, &row.shape));
        let diffusers = row.names[0].strip_prefix("unet/").unwrap().strip_suffix(".weight");
        let alias = format!("lora_unet_{}", diffusers.unwrap().replace('.', "_"));
        assert_eq!(model.layer(&alias), Some(layer), "{alias}");
        assert_eq!(model.layers_at(0, &row.key).len(), 1);
        assert_eq!(&model.layers()[model.layers_at(0, &row.key)[0]], layer);
        found += 1;
    }
    assert_eq!(found, 722 + 66 + 6, "with `conv_in`, `conv_out` and four of the embeddings");

    let fc1 = "text_model_encoder_layers_3_mlp_fc1";
    let first = model.layer(&format!("lora_te1_{fc1}")).unwrap();
    assert_eq!(model.layer(&format!("lora_te_{fc1}")), Some(first));
    assert_eq!(first.component, ComponentKind::TextEncoder);
    let v = model.layer("lora_te2_text_model_encoder_layers_31_self_attn_v_proj").unwrap();
    assert_eq!(v.component, ComponentKind::TextEncoder2);
    assert_eq!(v.place.rows, Some(2560..3840));
    assert_eq!(v.shape, [1280, 1280]);
    let key = "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight";
    assert_eq!(v.place.key, key);
    let names: Vec<&str> =
        model.layers_at(0, key).iter().map(|index| model.layers()[*index].name.as_str()).collect();
    let of = |part| format!("lora_te2_text_model_encoder_layers_31_self_attn_{part}_proj");
    assert_eq!(names, [of("k"), of("q"), of("v")]);
    assert!(model.layers_at(0, "no.such.key").is_empty());
    assert!(model.layers_at(7, key).is_empty());
    assert!(model.layer("lora_unet_no_such").is_none());
    assert!(model.layer("lora_te2_text_projection").is_none());
}

#[test]
fn a_joined_projection_is_seen_in_thirds() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sd2.safetensors");
    save(&file, &ldm_model("parity-sd2"));
    let single = ModelFiles::open(&file).unwrap();
    let text = component("parity-sd2", "text_encoder");
    for part in ["q", "k", "v"] {
        let name = format!("lora_te_text_model_encoder_layers_1_self_attn_{part}_proj");
        let layer = single.layer(&name).unwrap();
        let view = single.view(layer).unwrap();
        let expected = &text[&format!("text_model.encoder.layers.1.self_attn.{part}_proj.weight")];
        assert_eq!(view.shape, expected.shape);
        assert_eq!(layer.shape, expected.shape);
        assert!(view.data == expected.data);
        assert!(matches!(view.data, std::borrow::Cow::Borrowed(_)));
    }
}

#[test]
fn other_tensors_of_a_file_are_no_layers() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sd1.safetensors");
    let mut tensors = ldm_model("parity");
    let plain = {
        save(&file, &tensors);
        ModelFiles::open(&file).unwrap().layers().len()
    };
    let tensor = tensors["model.diffusion_model.out.2.weight"].clone();
    tensors.insert("model_ema.diffusion_modelout2weight".into(), tensor.clone());
    tensors.insert("model.diffusion_model.strange.weight".into(), tensor);
    save(&file, &tensors);
    let model = ModelFiles::open(&file).unwrap();
    assert_eq!(model.layers().len(), plain);
    assert!(model.notes.len() == 1 && model.notes[0].contains("strange"), "{:?}", model.notes);
    assert!(model.files[0].file.describe("model_ema.diffusion_modelout2weight").is_some());
}

/// The U-Net of a folder in two files with an index.
fn shard_unet(folder: &Path) {
    let path = folder.join("unet/diffusion_pytorch_model.safetensors");
    let tensors = component("parity", "unet");
    fs::remove_file(path).unwrap();
    let mut shards: [Tensors; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in tensors.into_iter().enumerate() {
        let file = format!("diffusion_pytorch_model-{}-of-2.safetensors", index % 2 + 1);
        map.insert(name.clone(), json!(file));
        shards[index % 2].insert(name, tensor);
    }
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("diffusion_pytorch_model-{}-of-2.safetensors", index + 1);
        save(&folder.join("unet").join(file), shard);
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(folder.join("unet/diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
}

fn copy_model(to: &Path) {
    for part in ["unet", "text_encoder", "vae"] {
        fs::create_dir_all(to.join(part)).unwrap();
        for entry in fs::read_dir(data(&format!("parity/model/{part}"))).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(part).join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn layers_of_shards_are_found_in_their_files() {
    let folder = tempfile::tempdir().unwrap();
    copy_model(folder.path());
    let plain = ModelFiles::open(folder.path()).unwrap();
    let files: Vec<_> = plain.files.iter().map(|f| (f.component, f.relative.clone())).collect();
    assert_eq!(
        files,
        [
            (Some(ComponentKind::Unet), "unet/diffusion_pytorch_model.safetensors".into()),
            (Some(ComponentKind::TextEncoder), "text_encoder/model.safetensors".into()),
            (Some(ComponentKind::Vae), "vae/diffusion_pytorch_model.safetensors".into()),
        ]
    );
    shard_unet(folder.path());
    let model = ModelFiles::open(folder.path()).unwrap();
    assert_eq!(model.files.len(), 4);
    let relative = "unet/diffusion_pytorch_model-2-of-2.safetensors";
    assert_eq!(model.files[1].relative, Path::new(relative));
    assert_eq!(model.layers().len(), plain.layers().len());
    let mut used = BTreeSet::new();
    for (layer, before) in model.layers().iter().zip(plain.layers()) {
        assert_eq!((&layer.name, &layer.shape), (&before.name, &before.shape));
        let (view, expected) = (model.view(layer).unwrap(), plain.view(before).unwrap());
        assert!(view == expected, "{}", layer.name);
        assert_eq!(model.layers_at(layer.place.file, &layer.place.key).len(), 1);
        used.insert(layer.place.file);
    }
    assert_eq!(used, BTreeSet::from([0, 1, 2]));
}

#[test]
fn what_is_no_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = error_of(&data("parity/lierla/init.safetensors"));
    assert!(text.contains("it is a LoRA, not a model"), "{text}");
    let text = error_of(&data("parity/model/unet/diffusion_pytorch_model.safetensors"));
    assert!(text.contains("it is a U-Net alone"), "{text}");
    let text = error_of(&folder.path().join("absent.safetensors"));
    assert!(text.contains("absent.safetensors"), "{text}");

    let tensor = OwnedTensor::from_f32(&[2, 2], &[0.0; 4], Dtype::F16).unwrap();
    let file = folder.path().join("x.safetensors");
    let unet = "model.diffusion_model.input_blocks.0.0.weight";
    for (key, expected) in [
        ("conditioner.embedders.0.model.ln_final.weight", "the refiner of SDXL"),
        ("model.diffusion_model.joint_blocks.0.weight", "SD3 is not supported"),
        ("first_stage_model.encoder.conv_in.weight", "a U-Net but no text encoder"),
    ] {
        let pair = [(unet.to_owned(), tensor.clone()), (key.to_owned(), tensor.clone())];
        save(&file, &pair.into());
        let text = error_of(&file);
        assert!(text.contains(expected), "{text}");
    }

    let dir = folder.path().join("model");
    for part in ["unet", "text_encoder", "vae"] {
        fs::create_dir(&dir).unwrap();
        copy_model(&dir);
        fs::remove_dir_all(dir.join(part)).unwrap();
        let text = error_of(&dir);
        assert!(text.contains("lacks") && text.contains(&format!("`{part}/")), "{text}");
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir(&dir).unwrap();
    copy_model(&dir);
    let index = json!({"_class_name": "StableDiffusionXLPipeline"});
    fs::write(dir.join("model_index.json"), index.to_string()).unwrap();
    let text = error_of(&dir);
    assert!(text.contains("its pipeline is `StableDiffusionXLPipeline`"), "{text}");
}

#[test]
fn full_size_folders_have_the_ldm_layout_of_sd_scripts() {
    let folder = tempfile::tempdir().unwrap();
    for (name, family) in FAMILIES {
        let dir = folder.path().join(name);
        write_folder(&dir, name);
        let layout = ModelFiles::open(&dir).unwrap().ldm_layout();
        assert!(layout.left_out.is_empty(), "{:?}", layout.left_out);
        let mut found: BTreeMap<String, Vec<usize>> =
            layout.tensors.into_iter().map(|t| (t.spec.name, t.spec.shape)).collect();
        let expected: BTreeMap<String, Vec<usize>> =
            rows(name).into_iter().map(|row| (row.key, row.shape)).collect();
        if family == Family::Sd2 {
            let extra: Vec<String> =
                found.keys().filter(|key| !expected.contains_key(*key)).cloned().collect();
            // sd-scripts' `make_dummy_weights`: layer 23, and two tensors.
            assert_eq!(extra.len(), 12 + 2);
            assert!(layout.notes[0].starts_with("layer 23 of the text encoder repeats layer 22"));
            let prefix = "cond_stage_model.model.";
            for key in extra {
                let rest = key.strip_prefix(prefix).unwrap();
                let shape = found.remove(&key).unwrap();
                match rest {
                    "text_projection" => assert_eq!(shape, [1024, 1024]),
                    "logit_scale" => assert!(shape.is_empty()),
                    _ => assert_eq!(shape, expected[&key.replace(".23.", ".22.")]),
                }
            }
        } else {
            assert!(layout.notes.is_empty());
        }
        assert_eq!(found, expected, "{name}");
    }
}

/// The tensors of a layout, pieces joined.
fn assembled(model: &ModelFiles) -> Tensors {
    let tensors = model.ldm_layout().tensors.into_iter().map(|tensor| {
        let pieces = tensor.read(model).unwrap();
        assert!(pieces.iter().all(|piece| piece.dtype == tensor.spec.dtype));
        let data: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.to_vec()).collect();
        let spec = tensor.spec;
        assert_eq!(spec.bytes(), data.len(), "{}", spec.name);
        (spec.name, OwnedTensor { dtype: spec.dtype, shape: spec.shape, data })
    });
    tensors.collect()
}

#[test]
fn a_folder_and_its_file_are_assembled_alike() {
    let folder = tempfile::tempdir().unwrap();
    for set in ["parity", "parity-sd2"] {
        let mut expected = ldm_model(set);
        let file = folder.path().join("model.safetensors");
        save(&file, &expected);
        let from_file = assembled(&ModelFiles::open(&file).unwrap());
        let from_folder = assembled(&ModelFiles::open(&data(&format!("{set}/model"))).unwrap());
        assert!(from_file == from_folder, "{set}");
        let made_up = |key: &str| {
            key.contains(".resblocks.4.") || key.ends_with("_projection") || key.ends_with("_scale")
        };
        expected.retain(|key, _| set == "parity" || !made_up(key));
        let is_known = |(key, _): &(&String, &OwnedTensor)| set == "parity" || !made_up(key);
        let found: Vec<_> = from_folder.iter().filter(is_known).collect();
        assert!(found.into_iter().eq(expected.iter()), "{set}");
    }
}

#[test]
fn what_no_component_has_is_outside() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sd1.safetensors");
    let mut tensors = ldm_model("parity");
    let tensor = OwnedTensor::from_f32(&[2], &[0.5, 1.0], Dtype::F32).unwrap();
    let position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids";
    for key in ["alphas_cumprod", position_ids] {
        tensors.insert(key.to_owned(), tensor.clone());
    }
    save(&file, &tensors);
    let model = ModelFiles::open(&file).unwrap();
    assert_eq!(model.outside_components(), [(0, "alphas_cumprod"), (0, position_ids)]);
    let model = ModelFiles::open(&data("parity/model")).unwrap();
    assert!(model.outside_components().is_empty());
}

#[test]
fn numbers_that_no_model_has_are_no_places() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), "sdxl");
    let mut unet = components("sdxl").remove("unet").unwrap();
    let strange = [
        "down_blocks.18446744073709551615.resnets.0.conv1.weight",
        "down_blocks.1.resnets.18446744073709551615.conv1.weight",
        "up_blocks.65535.upsamplers.0.conv.weight",
        "mid_block.attentions.9999999999999999999999.proj_in.weight",
    ];
    for name in strange {
        unet.insert(name.to_owned(), vec![2, 2]);
    }
    let path = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    crate::layouts::write_hollow(&path, &unet);
    let model = ModelFiles::open(folder.path()).unwrap();
    let left_out = model.ldm_layout().left_out;
    for name in [strange[0], strange[1], strange[3]] {
        assert!(left_out.contains(&format!("unet/{name}")), "{left_out:?}");
        // It is a layer all the same, under diffusers' name.
        let module = name.strip_suffix(".weight").unwrap().replace('.', "_");
        assert!(model.layer(&format!("lora_unet_{module}")).is_some(), "{module}");
    }
    let layer = model.layer("lora_unet_input_blocks_4_1_proj_in").unwrap();
    assert_eq!(layer.place.key, "down_blocks.1.attentions.0.proj_in.weight");
}
