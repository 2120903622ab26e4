//! The way back: diffusers' dotted path of a layer from sd-scripts' name.
//!
//! A name with underscores does not say where its dots were, so the words of these networks that
//! hold underscores themselves are listed here. A name with a part that no network has gives `None`.

use super::sdxl_unet;

/// Parts of paths that hold underscores. The longest that fits counts.
const JOINED: [&str; 31] = [
    "add_embedding",
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "conv_shortcut",
    "down_blocks",
    "final_layer_norm",
    "layer_norm1",
    "layer_norm2",
    "linear_1",
    "linear_2",
    "mid_block",
    "out_proj",
    "position_embedding",
    "proj_in",
    "proj_out",
    "q_proj",
    "k_proj",
    "v_proj",
    "self_attn",
    "text_model",
    "text_projection",
    "time_emb_proj",
    "time_embedding",
    "to_k",
    "to_out",
    "to_q",
    "to_v",
    "token_embedding",
    "transformer_blocks",
    "up_blocks",
];
/// Parts without underscores; numbers are parts too.
const SINGLE: [&str; 22] = [
    "attentions",
    "attn1",
    "attn2",
    "conv",
    "conv1",
    "conv2",
    "downsamplers",
    "embeddings",
    "encoder",
    "fc1",
    "fc2",
    "ff",
    "layers",
    "mlp",
    "net",
    "norm",
    "norm1",
    "norm2",
    "norm3",
    "proj",
    "resnets",
    "upsamplers",
];

/// `lora_te1_text_model_encoder_layers_0_mlp_fc1` -> (`text_encoder`,
/// `text_model.encoder.layers.0.mlp.fc1`): the component in a diffusers pipeline and the path within.
/// The original names of SDXL's U-Net become diffusers'.
pub fn diffusers_path(name: &str) -> Option<(&'static str, String)> {
    const PREFIXES: [(&str, &str); 4] = [
        ("lora_unet_", "unet"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
    ];
    let (component, layer) = PREFIXES
        .iter()
        .find_map(|(prefix, component)| Some((*component, name.strip_prefix(prefix)?)))?;
    let layer = match component {
        "unet" => sdxl_unet::diffusers_name(layer).unwrap_or_else(|| layer.to_owned()),
        _ => layer.to_owned(),
    };
    Some((component, dotted(&layer)?))
}

fn dotted(layer: &str) -> Option<String> {
    let mut parts = Vec::new();
    let mut rest = layer;
    while !rest.is_empty() {
        let fits = |part: &&&str| {
            rest.strip_prefix(**part)
                .is_some_and(|after| after.is_empty() || after.starts_with('_'))
        };
        let word = JOINED.iter().chain(&SINGLE).filter(fits).max_by_key(|part| part.len());
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let length = match word {
            Some(word) => word.len(),
            None if digits > 0 => digits,
            None => return None,
        };
        let (part, after) = rest.split_at(length);
        parts.push(part);
        rest = match after.strip_prefix('_') {
            Some(after) if !after.is_empty() => after,
            None if after.is_empty() => after,
            _ => return None,
        };
    }
    (!parts.is_empty()).then(|| parts.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::names::{Part, place};

    #[test]
    fn dots_come_back() {
        let cases = [
            (
                "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj",
                "unet.down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
            ),
            (
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
                "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            ),
            (
                "lora_unet_up_blocks_3_resnets_2_time_emb_proj",
                "unet.up_blocks.3.resnets.2.time_emb_proj",
            ),
            ("lora_unet_up_blocks_1_upsamplers_0_conv", "unet.up_blocks.1.upsamplers.0.conv"),
            (
                "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
                "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            ),
            ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"),
            (
                "lora_te1_text_model_encoder_layers_11_self_attn_out_proj",
                "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
            ),
            (
                "lora_te2_text_model_encoder_layers_31_mlp_fc2",
                "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
            ),
        ];
        for (name, path) in cases {
            let (component, inner) = diffusers_path(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(format!("{component}.{inner}"), path);
            // And there again.
            let (part, layer) = place(path).unwrap();
            let layer = match (part, name.contains("input_blocks") || name.contains("label_emb")) {
                (Part::Unet, true) => sdxl_unet::original_name(&layer).unwrap(),
                _ => layer,
            };
            assert!(name.ends_with(&layer), "{name} {layer}");
        }
    }

    #[test]
    fn names_of_no_network_have_no_path() {
        for name in [
            "lora_unet_",
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_conv_in_",
            "lora_unet_conv9",
            "down_blocks_0",
        ] {
            assert_eq!(diffusers_path(name), None, "{name}");
        }
    }
}
