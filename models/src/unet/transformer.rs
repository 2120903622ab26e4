//! The transformer of a U-Net level (diffusers' `Transformer2DModel`): self-attention over pixels,
//! cross-attention to the text, a gated feed-forward.

use engine::{AttentionShape, GroupNorm, LayerNorm, Linear, Result as EngineResult, Tape, Value};

use crate::Result;
use crate::reader::{LayerVisitor, Reader};

const GROUP_NORM_EPS: f32 = 1e-6;
const LAYER_NORM_EPS: f32 = 1e-5;

/// Sizes of a [`Transformer`].
#[derive(Clone, Copy)]
pub(super) struct TransformerShape {
    pub channels: usize,
    pub context: usize,
    pub heads: usize,
    pub depth: usize,
    pub groups: usize,
    /// Whether files keep `proj_in` and `proj_out` as 1x1 convolutions.
    pub projection_is_conv: bool,
}

pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Transformer {
    pub(super) fn load(reader: &Reader, path: &str, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { channels, groups, projection_is_conv, .. } = shape;
        let projection = |part: &str| {
            reader.projection(&format!("{path}.{part}"), (channels, channels), projection_is_conv)
        };
        let block = |i| Block::load(reader, &format!("{path}.transformer_blocks.{i}"), shape);
        Ok(Self {
            norm: reader.group_norm(&format!("{path}.norm"), channels, groups, GROUP_NORM_EPS)?,
            proj_in: projection("proj_in")?,
            blocks: (0..shape.depth).map(block).collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x` `[B,H,W,C]`, `context` `[B,T,context]`; gives `[B,H,W,C]`.
    pub(super) fn forward<'m>(
        &self,
        tape: &Tape<'m>,
        x: &Value,
        context: &Value,
    ) -> EngineResult<Value> {
        let shape = x.shape().to_vec();
        let mut h = self.norm.forward(tape, x)?;
        h = self.proj_in.forward(tape, &h)?;
        h = tape.reshape(&h, &[shape[0], shape[1] * shape[2], shape[3]])?;
        for block in &self.blocks {
            h = block.forward(tape, h, context)?;
        }
        h = tape.reshape(&h, &shape)?;
        self.proj_out.forward_add(tape, &h, x)
    }

    pub(super) fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit(&format!("{path}.proj_in"), (&mut self.proj_in).into());
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit(&format!("{path}.transformer_blocks.{i}"), visit);
        }
        visit(&format!("{path}.proj_out"), (&mut self.proj_out).into());
    }
}

impl Block {
    fn load(reader: &Reader, path: &str, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { channels, context, heads, .. } = shape;
        let name = |part: &str| format!("{path}.{part}");
        let norm = |part: &str| reader.layer_norm(&name(part), channels, LAYER_NORM_EPS);
        let attention =
            |part: &str, source| Attention::load(reader, &name(part), (channels, source), heads);
        let inner = 4 * channels;
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", channels)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", context)?,
            norm3: norm("norm3")?,
            ff_in: reader.linear(&name("ff.net.0.proj"), 2 * inner, channels)?,
            ff_out: reader.linear(&name("ff.net.2"), channels, inner)?,
        })
    }

    fn forward<'m>(&self, tape: &Tape<'m>, x: Value, context: &Value) -> EngineResult<Value> {
        let mut x = x;
        let mut h = self.norm1.forward(tape, &x)?;
        x = self.attn1.forward_add(tape, &h, &h, &x)?;
        h = self.norm2.forward(tape, &x)?;
        x = self.attn2.forward_add(tape, &h, context, &x)?;
        h = self.norm3.forward(tape, &x)?;
        h = self.ff_in.forward(tape, &h)?;
        h = tape.geglu(&h)?;
        self.ff_out.forward_add(tape, &h, &x)
    }

    fn visit(&mut self, path: &str, visit: LayerVisitor) {
        self.attn1.visit(&format!("{path}.attn1"), visit);
        visit(&format!("{path}.ff.net.0.proj"), (&mut self.ff_in).into());
        visit(&format!("{path}.ff.net.2"), (&mut self.ff_out).into());
        self.attn2.visit(&format!("{path}.attn2"), visit);
    }
}

impl Attention {
    fn load(
        reader: &Reader,
        path: &str,
        (channels, source): (usize, usize),
        heads: usize,
    ) -> Result<Self> {
        let plain = |part: &str, input| {
            reader.linear_without_bias(&format!("{path}.{part}"), channels, input)
        };
        Ok(Self {
            to_q: plain("to_q", channels)?,
            to_k: plain("to_k", source)?,
            to_v: plain("to_v", source)?,
            to_out: reader.linear(&format!("{path}.to_out.0"), channels, channels)?,
            heads,
        })
    }

    /// Attention of `x` over `source`, plus `residual`.
    fn forward_add<'m>(
        &self,
        tape: &Tape<'m>,
        x: &Value,
        source: &Value,
        residual: &Value,
    ) -> EngineResult<Value> {
        let q = self.to_q.forward(tape, x)?;
        let k = self.to_k.forward(tape, source)?;
        let v = self.to_v.forward(tape, source)?;
        let shape = AttentionShape { heads: self.heads, causal: false };
        let h = tape.attention(&q, &k, &v, shape)?;
        drop((q, k, v));
        self.to_out.forward_add(tape, &h, residual)
    }

    fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit(&format!("{path}.to_q"), (&mut self.to_q).into());
        visit(&format!("{path}.to_k"), (&mut self.to_k).into());
        visit(&format!("{path}.to_v"), (&mut self.to_v).into());
        visit(&format!("{path}.to_out.0"), (&mut self.to_out).into());
    }
}
