//! The layers that LyCORIS' presets choose (`lycoris/config.py`), for `network_module =
//! "lycoris.kohya"`.

use formats::Weights;

use super::rank::{Rank, RankRule};
use super::target::{Target, of_unet};

/// A named choice of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Every layer of the U-Net with a weight matrix, and the text encoder.
    Full,
    /// The same without 3x3 convolutions.
    FullLinear,
    /// Transformers of the U-Net, and the text encoder: the layers of `networks.lora`.
    AttentionMlp,
    /// Attentions alone, in both.
    AttentionOnly,
    /// [`Preset::Full`] without the text encoder.
    UnetOnly,
    /// [`Preset::AttentionMlp`] without the text encoder.
    UnetTransformerOnly,
    /// All of the U-Net but its transformers.
    UnetConvblockOnly,
}

impl Preset {
    /// Names in LyCORIS.
    pub const NAMES: [(&'static str, Preset); 7] = [
        ("full", Preset::Full),
        ("full-lin", Preset::FullLinear),
        ("attn-mlp", Preset::AttentionMlp),
        ("attn-only", Preset::AttentionOnly),
        ("unet-only", Preset::UnetOnly),
        ("unet-transformer-only", Preset::UnetTransformerOnly),
        ("unet-convblock-only", Preset::UnetConvblockOnly),
    ];

    /// Whether 3x3 convolutions are among the layers.
    pub fn has_convolutions(self) -> bool {
        matches!(self, Preset::Full | Preset::UnetOnly | Preset::UnetConvblockOnly)
    }

    /// Whether the text encoder is.
    pub fn has_text_encoder(self) -> bool {
        !matches!(self, Preset::UnetOnly | Preset::UnetTransformerOnly | Preset::UnetConvblockOnly)
    }

    fn covers(self, target: &Target) -> bool {
        if target.part.is_text() {
            return self.has_text_encoder()
                && (self != Preset::AttentionOnly || target.path.contains(".self_attn."));
        }
        match self {
            Preset::Full | Preset::UnetOnly => true,
            Preset::FullLinear => target.is_pointwise(),
            Preset::AttentionMlp | Preset::UnetTransformerOnly => target.in_transformer,
            Preset::AttentionOnly => {
                target.path.contains(".attn1.") || target.path.contains(".attn2.")
            }
            Preset::UnetConvblockOnly => {
                !target.in_transformer
                    && !target.path.starts_with("time_embedding.")
                    && !target.path.starts_with("add_embedding.")
            }
        }
    }
}

fn is_outer(path: &str) -> bool {
    matches!(
        path,
        "conv_in"
            | "conv_out"
            | "time_embedding.linear_1"
            | "time_embedding.linear_2"
            | "add_embedding.linear_1"
            | "add_embedding.linear_2"
    )
}

/// Layers of the U-Net outside of its blocks; only LyCORIS trains them.
pub fn outer_targets(weights: &dyn Weights) -> Vec<Target> {
    of_unet(weights, |path| is_outer(path).then_some(false))
}

/// One rank for linear layers and 1x1 convolutions of a preset, one for its other convolutions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PresetRanks {
    /// The layers.
    pub preset: Preset,
    /// `network_dim` and `network_alpha`.
    pub linear: Rank,
    /// `conv_dim` and `conv_alpha`.
    pub conv: Rank,
}

impl RankRule for PresetRanks {
    fn rank(&self, target: &Target) -> Option<Rank> {
        if !self.preset.covers(target) {
            None
        } else if target.is_pointwise() {
            Some(self.linear)
        } else {
            self.preset.has_convolutions().then_some(self.conv)
        }
    }
}
