//! The two names of an SDXL U-Net layer: diffusers' (`down_blocks_1_...`) and the original ones of
//! the SGM repository (`input_blocks_4_...`), both with underscores, without a prefix.
//!
//! SDXL has three levels of two (down) and three (up) resnets, so arithmetic on the block numbers
//! does it; a name that fits no rule gives `None`.

/// Diffusers' and the original name of what a resnet holds.
const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers_0"),
    ("conv1", "in_layers_2"),
    ("time_emb_proj", "emb_layers_1"),
    ("norm2", "out_layers_0"),
    ("conv2", "out_layers_3"),
    ("conv_shortcut", "skip_connection"),
];

/// Layers outside the blocks.
const OUTER: [(&str, &str); 7] = [
    ("conv_in", "input_blocks_0_0"),
    ("time_embedding_linear_1", "time_embed_0"),
    ("time_embedding_linear_2", "time_embed_2"),
    ("add_embedding_linear_1", "label_emb_0_0"),
    ("add_embedding_linear_2", "label_emb_0_2"),
    ("conv_norm_out", "out_0"),
    ("conv_out", "out_2"),
];

/// `down_blocks_1_attentions_0_proj_in` -> `input_blocks_4_1_proj_in`.
pub fn original_name(diffusers: &str) -> Option<String> {
    if let Some((_, original)) = OUTER.iter().find(|(name, _)| *name == diffusers) {
        return Some((*original).to_owned());
    }
    if let Some(rest) = diffusers.strip_prefix("mid_block_") {
        return Some(match number_after(rest, "resnets_") {
            Some((index, rest)) => {
                format!("middle_block_{}_{}", index.checked_mul(2)?, resnet_original(rest)?)
            }
            None => {
                let (index, rest) = number_after(rest, "attentions_")?;
                format!("middle_block_{}_{rest}", index.checked_mul(2)?.checked_add(1)?)
            }
        });
    }
    let (side, first, level, rest) = match number_after(diffusers, "down_blocks_") {
        Some((level, rest)) => ("input_blocks", 1, level, rest),
        None => {
            let (level, rest) = number_after(diffusers, "up_blocks_")?;
            ("output_blocks", 0, level, rest)
        }
    };
    let start = level.checked_mul(3)?.checked_add(first)?;
    let block = |index: usize| start.checked_add(index);
    if let Some((index, rest)) = number_after(rest, "resnets_") {
        return Some(format!("{side}_{}_0_{}", block(index)?, resnet_original(rest)?));
    }
    if let Some((index, rest)) = number_after(rest, "attentions_") {
        return Some(format!("{side}_{}_1_{rest}", block(index)?));
    }
    match rest {
        "downsamplers_0_conv" => Some(format!("{side}_{}_0_op", block(2)?)),
        // Both levels with an upsampler have attention, which stands before it.
        "upsamplers_0_conv" => Some(format!("{side}_{}_2_conv", block(2)?)),
        _ => None,
    }
}

/// `input_blocks_4_1_proj_in` -> `down_blocks_1_attentions_0_proj_in`.
pub(crate) fn diffusers_name(original: &str) -> Option<String> {
    if let Some((diffusers, _)) = OUTER.iter().find(|(_, name)| *name == original) {
        return Some((*diffusers).to_owned());
    }
    if let Some((module, rest)) = number_after(original, "middle_block_") {
        return Some(if module % 2 == 0 {
            format!("mid_block_resnets_{}_{}", module / 2, resnet_diffusers(rest)?)
        } else {
            format!("mid_block_attentions_{}_{rest}", module / 2)
        });
    }
    if let Some((block, rest)) = number_after(original, "input_blocks_") {
        let block = block.checked_sub(1)?;
        let (level, index) = (block / 3, block % 3);
        return Some(match rest.split_once('_')? {
            ("0", "op") => format!("down_blocks_{level}_downsamplers_0_conv"),
            ("0", rest) => {
                format!("down_blocks_{level}_resnets_{index}_{}", resnet_diffusers(rest)?)
            }
            ("1", rest) => format!("down_blocks_{level}_attentions_{index}_{rest}"),
            _ => return None,
        });
    }
    let (block, rest) = number_after(original, "output_blocks_")?;
    let (level, index) = (block / 3, block % 3);
    Some(match rest.split_once('_')? {
        ("0", rest) => format!("up_blocks_{level}_resnets_{index}_{}", resnet_diffusers(rest)?),
        ("1" | "2", "conv") => format!("up_blocks_{level}_upsamplers_0_conv"),
        ("1", rest) => format!("up_blocks_{level}_attentions_{index}_{rest}"),
        _ => return None,
    })
}

fn resnet_original(rest: &str) -> Option<&'static str> {
    RESNET.iter().find(|(name, _)| *name == rest).map(|(_, original)| *original)
}

fn resnet_diffusers(rest: &str) -> Option<&'static str> {
    RESNET.iter().find(|(_, original)| *original == rest).map(|(name, _)| *name)
}

/// `down_blocks_12_rest` with the prefix `down_blocks_` -> (12, `rest`).
fn number_after<'a>(name: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (number, rest) = name.strip_prefix(prefix)?.split_once('_')?;
    Some((number.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let pairs = [
            ("conv_in", "input_blocks_0_0"),
            ("down_blocks_0_resnets_1_conv1", "input_blocks_2_0_in_layers_2"),
            ("down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
            (
                "down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0",
                "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
            ),
            ("down_blocks_2_attentions_1_proj_out", "input_blocks_8_1_proj_out"),
            ("mid_block_resnets_1_time_emb_proj", "middle_block_2_emb_layers_1"),
            ("mid_block_attentions_0_proj_in", "middle_block_1_proj_in"),
            ("up_blocks_0_attentions_2_proj_in", "output_blocks_2_1_proj_in"),
            ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"),
            ("up_blocks_1_upsamplers_0_conv", "output_blocks_5_2_conv"),
            ("up_blocks_2_resnets_2_conv_shortcut", "output_blocks_8_0_skip_connection"),
            ("add_embedding_linear_2", "label_emb_0_2"),
            ("time_embedding_linear_1", "time_embed_0"),
            ("conv_out", "out_2"),
        ];
        for (diffusers, original) in pairs {
            assert_eq!(original_name(diffusers).as_deref(), Some(original), "{diffusers}");
            assert_eq!(diffusers_name(original).as_deref(), Some(diffusers), "{original}");
        }
    }

    #[test]
    fn other_names_have_no_counterpart() {
        let huge = format!("down_blocks_{}_resnets_0_conv1", usize::MAX);
        for name in ["", "down_blocks_0", "down_blocks_x_resnets_0_conv1", "double_blocks_0", &huge]
        {
            assert_eq!(original_name(name), None, "{name}");
        }
        for name in ["", "input_blocks_0_1_op", "input_blocks_4", "output_blocks_1_3_conv"] {
            assert_eq!(diffusers_name(name), None, "{name}");
        }
    }
}
