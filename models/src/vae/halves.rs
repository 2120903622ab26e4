//! Encoder and decoder: levels of residual blocks around a middle with one attention of one head.

use engine::{
    AttentionShape, Conv2d, GroupNorm, Linear, Result as EngineResult, Tape, Tensor, Value,
};

use super::config::VaeConfig;
use crate::Result;
use crate::reader::{ConvShape, Reader};
use crate::resnet::{Padding, ResnetBlock, ResnetShape, downsampler, upsample};

const EPS: f32 = 1e-6;

fn resnet(
    reader: &Reader,
    config: &VaeConfig,
    path: &str,
    (input, out): (usize, usize),
) -> Result<ResnetBlock> {
    let shape = ResnetShape { input, out, time: None, groups: config.groups, eps: EPS };
    ResnetBlock::load(reader, path, shape)
}

/// Residual blocks of one resolution and the change to the next.
struct Level {
    resnets: Vec<ResnetBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    fn load(
        reader: &Reader,
        config: &VaeConfig,
        path: &str,
        (count, input, out): (usize, usize, usize),
    ) -> Result<Self> {
        let block = |i| {
            let input = if i == 0 { input } else { out };
            resnet(reader, config, &format!("{path}.resnets.{i}"), (input, out))
        };
        Ok(Self { resnets: (0..count).map(block).collect::<Result<_>>()?, resample: None })
    }

    fn forward(&self, tape: &Tape, x: Value) -> EngineResult<Value> {
        let mut h = x;
        for resnet in &self.resnets {
            h = resnet.forward(tape, &h, None)?;
        }
        Ok(h)
    }
}

/// Residual block, attention, residual block.
struct Middle {
    first: ResnetBlock,
    attention: Attention,
    last: ResnetBlock,
}

impl Middle {
    fn load(reader: &Reader, config: &VaeConfig, path: &str, channels: usize) -> Result<Self> {
        let same = (channels, channels);
        Ok(Self {
            first: resnet(reader, config, &format!("{path}.resnets.0"), same)?,
            attention: Attention::load(reader, config, &format!("{path}.attentions.0"), channels)?,
            last: resnet(reader, config, &format!("{path}.resnets.1"), same)?,
        })
    }

    fn forward(&self, tape: &Tape, x: &Value) -> EngineResult<Value> {
        let mut h = self.first.forward(tape, x, None)?;
        h = self.attention.forward(tape, &h)?;
        self.last.forward(tape, &h, None)
    }
}

/// Self-attention over pixels with one head.
struct Attention {
    norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(reader: &Reader, config: &VaeConfig, path: &str, channels: usize) -> Result<Self> {
        // The second name is that of diffusers before 0.18, which published models still have.
        let layer = |name: &str, old_name: &str| {
            let old = format!("{path}.{old_name}");
            let name = format!("{path}.{name}");
            let is_old = !reader.contains(&format!("{name}.weight"))
                && reader.contains(&format!("{old}.weight"));
            let name = if is_old { &old } else { &name };
            reader.projection(name, (channels, channels), false)
        };
        let norm = format!("{path}.group_norm");
        Ok(Self {
            norm: reader.group_norm(&norm, channels, config.groups, EPS)?,
            to_q: layer("to_q", "query")?,
            to_k: layer("to_k", "key")?,
            to_v: layer("to_v", "value")?,
            to_out: layer("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, tape: &Tape, x: &Value) -> EngineResult<Value> {
        let [batch, height, width, channels] = *x.shape() else {
            let detail = format!("x is {:?}", x.shape());
            return Err(engine::EngineError::shape("vae attention", detail));
        };
        let mut h = self.norm.forward(tape, x)?;
        h = tape.reshape(&h, &[batch, height * width, channels])?;
        let q = self.to_q.forward(tape, &h)?;
        let k = self.to_k.forward(tape, &h)?;
        let v = self.to_v.forward(tape, &h)?;
        h = tape.attention(&q, &k, &v, AttentionShape { heads: 1, causal: false })?;
        drop((q, k, v));
        h = tape.reshape(&h, x.shape())?;
        self.to_out.forward_add(tape, &h, x)
    }
}

/// Images to moments before `quant_conv`.
pub(super) struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn load(reader: &Reader, config: &VaeConfig) -> Result<Self> {
        let count = config.channels.len();
        let (top, deep) = (config.channels[0], config.channels[count - 1]);
        let level = |i: usize| {
            let path = format!("encoder.down_blocks.{i}");
            let (input, out) = (config.channels[i.saturating_sub(1)], config.channels[i]);
            let mut level = Level::load(reader, config, &path, (config.layers, input, out))?;
            if i + 1 < count {
                let conv = format!("{path}.downsamplers.0.conv");
                level.resample = Some(downsampler(reader, &conv, out, Padding::After)?);
            }
            Ok(level)
        };
        let moments = ConvShape::same3(2 * config.latent_channels, deep);
        Ok(Self {
            conv_in: reader
                .conv("encoder.conv_in", ConvShape::same3(top, config.image_channels))?,
            levels: (0..count).map(level).collect::<Result<_>>()?,
            middle: Middle::load(reader, config, "encoder.mid_block", deep)?,
            norm_out: reader.group_norm("encoder.conv_norm_out", deep, config.groups, EPS)?,
            conv_out: reader.conv("encoder.conv_out", moments)?,
        })
    }

    /// `[B,H,W,3]` to `[B,H/8,W/8,8]`.
    pub(super) fn forward(&self, tape: &Tape, images: Tensor) -> EngineResult<Value> {
        let mut h = self.conv_in.forward(tape, &Value::constant(images))?;
        for level in &self.levels {
            h = level.forward(tape, h)?;
            if let Some(conv) = &level.resample {
                h = conv.forward(tape, &h)?;
            }
        }
        h = self.middle.forward(tape, &h)?;
        h = self.norm_out.forward_silu(tape, &h)?;
        self.conv_out.forward(tape, &h)
    }
}

/// Latents after `post_quant_conv` to images.
pub(super) struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn load(reader: &Reader, config: &VaeConfig) -> Result<Self> {
        let count = config.channels.len();
        let (top, deep) = (config.channels[0], config.channels[count - 1]);
        let level = |i: usize| {
            let path = format!("decoder.up_blocks.{i}");
            let depth = count - 1 - i;
            let input = config.channels[(depth + 1).min(count - 1)];
            let out = config.channels[depth];
            let mut level = Level::load(reader, config, &path, (config.layers + 1, input, out))?;
            if depth > 0 {
                let conv = format!("{path}.upsamplers.0.conv");
                level.resample = Some(reader.conv(&conv, ConvShape::same3(out, out))?);
            }
            Ok(level)
        };
        let conv_in = ConvShape::same3(deep, config.latent_channels);
        let conv_out = ConvShape::same3(config.image_channels, top);
        Ok(Self {
            conv_in: reader.conv("decoder.conv_in", conv_in)?,
            middle: Middle::load(reader, config, "decoder.mid_block", deep)?,
            levels: (0..count).map(level).collect::<Result<_>>()?,
            norm_out: reader.group_norm("decoder.conv_norm_out", top, config.groups, EPS)?,
            conv_out: reader.conv("decoder.conv_out", conv_out)?,
        })
    }

    /// `[B,h,w,4]` to `[B,8h,8w,3]`.
    pub(super) fn forward(&self, tape: &Tape, latents: Value) -> EngineResult<Value> {
        let mut h = self.conv_in.forward(tape, &latents)?;
        drop(latents);
        h = self.middle.forward(tape, &h)?;
        for level in &self.levels {
            h = level.forward(tape, h)?;
            if let Some(conv) = &level.resample {
                h = upsample(conv, tape, &h, None)?;
            }
        }
        h = self.norm_out.forward_silu(tape, &h)?;
        self.conv_out.forward(tape, &h)
    }
}
