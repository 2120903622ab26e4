//! Hidden states of prompts, kept as long as the text encoder stays as it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::text::Prompt;
use super::{Embedding, PipelineError, TextReader};

/// Prompts that are remembered; more than a prompt file has at a time, some 60 MB.
const MOST: usize = 256;

/// What an embedding depends on beside the text encoder: the prompt, that of the second encoder,
/// chunks, and layers left out.
type Key = (String, Option<String>, usize, Option<usize>);

/// The prompts of a pipeline.
#[derive(Default)]
pub(super) struct Texts {
    known: Mutex<HashMap<Key, Arc<Embedding>>>,
}

impl Texts {
    /// Hidden states of prompt and negative prompt, of as many chunks as the longer needs.
    pub fn read(
        &self,
        reader: &TextReader<'_>,
        prompts: [Prompt<'_>; 2],
    ) -> Result<[Arc<Embedding>; 2], PipelineError> {
        let chunks = reader.chunks(&prompts)?;
        let [prompt, negative] = prompts.map(|prompt| self.read_one(reader, prompt, chunks));
        Ok([prompt?, negative?])
    }

    fn read_one(
        &self,
        reader: &TextReader<'_>,
        prompt: Prompt<'_>,
        chunks: usize,
    ) -> Result<Arc<Embedding>, PipelineError> {
        let second = prompt.second.map(str::to_owned);
        let key = (prompt.first.to_owned(), second, chunks, reader.clip_skip);
        // Whoever panicked with the lock left whole entries behind.
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = known().get(&key) {
            return Ok(embedding.clone());
        }
        let embedding = Arc::new(reader.read_as(prompt, chunks)?);
        let mut known = known();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, embedding.clone());
        Ok(embedding)
    }

    /// The text encoder is no longer what it was.
    pub fn forget(&mut self) {
        self.known.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many prompts are remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
