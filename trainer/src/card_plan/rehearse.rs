//! A run as it is planned, on a recording card that enforces the limit.
//!
//! A plan counts the bytes of buffers; what the allocator takes of a card is more, as it cuts segments
//! into pieces. Whether that fits is tried out instead of guessed.

use anyhow::{Context, Result};
use engine::cuda::CardMemory;
use engine::cuda::driver::CardFacts;
use engine::cuda::recorder;
use engine::{Checkpointing, DType, EngineError};
use models::ModelError;

use super::CONTEXT_BYTES;
use super::measure::{Recording, StepShape, Subject, VaeRecording};
use crate::optimizer::Choice;

/// What is planned, as far as it does not change from trial to trial.
#[derive(Clone, Copy)]
pub struct Rehearsal<'a> {
    /// What the run does.
    pub subject: Subject<'a>,
    /// The card.
    pub facts: &'a CardFacts,
    /// Bytes that the process may use.
    pub limit: usize,
    /// What the U-Net's frozen weights are kept in.
    pub stored: DType,
    /// The optimizer.
    pub optimizer: &'a Choice,
    /// Images `[batch,height,width]` that are encoded together before the training.
    pub images: Option<[usize; 3]>,
}

impl Rehearsal<'_> {
    /// Encodes images and captions, loads the models and takes two steps, `others` bytes less than the
    /// limit at hand. What the memory was at the end; `None` if it did not suffice.
    pub fn run(
        &self,
        shape: StepShape,
        how: &Checkpointing,
        others: usize,
    ) -> Result<Option<CardMemory>> {
        let outcome = self.try_run(shape, how, self.limit.saturating_sub(others));
        match outcome {
            Ok(memory) => Ok(Some(memory)),
            Err(error) if is_full(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn try_run(&self, shape: StepShape, how: &Checkpointing, limit: usize) -> Result<CardMemory> {
        let limit = limit.saturating_sub(CONTEXT_BYTES);
        let opened = recorder::open_counted(self.facts.clone(), limit)?;
        let card = opened.0.card().context("a recording card is a card")?;
        if let Some(images) = self.images {
            let vae = self.subject.parts.vae;
            VaeRecording::on(opened.0, vae, self.subject.vae_dtype)?.encode(images)?;
            card.release_idle();
        }
        let mut recording = Recording::on(opened, self.subject, self.stored, self.optimizer)?;
        recording.rehearse(shape, how)?;
        Ok(card.memory_stats())
    }
}

/// Whether the memory did not suffice.
fn is_full(error: &anyhow::Error) -> bool {
    let full = |error: &EngineError| matches!(error, EngineError::OutOfMemory { .. });
    let of_model = |error: &ModelError| matches!(error, ModelError::Engine(error) if full(error));
    error.downcast_ref().is_some_and(full) || error.downcast_ref().is_some_and(of_model)
}
