//! Which program loads which file, and which keys each would drop.

use std::path::PathBuf;

use formats::lora_file::{self, SaveAs};
use formats::{Dtype, OwnedTensor};

use super::*;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

fn of(file: &AdapterFile, program: &str) -> Verdict {
    verdicts(file).into_iter().find(|verdict| verdict.program == program).unwrap()
}

fn all(file: &AdapterFile) -> Vec<(&'static str, Loads)> {
    verdicts(file).iter().map(|verdict| (verdict.program, verdict.loads)).collect()
}

/// A file of these tensors; `alpha` tensors hold the number given.
fn file_of(tensors: &[(&str, &[usize], f32)], metadata: &[(&str, &str)]) -> AdapterFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensor = |shape: &[usize], value: f32| {
        OwnedTensor::from_f32(shape, &vec![value; shape.iter().product()], Dtype::F32).unwrap()
    };
    let tensors =
        tensors.iter().map(|(key, shape, value)| ((*key).to_owned(), tensor(shape, *value)));
    let metadata = metadata.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    lora_file::write(&path, &tensors.collect(), &metadata, SaveAs::Safetensors).unwrap();
    // Mapped: the file may go.
    AdapterFile::open(&path).unwrap()
}

use Loads::{No, Partly, Yes};

#[test]
fn a_file_of_sd_scripts_loads_everywhere() {
    let file = AdapterFile::open(&data("lora/lierla_r4.safetensors")).unwrap();
    let expected =
        [("webui", Yes), ("forge", Yes), ("comfyui", Yes), ("diffusers", Yes), ("sd-scripts", Yes)];
    assert_eq!(all(&file), expected);
    assert!(verdicts(&file).iter().all(|verdict| verdict.reasons.is_empty()));
}

#[test]
fn a_file_of_peft_loads_in_diffusers_alone() {
    let file = AdapterFile::open(&data("adapters/diffusers_metadata.safetensors")).unwrap();
    let expected = [
        ("webui", No),
        ("forge", Partly),
        ("comfyui", Partly),
        ("diffusers", Yes),
        ("sd-scripts", No),
    ];
    assert_eq!(all(&file), expected);
    let comfyui = of(&file, "comfyui");
    // Attention without `.processor.`, text encoders without `text_model.`.
    assert_eq!(comfyui.dropped.len(), 8);
    assert!(
        comfyui.dropped.iter().all(|key| key.contains("text_encoder.") || key.contains(".to_"))
    );
    // Alpha 3 at rank 2 stands in the header only.
    let misread =
        ["lora_unet_down_blocks_1_resnets_0_conv1", "lora_unet_up_blocks_1_attentions_2_proj_in"];
    assert_eq!(comfyui.misread, misread);
}

#[test]
fn names_of_peft_alone_load_nowhere() {
    let file = AdapterFile::open(&data("adapters/peft_rslora/adapter_model.safetensors")).unwrap();
    let expected =
        [("webui", No), ("forge", No), ("comfyui", No), ("diffusers", No), ("sd-scripts", No)];
    assert_eq!(all(&file), expected);
}

#[test]
fn kinds_of_lycoris() {
    let pair: [(&str, &[usize], f32); 4] = [
        ("lora_unet_a.hada_w1_a", &[4, 2], 1.0),
        ("lora_unet_a.hada_w1_b", &[2, 4], 1.0),
        ("lora_unet_a.hada_w2_a", &[4, 2], 1.0),
        ("lora_unet_a.hada_w2_b", &[2, 4], 1.0),
    ];
    let file = file_of(&pair, &[]);
    let expected =
        [("webui", Yes), ("forge", Yes), ("comfyui", Yes), ("diffusers", No), ("sd-scripts", No)];
    assert_eq!(all(&file), expected);
    assert!(of(&file, "diffusers").reasons[0].contains("this is a LoHa: `lora_unet_a`"));
    assert!(of(&file, "sd-scripts").reasons.iter().any(|reason| reason.contains("lycoris.kohya")));

    let dora: [(&str, &[usize], f32); 3] = [
        ("lora_unet_a.lora_down.weight", &[2, 3], 1.0),
        ("lora_unet_a.lora_up.weight", &[4, 2], 1.0),
        ("lora_unet_a.dora_scale", &[4, 1], 1.0),
    ];
    let file = file_of(&dora, &[]);
    assert!(all(&file).iter().all(|(_, loads)| *loads == Partly), "{:?}", all(&file));
    assert_eq!(of(&file, "diffusers").dropped, ["lora_unet_a.dora_scale"]);
    assert_eq!(of(&file, "webui").dropped, [""; 0]);
    assert_eq!(of(&file, "webui").misread, ["lora_unet_a"]);

    let bias = file_of(&[("lora_unet_a.diff_b", &[4], 1.0)], &[]);
    assert_eq!(of(&bias, "webui").loads, No);
    assert_eq!(of(&bias, "comfyui").loads, Yes);
}

#[test]
fn diffusers_takes_the_most_frequent_alpha_for_attention() {
    let layer = |name: &str| {
        ["lora_down.weight", "lora_up.weight", "alpha"].map(|end| format!("lora_unet_{name}.{end}"))
    };
    let names = ["b_attn1_to_q", "b_attn1_to_k", "b_attn1_to_v", "b_ff_net_2"].map(layer);
    let alphas = [1.0, 1.0, 4.0, 4.0];
    let mut tensors: Vec<(&str, &[usize], f32)> = Vec::new();
    for ([down, up, alpha], value) in names.iter().zip(alphas) {
        tensors.push((down, &[2, 4], 1.0));
        tensors.push((up, &[4, 2], 1.0));
        tensors.push((alpha, &[], value));
    }
    let file = file_of(&tensors, &[]);
    let verdict = of(&file, "diffusers");
    assert_eq!(verdict.loads, Partly);
    // Two alphas as often: the first of the file counts, as `ff` sorts after the attention.
    assert_eq!(verdict.misread, ["lora_unet_b_attn1_to_v"]);
    assert_eq!(of(&file, "comfyui").loads, Yes);
}

#[test]
fn metadata_of_another_family_hide_the_file() {
    let module: [(&str, &[usize], f32); 2] = [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", &[2, 3], 1.0),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", &[4, 2], 1.0),
    ];
    let file = file_of(&module, &[("ss_base_model_version", "sdxl_base_v1-0")]);
    assert!(of(&file, "webui").reasons.is_empty());
    let file = file_of(&module, &[("ss_base_model_version", "sd_v1")]);
    let verdict = of(&file, "webui");
    assert_eq!(verdict.loads, Yes);
    assert!(verdict.reasons[0].contains("hides the file beside Stable Diffusion XL models"));
}
