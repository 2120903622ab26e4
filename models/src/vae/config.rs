//! Sizes of an autoencoder: from its `config.json`, or from the shapes of its tensors.

use formats::Weights;
use serde_json::{Value, json};

use crate::config_value::ConfigValue;
use crate::preset::Preset;
use crate::{ModelError, Result};

const COMPONENT: &str = "VAE";

/// Sizes of an autoencoder. Levels are counted from the image's resolution.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of an image.
    pub image_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level.
    pub channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    pub layers: usize,
    /// Groups of every group normalisation.
    pub groups: usize,
    /// Whether the encoder ends in `quant_conv`.
    pub quant_conv: bool,
    /// Whether the decoder starts with `post_quant_conv`.
    pub post_quant_conv: bool,
    /// Factor between the autoencoder's latents and those that the U-Net sees.
    pub scaling: f32,
}

impl VaeConfig {
    /// Sizes from `config` where a model has one, else from the shapes of `weights`.
    pub fn resolve(config: Option<&Value>, weights: &dyn Weights, preset: &Preset) -> Result<Self> {
        match config {
            Some(json) => Self::from_json(json, preset),
            None => Self::from_shapes(weights, preset),
        }
    }

    /// Sizes from diffusers' `vae/config.json`; what this program does not compute is refused.
    pub fn from_json(json: &Value, preset: &Preset) -> Result<Self> {
        let config = ConfigValue { component: COMPONENT, json };
        config.require("act_fn", &[json!("silu"), json!("swish")])?;
        config.require("mid_block_add_attention", &[json!(true)])?;
        config.require("latents_mean", &[])?;
        config.require("latents_std", &[])?;
        config.require("shift_factor", &[json!(0), json!(0.0)])?;
        let channels = config.list("block_out_channels")?;
        for (key, only) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            let names = config.names(key);
            if names.len() != channels.len() || names.iter().any(|name| *name != only) {
                let reason = format!("{} of `{only}` are needed", channels.len());
                return Err(config.error(key, &reason));
            }
        }
        let groups = config.count("norm_num_groups")?.unwrap_or(32);
        if channels.iter().any(|width| width % groups != 0) {
            let reason = format!("the groups must divide all channels, {channels:?}");
            return Err(config.error("norm_num_groups", &reason));
        }
        let image_channels = config.count("in_channels")?.unwrap_or(3);
        config.require("out_channels", &[json!(image_channels)])?;
        Ok(Self {
            image_channels,
            latent_channels: config.count("latent_channels")?.unwrap_or(4),
            layers: config.count("layers_per_block")?.unwrap_or(1),
            groups,
            quant_conv: config.flag("use_quant_conv")?.unwrap_or(true),
            post_quant_conv: config.flag("use_post_quant_conv")?.unwrap_or(true),
            scaling: config.float("scaling_factor")?.unwrap_or(preset.vae_scaling),
            channels,
        })
    }

    /// Sizes from shapes alone; groups and scaling, which no shape tells, from the family.
    pub fn from_shapes(weights: &dyn Weights, preset: &Preset) -> Result<Self> {
        let shape = |name: &str| {
            weights
                .shape(name)
                .filter(|shape| shape.len() == 4)
                .ok_or_else(|| ModelError::Unsized { component: COMPONENT, name: name.to_owned() })
        };
        let first = |level: usize, i: usize| {
            weights.shape(&format!("encoder.down_blocks.{level}.resnets.{i}.conv1.weight"))
        };
        shape("encoder.down_blocks.0.resnets.0.conv1.weight")?;
        let channels: Vec<usize> =
            (0..).map_while(|level| first(level, 0)?.first().copied()).collect();
        Ok(Self {
            image_channels: shape("encoder.conv_in.weight")?[1],
            latent_channels: shape("decoder.conv_in.weight")?[1],
            channels,
            layers: (0..).take_while(|i| first(0, *i).is_some()).count(),
            groups: 32,
            quant_conv: weights.contains("quant_conv.weight"),
            post_quant_conv: weights.contains("post_quant_conv.weight"),
            scaling: preset.vae_scaling,
        })
    }

    /// The autoencoder of SD1 and SD2 in full size.
    pub fn sd1() -> Self {
        Self {
            image_channels: 3,
            latent_channels: 4,
            channels: vec![128, 256, 512, 512],
            layers: 2,
            groups: 32,
            quant_conv: true,
            post_quant_conv: true,
            scaling: 0.18215,
        }
    }
}
