//! Captions encoded once, before the training, so that the text encoders can leave the memory.
//!
//! That is possible where the text encoder is not trained and each image always has the same caption.
//! The hidden states are kept in the type of the arithmetic: nothing is lost, as the U-Net reads them
//! in that type. Where they lie is said in [`crate::text_cache`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use engine::{DType, Device, Ids, Tape, Tensor};
use formats::safetensors_file::SafetensorsFile;
use formats::{Dtype, TensorFile, bytes_from_f32, extend_f32};
use models::{TextEncoders, TextOutput, token_factors};

use crate::base::Base;
use crate::dataset::caption::{CaptionMoment, caption_at, is_constant};
use crate::dataset::{DatasetError, DatasetGroup, Tokens};
use crate::inputs::{CHUNK, EncodedPrompts, Prompts, SecondPrompts, Text};
use crate::rng::{Purpose, stream};
use crate::step::encode_text;
use crate::text_cache::file;

/// Ids and the bits of the weights of a caption.
pub type Key = (Vec<u32>, Vec<u32>);

/// The captions of all images of a group, in the order of datasets and images; `None` if one can
/// differ from use to use.
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

/// The key of a caption's tokens.
pub fn key(ids: &[u32], weights: Option<&[f32]>) -> Key {
    let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect();
    (ids.to_vec(), weights.map(bits).unwrap_or_default())
}

/// The keys of `prompts`, one for each sample.
fn keys(prompts: &Prompts, samples: usize) -> Vec<Key> {
    let each = (prompts.ids.len() / samples.max(1)).max(1);
    let ids = prompts.ids.chunks(each).enumerate();
    let weights = prompts.weights.as_deref();
    ids.map(|(i, ids)| key(ids, weights.map(|all| &all[i * each..(i + 1) * each]))).collect()
}

/// What the text encoders say of one caption: hidden states, behind them SDXL's pooled output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Rows of the hidden states.
    pub tokens: usize,
    /// Their width.
    pub width: usize,
    /// Width of SDXL's pooled output.
    pub pooled: Option<usize>,
    /// Type of the numbers.
    pub dtype: Dtype,
}

impl Form {
    /// Of the text encoders of `base`, for captions of so many chunks.
    pub fn new(base: &Base, chunks: usize) -> Self {
        let second = base.text_encoder_2.as_ref();
        Self {
            // Only the outermost begin and end of joined chunks are kept.
            tokens: chunks * (CHUNK - 2) + 2,
            width: base.text_encoder.width + second.map_or(0, |second| second.width),
            pooled: base.pooled_width(),
            dtype: match base.dtype {
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
                _ => Dtype::F32,
            },
        }
    }

    /// Numbers of a caption.
    pub fn len(&self) -> usize {
        self.tokens * self.width + self.pooled.unwrap_or(0)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a caption.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

/// Where the bytes of a caption are.
pub enum Row {
    /// In memory of this rank.
    Memory(Vec<u8>),
    /// One of the rows of a mapped file that the ranks of this host share.
    Shared(Arc<SafetensorsFile>, usize),
    /// In a file of its own beside an image; read when it is needed.
    Beside(PathBuf),
}

/// Name of the tensor of [`Row::Shared`], `[rows, bytes]`.
pub const ROWS: &str = "rows";

/// What the text encoders say of captions.
pub struct Encoded {
    rows: HashMap<Key, Row>,
    form: Form,
}

impl Encoded {
    /// Of these rows.
    pub fn new(rows: HashMap<Key, Row>, form: Form) -> Self {
        Self { rows, form }
    }

    /// What the text encoders said of the prompts of `samples` samples.
    ///
    /// # Errors
    /// A caption that is not there; a file that went bad or away since the run began.
    pub fn look_up(&self, prompts: &Prompts, samples: usize) -> Result<EncodedPrompts> {
        let Form { tokens, width, pooled, .. } = self.form;
        let (mut hidden, mut others) = (Vec::with_capacity(samples * tokens * width), Vec::new());
        let mut numbers = Vec::with_capacity(self.form.len());
        for key in keys(prompts, samples) {
            let row = self.rows.get(&key).context("a caption was not encoded in advance")?;
            numbers.clear();
            self.read(row, &mut numbers)?;
            ensure!(numbers.len() == self.form.len(), "an encoded caption has the wrong length");
            hidden.extend_from_slice(&numbers[..tokens * width]);
            others.extend_from_slice(&numbers[tokens * width..]);
        }
        let pooled = pooled.map(|width| (vec![samples, width], others));
        Ok(EncodedPrompts { context: (vec![samples, tokens, width], hidden), pooled })
    }

    fn read(&self, row: &Row, out: &mut Vec<f32>) -> Result<()> {
        let dtype = self.form.dtype;
        match row {
            Row::Memory(bytes) => extend_f32(dtype, bytes, out),
            Row::Shared(file, index) => {
                let each = self.form.bytes();
                let view = file.view(ROWS)?;
                let bytes = view.data.get(index * each..(index + 1) * each);
                extend_f32(dtype, bytes.context("a shared caption is missing")?, out);
            }
            Row::Beside(path) => match file::read(path, &self.form) {
                Ok(bytes) => extend_f32(dtype, &bytes, out),
                Err(problem) => bail!(
                    "the cached text encoder output `{}` cannot be used: {problem}\nhint: remove \
                     it and start again, it is made anew",
                    path.display()
                ),
            },
        }
        Ok(())
    }

    /// Captions, and bytes that they take.
    pub fn size(&self) -> (usize, usize) {
        (self.rows.len(), self.rows.len() * self.form.bytes())
    }
}

/// A caption as the text encoders read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    /// As it is written.
    pub text: String,
    /// Its tokens.
    pub tokens: Tokens,
}

impl Caption {
    /// What it is found by.
    pub fn key(&self) -> Key {
        key(&self.tokens.ids, self.tokens.weights.as_deref())
    }
}

/// What the text encoders say of `captions`: the bytes of each. A caption's numbers do not depend on
/// those it is encoded with.
pub fn encode_captions(
    (encoders, clip_skip): (&TextEncoders, Option<usize>),
    captions: &[&Caption],
    form: &Form,
) -> Result<Vec<Vec<u8>>> {
    let device: Device = encoders.device();
    let mut ids = Vec::new();
    let (mut ids_2, mut weights) = (Vec::new(), Vec::new());
    for Caption { tokens, .. } in captions {
        ids.extend_from_slice(&tokens.ids);
        ids_2.extend(tokens.ids_2.iter().flatten());
        weights.extend(tokens.weights.iter().flatten());
    }
    let chunks = ids.len() / (CHUNK * captions.len()).max(1);
    let factors = match weights.is_empty() {
        true => None,
        false => {
            let factors = token_factors(&weights, captions.len(), chunks)?;
            Some(Tensor::from_f32(device, &[factors.len()], &factors, DType::F32)?)
        }
    };
    let second = form.pooled.map(|pooled| SecondPrompts { ids: ids_2, pooled, sizes: Vec::new() });
    let prompts = Prompts { ids, weights: None, chunks, second };
    let ids = prompts.text_ids(&Ids::new(device, &prompts.id_list()?)?)?;
    let text = Text::Tokens { ids, factors };
    let TextOutput { context, pooled } =
        encode_text(&Tape::inference(None), Some(encoders), clip_skip, &text)?;
    let shape = context.shape();
    ensure!(
        shape == [captions.len(), form.tokens, form.width],
        "the text encoders gave the shape {shape:?}, not: {:?}",
        [captions.len(), form.tokens, form.width]
    );
    let hidden = context.tensor().to_vec_f32()?;
    let pooled = pooled.map(|pooled| pooled.tensor().to_vec_f32()).transpose()?;
    let (each, width) = (form.tokens * form.width, form.pooled.unwrap_or(0));
    let mut rows = Vec::with_capacity(captions.len());
    for index in 0..captions.len() {
        let mut row = hidden[index * each..(index + 1) * each].to_vec();
        if let Some(pooled) = &pooled {
            row.extend(&pooled[index * width..(index + 1) * width]);
        }
        if let Some(caption) = row.iter().any(|x| !x.is_finite()).then(|| &captions[index].text) {
            let problem = format!(
                "the text encoders' output is not finite for the caption: `{caption}`\nhint: \
                 `mixed_precision = \"bf16\"` or `\"no\"` has the range that this model needs, or \
                 its file is damaged"
            );
            return Err(DatasetError::TextOutputs(problem).into());
        }
        rows.push(bytes_from_f32(&row, form.dtype)?);
    }
    Ok(rows)
}
