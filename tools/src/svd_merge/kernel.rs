//! The shape of a layer that only some files tell in full.
//!
//! LoHa and LoKr store `[out, in*kh*kw]`, the names tell the rest: which layers of the three families
//! are convolutions, and of which size.

use formats::Family;

/// 3x3 convolutions by the ends of their names: diffusers', then SDXL's original ones.
const WINDOWS: [&str; 10] = [
    "_conv1",
    "_conv2",
    "_downsamplers_0_conv",
    "_upsamplers_0_conv",
    "_conv_in",
    "_conv_out",
    "_in_layers_2",
    "_out_layers_3",
    "_0_op",
    "lora_unet_out_2",
];
/// 1x1 convolutions of every family.
const POINTS: [&str; 2] = ["_conv_shortcut", "_skip_connection"];
/// 1x1 convolutions of SD1 alone.
const SD1_POINTS: [&str; 2] = ["_proj_in", "_proj_out"];

/// `[out, in]` or `[out, in, kh, kw]` of the layer `name`, of what the files say of it.
pub(super) fn shape_of(name: &str, family: Option<Family>, said: &[Vec<usize>]) -> Vec<usize> {
    if let Some(whole) = said.iter().find(|shape| shape.len() > 2) {
        return whole.clone();
    }
    let [out, inputs] = said.first().map_or([0, 0], |shape| {
        [shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(1)]
    });
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let is_unet = name.starts_with("lora_unet_");
    // SDXL's blocks that make pictures larger: `output_blocks_2_2_conv`.
    let is_original_up = name.starts_with("lora_unet_output_blocks_") && name.ends_with("_conv");
    if is_unet && (ends(&WINDOWS) || is_original_up) && inputs.is_multiple_of(9) {
        return vec![out, inputs / 9, 3, 3];
    }
    let is_sd1 = family.is_none_or(|family| family == Family::Sd1);
    if is_unet && (ends(&POINTS) || (is_sd1 && ends(&SD1_POINTS))) {
        return vec![out, inputs, 1, 1];
    }
    vec![out, inputs]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_products_do_not() {
        let said = |name: &str, family, inputs| {
            shape_of(&format!("lora_unet_{name}"), Some(family), &[vec![8, inputs]])
        };
        let cases: [(&str, Family, usize, &[usize]); 9] = [
            ("down_blocks_0_resnets_0_conv1", Family::Sd1, 36, &[8, 4, 3, 3]),
            ("up_blocks_0_upsamplers_0_conv", Family::Sd2, 36, &[8, 4, 3, 3]),
            ("output_blocks_2_2_conv", Family::Sdxl, 36, &[8, 4, 3, 3]),
            ("input_blocks_3_0_op", Family::Sdxl, 36, &[8, 4, 3, 3]),
            ("down_blocks_0_resnets_0_conv_shortcut", Family::Sd2, 4, &[8, 4, 1, 1]),
            ("input_blocks_4_0_skip_connection", Family::Sdxl, 4, &[8, 4, 1, 1]),
            ("mid_block_attentions_0_proj_in", Family::Sd1, 4, &[8, 4, 1, 1]),
            ("mid_block_attentions_0_proj_in", Family::Sd2, 4, &[8, 4]),
            ("mid_block_attentions_0_transformer_blocks_0_attn1_to_q", Family::Sd1, 4, &[8, 4]),
        ];
        for (name, family, inputs, expected) in cases {
            assert_eq!(said(name, family, inputs), expected, "{name}");
        }
        let both = [vec![8, 36], vec![8, 4, 3, 3]];
        assert_eq!(shape_of("lora_te_x", None, &both), [8, 4, 3, 3]);
        assert_eq!(shape_of("lora_te_text_model_mlp_fc1", None, &both[..1]), [8, 36]);
    }
}
