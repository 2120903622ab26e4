//! What differs between model families where a checkpoint has no config, one row per family.

use engine::Activation;
use formats::Family;

/// How the heads of the U-Net's attention follow from the width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadRule {
    /// The same number of heads everywhere.
    Count(usize),
    /// Heads of this many channels.
    Width(usize),
}

impl HeadRule {
    /// Heads for `width` channels, at least one.
    pub(crate) fn heads(self, width: usize) -> usize {
        match self {
            HeadRule::Count(heads) => heads,
            HeadRule::Width(channels) => (width / channels).max(1),
        }
    }
}

/// Facts of a family.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Heads of the U-Net.
    pub(crate) unet_heads: HeadRule,
    /// Activation of the text encoder.
    pub(crate) text_activation: Activation,
    /// Channels of a head of the text encoder.
    pub(crate) text_head_width: usize,
    /// Factor of the VAE's latents.
    pub vae_scaling: f32,
    /// Whether sd-scripts' tokenizer pads with `!` (0) instead of the end token.
    pub pads_with_zero: bool,
    /// Whether hidden states are those before the last layer, without the final normalisation,
    /// whatever `clip_skip` says.
    pub penultimate: bool,
}

const SD1: Preset = Preset {
    unet_heads: HeadRule::Count(8),
    text_activation: Activation::QuickGelu,
    text_head_width: 64,
    vae_scaling: 0.18215,
    pads_with_zero: false,
    penultimate: false,
};

const SD2: Preset = Preset {
    unet_heads: HeadRule::Width(64),
    text_activation: Activation::Gelu,
    pads_with_zero: true,
    ..SD1
};

/// Heads as in SD2; of its two text encoders the first is SD1's, the second has a row of its own.
const SDXL: Preset =
    Preset { unet_heads: HeadRule::Width(64), vae_scaling: 0.13025, penultimate: true, ..SD1 };

/// SDXL's second text encoder, OpenCLIP bigG: exact GELU and zeros behind the end, as SD2's.
const SDXL_SECOND: Preset =
    Preset { text_activation: Activation::Gelu, pads_with_zero: true, ..SDXL };

/// The row of a family.
pub fn preset(family: Family) -> &'static Preset {
    match family {
        Family::Sd1 => &SD1,
        Family::Sd2 => &SD2,
        Family::Sdxl => &SDXL,
    }
}

/// The row for a family's second text encoder, if it has one.
pub fn second_text_preset(family: Family) -> Option<&'static Preset> {
    (family == Family::Sdxl).then_some(&SDXL_SECOND)
}
