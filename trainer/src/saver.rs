//! Writes the LoRA files of a run: names, metadata, precision; old files go when new ones are there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::ParamStore;
use formats::lora_file::{self, SaveAs};
use formats::{BaseModel, Dtype, model_hash::ModelIdentity};
use models::lora::LoraNetwork;

use crate::base::Base;
use crate::checkpoint::{SavePoint, Saving};
use crate::console;
use crate::dataset::DatasetGroup;
use crate::ema::average_path;
use crate::lease::Lease;
use crate::metadata::{DatasetFacts, FileMetadata, ModelFacts, RunFacts};
use crate::network::PreparedNetwork;
use crate::options::{Options, SaveModelAs, SavePrecision};
use crate::plan::{Plan, Stamp};

/// Everything a file needs beyond the numbers.
pub struct Saver {
    saving: Saving,
    metadata: FileMetadata,
    save_as: SaveAs,
    dtype: Dtype,
    stamp: Stamp,
    lease: Lease,
}

impl Saver {
    /// Collects names and metadata; hashes the base model, which takes seconds for a large file.
    pub fn new(
        (options, lease): (&Options, Lease),
        plan: &Plan,
        base: &Base,
        prepared: &PreparedNetwork,
        dataset: &DatasetNumbers,
    ) -> Result<Self> {
        let facts = run_facts(options, plan, base, prepared, dataset)?;
        Ok(Self {
            saving: plan.saving.clone(),
            metadata: FileMetadata::new(options, &facts, &dataset.facts)?,
            save_as: match options.save_model_as {
                SaveModelAs::Safetensors => SaveAs::Safetensors,
                SaveModelAs::Ckpt | SaveModelAs::Pt => SaveAs::Pickle,
            },
            dtype: match options.save_precision {
                None | Some(SavePrecision::Float) => Dtype::F32,
                Some(SavePrecision::Fp16) => Dtype::F16,
                Some(SavePrecision::Bf16) => Dtype::BF16,
            },
            stamp: plan.stamp,
            lease,
        })
    }

    /// The right to write files of this run's names.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Which files are due when.
    pub fn saving(&self) -> &Saving {
        &self.saving
    }

    /// Writes a file after `step` steps, in `epoch` (from 1), and removes the one it outdates.
    pub fn save(
        &self,
        network: &LoraNetwork,
        params: &ParamStore,
        point: SavePoint,
        (step, epoch): (usize, usize),
    ) -> Result<()> {
        let (path, old) = (self.saving.path(point), self.saving.outdated(point));
        self.write((network, params), (&path, old), (step, epoch))
    }

    /// Writes the average of the weights beside the file of [`Saver::save`].
    pub fn save_average(
        &self,
        network: &LoraNetwork,
        average: &ParamStore,
        point: SavePoint,
        (step, epoch): (usize, usize),
    ) -> Result<()> {
        let path = average_path(&self.saving.path(point));
        let old = self.saving.outdated(point).map(|old| average_path(&old));
        self.write((network, average), (&path, old), (step, epoch))
    }

    fn write(
        &self,
        (network, params): (&LoraNetwork, &ParamStore),
        (path, old): (&Path, Option<PathBuf>),
        (step, epoch): (usize, usize),
    ) -> Result<()> {
        let tensors = network.export(params, self.dtype)?;
        let metadata = self.metadata.at(step, epoch, self.stamp.now());
        let permit = || self.lease.check();
        lora_file::write_if(path, (&tensors, &metadata), self.save_as, permit)
            .map_err(|error| self.lease.cause(error))
            .with_context(|| format!("step {step} could not be saved"))?;
        console::note(&format!("saved {}", path.display()));
        if let Some(old) = old
            && old.exists()
        {
            self.lease.check()?;
            std::fs::remove_file(&old)
                .with_context(|| format!("cannot remove the outdated file: {}", old.display()))?;
            console::note(&format!("removed {}", old.display()));
        }
        Ok(())
    }
}

/// The dataset's part of a file's metadata.
pub struct DatasetNumbers {
    /// Values that describe the datasets.
    pub facts: DatasetFacts,
    /// Training images with repeats.
    pub train_images: usize,
    /// Regularisation images with repeats.
    pub reg_images: usize,
    /// Images that are held out for validation.
    pub validation_images: usize,
    /// Batches of an epoch on one rank.
    pub batches_per_epoch: usize,
    /// Samples of one rank's batch (first dataset).
    pub batch_size: usize,
    /// Width and height in pixels (first dataset).
    pub resolution: (usize, usize),
}

impl DatasetNumbers {
    /// Reads them off the datasets.
    pub fn new(group: &DatasetGroup, held_out: Option<&DatasetGroup>, plan: &Plan) -> Self {
        let first = group.datasets.first().map(|dataset| &dataset.plan);
        let (width, height) = first.map_or((0, 0), |plan| plan.resolution);
        Self {
            facts: group.facts(),
            train_images: group.num_train_images() as usize,
            reg_images: group.num_reg_images() as usize,
            validation_images: held_out.map_or(0, |group| group.num_train_images() as usize),
            batches_per_epoch: plan.batches_per_epoch,
            batch_size: first.map_or(1, |plan| plan.options.batch_size),
            resolution: (width as usize, height as usize),
        }
    }
}

fn run_facts(
    options: &Options,
    plan: &Plan,
    base: &Base,
    prepared: &PreparedNetwork,
    dataset: &DatasetNumbers,
) -> Result<RunFacts> {
    let started_at = plan.stamp.now();
    // The rank that most modules have: with `dim_from_weights` the option does not say it.
    let rank = prepared.network.modules().first().map(|module| module.rank);
    let (dim, alpha) = match (rank, options.dim_from_weights) {
        (Some(rank), true) => (rank.dim, f64::from(rank.alpha)),
        _ => (options.network_rank(), options.network_alpha),
    };
    Ok(RunFacts {
        session_id: plan.seed ^ started_at.to_bits() >> 20 & 0xffff_ffff,
        started_at,
        base_model_version: base.files.family.version_tag(options.v_parameterization).to_owned(),
        seed: plan.seed,
        network_dim: dim,
        network_alpha: alpha,
        max_train_steps: plan.steps,
        num_epochs: plan.epochs,
        num_train_images: dataset.train_images,
        num_reg_images: dataset.reg_images,
        num_validation_images: dataset.validation_images,
        num_batches_per_epoch: dataset.batches_per_epoch,
        optimizer_name: plan.optimizer.class.clone(),
        optimizer_args: plan.optimizer.python_text.clone(),
        total_batch_size: dataset.batch_size
            * plan.world.full
            * options.gradient_accumulation_steps,
        resolution: dataset.resolution,
        base_model: model_facts(&base.files)?,
        vae: base.files.vae_identity.as_ref().map(identity_facts).transpose()?,
    })
}

fn model_facts(files: &BaseModel) -> Result<ModelFacts> {
    Ok(ModelFacts { name: files.name.clone(), ..identity_facts(&files.identity)? })
}

fn identity_facts(identity: &ModelIdentity) -> Result<ModelFacts> {
    Ok(ModelFacts {
        name: identity.name.clone(),
        legacy_hash: identity.legacy_hash()?,
        sha256: identity.sha256()?,
    })
}
