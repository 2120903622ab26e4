//! What a rank takes of main memory where the CPU computes: planned before, compared after.
//!
//! The CPU and a card keep the same tensors, so a step is measured as for a card: its host code runs
//! on a device that only records. Kernels of the CPU have no workspace beyond what a core's cache
//! holds, and the pool keeps no more idle buffers than were once in use together.

use anyhow::Result;
use engine::Device;

use crate::base::Base;
use crate::card_plan::{Recording, StepShape, VaeRecording, Work, imagined_card};
use crate::dataset::DatasetGroup;
use crate::memory::{resident, show_bytes};
use crate::network::PreparedNetwork;
use crate::optimizer;
use crate::options::Options;
use crate::plan::Plan;
use crate::text_cache::bytes_in_memory;
use crate::world::World;

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// The program, its lists of images, and files' headers.
    pub program: usize,
    /// Frozen weights in the type of the arithmetic, and captions that were encoded in advance.
    pub weights: usize,
    /// LoRA weights, gradients and optimizer state.
    pub trainable: usize,
    /// What a step keeps for its backward pass and works with.
    pub step: usize,
    /// What a sample picture takes between steps.
    pub samples: usize,
    /// The VAE at work, where latents are cached before the training: nothing else is there then.
    pub caching: usize,
}

impl HostPlan {
    /// Measures a run.
    pub fn new(
        options: &Options,
        base: &Base,
        groups: (&DatasetGroup, Option<&DatasetGroup>, World),
        (plan, prepared): (&Plan, &PreparedNetwork),
    ) -> Result<Self> {
        let work = Work::of(options, base, groups, prepared, Device::Cpu)?;
        let subject = work.subject;
        // Its state is counted by the network: not every optimizer runs on a card.
        let stand_in = optimizer::choose("AdamW", &[])?;
        let card = imagined_card(usize::MAX);
        let mut recording = Recording::new(subject, &card, subject.dtype, &stand_in)?;
        let mut step = 0;
        for shape in largest(&work.shapes) {
            let (trace, inputs) = recording.step(shape, &plan.checkpointing)?;
            // The next batch waits.
            step = step.max(trace.peak() + 2 * inputs);
        }
        let vae = VaeRecording::new(subject.parts.vae, &card, subject.vae_dtype)?;
        let (encoding, vae) = (vae.encode(work.images)?, vae.weights);
        let values: usize = prepared.values.iter().map(|values| values.len() * 4).sum();
        let texts = if subject.encoded { bytes_in_memory(options, base, groups.0) } else { 0 };
        let weights = recording.resident.unet + recording.resident.text_encoder + texts;
        Ok(Self {
            // The values become the trained weights.
            program: resident().unwrap_or(0).saturating_sub(values),
            weights: weights + if work.caching { 0 } else { vae },
            trainable: prepared.training_bytes,
            step: step.max(if work.caching { 0 } else { encoding - vae }),
            samples: plan.sample_bytes,
            caching: if work.caching { encoding } else { 0 },
        })
    }

    /// The most at any time: a step and a sample picture come one after the other.
    pub fn total(&self) -> usize {
        let training = self.weights + self.trainable + self.step.max(self.samples);
        self.program + training.max(self.caching)
    }

    /// A line for people.
    pub fn describe(&self) -> String {
        let mut text = format!(
            "{} a rank: program {}, weights {}, training state {}, a step {}",
            show_bytes(self.total()),
            show_bytes(self.program),
            show_bytes(self.weights),
            show_bytes(self.trainable),
            show_bytes(self.step),
        );
        if self.samples > 0 {
            text += &format!(", between steps samples {}", show_bytes(self.samples));
        }
        if self.caching > 0 {
            text += &format!(", before them latents {}", show_bytes(self.caching));
        }
        text
    }
}

/// The shapes that can take most: the one with most pixels, and the one with most samples.
fn largest(shapes: &[StepShape]) -> Vec<StepShape> {
    let mut chosen = Vec::new();
    for by in [StepShape::pixels, |shape: &StepShape| shape.batch] {
        chosen.extend(shapes.iter().copied().max_by_key(|shape| (by(shape), shape.pixels())));
    }
    chosen.dedup();
    chosen
}
