//! Every kind of network on SDXL: all three parts learn, files have a place for each of their modules,
//! ranks agree; ranks and learning rates by block and by text encoder.

use formats::lora_file::LoraFile;

use super::pictures::generate;
use super::scene;
use crate::harness::{Scene, quoted, text};

const PARTS: [&str; 3] = ["lora_te1_", "lora_te2_", "lora_unet_"];

fn kind(module: &str, args: &str, batch: usize) -> Scene {
    let mut scene = scene(batch);
    scene.set("network_module", quoted(module)).set("network_args", args);
    scene.set("network_dim", "4").set("network_alpha", "2").set("max_train_steps", "2");
    scene
}

/// Modules of a part of which a tensor of this name has a number that is not zero.
fn learnt(file: &LoraFile, part: &str, suffix: &str) -> usize {
    let of_name =
        file.tensors.iter().filter(|(key, _)| key.starts_with(part) && key.ends_with(suffix));
    of_name.filter(|(_, tensor)| tensor.to_f32().iter().any(|x| *x != 0.)).count()
}

#[test]
fn every_kind_learns_in_all_parts_and_makes_pictures() {
    let folder = tempfile::tempdir().expect("a folder");
    let small = ["--prompt", "sks circle --d 1", "--W", "64", "--H", "64"];
    let (base, _) = generate(&folder.path().join("base"), &small);
    let base = std::fs::read(&base[0]).expect("a picture");
    // The second tensors start as zeros. Modules of the U-Net: 192 in transformers, 65 around them.
    // Of narrow layers LoKr has the whole second factor.
    for (module, args, zeros, modules) in [
        ("networks.lora", "['conv_dim=2', 'conv_alpha=1']", ".lora_up.weight", 257),
        ("networks.dylora", "['unit=2', 'conv_dim=4', 'conv_alpha=1']", ".lora_up.weight", 257),
        ("networks.loha", "['conv_dim=2', 'use_tucker=True']", ".hada_w2_a", 257),
        ("networks.lokr", "['factor=4', 'conv_dim=2']", ".lokr_w2", 257),
        ("lycoris.kohya", "['algo=locon', 'preset=full', 'conv_dim=2']", ".lora_up.weight", 257),
        ("networks.lora", "['dora_wd=True', 'conv_dim=2']", ".lora_up.weight", 257),
        ("lycoris.kohya", "['algo=lokr', 'preset=attn-mlp', 'full_matrix=True']", ".lokr_w2", 192),
    ] {
        let scene = kind(module, args, 4);
        let file = scene.trained(&[]);
        for part in PARTS {
            let count = learnt(&file, part, zeros) + learnt(&file, part, &format!("{zeros}_b"));
            assert!(count > 10, "{module} {args}: {part} learnt nothing");
        }
        let of_unet = file.tensors.keys().filter_map(|key| key.split_once('.'));
        let mut names: Vec<&str> =
            of_unet.map(|(name, _)| name).filter(|name| name.starts_with(PARTS[2])).collect();
        names.dedup();
        assert_eq!(names.len(), modules, "{module} {args}");
        if module == "networks.dylora" {
            // As in sd-scripts, whose `conv_alpha` is for LoRA alone.
            let alphas = file.tensors.iter().filter(|(key, _)| key.ends_with(".alpha"));
            assert!(alphas.into_iter().all(|(_, alpha)| alpha.to_f32() == [2.]));
        }
        let lora = scene.output_dir().join("small.safetensors").display().to_string();
        let with = [&small[..], &["--network_weights", &lora, "--network_mul", "3"]].concat();
        let (paths, said) = generate(&folder.path().join("with"), &with);
        assert!(!said.contains("has no layer"), "{module} {args}: {said}");
        let picture = image::open(&paths[0]).expect("a picture").to_rgb8();
        let plain = image::load_from_memory(&base).expect("a picture").to_rgb8();
        assert_ne!(picture, plain, "{module} {args} has no effect");
    }
}

#[test]
fn two_ranks_train_other_kinds_to_the_bit_where_that_is_asked_for() {
    for (module, args) in [
        ("networks.loha", "['conv_dim=2', 'use_tucker=True']"),
        ("networks.lora", "['dora_wd=True', 'conv_dim=2']"),
    ] {
        let one = kind(module, args, 4).set("reproducible", "true").trained(&[]);
        let mut two = kind(module, args, 2);
        let two = two.set("reproducible", "true").trained(&["--num_processes", "2"]);
        assert!(two.tensors == one.tensors, "{module} {args}");
    }
}

#[test]
fn the_23_blocks_have_ranks_and_learning_rates() {
    let dims = "1,2,2,2,2,2,2,2,3,0,4,4,4,5,5,5,5,5,0,0,0,0,1";
    let alphas = ["1"; 23].join(",");
    let args = format!("['block_dims={dims}', 'block_alphas={alphas}', 'conv_block_dims={dims}']");
    let file = kind("networks.lora", &args, 4).trained(&[]);
    let rank = |name: &str| {
        file.tensors.get(&format!("lora_unet_{name}.lora_down.weight")).map(|down| down.shape[0])
    };
    // Nothing of it is in block 0 (embeddings) and 22 (output); 1 + 8 is `input_blocks.8`, without a rank.
    for (name, dim) in [
        ("input_blocks_1_0_in_layers_2", Some(2)),
        ("input_blocks_4_1_proj_in", Some(2)),
        ("input_blocks_7_1_proj_in", Some(3)),
        ("input_blocks_8_1_proj_in", None),
        ("middle_block_1_proj_in", Some(4)),
        ("output_blocks_0_1_proj_in", Some(5)),
        ("output_blocks_4_1_proj_in", Some(5)),
        ("output_blocks_5_1_proj_in", None),
        ("output_blocks_8_0_in_layers_2", None),
    ] {
        assert_eq!(rank(name), dim, "{name}");
    }
    assert_eq!(file.tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"].to_f32(), [2.]);

    let rates = "['down_lr_weight=0,0,0,0,0,0,0,0,1', 'mid_lr_weight=0,1,0', 'up_lr_weight=zeros']";
    let scene = kind("networks.lora", rates, 4);
    let output = scene.train(&[], &[]);
    let said = text(&output);
    assert!(output.status.success() && !said.contains("are set to 1"), "{said}");
    let path = scene.output_dir().join("small.safetensors");
    let file = formats::lora_file::read(&path).expect("a LoRA file");
    let starts = ["lora_unet_input_blocks_8_1", "lora_unet_middle_block_1", "lora_te"];
    let chosen = |key: &String| starts.iter().any(|start| key.starts_with(start));
    assert!(file.tensors.keys().all(chosen));
    assert!(starts.iter().all(|start| file.tensors.keys().any(|key| key.starts_with(start))));
}

#[test]
fn text_encoders_have_one_learning_rate_or_two() {
    for (rates, learns) in [("[0.0, 1e-3]", [false, true]), ("[1e-3]", [true, true])] {
        let mut scene = kind("networks.lora", "[]", 4);
        let file = scene.set("text_encoder_lr", rates).trained(&[]);
        for (part, learns) in PARTS.into_iter().zip(learns) {
            let moved = learnt(&file, part, ".lora_up.weight") > 0;
            assert_eq!(moved, learns, "{rates}: {part}");
        }
        assert!(learnt(&file, PARTS[2], ".lora_up.weight") > 10);
    }
}
