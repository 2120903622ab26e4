//! Captions encoded once, before the training, so that the text encoder can leave the card.
//!
//! That is possible where the text encoder is not trained and each image always has the same caption.
//! The hidden states are kept in main memory, in the type of the arithmetic: nothing is lost, as the
//! U-Net reads them in that type.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};
use engine::{DType, Device, Ids, Tape, Tensor};
use half::{bf16, f16};
use models::{TextEncoders, TextOutput, token_factors};

use crate::dataset::caption::{CaptionMoment, caption_at, is_constant};
use crate::dataset::{DatasetGroup, LoaderOptions, LoaderParts};
use crate::inputs::{EncodedPrompts, Prompts, SecondPrompts, Text};
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
    /// Width of SDXL's pooled output, which lies behind the hidden states.
    pooled: Option<usize>,
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

fn key(ids: &[u32], weights: Option<&[f32]>) -> Key {
    let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect();
    (ids.to_vec(), weights.map(bits).unwrap_or_default())
}

/// Ids and weights of `prompts`, one entry for each sample.
fn keys(prompts: &Prompts, samples: usize) -> Vec<Key> {
    let each = (prompts.ids.len() / samples.max(1)).max(1);
    let ids = prompts.ids.chunks(each).enumerate();
    let weights = prompts.weights.as_deref();
    ids.map(|(i, ids)| key(ids, weights.map(|all| &all[i * each..(i + 1) * each]))).collect()
}

impl Encoded {
    /// Encodes `captions`, as the loader of these parts and options gives them. Calls `live` now
    /// and then.
    pub fn new(
        reader: (&TextEncoders, Option<usize>),
        (parts, options): (&LoaderParts, &LoaderOptions),
        captions: &[String],
        live: &dyn Fn(),
    ) -> Result<Self> {
        let chunks = options.token_length.chunks();
        let mut left: Vec<(Key, Option<Vec<u32>>)> = Vec::new();
        let mut known = HashSet::new();
        for caption in captions {
            let tokens = parts.tokens(caption, options)?;
            let key = key(&tokens.ids, tokens.weights.as_deref());
            if known.insert(key.clone()) {
                left.push((key, tokens.ids_2));
            }
        }
        let pooled = reader.0.pooled_width();
        let mut encoded = Self { rows: HashMap::new(), shape: [0, 0], pooled };
        for some in left.chunks(TOGETHER) {
            encoded.add(reader, chunks, some)?;
            live();
        }
        Ok(encoded)
    }

    fn add(
        &mut self,
        (text_encoder, clip_skip): (&TextEncoders, Option<usize>),
        chunks: usize,
        captions: &[(Key, Option<Vec<u32>>)],
    ) -> Result<()> {
        let device: Device = text_encoder.device();
        let ids: Vec<u32> = captions.iter().flat_map(|((ids, _), _)| ids).copied().collect();
        let weights: Vec<f32> = captions
            .iter()
            .flat_map(|((_, bits), _)| bits)
            .map(|bits| f32::from_bits(*bits))
            .collect();
        let factors = match weights.is_empty() {
            true => None,
            false => {
                let factors = token_factors(&weights, captions.len(), chunks)?;
                Some(Tensor::from_f32(device, &[factors.len()], &factors, DType::F32)?)
            }
        };
        let second = self.pooled.map(|pooled| SecondPrompts {
            ids: captions.iter().flat_map(|(_, ids)| ids.iter().flatten()).copied().collect(),
            pooled,
            sizes: Vec::new(),
        });
        let prompts = Prompts { ids, weights: None, chunks, second };
        let ids = prompts.text_ids(&Ids::new(device, &prompts.id_list()?)?)?;
        let text = Text::Tokens { ids, factors };
        let TextOutput { context, pooled } =
            encode_text(&Tape::inference(None), Some(text_encoder), clip_skip, &text)?;
        self.shape = [context.shape()[1], context.shape()[2]];
        let (dtype, each) = (context.tensor().dtype(), self.shape[0] * self.shape[1]);
        let values = context.tensor().to_vec_f32()?;
        let pooled = pooled.map(|pooled| pooled.tensor().to_vec_f32()).transpose()?;
        for (index, (key, _)) in captions.iter().enumerate() {
            let mut row = values[index * each..(index + 1) * each].to_vec();
            if let (Some(pooled), Some(width)) = (&pooled, self.pooled) {
                row.extend(&pooled[index * width..(index + 1) * width]);
            }
            self.rows.insert(key.clone(), Row::new(dtype, &row));
        }
        Ok(())
    }

    /// What the text encoders said of the prompts of `samples` samples.
    pub fn look_up(&self, prompts: &Prompts, samples: usize) -> Result<EncodedPrompts> {
        let [tokens, width] = self.shape;
        let each = tokens * width;
        let (mut values, mut pooled) = (Vec::with_capacity(samples * each), Vec::new());
        for key in keys(prompts, samples) {
            let row = self.rows.get(&key).context("a caption was not encoded in advance")?;
            row.extend(&mut values);
            let hidden = values.len() - self.pooled.unwrap_or(0);
            pooled.extend(values.drain(hidden..));
        }
        let pooled = self.pooled.map(|width| (vec![samples, width], pooled));
        Ok(EncodedPrompts { context: (vec![samples, tokens, width], values), pooled })
    }

    /// Captions, and bytes of main memory that they take.
    pub fn size(&self) -> (usize, usize) {
        (self.rows.len(), self.rows.values().map(Row::bytes).sum())
    }
}
