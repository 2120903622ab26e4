//! From a run's options, data and base model to what is asked of the planner.

use anyhow::{Context, Result};
use collectives::Comm;
use engine::cuda::driver::CardFacts;
use engine::{DType, Device};

use super::{CardPlan, OVERHEAD, Parts, StepShape, Subject, Wishes, choose, imagined_card};
use crate::base::Base;
use crate::dataset::{DatasetGroup, TokenLength};
use crate::encoded::constant_captions;
use crate::network::PreparedNetwork;
use crate::options::Options;
use crate::precision::{compute_type, vae_type};
use crate::samples::{SamplePlan, picture_bytes};
use crate::text_cache::{self, is_wanted};
use crate::world::World;

/// Names of AdamW whose state can be kept in 8 bits instead.
const ADAMW: [&str; 3] = ["AdamW", "PagedAdamW", "PagedAdamW32bit"];

/// The card that is planned for.
#[derive(Clone, Debug)]
pub struct Target {
    facts: CardFacts,
    /// Bytes that the process may use.
    limit: usize,
    /// Whether there is such a card.
    exists: bool,
}

impl Target {
    /// The card of this rank; or, for a plan alone, an imagined one of `vram_limit`. `None` for the
    /// CPU.
    pub fn find(options: &Options, device: Device) -> Option<Self> {
        if let Some(card) = device.card() {
            let limit = card.memory_stats().limit.saturating_add(OVERHEAD);
            return Some(Self { facts: card.facts().clone(), limit, exists: true });
        }
        let limit = options.vram_limit.filter(|_| options.dry_run)?.bytes;
        Some(Self { facts: imagined_card(limit), limit, exists: false })
    }

    /// The least limit of all ranks: they must choose alike.
    pub fn agree(mut self, comm: &Comm) -> Result<Self> {
        for rank in 0..comm.world_size() {
            let own = (self.limit as u64).to_le_bytes().to_vec();
            let bytes = comm.broadcast(rank, own).context("agree on the cards' memory")?;
            let bytes: [u8; 8] =
                bytes.try_into().map_err(|_| anyhow::anyhow!("not a number of bytes"))?;
            self.limit = self.limit.min(usize::try_from(u64::from_le_bytes(bytes))?);
        }
        Ok(self)
    }
}

/// What a run does on a rank, as far as memory depends on it.
pub struct Work<'a> {
    /// Models and what is trained.
    pub subject: Subject<'a>,
    /// Shapes of all batches.
    pub shapes: Vec<StepShape>,
    /// `[batch,height,width]` of the images that the VAE encodes at most at a time.
    pub images: [usize; 3],
    /// Whether that is over before the training.
    pub caching: bool,
}

impl<'a> Work<'a> {
    /// The work of a run on a device of the kind of `device`.
    pub fn of(
        options: &Options,
        base: &'a Base,
        (group, held_out, world): (&DatasetGroup, Option<&DatasetGroup>, World),
        prepared: &'a PreparedNetwork,
        device: Device,
    ) -> Result<Self> {
        let untrained = !prepared.network.has_text_modules();
        let constant =
            [Some(group), held_out].into_iter().flatten().all(|g| constant_captions(g).is_some());
        let length = options.max_token_length.map(|length| length as u32);
        let length = TokenLength::from_option(length);
        let chunks = length.context("`max_token_length` must be 150 or 225")?.chunks();
        let together = text_cache::together(options);
        let files = &base.files;
        let subject = Subject {
            parts: Parts {
                unet: (&base.unet, &*files.unet),
                text_encoder: (&base.text_encoder, &*files.text_encoder),
                text_encoder_2: base.text_encoder_2.as_ref().zip(files.text_encoder_2.as_deref()),
                vae: (&base.vae, &*files.vae),
            },
            network: &prepared.network,
            values: &prepared.values,
            dtype: compute_type(options, device),
            vae_dtype: vae_type(options, device, files.family),
            clip_skip: options.clip_skip,
            encoded: untrained && constant && is_wanted(options, device),
            captions: [together, chunks],
            weighted: options.weighted_captions,
            masked: options.alpha_mask || options.masked_loss,
        };
        let micro_batches = |size: usize| match held_out {
            // A validation takes whole batches, whatever a rank's share of one is.
            Some(_) => [world.micro_batches(size), vec![size.max(1)]].concat(),
            None => world.micro_batches(size),
        };
        let shapes = step_shapes(chunks, group, &micro_batches);
        let caching = options.cache_latents || options.cache_latents_to_disk;
        let together = match (caching, options.reproducible) {
            (true, false) => Some(options.vae_batch_size.max(1)),
            (true, true) => Some(1),
            (false, _) => None,
        };
        let image = |s: &StepShape| [together.unwrap_or(s.batch), s.height * 8, s.width * 8];
        let images = shapes.iter().map(image).max_by_key(|image| image.iter().product::<usize>());
        let images = images.context("there is no image to plan for")?;
        Ok(Self { subject, shapes, images, caching })
    }
}

/// Plans the memory of a run on `target`.
pub fn plan_run(
    options: &Options,
    base: &Base,
    (group, held_out, world): (&DatasetGroup, Option<&DatasetGroup>, World),
    (prepared, samples): (&PreparedNetwork, Option<&SamplePlan>),
    target: &Target,
) -> Result<CardPlan> {
    // Only whether it is a card decides.
    let groups = (group, held_out, world);
    let Work { subject, shapes, images, caching } =
        Work::of(options, base, groups, prepared, Device::Card(0))?;
    let optimizer = options.choose_optimizer()?;
    let eight_bit = match ADAMW.contains(&optimizer.name) {
        true => {
            let smaller = Options { optimizer_type: "AdamW8bit".into(), ..options.clone() };
            // Settings that it does not have keep the plain one.
            smaller.choose_optimizer().ok()
        }
        false => None,
    };
    let wishes = Wishes {
        checkpointing: options.gradient_checkpointing,
        fp8: options.fp8_base || options.fp8_base_unet,
        optimizer: &optimizer,
        eight_bit: eight_bit.as_ref(),
        shapes: &shapes,
        images: (images, caching),
    };
    let mut plan = choose(subject, &wishes, &target.facts, target.limit)?;
    if let Some(samples) = samples {
        let stored = if plan.chosen.fp8 { DType::F8 } else { subject.dtype };
        let types = (subject.dtype, stored, subject.vae_dtype);
        let picture = picture_bytes(samples, subject.parts, types, &target.facts)?;
        plan.add_samples(picture)?;
    }
    if !target.exists {
        let (major, minor) = target.facts.capability;
        plan.notes.push(format!(
            "planned for an imagined card of compute capability {major}.{minor} with that much memory"
        ));
    }
    Ok(plan)
}

/// The shapes of all batches of a run.
fn step_shapes(
    chunks: usize,
    group: &DatasetGroup,
    micro_batches: &dyn Fn(usize) -> Vec<usize>,
) -> Vec<StepShape> {
    let mut shapes: Vec<StepShape> = group
        .datasets
        .iter()
        .flat_map(|dataset| {
            let batches = micro_batches(dataset.plan.options.batch_size);
            // A rank's part of a bucket that holds fewer images than a batch is as small.
            dataset.buckets.iter().filter(|bucket| !bucket.items.is_empty()).flat_map(
                move |bucket| {
                    let (width, height) = (bucket.size.0 as usize / 8, bucket.size.1 as usize / 8);
                    let shape = move |batch| StepShape { batch, height, width, chunks };
                    batches.clone().into_iter().map(shape)
                },
            )
        })
        .collect();
    shapes.sort();
    shapes.dedup();
    shapes
}

impl CardPlan {
    /// Makes the options say what was chosen, so that the run, its files and its logs agree.
    pub fn apply(&self, options: &mut Options) {
        if self.chosen.eight_bit {
            options.optimizer_type = "AdamW8bit".to_owned();
        }
        if self.chosen.fp8 {
            options.fp8_base = true;
        }
        if let Some(together) = self.chosen.vae_batch {
            options.vae_batch_size = together;
        }
    }
}
