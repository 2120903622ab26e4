//! Folders of test data, and the inverse of the key tables: models in the LDM layout made from
//! diffusers folders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use formats::{Dtype, OwnedTensor, open_tensor_file};

pub type Tensors = BTreeMap<String, OwnedTensor>;

/// `tests/data/...` of the repository.
pub fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

/// Every tensor of a file.
pub fn load(path: &Path) -> Tensors {
    let file = open_tensor_file(path).unwrap();
    let read = |name: &&str| ((*name).to_owned(), file.view(name).unwrap().to_owned_tensor());
    file.names().iter().map(read).collect()
}

pub fn save(path: &Path, tensors: &Tensors) {
    let mut bytes = Vec::new();
    formats::safetensors_file::write_safetensors(&mut bytes, tensors, None).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A component of `tests/data/<set>/model`.
pub fn component(set: &str, folder: &str) -> Tensors {
    let stem = if folder == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    load(&data(&format!("{set}/model/{folder}/{stem}.safetensors")))
}

/// The model of `tests/data/<set>` as one dictionary in the LDM layout.
pub fn ldm_model(set: &str) -> Tensors {
    let mut out = Tensors::new();
    for (name, tensor) in component(set, "unet") {
        out.insert(format!("model.diffusion_model.{}", ldm_unet_name(&name)), tensor);
    }
    for (name, tensor) in component(set, "vae") {
        let (name, tensor) = ldm_vae_tensor(&name, tensor);
        out.insert(format!("first_stage_model.{name}"), tensor);
    }
    let text = component(set, "text_encoder");
    if set == "parity-sd2" {
        out.extend(open_clip(&text));
    } else {
        let prefix = "cond_stage_model.transformer.";
        out.extend(text.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
    }
    out
}

fn number(text: &str) -> usize {
    text.parse().unwrap()
}

/// The models of the test data have four levels with two blocks down and three up.
fn ldm_unet_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let rest = |from: usize| parts[from..].join(".");
    match parts[0] {
        "conv_in" => format!("input_blocks.0.0.{}", rest(1)),
        "conv_norm_out" => format!("out.0.{}", rest(1)),
        "conv_out" => format!("out.2.{}", rest(1)),
        "time_embedding" => {
            let layer = if parts[1] == "linear_1" { 0 } else { 2 };
            format!("time_embed.{layer}.{}", rest(2))
        }
        "mid_block" => match (parts[1], parts[2]) {
            ("attentions", _) => format!("middle_block.1.{}", rest(3)),
            (_, block) => format!("middle_block.{}.{}", 2 * number(block), ldm_resnet(&parts[3..])),
        },
        "down_blocks" => {
            let first = 1 + 3 * number(parts[1]);
            let block = first + number(parts[3]);
            match parts[2] {
                "resnets" => format!("input_blocks.{block}.0.{}", ldm_resnet(&parts[4..])),
                "attentions" => format!("input_blocks.{block}.1.{}", rest(4)),
                _ => format!("input_blocks.{}.0.op.{}", first + 2, rest(5)),
            }
        }
        _ => {
            let first = 3 * number(parts[1]);
            let block = first + number(parts[3]);
            match parts[2] {
                "resnets" => format!("output_blocks.{block}.0.{}", ldm_resnet(&parts[4..])),
                "attentions" => format!("output_blocks.{block}.1.{}", rest(4)),
                // After the attention, which the first level lacks.
                _ => {
                    let module = if parts[1] == "0" { 1 } else { 2 };
                    format!("output_blocks.{}.{module}.{}", first + 2, rest(4))
                }
            }
        }
    }
}

fn ldm_resnet(parts: &[&str]) -> String {
    let module = match parts[0] {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        other => panic!("{other}"),
    };
    format!("{module}.{}", parts[1])
}

fn ldm_vae_tensor(name: &str, mut tensor: OwnedTensor) -> (String, OwnedTensor) {
    let mut name =
        name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut");
    name = name.replace("mid_block.resnets.0", "mid.block_1");
    name = name.replace("mid_block.resnets.1", "mid.block_2");
    if name.contains("mid_block.attentions.0.") {
        let replacements = [
            ("mid_block.attentions.0.", "mid.attn_1."),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ];
        for (from, to) in replacements {
            name = name.replace(from, to);
        }
        if tensor.shape.len() == 2 {
            tensor.shape.extend([1, 1]);
        }
    }
    for level in 0..4 {
        let (down, up) = (format!("down_blocks.{level}."), format!("up_blocks.{level}."));
        name = name.replace(&format!("{down}resnets."), &format!("down.{level}.block."));
        name =
            name.replace(&format!("{down}downsamplers.0."), &format!("down.{level}.downsample."));
        let reversed = 3 - level;
        name = name.replace(&format!("{up}resnets."), &format!("up.{reversed}.block."));
        name = name.replace(&format!("{up}upsamplers.0."), &format!("up.{reversed}.upsample."));
    }
    (name, tensor)
}

/// OpenCLIP's layout with one layer more than the model uses, as published checkpoints have it.
fn open_clip(text: &Tensors) -> Tensors {
    let mut out = Tensors::new();
    let get = |name: &str| text[&format!("text_model.{name}")].clone();
    let prefix = "cond_stage_model.model.";
    let mut put = |name: String, tensor: OwnedTensor| {
        out.insert(format!("{prefix}{name}"), tensor);
    };
    put("token_embedding.weight".into(), get("embeddings.token_embedding.weight"));
    put("positional_embedding".into(), get("embeddings.position_embedding.weight"));
    put("text_projection".into(), OwnedTensor::from_f32(&[2, 2], &[1.0; 4], Dtype::F16).unwrap());
    put("logit_scale".into(), OwnedTensor::scalar(4.6, Dtype::F32).unwrap());
    let layers = text.keys().filter(|name| name.ends_with("layer_norm1.weight")).count();
    for kind in ["weight", "bias"] {
        put(format!("ln_final.{kind}"), get(&format!("final_layer_norm.{kind}")));
        for layer in 0..=layers {
            // The extra layer repeats the first one; its values must never show.
            let from = format!("encoder.layers.{}", if layer == layers { 0 } else { layer });
            let to = format!("transformer.resblocks.{layer}");
            let pairs = [
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ];
            for (ours, theirs) in pairs {
                put(format!("{to}.{ours}.{kind}"), get(&format!("{from}.{theirs}.{kind}")));
            }
            let [q, k, v] = ["q_proj", "k_proj", "v_proj"]
                .map(|part| get(&format!("{from}.self_attn.{part}.{kind}")));
            let mut joined = q;
            joined.shape[0] *= 3;
            joined.data.extend(k.data);
            joined.data.extend(v.data);
            put(format!("{to}.attn.in_proj_{kind}"), joined);
        }
    }
    out
}
