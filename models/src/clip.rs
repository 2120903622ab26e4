//! CLIP's text encoder (transformers' `CLIPTextModel`): ViT-L of SD1, OpenCLIP-H of SD2, both ViT-L and
//! OpenCLIP bigG with its projection of SDXL.
//!
//! A prompt longer than 77 tokens comes as several chunks along the batch axis; see [`join_chunks`].

use engine::{
    Activation, AttentionShape, DType, Device, Embedding, EngineError, Ids, LayerNorm, Linear,
    Result as EngineResult, RowChoice, Tape, Value,
};
use formats::Weights;
use serde_json::{Value as Json, json};

use crate::config_value::ConfigValue;
use crate::preset::Preset;
use crate::reader::{LayerVisitor, Reader, SlotVisitor, TensorShape};
use crate::{ModelError, Result};

const COMPONENT: &str = "text encoder";
const TOKENS: &str = "text_model.embeddings.token_embedding";
const POSITIONS: &str = "text_model.embeddings.position_embedding";
const LAYERS: &str = "text_model.encoder.layers";
const PROJECTION: &str = "text_projection";
/// The token that ends a prompt, the last of CLIP's vocabulary.
const END: u32 = 49407;

/// Sizes of a text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Rows of the token table.
    pub vocabulary: usize,
    /// Longest sequence.
    pub positions: usize,
    /// Width of the output.
    pub width: usize,
    /// Width inside the feed-forward.
    pub inner: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Heads of each layer.
    pub heads: usize,
    /// Activation of the feed-forward.
    pub activation: Activation,
    /// Epsilon of the layer normalisations.
    pub norm_eps: f32,
    /// Width of the pooled output, where there is a projection to it.
    pub pooled: Option<usize>,
}

impl ClipConfig {
    /// Sizes from the shapes of `weights`; heads, activation and epsilon from `config` where the
    /// model has one, else from the family.
    pub fn resolve(config: Option<&Json>, weights: &dyn Weights, preset: &Preset) -> Result<Self> {
        let shape = |name: String| {
            let shape = weights.shape(&name).filter(|shape| shape.len() == 2);
            shape.ok_or(ModelError::Unsized { component: COMPONENT, name })
        };
        let tokens = shape(format!("{TOKENS}.weight"))?;
        let layers = (0..)
            .take_while(|i| weights.contains(&format!("{LAYERS}.{i}.self_attn.q_proj.weight")))
            .count();
        let width = tokens[1];
        let mut clip = Self {
            vocabulary: tokens[0],
            positions: shape(format!("{POSITIONS}.weight"))?[0],
            width,
            inner: shape(format!("{LAYERS}.0.mlp.fc1.weight"))?[0],
            layers,
            heads: (width / preset.text_head_width).max(1),
            activation: preset.text_activation,
            norm_eps: 1e-5,
            pooled: weights.shape(&format!("{PROJECTION}.weight")).and_then(|s| s.first().copied()),
        };
        if let Some(json) = config {
            clip.apply(&ConfigValue { component: COMPONENT, json })?;
        }
        Ok(clip)
    }

    fn apply(&mut self, config: &ConfigValue) -> Result<()> {
        self.heads = config.count("num_attention_heads")?.unwrap_or(self.heads);
        if !self.width.is_multiple_of(self.heads) {
            let reason = format!("the heads must divide the width {}", self.width);
            return Err(config.error("num_attention_heads", &reason));
        }
        self.norm_eps = config.float("layer_norm_eps")?.unwrap_or(self.norm_eps);
        config.require("hidden_size", &[json!(self.width)])?;
        config.require("intermediate_size", &[json!(self.inner)])?;
        self.activation = match config.text("hidden_act") {
            Some("quick_gelu") => Activation::QuickGelu,
            Some("gelu") => Activation::Gelu,
            None => self.activation,
            Some(_) => {
                return Err(config.error("hidden_act", "`quick_gelu` or `gelu` is needed"));
            }
        };
        Ok(())
    }

    /// The text encoder of SD1 (CLIP ViT-L/14) in full size.
    pub fn sd1() -> Self {
        Self {
            vocabulary: 49408,
            positions: 77,
            width: 768,
            inner: 3072,
            layers: 12,
            heads: 12,
            activation: Activation::QuickGelu,
            norm_eps: 1e-5,
            pooled: None,
        }
    }

    /// The text encoder of SD2 (OpenCLIP-H without its last layer) in full size.
    pub fn sd2() -> Self {
        Self {
            width: 1024,
            inner: 4096,
            layers: 23,
            heads: 16,
            activation: Activation::Gelu,
            ..Self::sd1()
        }
    }
}

impl ClipConfig {
    /// The second text encoder of SDXL (OpenCLIP bigG) in full size.
    pub fn sdxl_second() -> Self {
        Self {
            width: 1280,
            inner: 5120,
            layers: 32,
            heads: 20,
            activation: Activation::Gelu,
            pooled: Some(1280),
            ..Self::sd1()
        }
    }
}

/// A text encoder on one device, its weights frozen.
pub struct ClipTextModel {
    config: ClipConfig,
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
}

struct Layer {
    norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl ClipTextModel {
    /// Reads a text encoder; `dtype` is the type of its arithmetic.
    pub fn load(
        weights: &dyn Weights,
        config: &ClipConfig,
        device: Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::read(&Reader::new(weights, device, dtype), config)
    }

    /// Names and shapes of all tensors of a text encoder of this config.
    pub fn tensor_shapes(config: &ClipConfig) -> Result<Vec<TensorShape>> {
        let reader = Reader::listing();
        Self::read(&reader, config)?;
        Ok(reader.into_list())
    }

    fn read(reader: &Reader, config: &ClipConfig) -> Result<Self> {
        let layer = |i| Layer::load(reader, &format!("{LAYERS}.{i}"), config);
        let final_norm = "text_model.final_layer_norm";
        Ok(Self {
            tokens: reader.embedding(TOKENS, config.vocabulary, config.width)?,
            positions: reader.embedding(POSITIONS, config.positions, config.width)?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            final_norm: reader.layer_norm(final_norm, config.width, config.norm_eps)?,
            projection: config
                .pooled
                .map(|pooled| reader.linear_without_bias(PROJECTION, pooled, config.width))
                .transpose()?,
            config: config.clone(),
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Hidden states of sequences of `length` tokens that follow each other in `ids`:
    /// `[ids.len()/length, length, width]`, after the final layer norm.
    ///
    /// With `clip_skip` 2 the last layer is not run, with 3 the last two, and so on; `None` and 1
    /// run all. More than the model has is an error.
    pub fn forward<'m>(
        &'m self,
        tape: &Tape<'m>,
        ids: &Ids,
        length: usize,
        clip_skip: Option<usize>,
    ) -> EngineResult<Value> {
        let used = self.used_layers(clip_skip)?;
        let h = self.run(tape, ids, length, used)?;
        self.final_norm.forward(tape, &h)
    }

    /// What the last layer would read, `[ids.len()/length, length, width]`, without the final layer
    /// norm: SDXL's hidden states.
    pub fn penultimate<'m>(
        &'m self,
        tape: &Tape<'m>,
        ids: &Ids,
        length: usize,
    ) -> EngineResult<Value> {
        self.run(tape, ids, length, self.config.layers.saturating_sub(1))
    }

    /// As [`Self::forward`], without the final layer norm: what gen_img reads of SDXL, `clip_skip` 2
    /// unless it is told otherwise.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn skipping<'m>(
        &'m self,
        tape: &Tape<'m>,
        ids: &Ids,
        length: usize,
        clip_skip: usize,
    ) -> EngineResult<Value> {
        let used = self.used_layers(Some(clip_skip))?;
        self.run(tape, ids, length, used)
    }

    /// The pooled output `[prompts, config.pooled]`: last layer, final layer norm and projection of
    /// what [`Self::penultimate`] gave, at the rows of `ends` ([`end_rows`]).
    ///
    /// # Errors
    /// A text encoder without a projection.
    pub fn pooled<'m>(
        &'m self,
        tape: &Tape<'m>,
        penultimate: &Value,
        ends: &RowChoice,
    ) -> EngineResult<Value> {
        let (Some(last), Some(projection)) = (self.layers.last(), &self.projection) else {
            let reason = "the text encoder has no projection of a pooled output";
            return Err(EngineError::Unsupported(reason.into()));
        };
        let h = tape.segment(&[penultimate], move |tape, inputs| last.forward(tape, &inputs[0]))?;
        let h = tape.gather(&h, ends)?;
        let h = self.final_norm.forward(tape, &h)?;
        projection.forward(tape, &h)
    }

    /// The first `used` layers.
    fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        ids: &Ids,
        length: usize,
        used: usize,
    ) -> EngineResult<Value> {
        if length == 0 || length > self.config.positions || !ids.len().is_multiple_of(length) {
            let detail = format!(
                "{} ids in sequences of {length}, the model has {} positions",
                ids.len(),
                self.config.positions
            );
            return Err(EngineError::shape("text encoder", detail));
        }
        let places: Vec<u32> = (0..ids.len()).map(|i| (i % length) as u32).collect();
        let places = Ids::constant(self.positions.table.device(), &places)?;
        let mut h = tape.add(&self.tokens.forward(ids)?, &self.positions.forward(&places)?)?;
        h = tape.reshape(&h, &[ids.len() / length, length, self.config.width])?;
        for layer in &self.layers[..used] {
            h = tape.segment(&[&h], move |tape, inputs| layer.forward(tape, &inputs[0]))?;
        }
        Ok(h)
    }

    fn used_layers(&self, clip_skip: Option<usize>) -> EngineResult<usize> {
        let skip = clip_skip.unwrap_or(1);
        let used = (self.config.layers + 1).checked_sub(skip).filter(|used| skip > 0 && *used > 0);
        used.ok_or_else(|| {
            EngineError::Unsupported(format!(
                "`clip_skip` must lie between 1 and the text encoder's {} layers, it is: {skip}",
                self.config.layers
            ))
        })
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.positions.table.device()
    }

    /// Visits every layer that can carry an adapter.
    pub fn visit_slots(&mut self, visit: SlotVisitor) {
        self.visit_layers(&mut |path, layer| visit(path, layer.slot()));
    }

    pub(crate) fn visit_layers(&mut self, visit: LayerVisitor) {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&format!("{LAYERS}.{i}"), visit);
        }
    }
}

impl Layer {
    fn load(reader: &Reader, path: &str, config: &ClipConfig) -> Result<Self> {
        let ClipConfig { width, inner, heads, activation, norm_eps, .. } = *config;
        let square = |part| reader.linear(&format!("{path}.self_attn.{part}"), width, width);
        let norm = |part| reader.layer_norm(&format!("{path}.{part}"), width, norm_eps);
        Ok(Self {
            norm1: norm("layer_norm1")?,
            k_proj: square("k_proj")?,
            v_proj: square("v_proj")?,
            q_proj: square("q_proj")?,
            out_proj: square("out_proj")?,
            norm2: norm("layer_norm2")?,
            fc1: reader.linear(&format!("{path}.mlp.fc1"), inner, width)?,
            fc2: reader.linear(&format!("{path}.mlp.fc2"), width, inner)?,
            heads,
            activation,
        })
    }

    fn forward<'m>(&self, tape: &Tape<'m>, x: &Value) -> EngineResult<Value> {
        let mut h = self.norm1.forward(tape, x)?;
        let q = self.q_proj.forward(tape, &h)?;
        let k = self.k_proj.forward(tape, &h)?;
        let v = self.v_proj.forward(tape, &h)?;
        h = tape.attention(&q, &k, &v, AttentionShape { heads: self.heads, causal: true })?;
        let x = self.out_proj.forward_add(tape, &h, x)?;
        h = self.norm2.forward(tape, &x)?;
        h = self.fc1.forward(tape, &h)?;
        h = tape.activation(self.activation, &h)?;
        self.fc2.forward_add(tape, &h, &x)
    }

    /// In the order in which transformers registers them, which sd-scripts follows.
    fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit(&format!("{path}.self_attn.k_proj"), (&mut self.k_proj).into());
        visit(&format!("{path}.self_attn.v_proj"), (&mut self.v_proj).into());
        visit(&format!("{path}.self_attn.q_proj"), (&mut self.q_proj).into());
        visit(&format!("{path}.self_attn.out_proj"), (&mut self.out_proj).into());
        visit(&format!("{path}.mlp.fc1"), (&mut self.fc1).into());
        visit(&format!("{path}.mlp.fc2"), (&mut self.fc2).into());
    }
}

/// Rows of the pooled outputs in the hidden states of `ids` `[prompts,chunks,length]`: the first end
/// token of each prompt's first chunk (transformers' rule; sd-scripts keeps the first chunk's).
pub fn end_rows(ids: &[u32], chunks: usize, length: usize) -> Vec<u32> {
    let each = (chunks * length).max(1);
    let of_prompt = |(prompt, ids): (usize, &[u32])| {
        let end = ids[..length.min(ids.len())].iter().position(|id| *id == END);
        (prompt * each + end.unwrap_or(0)) as u32
    };
    ids.chunks(each).enumerate().map(of_prompt).collect()
}

/// Joins the chunks of long prompts: `[B·chunks,L,C]` becomes `[B, chunks·(L-2)+2, C]`.
///
/// Each prompt keeps the start token of its first chunk, the bodies of all chunks, and the last
/// token of its last chunk, as in sd-scripts' `get_hidden_states`. (sd-scripts means to treat empty
/// chunks of SD2 otherwise, but compares ids with the end token's text, so that never happens.)
pub fn join_chunks(tape: &Tape, hidden: &Value, chunks: usize) -> EngineResult<Value> {
    let [sequences, length, width] = *hidden.shape() else {
        let detail = format!("hidden states are {:?}", hidden.shape());
        return Err(EngineError::shape("join_chunks", detail));
    };
    if chunks == 0 || sequences == 0 || sequences % chunks != 0 || length < 2 {
        let detail = format!("{chunks} chunks a prompt in {:?}", hidden.shape());
        return Err(EngineError::shape("join_chunks", detail));
    }
    if chunks == 1 {
        return Ok(hidden.clone());
    }
    let rows = joined_rows(sequences / chunks, chunks, length);
    let joined = tape.gather_rows(hidden, &rows)?;
    tape.reshape(&joined, &[sequences / chunks, rows.len() * chunks / sequences, width])
}

fn joined_rows(prompts: usize, chunks: usize, length: usize) -> Vec<u32> {
    let mut rows = Vec::with_capacity(prompts * (chunks * (length - 2) + 2));
    for prompt in 0..prompts {
        let start = prompt * chunks * length;
        rows.push(start as u32);
        for chunk in 0..chunks {
            let body = start + chunk * length;
            rows.extend((body + 1..body + length - 1).map(|row| row as u32));
        }
        rows.push((start + chunks * length - 1) as u32);
    }
    rows
}

/// Factors of the rows of joined hidden states `[B,T,C]` for a weight per token
/// (`weighted_captions`), for [`Tape::scale_rows`].
///
/// `weights` has one entry per token of every chunk, `[prompts,chunks,L]` row-major. The first and
/// the last token of a prompt of several chunks keep their value, as in sd-scripts.
pub fn token_factors(weights: &[f32], prompts: usize, chunks: usize) -> EngineResult<Vec<f32>> {
    if chunks <= 1 {
        return Ok(weights.to_vec());
    }
    let length = weights.len() / (prompts * chunks).max(1);
    if length < 2 || weights.len() != prompts * chunks * length {
        let detail = format!("{} weights for {prompts} prompts of {chunks} chunks", weights.len());
        return Err(EngineError::shape("token_factors", detail));
    }
    let mut factors = Vec::with_capacity(prompts * (chunks * (length - 2) + 2));
    for prompt in weights.chunks(chunks * length) {
        factors.push(1.);
        prompt.chunks(length).for_each(|chunk| factors.extend(&chunk[1..length - 1]));
        factors.push(1.);
    }
    Ok(factors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> ClipConfig {
        ClipConfig { vocabulary: 8, width: 32, inner: 64, layers: 2, heads: 1, ..ClipConfig::sd1() }
    }

    #[test]
    fn a_config_names_what_it_gets_wrong() {
        for (key, value) in [
            ("hidden_act", json!("relu")),
            ("num_attention_heads", json!(5)),
            ("num_attention_heads", json!(0)),
            ("hidden_size", json!(64)),
            ("intermediate_size", json!(32)),
            ("layer_norm_eps", json!("small")),
        ] {
            let json = json!({ key: value });
            let config = ConfigValue { component: COMPONENT, json: &json };
            let message = small().apply(&config).unwrap_err().to_string();
            assert!(message.contains(&format!("`{key}`")), "{message}");
        }
        let json = json!({ "hidden_act": "gelu", "num_attention_heads": 4, "hidden_size": 32 });
        let mut config = small();
        config.apply(&ConfigValue { component: COMPONENT, json: &json }).unwrap();
        assert_eq!((config.activation, config.heads), (Activation::Gelu, 4));
    }

    #[test]
    fn skipping_more_layers_than_there_are_is_an_error() {
        let reader = Reader::listing();
        let model = ClipTextModel::read(&reader, &small()).unwrap();
        for (clip_skip, used) in [(None, 2), (Some(1), 2), (Some(2), 1)] {
            assert_eq!(model.used_layers(clip_skip).unwrap(), used);
        }
        for clip_skip in [0, 3, 100] {
            assert!(model.used_layers(Some(clip_skip)).is_err(), "{clip_skip}");
        }
    }

    #[test]
    fn chunks_are_joined_as_sd_scripts_does() {
        assert_eq!(joined_rows(2, 2, 4), [0, 1, 2, 5, 6, 7, 8, 9, 10, 13, 14, 15]);
    }
}
