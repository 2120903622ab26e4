//! Sizes of a U-Net: from its `config.json`, or from the shapes of its tensors.

use formats::Weights;
use serde_json::{Value, json};

use super::time::timestep_embedding;
use super::transformer::TransformerShape;
use crate::config_value::ConfigValue;
use crate::preset::Preset;
use crate::{ModelError, Result};

const COMPONENT: &str = "U-Net";

/// Sizes of a U-Net of Stable Diffusion 1.x, 2.x or XL. Lists have one entry per level, top first.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    /// Channels of the latents it reads.
    pub in_channels: usize,
    /// Channels of what it predicts.
    pub out_channels: usize,
    /// Channels of each level.
    pub channels: Vec<usize>,
    /// Residual blocks of each level on the way down; the way up has one more.
    pub layers: Vec<usize>,
    /// Whether a level has transformers.
    pub attention: Vec<bool>,
    /// Heads of each level; the middle has the last entry.
    pub heads: Vec<usize>,
    /// Transformer blocks of each level; the middle has the last entry.
    pub depth: Vec<usize>,
    /// Width of the text encoder's output.
    pub context_width: usize,
    /// Groups of every group normalisation.
    pub groups: usize,
    /// Epsilon of the residual blocks' group normalisation.
    pub norm_eps: f32,
    /// Whether `proj_in` and `proj_out` are stored as 1x1 convolutions (SD1).
    pub projection_is_conv: bool,
    /// Width of the vector that is added to the time embedding (SDXL: pooled text and sizes).
    pub added: Option<usize>,
}

impl UnetConfig {
    /// Sizes from `config` where a model has one, else from the shapes of `weights`.
    pub fn resolve(config: Option<&Value>, weights: &dyn Weights, preset: &Preset) -> Result<Self> {
        match config {
            Some(json) => Self::from_json(json),
            None => Self::from_shapes(weights, preset),
        }
    }

    /// Sizes from diffusers' `unet/config.json`; what this program does not compute is refused.
    pub fn from_json(json: &Value) -> Result<Self> {
        let config = ConfigValue { component: COMPONENT, json };
        refuse_unsupported(&config)?;
        let channels = config.list("block_out_channels")?;
        let levels = channels.len();
        let attention = attention_levels(&config, levels)?;
        // diffusers: `attention_head_dim` has always meant the number of heads of these models.
        let heads = match config.counts("num_attention_heads", levels)? {
            Some(heads) => heads,
            None => config.counts("attention_head_dim", levels)?.unwrap_or(vec![8; levels]),
        };
        let context = config.count("cross_attention_dim")?;
        let added = match config.text("addition_embed_type") {
            None => None,
            Some(_) => {
                config.require("addition_embed_type", &[json!("text_time")])?;
                let key = "projection_class_embeddings_input_dim";
                let width = config.count(key)?;
                Some(width.ok_or_else(|| config.error(key, "a number is needed"))?)
            }
        };
        let unet = Self {
            in_channels: config.count("in_channels")?.unwrap_or(4),
            out_channels: config.count("out_channels")?.unwrap_or(4),
            layers: config.counts("layers_per_block", levels)?.unwrap_or(vec![2; levels]),
            depth: config
                .counts("transformer_layers_per_block", levels)?
                .unwrap_or(vec![1; levels]),
            attention,
            heads,
            context_width: context
                .ok_or_else(|| config.error("cross_attention_dim", "a number is needed"))?,
            groups: config.count("norm_num_groups")?.unwrap_or(32),
            norm_eps: config.float("norm_eps")?.unwrap_or(1e-5),
            projection_is_conv: !config.flag("use_linear_projection")?.unwrap_or(false),
            added,
            channels,
        };
        unet.check(&config)?;
        Ok(unet)
    }

    fn check(&self, config: &ConfigValue) -> Result<()> {
        for (channels, heads) in self.channels.iter().zip(&self.heads) {
            if channels % self.groups != 0 {
                let reason = format!("the groups must divide all channels, {:?}", self.channels);
                return Err(config.error("norm_num_groups", &reason));
            }
            if channels % heads != 0 {
                let reason = format!("the heads must divide the channels, {:?}", self.channels);
                return Err(config.error("attention_head_dim", &reason));
            }
        }
        Ok(())
    }

    /// Sizes from shapes alone; heads and groups, which no shape tells, from the family.
    pub fn from_shapes(weights: &dyn Weights, preset: &Preset) -> Result<Self> {
        let shape = |name: &str, axes: usize| {
            weights
                .shape(name)
                .filter(|shape| shape.len() >= axes)
                .ok_or_else(|| ModelError::Unsized { component: COMPONENT, name: name.to_owned() })
        };
        let conv_in = shape("conv_in.weight", 4)?;
        let (mut channels, mut layers) = (Vec::new(), Vec::new());
        let (mut attention, mut depth) = (Vec::new(), Vec::new());
        shape("down_blocks.0.resnets.0.conv1.weight", 4)?;
        loop {
            let path = format!("down_blocks.{}", channels.len());
            let Some(first) = weights.shape(&format!("{path}.resnets.0.conv1.weight")) else {
                break;
            };
            channels.push(first.first().copied().unwrap_or(0));
            let resnets = format!("{path}.resnets");
            layers.push(count(weights, |i| format!("{resnets}.{i}.conv1.weight")));
            let blocks = format!("{path}.attentions.0.transformer_blocks");
            let blocks = count(weights, |i| format!("{blocks}.{i}.attn1.to_q.weight"));
            attention.push(blocks > 0);
            depth.push(blocks.max(1));
        }
        let mid = "mid_block.attentions.0";
        let context = shape(&format!("{mid}.transformer_blocks.0.attn2.to_k.weight"), 2)?;
        Ok(Self {
            in_channels: conv_in[1],
            out_channels: shape("conv_out.weight", 4)?[0],
            heads: channels.iter().map(|width| preset.unet_heads.heads(*width)).collect(),
            context_width: context[1],
            groups: 32,
            norm_eps: 1e-5,
            projection_is_conv: shape(&format!("{mid}.proj_in.weight"), 2)?.len() == 4,
            added: match weights.contains("add_embedding.linear_1.weight") {
                true => Some(shape("add_embedding.linear_1.weight", 2)?[1]),
                false => None,
            },
            channels,
            layers,
            attention,
            depth,
        })
    }

    /// Stable Diffusion 1.x in full size.
    pub fn sd1() -> Self {
        Self {
            in_channels: 4,
            out_channels: 4,
            channels: vec![320, 640, 1280, 1280],
            layers: vec![2; 4],
            attention: vec![true, true, true, false],
            heads: vec![8; 4],
            depth: vec![1; 4],
            context_width: 768,
            groups: 32,
            norm_eps: 1e-5,
            projection_is_conv: true,
            added: None,
        }
    }

    /// Stable Diffusion 2.x in full size.
    pub fn sd2() -> Self {
        Self {
            heads: vec![5, 10, 20, 20],
            context_width: 1024,
            projection_is_conv: false,
            ..Self::sd1()
        }
    }

    /// Stable Diffusion XL in full size.
    pub fn sdxl() -> Self {
        Self {
            channels: vec![320, 640, 1280],
            layers: vec![2; 3],
            attention: vec![false, true, true],
            heads: vec![5, 10, 20],
            depth: vec![1, 2, 10],
            context_width: 2048,
            projection_is_conv: false,
            added: Some(2816),
            ..Self::sd1()
        }
    }

    pub(super) fn levels(&self) -> usize {
        self.channels.len()
    }

    pub(super) fn time_width(&self) -> usize {
        4 * self.channels[0]
    }

    /// Channels of the skips that the way up takes on `level`, in its order.
    pub(super) fn skips_of(&self, level: usize) -> Vec<usize> {
        let mut skips = vec![self.channels[level]; self.layers[level]];
        skips.push(self.channels[level.saturating_sub(1)]);
        skips
    }

    /// The transformer of a level (`None` is the middle), if it has one.
    pub(super) fn transformer(
        &self,
        level: Option<usize>,
        channels: usize,
    ) -> Option<TransformerShape> {
        if level.is_some_and(|level| !self.attention[level]) {
            return None;
        }
        let level = level.unwrap_or(self.levels() - 1);
        Some(TransformerShape {
            channels,
            context: self.context_width,
            heads: self.heads[level],
            depth: self.depth[level],
            groups: self.groups,
            projection_is_conv: self.projection_is_conv,
        })
    }
}

/// The sizes of one image that SDXL is told, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SizeIds {
    /// Height and width of the image before it was resized.
    pub original: [f32; 2],
    /// Top and left of the crop.
    pub crop: [f32; 2],
    /// Height and width of what is made of it.
    pub target: [f32; 2],
}

impl UnetConfig {
    /// The sinusoidal embeddings of sizes that follow pooled text of this width in what is added to
    /// the time embedding, `[sizes.len(), added - pooled]`: original height, original width, crop
    /// top, crop left, target height, target width, each as wide as the others.
    ///
    /// # Errors
    /// A model that takes no such vector, or another width of pooled text.
    pub fn size_waves(&self, pooled: usize, sizes: &[SizeIds]) -> Result<Vec<f32>> {
        let rest = self.added.and_then(|added| added.checked_sub(pooled));
        let Some(each) = rest.filter(|rest| rest % 6 == 0 && *rest > 0).map(|rest| rest / 6) else {
            return Err(ModelError::Config {
                component: COMPONENT,
                key: "projection_class_embeddings_input_dim".to_owned(),
                reason: format!(
                    "it must be the width of pooled text, {pooled}, and six times that of a size"
                ),
                got: format!("{:?}", self.added),
            });
        };
        let numbers = |ids: &SizeIds| {
            let SizeIds { original: [h, w], crop: [top, left], target: [height, width] } = *ids;
            [h, w, top, left, height, width]
        };
        Ok(sizes.iter().flat_map(|ids| timestep_embedding(&numbers(ids), each)).collect())
    }
}

fn count(weights: &dyn Weights, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|i| weights.contains(&name(*i))).count()
}

fn attention_levels(config: &ConfigValue, levels: usize) -> Result<Vec<bool>> {
    let down = config.names("down_block_types");
    let known = |name: &&str| matches!(*name, "CrossAttnDownBlock2D" | "DownBlock2D");
    if down.len() != levels || !down.iter().all(known) {
        let reason = format!("{levels} of `CrossAttnDownBlock2D` and `DownBlock2D` are needed");
        return Err(config.error("down_block_types", &reason));
    }
    let attention: Vec<bool> = down.iter().map(|name| *name == "CrossAttnDownBlock2D").collect();
    let mirrored = attention
        .iter()
        .rev()
        .map(|has| if *has { "CrossAttnUpBlock2D" } else { "UpBlock2D" })
        .collect::<Vec<_>>();
    if config.names("up_block_types") != mirrored {
        return Err(config.error("up_block_types", &format!("{mirrored:?} is needed")));
    }
    Ok(attention)
}

/// Keys of diffusers' config that change the arithmetic, and the values computed here.
fn refuse_unsupported(config: &ConfigValue) -> Result<()> {
    for key in [
        "class_embed_type",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
        "cross_attention_norm",
        "num_class_embeds",
        "reverse_transformer_layers_per_block",
    ] {
        config.require(key, &[])?;
    }
    for key in [
        "center_input_sample",
        "class_embeddings_concat",
        "dual_cross_attention",
        "only_cross_attention",
        "mid_block_only_cross_attention",
        "resnet_skip_time_act",
    ] {
        config.require(key, &[json!(false)])?;
    }
    let one = [json!(1), json!(1.0)];
    config.require("act_fn", &[json!("silu"), json!("swish")])?;
    config.require("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")])?;
    config.require("resnet_time_scale_shift", &[json!("default")])?;
    config.require("time_embedding_type", &[json!("positional")])?;
    config.require("attention_type", &[json!("default")])?;
    config.require("flip_sin_to_cos", &[json!(true)])?;
    config.require("freq_shift", &[json!(0), json!(0.0)])?;
    config.require("downsample_padding", &[json!(1)])?;
    config.require("conv_in_kernel", &[json!(3)])?;
    config.require("conv_out_kernel", &[json!(3)])?;
    config.require("mid_block_scale_factor", &one)?;
    config.require("resnet_out_scale_factor", &one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Value {
        json!({
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": [2, 4],
            "cross_attention_dim": 16,
            "use_linear_projection": true,
            "class_embed_type": null,
        })
    }

    #[test]
    fn lists_and_defaults_are_read() {
        let config = UnetConfig::from_json(&small()).unwrap();
        assert_eq!(config.heads, [2, 4]);
        assert_eq!(config.layers, [2, 2]);
        assert_eq!(config.attention, [true, false]);
        assert!(!config.projection_is_conv);
        assert_eq!(config.skips_of(1), [64, 64, 32]);
        assert_eq!(config.skips_of(0), [32, 32, 32]);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("class_embed_type", json!("timestep")),
            ("act_fn", json!("gelu")),
            ("down_block_types", json!(["AttnDownBlock2D", "DownBlock2D"])),
            ("up_block_types", json!(["UpBlock2D", "UpBlock2D"])),
            ("attention_head_dim", json!([2, 4, 8])),
            ("attention_head_dim", json!(3)),
            ("norm_num_groups", json!(48)),
            ("block_out_channels", json!([])),
            ("cross_attention_dim", json!(-1)),
        ] {
            let mut json = small();
            json[key] = value;
            let message = UnetConfig::from_json(&json).unwrap_err().to_string();
            assert!(message.contains(&format!("`{key}`")), "{message}");
        }
    }
}
