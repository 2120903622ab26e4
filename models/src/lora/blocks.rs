//! Blocks of a U-Net: ranks and learning rates that differ from depth to depth.
//!
//! The numbering, the presets and which modules are left out are sd-scripts'. Lists come as the
//! user wrote them (`network_args` values); what is only odd becomes a note, what cannot be meant
//! is an error.

use formats::Family;

use super::rank::{Rank, RankRule};
use super::target::{Part, Target};
use crate::{ModelError, Result};

/// How the blocks of a U-Net are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockLayout {
    /// Stable Diffusion 1 and 2: 12 down, 1 middle, 12 up, by diffusers' names. The first has no
    /// layer that could carry a LoRA.
    Sd,
    /// Stable Diffusion XL: embeddings, 9 down, 3 middle, 9 up, output, by the original names.
    Sdxl,
}

impl BlockLayout {
    /// That of a family.
    pub fn of(family: Family) -> Self {
        match family {
            Family::Sd1 | Family::Sd2 => BlockLayout::Sd,
            Family::Sdxl => BlockLayout::Sdxl,
        }
    }

    /// Number of blocks, the length of `block_dims`.
    pub fn count(self) -> usize {
        2 * self.side() + self.middle() + 2 * self.ends()
    }

    /// Blocks on the way down, and as many on the way up: the length of `down_lr_weight`.
    pub fn side(self) -> usize {
        match self {
            BlockLayout::Sd => 12,
            BlockLayout::Sdxl => 9,
        }
    }

    /// Blocks in the middle, the length of `mid_lr_weight`.
    pub fn middle(self) -> usize {
        match self {
            BlockLayout::Sd => 1,
            BlockLayout::Sdxl => 3,
        }
    }

    /// Blocks before the way down, and as many after the way up, that have no learning rate of
    /// their own.
    fn ends(self) -> usize {
        match self {
            BlockLayout::Sd => 0,
            BlockLayout::Sdxl => 1,
        }
    }

    /// Block of a U-Net module by its name in files (`lora_unet_down_blocks_0_...`), `None` for a
    /// name of another kind.
    pub fn index(self, module: &str) -> Option<usize> {
        let name = module.strip_prefix(Part::Unet.prefix())?.strip_prefix('_')?;
        let index = match self {
            BlockLayout::Sd => sd_block(name)?,
            BlockLayout::Sdxl => sdxl_block(name)?,
        };
        (index < self.count()).then_some(index)
    }
}

/// `down_blocks_1_attentions_0_...`: 1 + 3·1 + 0.
fn sd_block(name: &str) -> Option<usize> {
    if name.starts_with("mid_block_") {
        return Some(12);
    }
    let (start, rest) = match (name.strip_prefix("down_blocks_"), name.strip_prefix("up_blocks_")) {
        (Some(rest), _) => (1, rest),
        (None, rest) => (13, rest?),
    };
    let mut parts = rest.split('_');
    let level: usize = parts.next()?.parse().ok()?;
    let place = match parts.next()? {
        "resnets" | "attentions" => parts.next()?.parse().ok()?,
        "downsamplers" | "upsamplers" => 2,
        _ => return None,
    };
    Some(start + 3 * level + place)
}

/// `input_blocks_4_1_...`: 1 + 4.
fn sdxl_block(name: &str) -> Option<usize> {
    const STARTS: [(&str, usize); 3] =
        [("input_blocks_", 1), ("middle_block_", 10), ("output_blocks_", 13)];
    if name.starts_with("time_embed_") || name.starts_with("label_emb_") {
        return Some(0);
    }
    if name.starts_with("out_") {
        return Some(22);
    }
    STARTS.iter().find_map(|(start, first)| {
        let number = name.strip_prefix(start)?.split('_').next()?;
        Some(first + number.parse::<usize>().ok()?)
    })
}

/// Names of the curves that `down_lr_weight` and `up_lr_weight` take in place of a list.
pub const LR_CURVES: [&str; 5] = ["sine", "cosine", "linear", "reverse_linear", "zeros"];

/// The learning-rate settings of `network_args`, as written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockLrText {
    /// `down_lr_weight`: a list, one number for all, or a curve with an optional `+offset`.
    pub down: Option<String>,
    /// `mid_lr_weight`: a list.
    pub mid: Option<String>,
    /// `up_lr_weight`: as `down`.
    pub up: Option<String>,
    /// `block_lr_zero_threshold`: weights up to it count as 0, negative ones always do.
    pub zero_threshold: f64,
}

/// Factor of the U-Net's learning rate in each block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockRates {
    layout: BlockLayout,
    weights: Vec<f64>,
}

impl BlockRates {
    /// Reads the settings; `None` where none was given. What was filled in or cut goes to `notes`.
    pub fn read(
        layout: BlockLayout,
        text: &BlockLrText,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        if text.down.is_none() && text.mid.is_none() && text.up.is_none() {
            return Ok(None);
        }
        let side = |key: &str, text: &Option<String>, notes: &mut Vec<String>| match text {
            None => Ok(vec![1.; layout.side()]),
            Some(text) => side_weights(key, text, layout.side(), notes),
        };
        let mut weights = side("down_lr_weight", &text.down, notes)?;
        weights.extend(match &text.mid {
            None => vec![1.; layout.middle()],
            Some(text) => {
                let list = weight_list("mid_lr_weight", text)?;
                fit("mid_lr_weight", list, layout.middle(), notes)
            }
        });
        weights.extend(side("up_lr_weight", &text.up, notes)?);
        for weight in weights.iter_mut().filter(|weight| **weight <= text.zero_threshold.max(0.)) {
            *weight = 0.;
        }
        let ends = vec![1.; layout.ends()];
        let weights = [ends.clone(), weights, ends].concat();
        Ok(Some(Self { layout, weights }))
    }

    /// One factor per block.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// Block and factor of a U-Net module.
    pub(super) fn of(&self, module: &str) -> (usize, f64) {
        // sd-scripts reads the last entry for names that it does not know; there are none of them
        // among the layers of a U-Net.
        let index = self.layout.index(module).unwrap_or(self.weights.len() - 1);
        (index, self.weights[index])
    }
}

/// The weights of the way down or up.
fn side_weights(key: &str, text: &str, len: usize, notes: &mut Vec<String>) -> Result<Vec<f64>> {
    if text.contains(',') {
        return Ok(fit(key, weight_list(key, text)?, len, notes));
    }
    if let Ok(weight) = text.trim().parse::<f64>() {
        return Ok(vec![finite(key, text, weight)?; len]);
    }
    let (name, offset) = match text.split_once('+') {
        None => (text.trim(), 0.),
        Some((name, offset)) => (name.trim(), read_weight(key, offset)?),
    };
    let curve: fn(f64) -> f64 = match name {
        "sine" | "cosine" => |x| (std::f64::consts::PI * x / 2.).sin(),
        "linear" | "reverse_linear" => |x| x,
        "zeros" => |_| 0.,
        _ => {
            let curves = LR_CURVES.map(|curve| format!("`{curve}`")).join(", ");
            return Err(ModelError::Network(format!(
                "`{key}` must be numbers with commas or one of {curves}, not: `{text}`"
            )));
        }
    };
    let mut weights: Vec<f64> =
        (0..len).map(|i| curve(i as f64 / (len - 1) as f64) + offset).collect();
    if matches!(name, "cosine" | "reverse_linear") {
        weights.reverse();
    }
    Ok(weights)
}

/// Numbers with commas; an empty item is 0.
fn weight_list(key: &str, text: &str) -> Result<Vec<f64>> {
    text.split(',')
        .map(|item| if item.trim().is_empty() { Ok(0.) } else { read_weight(key, item) })
        .collect()
}

fn read_weight(key: &str, item: &str) -> Result<f64> {
    finite(key, item, item.trim().parse::<f64>().map_err(|_| not_a_number(key, item))?)
}

/// Negative weights are as good as 0: `cosine+-0.5` leaves out the blocks at the far end.
fn finite(key: &str, item: &str, weight: f64) -> Result<f64> {
    weight.is_finite().then_some(weight).ok_or_else(|| not_a_number(key, item))
}

fn not_a_number(key: &str, item: &str) -> ModelError {
    ModelError::Network(format!("`{key}` must be numbers with commas, one is not: `{item}`"))
}

/// Cuts a list to `len`, or fills it up with 1.
fn fit(key: &str, mut list: Vec<f64>, len: usize, notes: &mut Vec<String>) -> Vec<f64> {
    let got = list.len();
    if got > len {
        notes.push(format!("`{key}` has {got} numbers, those after the {len}th are ignored"));
    } else if got < len {
        notes.push(format!("`{key}` has {got} numbers, those missing to {len} are set to 1"));
    }
    list.resize(len, 1.);
    list
}

/// The rank settings of `network_args`, as written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockRankText {
    /// `block_dims`.
    pub dims: Option<String>,
    /// `block_alphas`.
    pub alphas: Option<String>,
    /// `conv_block_dims`.
    pub conv_dims: Option<String>,
    /// `conv_block_alphas`.
    pub conv_alphas: Option<String>,
}

impl BlockRankText {
    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What holds in all blocks where a list is missing; alpha 0 means that of the rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UniformRank {
    /// `network_dim`.
    pub dim: usize,
    /// `network_alpha`.
    pub alpha: f32,
    /// `conv_dim`.
    pub conv_dim: Option<usize>,
    /// `conv_alpha`; counts without `conv_dim` too, for `conv_block_dims`.
    pub conv_alpha: f32,
}

/// A rank for each block of the U-Net; the text encoder has one for all.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockRanks {
    layout: BlockLayout,
    /// `None`: no module in this block.
    linear: Vec<Option<Rank>>,
    /// `None`: 3x3 convolutions, and all layers outside of transformers, are not trained.
    conv: Option<Vec<Option<Rank>>>,
    text_encoder: Rank,
}

impl BlockRanks {
    /// Reads the lists. Blocks with a learning rate of 0 get no module.
    pub fn read(
        layout: BlockLayout,
        text: &BlockRankText,
        uniform: UniformRank,
        rates: Option<&BlockRates>,
    ) -> Result<Self> {
        let dims = int_list(layout, "block_dims", &text.dims)?;
        let alphas = float_list(layout, "block_alphas", &text.alphas)?;
        let conv_dims = int_list(layout, "conv_block_dims", &text.conv_dims)?;
        let conv_alphas = float_list(layout, "conv_block_alphas", &text.conv_alphas)?;
        let runs = |block: usize| rates.is_none_or(|rates| rates.weights[block] != 0.);
        let ranks = |dims: &[usize], alpha: &dyn Fn(usize) -> f32| {
            let rank = |block: usize| {
                let dim = dims[block];
                (dim > 0 && runs(block)).then(|| Rank::new(dim, alpha(block)))
            };
            (0..layout.count()).map(rank).collect::<Vec<_>>()
        };
        let same = |dim: usize| vec![dim; layout.count()];
        let alpha = |block: usize| alphas.as_ref().map_or(uniform.alpha, |alphas| alphas[block]);
        let linear = ranks(&dims.unwrap_or_else(|| same(uniform.dim)), &alpha);
        let conv = match (conv_dims, uniform.conv_dim) {
            (Some(dims), _) => Some(ranks(&dims, &|block| {
                conv_alphas.as_ref().map_or(uniform.conv_alpha, |alphas| alphas[block])
            })),
            // sd-scripts reads `conv_block_alphas` together with `conv_block_dims` only.
            (None, Some(dim)) => Some(ranks(&same(dim), &|_| uniform.conv_alpha)),
            (None, None) => None,
        };
        Ok(Self { layout, linear, conv, text_encoder: Rank::new(uniform.dim, uniform.alpha) })
    }
}

impl RankRule for BlockRanks {
    fn rank(&self, target: &Target) -> Option<Rank> {
        if target.part != Part::Unet {
            return Some(self.text_encoder);
        }
        let block = self.layout.index(&target.name)?;
        match (target.is_pointwise(), &self.conv) {
            (true, conv) if target.in_transformer || conv.is_some() => self.linear[block],
            (true, _) => None,
            (false, conv) => conv.as_ref()?[block],
        }
    }
}

/// Whole numbers with commas, one per block.
fn int_list(layout: BlockLayout, key: &str, text: &Option<String>) -> Result<Option<Vec<usize>>> {
    let read = |item: &str| {
        item.parse::<usize>().map_err(|_| {
            let fault = format!("`{key}` must be whole numbers with commas, one is not: `{item}`");
            ModelError::Network(fault)
        })
    };
    block_list(layout, key, text, &read)
}

/// Numbers with commas, one per block.
fn float_list(layout: BlockLayout, key: &str, text: &Option<String>) -> Result<Option<Vec<f32>>> {
    let read = |item: &str| {
        let number = item.parse::<f32>().ok().filter(|number| number.is_finite());
        number.ok_or_else(|| not_a_number(key, item))
    };
    block_list(layout, key, text, &read)
}

fn block_list<T>(
    layout: BlockLayout,
    key: &str,
    text: &Option<String>,
    read: &dyn Fn(&str) -> Result<T>,
) -> Result<Option<Vec<T>>> {
    let Some(text) = text else { return Ok(None) };
    let list = text.split(',').map(|item| read(item.trim())).collect::<Result<Vec<T>>>()?;
    if list.len() == layout.count() {
        return Ok(Some(list));
    }
    let parts = match layout {
        BlockLayout::Sd => "12 down, 1 middle, 12 up",
        BlockLayout::Sdxl => "1 for embeddings, 9 down, 3 middle, 9 up, 1 for the output",
    };
    Err(ModelError::Network(format!(
        "`{key}` must have {} numbers ({parts}), it has: {}",
        layout.count(),
        list.len()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(layout: BlockLayout, text: BlockLrText) -> (BlockRates, Vec<String>) {
        let mut notes = Vec::new();
        (BlockRates::read(layout, &text, &mut notes).unwrap().unwrap(), notes)
    }

    fn down(text: &str) -> BlockLrText {
        BlockLrText { down: Some(text.to_owned()), ..BlockLrText::default() }
    }

    #[test]
    fn blocks_are_numbered_as_in_the_reference() {
        let sd = |name: &str| BlockLayout::Sd.index(&format!("lora_unet_{name}"));
        assert_eq!(sd("down_blocks_0_attentions_0_proj_in"), Some(1));
        assert_eq!(sd("down_blocks_0_downsamplers_0_conv"), Some(3));
        assert_eq!(sd("down_blocks_1_resnets_1_conv1"), Some(5));
        assert_eq!(sd("down_blocks_3_resnets_1_conv2"), Some(11));
        assert_eq!(sd("mid_block_attentions_0_proj_in"), Some(12));
        assert_eq!(sd("up_blocks_0_resnets_0_conv1"), Some(13));
        assert_eq!(sd("up_blocks_0_upsamplers_0_conv"), Some(15));
        assert_eq!(sd("up_blocks_3_attentions_2_proj_out"), Some(24));
        assert_eq!(sd("input_blocks_4_1_proj_in"), None);
        assert_eq!(BlockLayout::Sd.index("lora_te_text_model_encoder_layers_0_mlp_fc1"), None);
        let sdxl = |name: &str| BlockLayout::Sdxl.index(&format!("lora_unet_{name}"));
        assert_eq!(sdxl("time_embed_0"), Some(0));
        assert_eq!(sdxl("label_emb_0_0"), Some(0));
        assert_eq!(sdxl("input_blocks_4_1_transformer_blocks_0_attn1_to_q"), Some(5));
        assert_eq!(sdxl("input_blocks_8_1_proj_in"), Some(9));
        assert_eq!(sdxl("middle_block_1_proj_in"), Some(11));
        assert_eq!(sdxl("output_blocks_0_1_proj_in"), Some(13));
        assert_eq!(sdxl("output_blocks_8_0_in_layers_2"), Some(21));
        assert_eq!(sdxl("out_2"), Some(22));
        assert_eq!(sdxl("output_blocks_99_0"), None);
        assert_eq!((BlockLayout::Sd.count(), BlockLayout::Sdxl.count()), (25, 23));
    }

    /// Values of sd-scripts' `get_block_lr_weight`.
    #[test]
    fn curves_are_those_of_the_reference() {
        let close = |got: &[f64], want: &[f64]| {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-9), "{got:?}");
        };
        let (sine, notes) = rates(BlockLayout::Sd, down("sine+.5"));
        assert!(notes.is_empty());
        close(&sine.weights()[..3], &[0.5, 0.642_314_838_273_285, 0.781_732_556_841_429_7]);
        close(&sine.weights()[11..13], &[1.5, 1.]);
        let (cosine, _) = rates(BlockLayout::Sd, down("cosine"));
        close(&cosine.weights()[10..12], &[0.142_314_838_273_285, 0.]);
        let (linear, _) = rates(BlockLayout::Sdxl, down("linear"));
        close(linear.weights(), &{
            let mut want = vec![1.; 23];
            (0..9).for_each(|i| want[1 + i] = i as f64 / 8.);
            want
        });
        let (reversed, _) = rates(BlockLayout::Sd, down("reverse_linear"));
        close(&reversed.weights()[..2], &[1., 10. / 11.]);
        let (zeros, _) = rates(BlockLayout::Sd, down("zeros+0.25"));
        close(&zeros.weights()[..12], &[0.25; 12]);
    }

    #[test]
    fn lists_are_cut_filled_and_thresholded() {
        let text = BlockLrText { zero_threshold: 0.1, ..down("0.05,,0.1,0.2") };
        let (short, notes) = rates(BlockLayout::Sd, text);
        assert_eq!(short.weights()[..5], [0., 0., 0., 0.2, 1.]);
        assert_eq!(notes, ["`down_lr_weight` has 4 numbers, those missing to 12 are set to 1"]);
        let text = BlockLrText { mid: Some("2,3".to_owned()), ..down(&"2,".repeat(13)) };
        let (long, notes) = rates(BlockLayout::Sd, text);
        assert_eq!(long.weights()[10..14], [2., 2., 2., 1.]);
        assert_eq!(notes.len(), 2);
        assert!(notes[0].contains("14 numbers, those after the 12th are ignored"), "{notes:?}");
        // A single number is one for all; the reference stops with a type error.
        let (one, notes) = rates(BlockLayout::Sd, down("0.5"));
        assert_eq!(one.weights()[..13], [vec![0.5; 12], vec![1.]].concat());
        assert!(notes.is_empty());
        let text = BlockLrText { mid: Some("1,0.5".to_owned()), ..BlockLrText::default() };
        assert_eq!(rates(BlockLayout::Sdxl, text).0.weights()[9..14], [1., 1., 0.5, 1., 1.]);
        let none = BlockRates::read(BlockLayout::Sd, &BlockLrText::default(), &mut Vec::new());
        assert_eq!(none.unwrap(), None);
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let lr = |text: &str| {
            BlockRates::read(BlockLayout::Sd, &down(text), &mut Vec::new()).unwrap_err().to_string()
        };
        assert!(lr("sin").contains("`sine`, `cosine`"), "{}", lr("sin"));
        assert!(lr("1,x").ends_with("not: `x`"), "{}", lr("1,x"));
        assert!(lr("inf").ends_with("not: `inf`"), "{}", lr("inf"));
        assert!(lr("sine+x").contains("not: `x`"));
        let uniform = UniformRank { dim: 4, alpha: 1., conv_dim: None, conv_alpha: 1. };
        let ranks = |dims: &str| {
            let text = BlockRankText { dims: Some(dims.to_owned()), ..BlockRankText::default() };
            BlockRanks::read(BlockLayout::Sd, &text, uniform, None)
        };
        let fault = ranks(&["4"; 24].join(",")).unwrap_err().to_string();
        assert_eq!(
            fault,
            "`block_dims` must have 25 numbers (12 down, 1 middle, 12 up), it has: 24"
        );
        assert!(ranks("4.5").unwrap_err().to_string().contains("whole numbers"));
        assert!(ranks("-4").unwrap_err().to_string().contains("whole numbers"));
        assert!(ranks(&["4"; 25].join(",")).is_ok());
    }
}
