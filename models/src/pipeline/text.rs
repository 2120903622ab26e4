//! Prompts to hidden states, as sd-scripts' generation scripts read them.
//!
//! `(word:1.2)` weighs the hidden states of a word; the mean of a prompt's states is put back
//! afterwards. Long prompts go through the text encoder in chunks of 75 tokens, each with its begin
//! and end token, and all of a chunk's 77 states are kept. (Training joins chunks in another way,
//! [`crate::join_chunks`], as the reference's training does.)

use engine::{Ids, ParamStore, RowChoice, Tape, Value};

use super::PipelineError;
use crate::prompt::{CHUNK, ClipTokenizer, Tokenizers, parse_weights};
use crate::{TextEncoders, end_rows};

/// Tokens of a chunk without begin and end.
const INNER: usize = CHUNK - 2;

/// SDXL's hidden states are those before the last layer.
const SDXL_SKIP: usize = 2;

/// Who reads prompts.
#[derive(Clone, Copy)]
pub struct TextReader<'m> {
    /// Text to ids.
    pub tokenizers: &'m Tokenizers,
    /// Ids to hidden states.
    pub encoders: &'m TextEncoders,
    /// Values of the adapters in `encoders`, if they have any.
    pub params: Option<&'m ParamStore>,
    /// Layers to leave out at the end, counted as sd-scripts does: 1 leaves out none. `None` is 1; of
    /// SDXL, whose hidden states go without the final layer norm, it is 2.
    pub clip_skip: Option<usize>,
    /// A prompt may have this many chunks (`--max_embeddings_multiples`).
    pub most_chunks: usize,
}

/// Hidden states of one prompt, `[tokens,width]` row-major; SDXL's two text encoders side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Numbers, row by row.
    pub rows: Vec<f32>,
    /// Numbers of a row.
    pub width: usize,
    /// SDXL's pooled output.
    pub pooled: Option<Vec<f32>>,
}

impl Embedding {
    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.width.max(1)
    }
}

/// A prompt, and what SDXL's second text encoder reads in its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt<'p> {
    pub first: &'p str,
    pub second: Option<&'p str>,
}

impl<'p> From<&'p str> for Prompt<'p> {
    fn from(first: &'p str) -> Self {
        Prompt { first, second: None }
    }
}

/// Tokens of a prompt and the weight of each.
struct Tokens {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl TextReader<'_> {
    /// Hidden states of `prompts`, all of as many chunks as the longest of them needs.
    ///
    /// # Errors
    /// A prompt of more tokens than `most_chunks` hold: nothing is cut off silently.
    pub fn read(&self, prompts: &[&str]) -> Result<Vec<Embedding>, PipelineError> {
        let prompts: Vec<Prompt<'_>> = prompts.iter().map(|prompt| Prompt::from(*prompt)).collect();
        let chunks = self.chunks(&prompts)?;
        prompts.iter().map(|prompt| self.read_as(*prompt, chunks)).collect()
    }

    /// Chunks that the longest of `prompts` needs.
    ///
    /// # Errors
    /// As [`TextReader::read`].
    pub(super) fn chunks(&self, prompts: &[Prompt<'_>]) -> Result<usize, PipelineError> {
        let texts = prompts.iter().flat_map(|prompt| [Some(prompt.first), prompt.second]);
        texts
            .flatten()
            .try_fold(1, |most, text| Ok(self.tokens(text)?.ids.len().div_ceil(INNER).max(most)))
    }

    /// Hidden states of a prompt, filled up to so many chunks.
    ///
    /// # Errors
    /// As [`TextReader::read`].
    pub(super) fn read_as(
        &self,
        prompt: Prompt<'_>,
        chunks: usize,
    ) -> Result<Embedding, PipelineError> {
        let chunks = chunks.max(self.chunks(&[prompt])?);
        let first = self.tokens(prompt.first)?;
        let second = prompt.second.map(|text| self.tokens(text)).transpose()?;
        if let Some(params) = self.params {
            params.refresh()?;
        }
        self.encode([&first, second.as_ref().unwrap_or(&first)], chunks)
    }

    fn tokens(&self, prompt: &str) -> Result<Tokens, PipelineError> {
        let mut tokens = Tokens { ids: Vec::new(), weights: Vec::new() };
        for (part, weight) in parse_weights(prompt) {
            let ids = self.tokenizers.first.encode(&part)?;
            tokens.weights.extend(std::iter::repeat_n(weight as f32, ids.len()));
            tokens.ids.extend(ids);
        }
        let most = INNER * self.most_chunks.max(1);
        if tokens.ids.len() > most {
            return Err(PipelineError::LongPrompt {
                tokens: tokens.ids.len(),
                most,
                needed: tokens.ids.len().div_ceil(INNER),
                prompt: prompt.to_owned(),
            });
        }
        Ok(tokens)
    }

    /// Hidden states of what the first text encoder reads and what SDXL's second does.
    fn encode(&self, prompts: [&Tokens; 2], chunks: usize) -> Result<Embedding, PipelineError> {
        let tape = Tape::inference(self.params);
        let device = self.encoders.device();
        let read = |hidden: &Value, tokens: &Tokens| -> Result<Vec<f32>, PipelineError> {
            let mut rows = hidden.tensor().to_vec_f32()?;
            weigh(&mut rows, &tokens.weights_of(chunks), hidden.shape()[2]);
            Ok(rows)
        };
        let first = &self.encoders.first;
        let ids = sequences(&self.tokenizers.first, &prompts[0].ids, chunks);
        let ids = Ids::new(device, &ids)?;
        let (Some(second), Some(tokenizer)) = (&self.encoders.second, &self.tokenizers.second)
        else {
            let hidden = first.forward(&tape, &ids, CHUNK, self.clip_skip)?;
            let rows = read(&hidden, prompts[0])?;
            return Ok(Embedding { rows, width: first.config().width, pooled: None });
        };
        let skip = self.clip_skip.unwrap_or(SDXL_SKIP);
        let left = read(&first.skipping(&tape, &ids, CHUNK, skip)?, prompts[0])?;
        let numbers = sequences(tokenizer, &prompts[1].ids, chunks);
        let ids = Ids::new(device, &numbers)?;
        let before_last = second.penultimate(&tape, &ids, CHUNK)?;
        let ends = end_rows(&numbers, chunks, CHUNK);
        let ends = RowChoice::constant(device, &ends, numbers.len())?;
        let pooled = second.pooled(&tape, &before_last, &ends)?.tensor().to_vec_f32()?;
        let hidden = match skip {
            SDXL_SKIP => before_last,
            _ => second.skipping(&tape, &ids, CHUNK, skip)?,
        };
        let (right, widths) =
            (read(&hidden, prompts[1])?, [first.config().width, second.config().width]);
        let both = left.chunks(widths[0]).zip(right.chunks(widths[1]));
        let rows = both.flat_map(|(left, right)| left.iter().chain(right)).copied().collect();
        Ok(Embedding { rows, width: widths[0] + widths[1], pooled: Some(pooled) })
    }
}

impl Tokens {
    /// The weight of each place of so many chunks.
    fn weights_of(&self, chunks: usize) -> Vec<f32> {
        let mut of_body = self.weights.clone();
        of_body.resize(INNER * chunks, 1.);
        let mut weights = Vec::with_capacity(CHUNK * chunks);
        for part in of_body.chunks(INNER) {
            weights.push(1.);
            weights.extend(part);
            weights.push(1.);
        }
        weights
    }
}

/// Ids of a prompt's chunks, `[chunks,77]`, as gen_img cuts them: text, end, padding; each chunk begins
/// with the begin token. Where a tokenizer pads with the end token, each ends with that; else only a
/// chunk whose last place is text, and a chunk of padding begins with the end token.
fn sequences(tokenizer: &ClipTokenizer, text: &[u32], chunks: usize) -> Vec<u32> {
    let (begin, end, pad) = (tokenizer.begin_id(), tokenizer.end_id(), tokenizer.pad_id());
    let mut whole = vec![begin];
    whole.extend(text);
    whole.push(end);
    whole.resize(INNER * chunks + 2, pad);
    let mut ids = Vec::with_capacity(CHUNK * chunks);
    for chunk in 0..chunks {
        let mut part = whole[chunk * INNER..][..CHUNK].to_vec();
        part[0] = begin;
        if pad == end || ![end, pad].contains(&part[CHUNK - 1]) {
            part[CHUNK - 1] = end;
        }
        if part[1] == pad && chunks > 1 {
            part[1] = end;
        }
        ids.extend(part);
    }
    ids
}

/// Multiplies each row by its weight, then all by what restores the mean.
fn weigh(rows: &mut [f32], weights: &[f32], width: usize) {
    if weights.iter().all(|weight| *weight == 1.) {
        return;
    }
    let mean = |rows: &[f32]| rows.iter().copied().map(f64::from).sum::<f64>();
    let before = mean(rows);
    for (row, weight) in rows.chunks_mut(width).zip(weights) {
        row.iter_mut().for_each(|value| *value *= weight);
    }
    let factor = (before / mean(rows)) as f32;
    rows.iter_mut().for_each(|value| *value *= factor);
}
