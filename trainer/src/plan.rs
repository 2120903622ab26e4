//! What a run will do, resolved from the options and the data before anything heavy happens.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use engine::{Checkpointing, DType};
use models::lora::Part;

use crate::base::Base;
use crate::card_plan::CardPlan;
use crate::checkpoint::Saving;
use crate::dataset::{DatasetGroup, Sampler};
use crate::host_plan::HostPlan;
use crate::memory::show_bytes;
use crate::network::PreparedNetwork;
use crate::optimizer::Choice;
use crate::options::Options;
use crate::rng::{Purpose, stream};
use crate::world::World;

/// A resolved run.
pub struct Plan {
    /// Start of all random numbers.
    pub seed: u64,
    /// Ranks.
    pub world: World,
    /// Optimizer steps of the run.
    pub steps: usize,
    /// Epochs of the run; the last one may be cut short by `steps`.
    pub epochs: usize,
    /// Optimizer steps of a whole epoch.
    pub steps_per_epoch: usize,
    /// Global batches of an epoch.
    pub batches_per_epoch: usize,
    /// Optimizer and its settings.
    pub optimizer: Choice,
    /// Files.
    pub saving: Saving,
    /// Blocks that are computed again in the backward pass.
    pub checkpointing: Checkpointing,
    /// Seconds since 1970 that the files bear.
    pub stamp: Stamp,
    /// Bytes that a sample picture takes on the CPU beside the models.
    pub sample_bytes: usize,
    /// Sample pictures are decoded in tiles.
    pub tiled_samples: bool,
}

/// The time in a file's metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stamp {
    /// The clock.
    Clock,
    /// The same for every run of a config: the newest input file.
    Fixed(f64),
}

impl Stamp {
    /// Seconds since 1970.
    pub fn now(self) -> f64 {
        match self {
            Stamp::Clock => seconds(SystemTime::now()),
            Stamp::Fixed(time) => time,
        }
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0., |since| since.as_secs_f64())
}

/// The seed that the user gave, or one from the clock and the process.
pub fn choose_seed(options: &Options) -> u64 {
    options.seed.unwrap_or_else(|| {
        let clock = seconds(SystemTime::now()).to_bits();
        let mut rng = stream(clock, Purpose::SeedChoice, u64::from(std::process::id()), 0);
        u64::from(rng.next_u32())
    })
}

impl Plan {
    /// Resolves a run on the ranks of `world`.
    pub fn new(
        options: &Options,
        group: &DatasetGroup,
        base: &Base,
        seed: u64,
        world: World,
    ) -> Result<Self> {
        let sampler = Sampler::new(group, seed, world.full, options.gradient_accumulation_steps);
        let steps_per_epoch = sampler.steps_per_epoch();
        if steps_per_epoch == 0 {
            bail!("the datasets hold no images\nhint: check `image_dir` and `num_repeats`");
        }
        let steps = match options.max_train_epochs {
            Some(epochs) => epochs * steps_per_epoch,
            None => options.max_train_steps,
        };
        if steps == 0 {
            bail!("there is nothing to train: `max_train_steps` or `max_train_epochs` is 0");
        }
        let epochs = steps.div_ceil(steps_per_epoch);
        Ok(Self {
            seed,
            world,
            steps,
            epochs,
            steps_per_epoch,
            batches_per_epoch: sampler.batches_per_epoch(),
            optimizer: options.choose_optimizer()?,
            saving: Saving::from_options(options, epochs)?,
            checkpointing: options.gradient_checkpointing.into(),
            stamp: choose_stamp(options, group, base)?,
            sample_bytes: 0,
            tiled_samples: false,
        })
    }

    /// The same run on what turned out to be there of its images.
    pub fn again(self, options: &Options, group: &DatasetGroup, base: &Base) -> Result<Self> {
        let counted = Self::new(options, group, base, self.seed, self.world)?;
        Ok(Self {
            checkpointing: self.checkpointing,
            sample_bytes: self.sample_bytes,
            tiled_samples: self.tiled_samples,
            ..counted
        })
    }
}

/// With a seed the run is meant to be repeatable to the byte, so its files bear the time of the
/// newest input instead of the clock's.
fn choose_stamp(options: &Options, group: &DatasetGroup, base: &Base) -> Result<Stamp> {
    if options.seed.is_none() {
        return Ok(Stamp::Clock);
    }
    let images = group.datasets.iter().flat_map(|d| &d.images).map(|image| image.path.clone());
    let files: Vec<PathBuf> = images.chain([base.files.path.clone()]).collect();
    let times = files.iter().filter_map(|path| std::fs::metadata(path).ok()?.modified().ok());
    let newest = times.max().context("no input file has a modification time")?;
    Ok(Stamp::Fixed(seconds(newest).floor()))
}

/// Lines about a run, name and value, for people.
pub fn describe(
    options: &Options,
    plan: &Plan,
    group: &DatasetGroup,
    (base, card, host): (&Base, Option<&CardPlan>, Option<&HostPlan>),
    prepared: &PreparedNetwork,
) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, value: String| lines.push((name.to_owned(), value));
    let network = &prepared.network;
    add("base model", format!("{} ({})", base.files.path.display(), base.files.family.title()));
    let accumulation = options.gradient_accumulation_steps;
    let sampler = Sampler::new(group, plan.seed, plan.world.full, accumulation);
    for (name, value) in group.summary(&sampler) {
        add(&name, value);
    }
    let batch = group.datasets.first().map_or(1, |dataset| dataset.plan.options.batch_size);
    add("batch", plan.world.describe(batch, accumulation));
    add(
        "length",
        format!(
            "{} steps, {} epochs of {} batches in {} steps",
            plan.steps, plan.epochs, plan.batches_per_epoch, plan.steps_per_epoch
        ),
    );
    add(
        "network",
        format!(
            "{} text encoder and {} U-Net modules, {} trainable numbers",
            network.module_count(Part::TextEncoder) + network.module_count(Part::TextEncoder2),
            network.module_count(Part::Unet),
            network.element_count()
        ),
    );
    let rates: Vec<String> = network
        .groups()
        .iter()
        .map(|g| format!("{} {:e}", g.label, crate::network::learning_rate(options, g)))
        .collect();
    let warmup = match options.lr_warmup_steps.of(plan.steps) {
        0 => String::new(),
        steps => format!(", {steps} warm-up steps"),
    };
    let schedule = options.lr_schedule_name();
    add("learning rate", format!("{}, {schedule}{warmup}", rates.join(", ")));
    add("optimizer", plan.optimizer.describe());
    let precision = match base.dtype {
        DType::BF16 => "bf16",
        DType::F16 => "float16",
        _ => "float32",
    };
    match card {
        Some(card) => {
            if base.device.card().is_some() {
                add("arithmetic", format!("{precision} on {}", base.device));
            }
            add("card memory", card.table());
            add("main memory", describe_main_memory(base, prepared));
        }
        None => {
            add("arithmetic", format!("{precision} on {}", base.device));
            if let Some(host) = host {
                add("memory", host.describe());
            }
        }
    }
    add("seed", plan.seed.to_string());
    add("output", plan.saving.path(crate::checkpoint::SavePoint::Last).display().to_string());
    lines
}

/// What a rank takes beside its card: values of the network, and room to bring the largest tensor
/// of the base model to the card: as f32, and as the bytes that are sent. Files are mapped, not read.
fn describe_main_memory(base: &Base, prepared: &PreparedNetwork) -> String {
    let largest = base
        .parts()
        .flat_map(|(_, weights)| {
            weights.names().into_iter().filter_map(|name| weights.shape(&name))
        })
        .map(|shape| shape.iter().product::<usize>())
        .max()
        .unwrap_or(0);
    let room = largest * (DType::F32.size() + base.dtype.size());
    let values = prepared.network.element_count() * 4;
    format!(
        "about {} a rank beside images and program: the network's values {}, room to load a tensor {}",
        show_bytes(values + room),
        show_bytes(values),
        show_bytes(room)
    )
}
