//! The memory of a card is planned: what a run takes is measured on a recording card, and only as
//! much is given up as the limit asks for.
//!
//! In this order: nothing; blocks are checkpointed, those first that keep most for what it costs to
//! compute them again; the optimizer's state in 8 bits, where it is AdamW's; the frozen U-Net in 8
//! bits; both. What cannot fit then is refused with numbers. Checkpointing takes more time than the
//! others, and yet comes first: it alone gives the same weights to the bit. Whoever wants the time
//! back asks for `fp8_base`.

mod choose;
mod measure;
mod refuse;
mod rehearse;
mod run;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_sdxl;

use anyhow::{Result, bail};
use engine::Checkpointing;
use engine::cuda::driver::{CardFacts, WORKSPACE};

pub use self::choose::{Wishes, choose};
pub use self::measure::{Parts, Recording, Resident, StepShape, Subject, VaeRecording};
pub use self::rehearse::Rehearsal;
pub use self::run::{Target, Work, plan_run};
use crate::memory::show_bytes;
use crate::options::Options;
use crate::samples::PictureBytes;

/// Bytes that a process takes of a card before its first tensor: the context, the kernels, and what
/// cuDNN and cuBLASLt load. An allowance: it waits for a measurement on a card.
pub const CONTEXT_BYTES: usize = 400 << 20;

/// What no tensor can have of a limit.
pub const OVERHEAD: usize = CONTEXT_BYTES + WORKSPACE;

/// What `vram_limit` leaves for tensors and the libraries' scratch: the context comes on top.
pub fn limit_beside_context(options: &Options) -> Option<usize> {
    options.vram_limit.map(|limit| limit.bytes.saturating_sub(CONTEXT_BYTES))
}

/// Name of the component that makes room for other work between steps.
const ARENA: &str = "arena of a step";

/// A component of a run on the card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// What it takes.
    pub bytes: usize,
    /// How it is kept.
    pub note: String,
}

/// What was chosen so that the run fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Blocks that are computed again in the backward pass.
    pub checkpointing: Checkpointing,
    /// AdamW's state is kept in 8 bits.
    pub eight_bit: bool,
    /// The frozen U-Net is kept in 8 bits.
    pub fp8: bool,
    /// Images that the VAE encodes together before the training, where fewer than asked for.
    pub vae_batch: Option<usize>,
    /// Sample pictures are decoded in tiles.
    pub tiled_samples: bool,
}

/// A run's use of its card.
#[derive(Clone, Debug)]
pub struct CardPlan {
    /// What was chosen.
    pub chosen: Chosen,
    /// Components of the training; they are on the card at the same time.
    pub rows: Vec<Row>,
    /// Most bytes while latents are cached, before the training; all else is not there yet.
    pub caching: Option<usize>,
    /// Most bytes while captions are encoded, before the U-Net is there.
    pub captions: Option<usize>,
    /// Most bytes while a sample picture is made, all that stays on the card included; the arena of
    /// the steps makes room.
    pub sampling: Option<usize>,
    /// Bytes that the process may use.
    pub limit: usize,
    /// What was chosen and why, and what card it is planned for.
    pub notes: Vec<String>,
}

impl CardPlan {
    /// Bytes of the training.
    pub fn training(&self) -> usize {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    /// Most bytes at any time.
    pub fn peak(&self) -> usize {
        let before = self.caching.into_iter().chain(self.captions).max();
        let before = before.map_or(0, |bytes| bytes + OVERHEAD);
        self.training().max(before).max(self.sampling.unwrap_or(0))
    }

    /// Takes sample pictures into account: decoded in tiles where the whole does not fit; refuses
    /// those that do not fit at all.
    pub fn add_samples(&mut self, picture: PictureBytes) -> Result<()> {
        let arena = self.rows.iter().filter(|row| row.name == ARENA).map(|row| row.bytes);
        let kept = self.training() - arena.sum::<usize>();
        let (whole, tiled) = (kept + picture.most(), kept + picture.most_in_tiles());
        let [width, height] = picture.size;
        if tiled > self.limit {
            bail!(
                "to make a sample picture of {width}x{height} takes {} of the card with what the \
                 training keeps there, it may use: {}\nhint: make it smaller (`--w`, `--h` in \
                 `sample_prompts`), or make no samples",
                show_bytes(tiled),
                show_bytes(self.limit)
            );
        }
        self.chosen.tiled_samples = whole > self.limit;
        if self.chosen.tiled_samples {
            let limit = show_bytes(self.limit);
            self.notes.push(format!("samples are decoded in tiles to fit {limit}"));
        }
        self.sampling = Some(if self.chosen.tiled_samples { tiled } else { whole });
        Ok(())
    }

    /// Lines of a table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} of {} in the training",
            show_bytes(self.training()),
            show_bytes(self.limit)
        );
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for Row { name, bytes, note } in &self.rows {
            text += &format!("\n{name:<width$}  {:>9}  {note}", show_bytes(*bytes));
        }
        if let Some(caching) = self.caching {
            text += &format!("\nbefore that, to cache latents: {}", show_bytes(caching + OVERHEAD));
        }
        if let Some(captions) = self.captions {
            let bytes = show_bytes(captions + OVERHEAD);
            text += &format!("\nbefore that, to encode captions: {bytes}");
        }
        if let Some(sampling) = self.sampling {
            text += &format!("\nbetween steps, to make samples: {}", show_bytes(sampling));
        }
        for note in &self.notes {
            text += &format!("\n{note}");
        }
        text
    }
}

/// A card to plan for where there is none: of the usual kind with 8 GB (GA104, sm_86).
pub fn imagined_card(memory: usize) -> CardFacts {
    CardFacts {
        name: "an imagined card".into(),
        label: "cuda".into(),
        capability: (8, 6),
        processors: 46,
        memory,
        shared_memory: 99 << 10,
        computes: false,
    }
}
