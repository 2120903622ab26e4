//! What is said of a run that does not fit: what it takes at least, and what would help.

use anyhow::{Result, bail};
use engine::DType;
use engine::cuda::driver::CardFacts;

use super::choose::{Steps, Wishes, levels};
use super::measure::{Recording, StepShape, Subject, VaeRecording};
use super::{CardPlan, OVERHEAD};
use crate::memory::show_bytes;

/// Refuses a limit that leaves nothing for tensors.
pub(super) fn refuse_too_little(limit: usize) -> Result<()> {
    if limit > OVERHEAD {
        return Ok(());
    }
    bail!(
        "a process takes at least {} of a card before its first tensor, it may use: {}\nhint: close \
         what else uses the card, or raise `vram_limit`",
        show_bytes(OVERHEAD),
        show_bytes(limit)
    )
}

/// Says what an image takes that the VAE cannot encode.
pub(super) fn refuse_encoding(
    needs: usize,
    limit: usize,
    [height, width]: [usize; 2],
) -> Result<()> {
    bail!(
        "to encode an image of {width}x{height} takes {} of the card, it may use: {}\nhint: lower \
         the resolution, or cache the latents on another machine with `cache_latents_to_disk`",
        show_bytes(needs),
        show_bytes(limit)
    )
}

/// Says what the least is that the run takes, and what would make it fit.
pub(super) fn refuse(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    (smallest, limit): (usize, usize),
) -> Result<CardPlan> {
    let mut hints = Vec::new();
    let largest = wishes.shapes.iter().map(|shape| shape.batch).max().unwrap_or(1);
    let mut batch = largest;
    while batch > 1 && hints.is_empty() {
        batch /= 2;
        let smaller = |shape: &StepShape| StepShape { batch: shape.batch.min(batch), ..*shape };
        let shapes: Vec<StepShape> = wishes.shapes.iter().map(smaller).collect();
        let fewer = Wishes { shapes: &shapes, images: wishes.images, ..*wishes };
        if fits_at_least(subject, &fewer, facts, limit)? {
            hints.push(format!(
                "`train_batch_size = {batch}` with `gradient_accumulation_steps = {}` fits",
                largest.div_ceil(batch)
            ));
        }
    }
    if subject.dtype == DType::F32 {
        hints.push("`mixed_precision = \"bf16\"` halves weights and activations".to_owned());
    }
    if !subject.encoded {
        hints.push("`network_train_unet_only` leaves the text encoder untrained".to_owned());
    }
    hints.push("a lower resolution or `network_dim` takes less".to_owned());
    bail!(
        "the run takes at least {} of the card with every block checkpointed{}, it may use: \
         {}\nhint: {}",
        show_bytes(smallest),
        if wishes.eight_bit.is_some() { ", 8-bit AdamW and `fp8_base`" } else { " and `fp8_base`" },
        show_bytes(limit),
        hints.join("; ")
    )
}

/// Whether the smallest way fits.
fn fits_at_least(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    limit: usize,
) -> Result<bool> {
    let Some(level) = levels(wishes, subject.dtype).pop() else { return Ok(false) };
    let mut recording = Recording::new(subject, facts, DType::F8, level.optimizer)?;
    let encoding = match wishes.images.1 {
        true => 0,
        false => VaeRecording::new(subject.parts.vae, facts, subject.vae_dtype)?
            .encode(wishes.images.0)?,
    };
    let resident = recording.resident.total() + encoding;
    let mut steps = Steps::new(&mut recording, wishes.shapes)?;
    Ok(OVERHEAD + resident + steps.least()?.total() <= limit)
}
