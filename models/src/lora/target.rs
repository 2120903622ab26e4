//! The layers of a base model that can carry an adapter, in the order of sd-scripts.
//!
//! They follow from names and shapes alone: matrices and kernels inside transformers, residual blocks
//! and resamplers of the U-Net, inside attention and feed-forward of a text encoder.

use std::cmp::Ordering;

use formats::{Weights, sdxl_original_name};

/// Parts of a model that are trained with a learning rate of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The text encoder, SDXL's first.
    TextEncoder,
    /// SDXL's second text encoder.
    TextEncoder2,
    /// The U-Net.
    Unet,
}

impl Part {
    /// Start of the module names in files; SDXL's first text encoder has `lora_te1`.
    pub fn prefix(self) -> &'static str {
        match self {
            Part::TextEncoder => "lora_te",
            Part::TextEncoder2 => "lora_te2",
            Part::Unet => "lora_unet",
        }
    }

    /// Name of its learning rate in sd-scripts' logs; SDXL's first text encoder has `textencoder 1`.
    pub fn group_name(self) -> &'static str {
        match self {
            Part::TextEncoder => "textencoder",
            Part::TextEncoder2 => "textencoder 2",
            Part::Unet => "unet",
        }
    }

    /// Whether it is one of the text encoders.
    pub fn is_text(self) -> bool {
        self != Part::Unet
    }
}

/// How files keep the weight of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// `[out,in]`.
    Linear,
    /// `[out,in,height,width]`.
    Conv {
        /// Height and width.
        kernel: (usize, usize),
    },
}

/// A layer that can carry an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Part of the model.
    pub part: Part,
    /// Name in diffusers or transformers.
    pub path: String,
    /// Name in files: `lora_unet_down_blocks_0_...`.
    pub name: String,
    /// Form of its weight.
    pub kind: LayerKind,
    /// Outputs.
    pub out: usize,
    /// Inputs.
    pub input: usize,
    /// Whether it lies in a transformer (or text encoder): these are trained without `conv_dim`.
    pub in_transformer: bool,
}

impl Target {
    /// Numbers of its weight to an output: inputs times pixels of the window.
    pub fn weight_columns(&self) -> usize {
        match self.kind {
            LayerKind::Linear => self.input,
            LayerKind::Conv { kernel: (height, width) } => self.input * height * width,
        }
    }

    /// Whether it is linear or a 1x1 convolution: these have `network_dim`, others `conv_dim`.
    pub fn is_pointwise(&self) -> bool {
        matches!(self.kind, LayerKind::Linear | LayerKind::Conv { kernel: (1, 1) })
    }
}

/// All layers of a U-Net that can carry an adapter. Files call those of SDXL by their original names
/// (`lora_unet_input_blocks_4_1_proj_in`).
pub fn unet_targets(weights: &dyn Weights) -> Vec<Target> {
    of_unet(weights, |path| {
        let has = |part: &str| path.split('.').any(|segment| segment == part);
        if has("attentions") {
            Some(true)
        } else {
            (has("resnets") || has("downsamplers") || has("upsamplers")).then_some(false)
        }
    })
}

/// All layers of the text encoder of Stable Diffusion 1.x or 2.x that can carry an adapter.
pub fn text_encoder_targets(weights: &dyn Weights) -> Vec<Target> {
    text_targets(weights, Part::TextEncoder, Part::TextEncoder.prefix())
}

/// The same for both text encoders of SDXL, the first one first.
pub fn sdxl_text_encoder_targets(first: &dyn Weights, second: &dyn Weights) -> Vec<Target> {
    let mut found = text_targets(first, Part::TextEncoder, "lora_te1");
    found.extend(text_targets(second, Part::TextEncoder2, Part::TextEncoder2.prefix()));
    found
}

fn text_targets(weights: &dyn Weights, part: Part, prefix: &str) -> Vec<Target> {
    targets(weights, (part, prefix), |path| {
        let has = |part: &str| path.split('.').any(|segment| segment == part);
        (has("layers") && (has("self_attn") || has("mlp"))).then_some(true)
    })
}

/// `place` says for a path whether it lies in a transformer, `None` if it carries no adapter.
pub(super) fn of_unet(weights: &dyn Weights, place: impl Fn(&str) -> Option<bool>) -> Vec<Target> {
    let prefix = Part::Unet.prefix();
    let mut found = targets(weights, (Part::Unet, prefix), place);
    if weights.contains("add_embedding.linear_1.weight") {
        for target in &mut found {
            if let Some(original) = sdxl_original_name(&target.path.replace('.', "_")) {
                target.name = format!("{prefix}_{original}");
            }
        }
    }
    found
}

fn targets(
    weights: &dyn Weights,
    (part, prefix): (Part, &str),
    place: impl Fn(&str) -> Option<bool>,
) -> Vec<Target> {
    let mut found = Vec::new();
    for name in weights.names() {
        let Some(path) = name.strip_suffix(".weight") else { continue };
        let Some(in_transformer) = place(path) else { continue };
        let (kind, out, input) = match weights.shape(&name).as_deref() {
            Some(&[out, input]) => (LayerKind::Linear, out, input),
            Some(&[out, input, h, w]) => (LayerKind::Conv { kernel: (h, w) }, out, input),
            _ => continue,
        };
        let name = format!("{prefix}_{}", path.replace('.', "_"));
        let path = path.to_owned();
        found.push(Target { part, path, name, kind, out, input, in_transformer });
    }
    found.sort_by(|a, b| compare_paths(&a.path, &b.path));
    found
}

/// Siblings in the order in which diffusers and transformers register them.
const SIBLINGS: [&str; 29] = [
    "down_blocks",
    "up_blocks",
    "mid_block",
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "proj_in",
    "transformer_blocks",
    "proj_out",
    "attn1",
    "ff",
    "attn2",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "conv1",
    "time_emb_proj",
    "conv2",
    "conv_shortcut",
    "self_attn",
    "mlp",
    "k_proj",
    "v_proj",
    "q_proj",
    "out_proj",
    "fc1",
    "fc2",
];

/// Orders two paths segment by segment: numbers by value, names by [`SIBLINGS`].
fn compare_paths(a: &str, b: &str) -> Ordering {
    let key = |segment: &str| match segment.parse::<usize>() {
        Ok(number) => (0, number),
        Err(_) => (1, SIBLINGS.iter().position(|name| *name == segment).unwrap_or(SIBLINGS.len())),
    };
    for (left, right) in a.split('.').zip(b.split('.')) {
        let order = key(left).cmp(&key(right)).then_with(|| left.cmp(right));
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ordered_by_value_and_names_as_registered() {
        let sorted = [
            "down_blocks.0.attentions.0.proj_in",
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q",
            "down_blocks.0.resnets.0.time_emb_proj",
            "down_blocks.0.resnets.0.conv2",
            "down_blocks.10.resnets.0.conv1",
            "up_blocks.0.resnets.0.conv1",
            "mid_block.resnets.0.conv1",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare_paths(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }
}
