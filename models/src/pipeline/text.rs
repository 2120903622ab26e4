//! Prompts to hidden states, as sd-scripts' generation scripts read them.
//!
//! `(word:1.2)` weighs the hidden states of a word; the mean of a prompt's states is put back
//! afterwards. Long prompts go through the text encoder in chunks of 75 tokens, each with its begin
//! and end token, and all of a chunk's 77 states are kept. (Training joins chunks in another way,
//! [`crate::join_chunks`], as the reference's training does.)

use engine::{Ids, ParamStore, Tape};

use super::PipelineError;
use crate::ClipTextModel;
use crate::prompt::{CHUNK, ClipTokenizer, parse_weights};

/// Tokens of a chunk without begin and end.
const INNER: usize = CHUNK - 2;

/// Who reads prompts.
#[derive(Clone, Copy)]
pub struct TextReader<'m> {
    /// Text to ids.
    pub tokenizer: &'m ClipTokenizer,
    /// Ids to hidden states.
    pub encoder: &'m ClipTextModel,
    /// Values of the adapters in `encoder`, if it has any.
    pub params: Option<&'m ParamStore>,
    /// Layers to leave out at the end, counted as sd-scripts does: `None` and 1 leave out none.
    pub clip_skip: Option<usize>,
    /// A prompt may have this many chunks (`--max_embeddings_multiples`).
    pub most_chunks: usize,
}

/// Hidden states of one prompt, `[tokens,width]` row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Numbers, row by row.
    pub rows: Vec<f32>,
    /// Numbers of a row.
    pub width: usize,
}

impl Embedding {
    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.width.max(1)
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
        let chunks = self.chunks(prompts)?;
        prompts.iter().map(|prompt| self.read_as(prompt, chunks)).collect()
    }

    /// Chunks that the longest of `prompts` needs.
    ///
    /// # Errors
    /// As [`TextReader::read`].
    pub fn chunks(&self, prompts: &[&str]) -> Result<usize, PipelineError> {
        prompts.iter().try_fold(1, |most, prompt| {
            Ok(self.tokens(prompt)?.ids.len().div_ceil(INNER).max(most))
        })
    }

    /// Hidden states of a prompt, filled up to so many chunks.
    ///
    /// # Errors
    /// As [`TextReader::read`].
    pub fn read_as(&self, prompt: &str, chunks: usize) -> Result<Embedding, PipelineError> {
        let tokens = self.tokens(prompt)?;
        let needed = tokens.ids.len().div_ceil(INNER);
        self.encode(&tokens, chunks.max(needed))
    }

    fn tokens(&self, prompt: &str) -> Result<Tokens, PipelineError> {
        let mut tokens = Tokens { ids: Vec::new(), weights: Vec::new() };
        for (part, weight) in parse_weights(prompt) {
            let ids = self.tokenizer.encode(&part)?;
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

    fn encode(&self, tokens: &Tokens, chunks: usize) -> Result<Embedding, PipelineError> {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        let mut body = tokens.ids.clone();
        // As the reference pads: the end token follows the text, then padding.
        let padding = INNER * chunks - body.len();
        body.extend(std::iter::once(self.tokenizer.end_id()).take(padding));
        body.resize(INNER * chunks, self.tokenizer.pad_id());
        let mut of_body = tokens.weights.clone();
        of_body.resize(INNER * chunks, 1.);
        for (part, part_weights) in body.chunks(INNER).zip(of_body.chunks(INNER)) {
            ids.push(self.tokenizer.begin_id());
            ids.extend(part);
            // The last chunk ends with padding where there is any, the others with the end token.
            let is_last = ids.len() + 1 == CHUNK * chunks;
            ids.push(match is_last && padding > 0 {
                true => self.tokenizer.pad_id(),
                false => self.tokenizer.end_id(),
            });
            weights.push(1.);
            weights.extend(part_weights);
            weights.push(1.);
        }
        if let Some(params) = self.params {
            params.refresh()?;
        }
        let tape = Tape::inference(self.params);
        let ids = Ids::new(self.encoder.device(), &ids)?;
        let hidden = self.encoder.forward(&tape, &ids, CHUNK, self.clip_skip)?;
        let mut rows = hidden.tensor().to_vec_f32()?;
        let width = self.encoder.config().width;
        weigh(&mut rows, &weights, width);
        Ok(Embedding { rows, width })
    }
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
