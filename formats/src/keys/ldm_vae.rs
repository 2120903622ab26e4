//! The VAE of single-file checkpoints (`first_stage_model.`) and of older diffusers folders under
//! diffusers' present names.
//!
//! Its attention is stored as 1x1 convolutions in the LDM layout, as `query`, `key`, `value`,
//! `proj_attn` by early diffusers, and as `to_q`, `to_k`, `to_v`, `to_out.0` now: always presented
//! as the last, with matrices.

use super::{KeyMap, Part, split_index, under};
use crate::tensor_file::TensorFile;

const ATTENTION: &str = "mid_block.attentions.0.";

/// The table for the VAE whose LDM keys start with `prefix`.
pub(crate) fn map_ldm_vae(file: &dyn TensorFile, prefix: &str) -> KeyMap {
    let mut map = KeyMap::default();
    let tensors = under(file, prefix);
    let levels = tensors.iter().filter_map(|(_, rest)| {
        let (level, _) = split_index(rest.strip_prefix("decoder.up.")?)?;
        Some(level)
    });
    let last_level = levels.max().unwrap_or_default();
    for (key, rest) in tensors {
        // The training loss (a perceptual network) is no part of the model.
        if rest.starts_with("loss.") || rest.starts_with("model_ema.") {
            continue;
        }
        match ldm_name(rest, last_level) {
            Some((name, part)) => map.insert(name, key, part),
            None => map.ignored.push(key.to_owned()),
        }
    }
    map
}

fn ldm_name(rest: &str, last_level: usize) -> Option<(String, Part)> {
    if rest.starts_with("quant_conv.") || rest.starts_with("post_quant_conv.") {
        return Some((rest.to_owned(), Part::Whole));
    }
    let (half, rest) = rest.split_once('.')?;
    if !matches!(half, "encoder" | "decoder") {
        return None;
    }
    let whole = |name: String| Some((format!("{half}.{name}"), Part::Whole));
    if rest.starts_with("conv_in.") || rest.starts_with("conv_out.") {
        return whole(rest.to_owned());
    }
    if let Some(rest) = rest.strip_prefix("norm_out.") {
        return whole(format!("conv_norm_out.{rest}"));
    }
    if let Some(rest) = rest.strip_prefix("mid.attn_1.") {
        let (name, part) = attention_name(rest)?;
        return Some((format!("{half}.{ATTENTION}{name}"), part));
    }
    for (from, to) in [("mid.block_1.", 0), ("mid.block_2.", 1)] {
        if let Some(rest) = rest.strip_prefix(from) {
            return whole(format!("mid_block.resnets.{to}.{}", resnet_name(rest)));
        }
    }
    let (side, level, rest) = if let Some(rest) = rest.strip_prefix("down.") {
        let (level, rest) = split_index(rest)?;
        ("down_blocks", level, rest)
    } else {
        // The LDM decoder counts its levels from the image, diffusers from the latents.
        let (level, rest) = split_index(rest.strip_prefix("up.")?)?;
        ("up_blocks", last_level.checked_sub(level)?, rest)
    };
    let samplers =
        [("downsample.conv.", "downsamplers.0.conv."), ("upsample.conv.", "upsamplers.0.conv.")];
    for (from, to) in samplers {
        if let Some(rest) = rest.strip_prefix(from) {
            return whole(format!("{side}.{level}.{to}{rest}"));
        }
    }
    let (block, rest) = split_index(rest.strip_prefix("block.")?)?;
    whole(format!("{side}.{level}.resnets.{block}.{}", resnet_name(rest)))
}

fn resnet_name(rest: &str) -> String {
    match rest.strip_prefix("nin_shortcut.") {
        Some(rest) => format!("conv_shortcut.{rest}"),
        None => rest.to_owned(),
    }
}

/// Attention tensors of any age: the present name and how the stored tensor is seen.
fn attention_name(rest: &str) -> Option<(String, Part)> {
    const PARTS: [(&str, &str); 14] = [
        ("norm.", "group_norm."),
        ("group_norm.", "group_norm."),
        ("q.", "to_q."),
        ("k.", "to_k."),
        ("v.", "to_v."),
        ("proj_out.", "to_out.0."),
        ("query.", "to_q."),
        ("key.", "to_k."),
        ("value.", "to_v."),
        ("proj_attn.", "to_out.0."),
        ("to_q.", "to_q."),
        ("to_k.", "to_k."),
        ("to_v.", "to_v."),
        ("to_out.0.", "to_out.0."),
    ];
    PARTS.iter().find_map(|(from, to)| {
        let rest = rest.strip_prefix(from)?;
        let is_matrix = rest == "weight" && *to != "group_norm.";
        Some((format!("{to}{rest}"), if is_matrix { Part::Matrix } else { Part::Whole }))
    })
}

/// The table for a VAE in diffusers' layout of any age.
pub(crate) fn map_diffusers_vae(file: &dyn TensorFile) -> KeyMap {
    let mut map = KeyMap::default();
    for name in file.names() {
        let attention = ["encoder.", "decoder."].iter().find_map(|half| {
            let rest = name.strip_prefix(half)?.strip_prefix(ATTENTION)?;
            let (rest, part) = attention_name(rest)?;
            Some((format!("{half}{ATTENTION}{rest}"), part))
        });
        match attention {
            Some((renamed, part)) => map.insert(renamed, name, part),
            None => map.insert(name.to_owned(), name, Part::Whole),
        }
    }
    map
}
