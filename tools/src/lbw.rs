//! `--lbws`: how much of a LoRA is taken in each block of the network.
//!
//! The lists and blocks of sd-scripts' `svd_merge_lora.py`: 12, 17, 20 or 26 numbers for 26 places
//! (text encoders, 12 blocks down, the middle, 12 up), of which the shorter lists name those that
//! have LoRA modules: 17 and 26 for SD1 and SD2, 12 and 20 for SDXL. Blocks without a number count
//! as 1.

use formats::Family;
use serde_json::Value;

use crate::Usage;

/// Places of all blocks: BASE, IN00 to IN11, MID, OUT00 to OUT11.
const PLACES: usize = 26;
/// Of the middle block.
const MIDDLE: usize = 13;

/// The places that a list of each length has numbers for.
const LISTS: [(usize, &[std::ops::RangeInclusive<usize>]); 4] = [
    (12, &[0..=0, 5..=6, 8..=9, 13..=19]),
    (17, &[0..=0, 2..=3, 5..=6, 8..=9, 13..=13, 17..=25]),
    (20, &[0..=9, 13..=22]),
    (26, &[0..=25]),
];

/// The weights of one file's blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockWeights {
    weights: [f64; PLACES],
    is_sdxl: bool,
}

impl BlockWeights {
    /// One list for each file, each a JSON list.
    ///
    /// # Errors
    /// A [`Usage`] for a list that is none, of a length that is none of the four, or lists of
    /// different lengths.
    pub fn parse_all(lists: &[String]) -> Result<Vec<Self>, Usage> {
        let parsed: Vec<Vec<f64>> =
            lists.iter().map(|text| numbers(text)).collect::<Result<_, _>>()?;
        if let [first, rest @ ..] = parsed.as_slice()
            && let Some(other) = rest.iter().find(|list| list.len() != first.len())
        {
            return Err(Usage(format!(
                "the lists of `lbws` should be equally long, they have: {} and {} numbers",
                first.len(),
                other.len()
            )));
        }
        parsed.iter().map(|list| Self::of(list)).collect()
    }

    fn of(list: &[f64]) -> Result<Self, Usage> {
        let Some((length, ranges)) = LISTS.iter().find(|(length, _)| *length == list.len()) else {
            return Err(Usage(format!(
                "a list of `lbws` should have 12, 17, 20 or 26 numbers, it has: {}\nhint: 17 or 26 \
                 for Stable Diffusion 1.x and 2.x, 12 or 20 for SDXL",
                list.len()
            )));
        };
        let mut weights = [1.0; PLACES];
        for (place, weight) in ranges.iter().cloned().flatten().zip(list) {
            weights[place] = *weight;
        }
        Ok(Self { weights, is_sdxl: matches!(length, 12 | 20) })
    }

    /// Checks that the list's length is one of the family's.
    ///
    /// # Errors
    /// A [`Usage`] that names both.
    pub fn check_family(&self, family: Option<Family>) -> Result<(), Usage> {
        match family {
            Some(family) if (family == Family::Sdxl) != self.is_sdxl => Err(Usage(format!(
                "`lbws` of this length are not for a LoRA of: {}\nhint: give 17 or 26 numbers for \
                 Stable Diffusion 1.x and 2.x, 12 or 20 for SDXL",
                family.title()
            ))),
            _ => Ok(()),
        }
    }

    /// How much is taken of a module.
    pub fn weight_of(&self, module: &str) -> f64 {
        place_of(module, self.is_sdxl).and_then(|place| self.weights.get(place)).map_or(1.0, |w| *w)
    }
}

fn numbers(text: &str) -> Result<Vec<f64>, Usage> {
    let bad = |what: &str| {
        Usage(format!(
            "a list of `lbws` {what}: {text}\nhint: write it as JSON, `\"[1,0.5,0]\"` with 12, 17, 20 \
             or 26 numbers"
        ))
    };
    let value: Value = serde_json::from_str(text).map_err(|_| bad("is no JSON list"))?;
    let list = value.as_array().ok_or_else(|| bad("is no JSON list"))?;
    let number = |value: &Value| value.as_f64().ok_or_else(|| bad("holds what is no number"));
    list.iter().map(number).collect()
}

/// The place of a module's block; `None` for one of no block.
fn place_of(module: &str, is_sdxl: bool) -> Option<usize> {
    if module.contains("text_model_encoder_") {
        return Some(0);
    }
    if is_sdxl {
        let name = module.strip_prefix("lora_unet_")?;
        let after = |start: &str| name.strip_prefix(start).and_then(first_number);
        if name.starts_with("time_embed_") || name.starts_with("label_emb_") {
            return Some(1);
        }
        return after("input_blocks_")
            .map(|block| 1 + block)
            .or_else(|| name.starts_with("middle_block_").then_some(MIDDLE))
            .or_else(|| after("output_blocks_").map(|block| 14 + block))
            .or_else(|| name.starts_with("out_").then_some(23));
    }
    if module.contains("mid_block_") {
        return Some(MIDDLE);
    }
    let (is_up, rest) = match (module.split_once("down_blocks_"), module.split_once("up_blocks_")) {
        (Some((_, rest)), _) => (false, rest),
        (None, Some((_, rest))) => (true, rest),
        (None, None) => return None,
    };
    let block = first_number(rest)?;
    let part = rest.split_once('_')?.1;
    let of = |kind: &str| part.strip_prefix(kind).and_then(first_number);
    let within = if let Some(index) = of("resnets_").or_else(|| of("attentions_")) {
        index
    } else if of(if is_up { "upsamplers_" } else { "downsamplers_" }).is_some() {
        2
    } else {
        return None;
    };
    // IN00 and OUT00 follow BASE and MID; IN00 is the first convolution, which has no LoRA.
    Some(if is_up { MIDDLE + 1 } else { 2 } + 3 * block + within)
}

/// The number that `text` begins with, before `_`.
fn first_number(text: &str) -> Option<usize> {
    text.split('_').next().and_then(|digits| digits.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(length: usize) -> BlockWeights {
        let list: Vec<String> = (0..length).map(|i| (100 + i).to_string()).collect();
        BlockWeights::parse_all(&[format!("[{}]", list.join(","))]).unwrap().remove(0)
    }

    #[test]
    fn numbers_reach_the_blocks_of_the_reference() {
        // Values from get_lbw_block_index and the four tables of svd_merge_lora.py.
        let cases = [
            (26, "lora_te_text_model_encoder_layers_3_mlp_fc1", 100.0),
            (26, "lora_unet_down_blocks_0_attentions_0_proj_in", 102.0),
            (26, "lora_unet_down_blocks_1_resnets_1_conv1", 106.0),
            (26, "lora_unet_down_blocks_2_downsamplers_0_conv", 110.0),
            (26, "lora_unet_mid_block_attentions_0_proj_in", 113.0),
            (26, "lora_unet_up_blocks_0_resnets_2_conv1", 116.0),
            (26, "lora_unet_up_blocks_0_upsamplers_0_conv", 116.0),
            (26, "lora_unet_up_blocks_3_attentions_2_proj_out", 125.0),
            (17, "lora_te_text_model_encoder_layers_3_mlp_fc1", 100.0),
            (17, "lora_unet_down_blocks_0_attentions_0_proj_in", 101.0),
            (17, "lora_unet_down_blocks_2_attentions_1_proj_in", 106.0),
            (17, "lora_unet_mid_block_attentions_0_proj_in", 107.0),
            (17, "lora_unet_up_blocks_1_attentions_0_proj_in", 108.0),
            (17, "lora_unet_up_blocks_3_attentions_2_proj_in", 116.0),
            // Without a number: 1.
            (17, "lora_unet_up_blocks_0_resnets_2_conv1", 1.0),
            (17, "lora_unet_conv_in", 1.0),
            (12, "lora_te1_text_model_encoder_layers_3_mlp_fc1", 100.0),
            (12, "lora_te2_text_model_encoder_layers_3_mlp_fc1", 100.0),
            (12, "lora_unet_input_blocks_4_1_proj_in", 101.0),
            (12, "lora_unet_input_blocks_8_1_proj_in", 104.0),
            (12, "lora_unet_middle_block_1_proj_in", 105.0),
            (12, "lora_unet_output_blocks_0_1_proj_in", 106.0),
            (12, "lora_unet_output_blocks_5_1_proj_in", 111.0),
            (12, "lora_unet_output_blocks_6_0_in_layers_2", 1.0),
            (12, "lora_unet_input_blocks_1_0_in_layers_2", 1.0),
            (20, "lora_unet_time_embed_0", 101.0),
            (20, "lora_unet_input_blocks_1_0_in_layers_2", 102.0),
            (20, "lora_unet_middle_block_1_proj_in", 110.0),
            (20, "lora_unet_output_blocks_8_0_in_layers_2", 119.0),
            (20, "lora_unet_out_2", 1.0),
        ];
        for (length, module, expected) in cases {
            assert_eq!(counting(length).weight_of(module), expected, "{length} {module}");
        }
    }

    #[test]
    fn lists_that_cannot_be_meant_are_refused() {
        let twelve = format!("[{}]", ["1"; 12].join(","));
        let seventeen = format!("[{}]", ["1"; 17].join(","));
        let wrong: [(&[&str], &str); 5] = [
            (&["[1,2"], "no JSON list"),
            (&["{\"a\": 1}"], "no JSON list"),
            (&["[1,\"x\"]"], "no number"),
            (&["[1,2]"], "it has: 2"),
            (&[&twelve, &seventeen], "12 and 17"),
        ];
        for (lists, word) in wrong {
            let lists: Vec<String> = lists.iter().map(|text| (*text).to_owned()).collect();
            let error = BlockWeights::parse_all(&lists).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(counting(17).check_family(Some(Family::Sdxl)).is_err());
        assert!(counting(12).check_family(Some(Family::Sdxl)).is_ok());
        assert!(counting(26).check_family(Some(Family::Sd2)).is_ok());
        assert!(counting(12).check_family(None).is_ok());
    }
}
