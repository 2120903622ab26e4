//! Levels of the U-Net: pairs of residual block and transformer, then a resampler.

use engine::{Conv2d, Result as EngineResult, Tape, Value};

use super::config::UnetConfig;
use super::transformer::Transformer;
use crate::Result;
use crate::reader::{ConvShape, LayerVisitor, Reader};
use crate::resnet::{Padding, ResnetBlock, ResnetShape, downsampler, upsample};

/// What every block of one forward pass gets besides its feature map.
pub(super) struct Pass<'p, 'm> {
    pub tape: &'p Tape<'m>,
    /// SiLU of the time embedding `[B,time]`.
    pub time: &'p Value,
    /// Text `[B,T,context]`.
    pub context: &'p Value,
}

/// A residual block and, on levels with attention, the transformer behind it.
struct Pair {
    resnet: ResnetBlock,
    attention: Option<Transformer>,
}

impl Pair {
    fn load(
        reader: &Reader,
        config: &UnetConfig,
        place: &Place,
        channels: (usize, usize),
    ) -> Result<Self> {
        let (input, out) = channels;
        let (path, index) = (&place.path, place.index);
        let resnet = ResnetShape {
            input,
            out,
            time: Some(config.time_width()),
            groups: config.groups,
            eps: config.norm_eps,
        };
        let transformer =
            |shape| Transformer::load(reader, &format!("{path}.attentions.{index}"), shape);
        Ok(Self {
            resnet: ResnetBlock::load(reader, &format!("{path}.resnets.{index}"), resnet)?,
            attention: config.transformer(place.level, out).map(transformer).transpose()?,
        })
    }

    fn run<'m>(&self, tape: &Tape<'m>, x: &Value, rest: &[Value]) -> EngineResult<Value> {
        let [time, context] = rest else {
            return Err(engine::EngineError::Tape("a segment lost its inputs".into()));
        };
        let h = self.resnet.forward(tape, x, Some(time))?;
        match &self.attention {
            Some(attention) => attention.forward(tape, &h, context),
            None => Ok(h),
        }
    }

    /// `x` `[B,H,W,in]` to `[B,H,W,out]`, as a segment.
    fn forward<'m>(&'m self, pass: &Pass<'_, 'm>, x: &Value) -> EngineResult<Value> {
        pass.tape.segment(&[x, pass.time, pass.context], move |tape, inputs| {
            let (x, rest) = first(inputs)?;
            self.run(tape, x, rest)
        })
    }

    /// The same for `x` joined with the `skip` of the way down.
    fn forward_joined<'m>(
        &'m self,
        pass: &Pass<'_, 'm>,
        x: &Value,
        skip: &Value,
    ) -> EngineResult<Value> {
        pass.tape.segment(&[x, skip, pass.time, pass.context], move |tape, inputs| {
            let (x, rest) = first(inputs)?;
            let (skip, rest) = first(rest)?;
            self.run(tape, &tape.concat_last(x, skip)?, rest)
        })
    }

    fn visit_attention(&mut self, path: &str, index: usize, visit: LayerVisitor) {
        if let Some(attention) = &mut self.attention {
            attention.visit(&format!("{path}.attentions.{index}"), visit);
        }
    }

    fn visit_resnet(&mut self, path: &str, index: usize, visit: LayerVisitor) {
        self.resnet.visit(&format!("{path}.resnets.{index}"), visit);
    }
}

fn first(values: &[Value]) -> EngineResult<(&Value, &[Value])> {
    let lost = || engine::EngineError::Tape("a segment lost its inputs".into());
    values.split_first().ok_or_else(lost)
}

/// Where a pair stands.
struct Place {
    path: String,
    index: usize,
    /// `None` is the middle.
    level: Option<usize>,
}

fn visit_pairs(pairs: &mut [Pair], path: &str, visit: LayerVisitor) {
    for (i, pair) in pairs.iter_mut().enumerate() {
        pair.visit_attention(path, i, visit);
    }
    for (i, pair) in pairs.iter_mut().enumerate() {
        pair.visit_resnet(path, i, visit);
    }
}

/// One level of the way down.
pub(super) struct DownBlock {
    pairs: Vec<Pair>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    pub(super) fn load(reader: &Reader, config: &UnetConfig, level: usize) -> Result<Self> {
        let path = format!("down_blocks.{level}");
        let out = config.channels[level];
        let before = config.channels[level.saturating_sub(1)];
        let pair = |index| {
            let input = if index == 0 { before } else { out };
            let place = Place { path: path.clone(), index, level: Some(level) };
            Pair::load(reader, config, &place, (input, out))
        };
        let pairs = (0..config.layers[level]).map(pair).collect::<Result<_>>()?;
        let conv = format!("{path}.downsamplers.0.conv");
        let last = level + 1 == config.levels();
        let down = || downsampler(reader, &conv, out, Padding::Around).map(Some);
        Ok(Self { pairs, downsampler: if last { None } else { down()? } })
    }

    pub(super) fn forward<'m>(
        &'m self,
        pass: &Pass<'_, 'm>,
        x: Value,
        skips: &mut Vec<Value>,
    ) -> EngineResult<Value> {
        let mut h = x;
        for pair in &self.pairs {
            h = pair.forward(pass, &h)?;
            skips.push(h.clone());
        }
        if let Some(conv) = &self.downsampler {
            h = conv.forward(pass.tape, &h)?;
            skips.push(h.clone());
        }
        Ok(h)
    }

    pub(super) fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit_pairs(&mut self.pairs, path, visit);
        if let Some(conv) = &mut self.downsampler {
            visit(&format!("{path}.downsamplers.0.conv"), conv.into());
        }
    }
}

/// The level between the ways: residual block, transformer, residual block.
pub(super) struct MidBlock {
    pair: Pair,
    last: Pair,
}

impl MidBlock {
    pub(super) fn load(reader: &Reader, config: &UnetConfig) -> Result<Self> {
        let out = config.channels[config.levels() - 1];
        let place = |index| Place { path: "mid_block".into(), index, level: None };
        let pair = Pair::load(reader, config, &place(0), (out, out))?;
        let shape = ResnetShape {
            input: out,
            out,
            time: Some(config.time_width()),
            groups: config.groups,
            eps: config.norm_eps,
        };
        let resnet = ResnetBlock::load(reader, "mid_block.resnets.1", shape)?;
        Ok(Self { pair, last: Pair { resnet, attention: None } })
    }

    pub(super) fn forward<'m>(&'m self, pass: &Pass<'_, 'm>, x: Value) -> EngineResult<Value> {
        let h = self.pair.forward(pass, &x)?;
        self.last.forward(pass, &h)
    }

    pub(super) fn visit(&mut self, path: &str, visit: LayerVisitor) {
        self.pair.visit_attention(path, 0, visit);
        self.pair.visit_resnet(path, 0, visit);
        self.last.visit_resnet(path, 1, visit);
    }
}

/// One level of the way up, which takes back the feature maps of the way down.
pub(super) struct UpBlock {
    pairs: Vec<Pair>,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// `index` counts from the middle; its level is the mirror image.
    pub(super) fn load(reader: &Reader, config: &UnetConfig, index: usize) -> Result<Self> {
        let path = format!("up_blocks.{index}");
        let last = config.levels() - 1;
        let level = last - index;
        let out = config.channels[level];
        let mut before = config.channels[(level + 1).min(last)];
        let mut pairs = Vec::new();
        for (i, skip) in config.skips_of(level).into_iter().enumerate() {
            let place = Place { path: path.clone(), index: i, level: Some(level) };
            pairs.push(Pair::load(reader, config, &place, (before + skip, out))?);
            before = out;
        }
        let name = format!("{path}.upsamplers.0.conv");
        let up = || reader.conv(&name, ConvShape::same3(out, out)).map(Some);
        Ok(Self { pairs, upsampler: if index == last { None } else { up()? } })
    }

    pub(super) fn forward<'m>(
        &'m self,
        pass: &Pass<'_, 'm>,
        x: Value,
        skips: &mut Vec<Value>,
    ) -> EngineResult<Value> {
        let mut h = x;
        for pair in &self.pairs {
            let skip = skips.pop();
            let skip = skip.ok_or_else(|| engine::EngineError::Tape("no skip is left".into()))?;
            h = pair.forward_joined(pass, &h, &skip)?;
        }
        let Some(conv) = &self.upsampler else { return Ok(h) };
        let size = skips.last().and_then(|skip| match skip.shape() {
            [_, height, width, _] => Some((*height, *width)),
            _ => None,
        });
        upsample(conv, pass.tape, &h, size)
    }

    pub(super) fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit_pairs(&mut self.pairs, path, visit);
        if let Some(conv) = &mut self.upsampler {
            visit(&format!("{path}.upsamplers.0.conv"), conv.into());
        }
    }
}
