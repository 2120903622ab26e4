//! Diffusers' names of a VAE under those of the LDM layout: the inverse of `ldm_vae`.

use super::split_index;

/// The LDM name of a tensor, and whether its matrix is a 1x1 convolution there. `last_level` is the
/// highest index of the decoder's levels, which are counted backwards. `None` for a name that no
/// VAE has.
pub(crate) fn ldm_vae_name(diffusers: &str, last_level: usize) -> Option<(String, bool)> {
    if diffusers.starts_with("quant_conv.") || diffusers.starts_with("post_quant_conv.") {
        return Some((diffusers.to_owned(), false));
    }
    let (half, rest) = diffusers.split_once('.')?;
    if !matches!(half, "encoder" | "decoder") {
        return None;
    }
    let (name, is_conv) = within_half(rest, last_level)?;
    Some((format!("{half}.{name}"), is_conv))
}

/// The highest index of the decoder's levels.
pub(crate) fn last_vae_level(names: &[String]) -> usize {
    let levels = names.iter().filter_map(|name| {
        let (level, _) = split_index(name.strip_prefix("decoder.up_blocks.")?)?;
        Some(level)
    });
    levels.max().unwrap_or_default()
}

fn within_half(rest: &str, last_level: usize) -> Option<(String, bool)> {
    if rest.starts_with("conv_in.") || rest.starts_with("conv_out.") {
        return Some((rest.to_owned(), false));
    }
    if let Some(rest) = rest.strip_prefix("conv_norm_out.") {
        return Some((format!("norm_out.{rest}"), false));
    }
    if let Some(rest) = rest.strip_prefix("mid_block.attentions.0.") {
        return attention(rest);
    }
    if let Some(rest) = rest.strip_prefix("mid_block.resnets.") {
        let (block, rest) = split_index(rest)?;
        return Some((format!("mid.block_{}.{}", block + 1, resnet(rest)), false));
    }
    let (side, level, rest) = match rest.strip_prefix("down_blocks.") {
        Some(rest) => {
            let (level, rest) = split_index(rest)?;
            ("down", level, rest)
        }
        None => {
            let (level, rest) = split_index(rest.strip_prefix("up_blocks.")?)?;
            ("up", last_level.checked_sub(level)?, rest)
        }
    };
    for (from, to) in [("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample.")] {
        if let Some(rest) = rest.strip_prefix(from) {
            return Some((format!("{side}.{level}.{to}{rest}"), false));
        }
    }
    let (block, rest) = split_index(rest.strip_prefix("resnets.")?)?;
    Some((format!("{side}.{level}.block.{block}.{}", resnet(rest)), false))
}

fn resnet(rest: &str) -> String {
    match rest.strip_prefix("conv_shortcut.") {
        Some(rest) => format!("nin_shortcut.{rest}"),
        None => rest.to_owned(),
    }
}

fn attention(rest: &str) -> Option<(String, bool)> {
    const PARTS: [(&str, &str); 5] = [
        ("group_norm.", "norm."),
        ("to_q.", "q."),
        ("to_k.", "k."),
        ("to_v.", "v."),
        ("to_out.0.", "proj_out."),
    ];
    PARTS.iter().find_map(|(from, to)| {
        let rest = rest.strip_prefix(from)?;
        let is_conv = *to != "norm." && rest == "weight";
        Some((format!("mid.attn_1.{to}{rest}"), is_conv))
    })
}
