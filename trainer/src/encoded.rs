//! Captions encoded once, before the training, so that the text encoder can leave the card.
//!
//! That is possible where the text encoder is not trained and each image always has the same caption.
//! The hidden states are kept in main memory, in the type of the arithmetic: nothing is lost, as the
//! U-Net reads them in that type.

use std::collections::HashMap;

use anyhow::{Context, Result};
use engine::{DType, Device, Ids, Tape, Tensor};
use half::{bf16, f16};
use models::{ClipTextModel, token_factors};

use crate::dataset::caption::{CaptionMoment, caption_at, is_constant};
use crate::dataset::{DatasetGroup, LoaderOptions, LoaderParts};
use crate::inputs::{Array, Prompts, Text};
use crate::rng::{Purpose, stream};
use crate::step::encode_text;

/// Captions that go through the text encoder together.
const TOGETHER: usize = 16;

/// Ids and the bits of the weights of a caption.
type Key = (Vec<u32>, Vec<u32>);

/// Hidden states of captions.
pub struct Encoded {
    rows: HashMap<Key, Row>,
    /// Tokens and width of each.
    shape: [usize; 2],
}

enum Row {
    Single(Vec<f32>),
    Bfloat(Vec<bf16>),
    Half(Vec<f16>),
}

impl Row {
    fn new(dtype: DType, values: &[f32]) -> Self {
        match dtype {
            DType::BF16 => Self::Bfloat(values.iter().map(|x| bf16::from_f32(*x)).collect()),
            DType::F16 => Self::Half(values.iter().map(|x| f16::from_f32(*x)).collect()),
            _ => Self::Single(values.to_vec()),
        }
    }

    fn extend(&self, out: &mut Vec<f32>) {
        match self {
            Self::Single(values) => out.extend_from_slice(values),
            Self::Bfloat(values) => out.extend(values.iter().map(|x| x.to_f32())),
            Self::Half(values) => out.extend(values.iter().map(|x| x.to_f32())),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Single(values) => values.len() * 4,
            Self::Bfloat(values) => values.len() * 2,
            Self::Half(values) => values.len() * 2,
        }
    }
}

/// The captions of all images of a group; `None` if one can differ from use to use.
pub fn constant_captions(group: &DatasetGroup) -> Option<Vec<String>> {
    let moment = CaptionMoment { epoch: 0, step: 0, max_train_steps: 1 };
    let mut captions = Vec::new();
    for dataset in &group.datasets {
        for image in &dataset.images {
            let options = &dataset.plan.subsets[image.subset].options;
            if !is_constant(options) {
                return None;
            }
            let mut rng = stream(0, Purpose::Caption, 0, 0);
            captions.push(caption_at(&image.caption, options, moment, &mut rng));
        }
    }
    Some(captions)
}

/// Ids and weights of `prompts`, one entry for each sample.
fn keys(prompts: &Prompts, samples: usize) -> Vec<Key> {
    let each = prompts.ids.len() / samples.max(1);
    let ids = prompts.ids.chunks(each.max(1));
    match &prompts.weights {
        None => ids.map(|ids| (ids.to_vec(), Vec::new())).collect(),
        Some(weights) => {
            let bits = |weights: &[f32]| weights.iter().map(|w| w.to_bits()).collect();
            ids.zip(weights.chunks(each.max(1))).map(|(ids, w)| (ids.to_vec(), bits(w))).collect()
        }
    }
}

impl Encoded {
    /// Encodes `captions`, as the loader of these parts and options gives them. Calls `live` now
    /// and then.
    pub fn new(
        (text_encoder, clip_skip): (&ClipTextModel, Option<usize>),
        (parts, options): (&LoaderParts, &LoaderOptions),
        captions: &[String],
        live: &dyn Fn(),
    ) -> Result<Self> {
        let chunks = options.token_length.chunks();
        let mut left: Vec<Key> = Vec::new();
        let mut known = std::collections::HashSet::new();
        for caption in captions {
            let (ids, weights) = parts.tokens(caption, options)?;
            let prompts = Prompts { ids, weights, chunks };
            left.extend(keys(&prompts, 1).into_iter().filter(|key| known.insert(key.clone())));
        }
        let mut encoded = Self { rows: HashMap::new(), shape: [0, 0] };
        for some in left.chunks(TOGETHER) {
            encoded.add(text_encoder, clip_skip, chunks, some)?;
            live();
        }
        Ok(encoded)
    }

    fn add(
        &mut self,
        text_encoder: &ClipTextModel,
        clip_skip: Option<usize>,
        chunks: usize,
        keys: &[Key],
    ) -> Result<()> {
        let device: Device = text_encoder.device();
        let ids: Vec<u32> = keys.iter().flat_map(|(ids, _)| ids).copied().collect();
        let weights: Vec<f32> =
            keys.iter().flat_map(|(_, bits)| bits).map(|bits| f32::from_bits(*bits)).collect();
        let factors = match weights.is_empty() {
            true => None,
            false => {
                let factors = token_factors(&weights, keys.len(), chunks)?;
                Some(Tensor::from_f32(device, &[factors.len()], &factors, DType::F32)?)
            }
        };
        let text = Text::Tokens { ids: Ids::new(device, &ids)?, factors, chunks };
        let hidden = encode_text(&Tape::inference(None), Some(text_encoder), clip_skip, &text)?;
        let (tensor, len) = (hidden.tensor(), hidden.tensor().len() / keys.len());
        self.shape = [hidden.shape()[1], hidden.shape()[2]];
        let values = tensor.to_vec_f32()?;
        for (key, row) in keys.iter().zip(values.chunks(len)) {
            self.rows.insert(key.clone(), Row::new(tensor.dtype(), row));
        }
        Ok(())
    }

    /// The hidden states of the prompts of `samples` samples, `[B,T,C]`.
    pub fn look_up(&self, prompts: &Prompts, samples: usize) -> Result<Array> {
        let [tokens, width] = self.shape;
        let mut values = Vec::with_capacity(samples * tokens * width);
        for key in keys(prompts, samples) {
            let row = self.rows.get(&key).context("a caption was not encoded in advance")?;
            row.extend(&mut values);
        }
        Ok((vec![samples, tokens, width], values))
    }

    /// Captions, and bytes of main memory that they take.
    pub fn size(&self) -> (usize, usize) {
        (self.rows.len(), self.rows.values().map(Row::bytes).sum())
    }
}
