//! Metadata of a trained LoRA file, as sd-scripts 0.10.1 writes it: `ss_*` about the training and
//! `modelspec.*` about the model.
//!
//! Every value is text, formatted as Python prints it, because other programs compare it as text.
//! The `sshs_*` hashes are added by `formats` when the file is written. Keys come sorted. Times are
//! passed in, so that the same facts give the same bytes.

mod python;
#[cfg(test)]
mod tests;

pub use python::{python_float, python_json, python_literal};

use crate::optimizer::Pace;
use crate::options::Options;
use anyhow::{Context, Result};
use formats::Family;
use formats::model_spec::{ModelSpec, OptionalSpec, thumbnail_url};
use python::PythonText;
use serde_json::Value;
use std::collections::BTreeMap;

/// Keys that stay under `--no_metadata`: without them other programs cannot load the file.
const MINIMUM_KEYS: [&str; 6] = [
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
];

/// A model file as the metadata names it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// File name, or what the user wrote where that is no file (a hub id).
    pub name: String,
    /// The short hash of old WebUI versions; `None` for folders and hub ids.
    pub legacy_hash: Option<String>,
    /// SHA-256 of the file; `None` for folders and hub ids.
    pub sha256: Option<String>,
}

/// What a run knows about itself beyond its options.
#[derive(Clone, Debug, PartialEq)]
pub struct RunFacts {
    /// Number that all files of one run share.
    pub session_id: u64,
    /// Start, in seconds since 1970 (UTC).
    pub started_at: f64,
    /// `sd_v1`, `sd_v1_v`, `sd_v2` or `sd_v2_v`: WebUI hides files with a wrong one.
    pub base_model_version: String,
    /// The seed that was used, chosen at random or not.
    pub seed: u64,
    /// Rank of the network; with `dim_from_weights` the one of the weights.
    pub network_dim: usize,
    /// Alpha of the network.
    pub network_alpha: f64,
    /// Optimizer steps of the whole run.
    pub max_train_steps: usize,
    /// Epochs of the whole run.
    pub num_epochs: usize,
    /// Training images, repeats counted.
    pub num_train_images: usize,
    /// Regularization images, repeats counted.
    pub num_reg_images: usize,
    /// Images held out for validation.
    pub num_validation_images: usize,
    /// Batches of an epoch on one rank.
    pub num_batches_per_epoch: usize,
    /// Class of the optimizer, `torch.optim.adamw.AdamW`.
    pub optimizer_name: String,
    /// Settings of the optimizer that were written ([`crate::optimizer::Choice::python_text`]).
    pub optimizer_args: String,
    /// Batch of all ranks with accumulation.
    pub total_batch_size: usize,
    /// Width and height that images are trained at (first dataset), in pixels.
    pub resolution: (usize, usize),
    /// The base model.
    pub base_model: ModelFacts,
    /// The VAE given as `--vae`.
    pub vae: Option<ModelFacts>,
}

/// The dataset's part of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum DatasetFacts {
    /// A dataset config: the values of `ss_datasets`, `ss_tag_frequency` and `ss_dataset_dirs`.
    Config {
        /// List with one object per dataset.
        datasets: Value,
        /// Folder -> tag -> count.
        tag_frequency: Value,
        /// Folder -> `{n_repeats, img_count}`.
        dataset_dirs: Value,
    },
    /// `train_data_dir` / `in_json`, where the reference writes the settings one by one.
    Folders {
        /// Buckets are used.
        enable_bucket: bool,
        /// Images are never enlarged.
        bucket_no_upscale: bool,
        /// Shortest bucket side, after rounding; `None` without buckets.
        min_bucket_reso: Option<usize>,
        /// Longest bucket side, after rounding; `None` without buckets.
        max_bucket_reso: Option<usize>,
        /// Folder -> `{n_repeats, img_count}`.
        dataset_dirs: Value,
        /// The same for regularization images.
        reg_dataset_dirs: Value,
        /// Folder -> tag -> count.
        tag_frequency: Value,
        /// Buckets and their counts.
        bucket_info: Value,
    },
}

/// Metadata that stays the same during a run; [`FileMetadata::at`] adds what a file has of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct FileMetadata {
    entries: BTreeMap<String, String>,
    model_spec: ModelSpec,
    minimum_only: bool,
}

impl FileMetadata {
    /// Collects the metadata of a run. Fails when the thumbnail cannot be read.
    pub fn new(options: &Options, run: &RunFacts, dataset: &DatasetFacts) -> Result<Self> {
        let mut entries = BTreeMap::new();
        add_run(&mut entries, options, run);
        add_options(&mut entries, options);
        add_own_rate(&mut entries, options)?;
        add_dataset(&mut entries, options, run, dataset);
        add_network_args(&mut entries, options)?;
        add_model(&mut entries, "sd_model", Some(&run.base_model));
        add_model(&mut entries, "vae", run.vae.as_ref());
        Ok(FileMetadata {
            entries,
            model_spec: model_spec(options, run)?,
            minimum_only: options.no_metadata,
        })
    }

    /// The metadata of a file saved after `steps` optimizer steps in `epoch` (from 1), at
    /// `finished_at` seconds since 1970.
    pub fn at(&self, steps: usize, epoch: usize, finished_at: f64) -> BTreeMap<String, String> {
        let mut file = self.entries.clone();
        file.insert("ss_training_finished_at".to_owned(), python_float(finished_at));
        file.insert("ss_steps".to_owned(), steps.to_string());
        file.insert("ss_epoch".to_owned(), epoch.to_string());
        if self.minimum_only {
            file.retain(|key, _| MINIMUM_KEYS.contains(&key.as_str()));
        }
        let spec = ModelSpec { timestamp: finished_at as i64, ..self.model_spec.clone() };
        file.extend(spec.to_metadata());
        file
    }
}

/// What the file is, for programs that list models; the date is each file's own.
fn model_spec(options: &Options, run: &RunFacts) -> Result<ModelSpec> {
    let family = match &*run.base_model_version {
        tag if tag.starts_with("sdxl") => Family::Sdxl,
        tag if tag.starts_with("sd_v2") => Family::Sd2,
        _ => Family::Sd1,
    };
    let title = options.metadata_title.clone().or_else(|| options.output_name.clone());
    let thumbnail = options.metadata_thumbnail.as_deref().map(thumbnail_url).transpose();
    let restricted = options.min_timestep.is_some() || options.max_timestep.is_some();
    let range = (options.min_timestep.unwrap_or(0), options.max_timestep.unwrap_or(1000));
    Ok(ModelSpec {
        family,
        v_parameterization: options.v_parameterization,
        title: title.unwrap_or_else(|| format!("LoRA@{}", python_float(run.started_at))),
        // Not the size trained at: the reference ignores the dataset config here.
        // The reference ignores the dataset config here; the file says what it was trained at.
        resolution: Some(run.resolution),
        timestamp: run.started_at as i64,
        timestep_range: restricted.then_some(range),
        clip_skip: options.clip_skip,
        implementation_version: concat!("lorarun/", env!("CARGO_PKG_VERSION")).to_owned(),
        optional: OptionalSpec {
            author: options.metadata_author.clone(),
            description: options.metadata_description.clone(),
            license: options.metadata_license.clone(),
            tags: options.metadata_tags.clone(),
            usage_hint: options.metadata_usage_hint.clone(),
            thumbnail: thumbnail.context("cannot read the picture of `metadata_thumbnail`")?,
            merged_from: options.metadata_merged_from.clone(),
            trigger_phrase: options.metadata_trigger_phrase.clone(),
            preprocessor: options.metadata_preprocessor.clone(),
            is_negative_embedding: options.metadata_is_negative_embedding.clone(),
        },
    })
}

/// Inserts `ss_<name>` for each listed expression.
macro_rules! put {
    ($entries:ident, $($name:literal => $value:expr),+ $(,)?) => {
        $entries.extend([ $( (concat!("ss_", $name).to_owned(), PythonText::text(&$value)) ),+ ])
    };
}

/// What the run knows.
fn add_run(entries: &mut BTreeMap<String, String>, options: &Options, run: &RunFacts) {
    let optimizer = match run.optimizer_args.as_str() {
        "" => run.optimizer_name.clone(),
        args => format!("{}({args})", run.optimizer_name),
    };
    put!(entries,
        "session_id" => run.session_id,
        "training_started_at" => run.started_at,
        "num_train_images" => run.num_train_images,
        "num_validation_images" => run.num_validation_images,
        "num_reg_images" => run.num_reg_images,
        "num_batches_per_epoch" => run.num_batches_per_epoch,
        "num_epochs" => run.num_epochs,
        "max_train_steps" => run.max_train_steps,
        "network_module" => options.network_module.as_deref().unwrap_or("networks.lora"),
        "network_dim" => run.network_dim,
        "network_alpha" => run.network_alpha,
        "base_model_version" => run.base_model_version,
        // What the file is, also where the user left `v2` for us to find out.
        "v2" => run.base_model_version.starts_with("sd_v2"),
        "seed" => run.seed,
        "optimizer" => optimizer,
        // No git checkout of sd-scripts is involved; the reference prints this in that case.
        "sd_scripts_commit_hash" => "(unknown)",
    );
}

/// An optimizer that chooses its learning rate: the reference forgets those of the config and names
/// its own schedule.
fn add_own_rate(entries: &mut BTreeMap<String, String>, options: &Options) -> Result<()> {
    if options.choose_optimizer()?.recipe.pace() == Pace::Relative {
        let rate: Option<f64> = None;
        put!(entries,
            "learning_rate" => rate,
            "unet_lr" => rate,
            "lr_scheduler" => format!("adafactor:{}", python_float(options.learning_rate)),
        );
    }
    Ok(())
}

/// What stands in the options.
fn add_options(entries: &mut BTreeMap<String, String>, options: &Options) {
    let warmup = match options.lr_warmup_steps {
        crate::options::IntOrFloat::Steps(steps) => steps.text(),
        crate::options::IntOrFloat::Share(share) => share.text(),
    };
    let crop = options
        .face_crop_aug_range
        .map(|range| format!("({}, {})", range.low.text(), range.high.text()));
    put!(entries,
        "output_name" => options.output_name,
        "learning_rate" => options.learning_rate,
        "text_encoder_lr" => options.text_encoder_lr,
        "unet_lr" => options.unet_lr,
        "gradient_checkpointing" => options.gradient_checkpointing,
        "gradient_accumulation_steps" => options.gradient_accumulation_steps,
        "lr_warmup_steps" => warmup,
        "lr_scheduler" => options.lr_scheduler.as_str(),
        "network_dropout" => options.network_dropout,
        "mixed_precision" => options.mixed_precision.as_str(),
        "full_fp16" => options.full_fp16,
        "clip_skip" => options.clip_skip,
        "max_token_length" => options.max_token_length,
        "cache_latents" => options.cache_latents,
        "lowram" => options.lowram,
        "noise_offset" => options.noise_offset,
        "multires_noise_iterations" => options.multires_noise_iterations,
        "multires_noise_discount" => options.multires_noise_discount,
        "adaptive_noise_scale" => options.adaptive_noise_scale,
        "zero_terminal_snr" => options.zero_terminal_snr,
        "training_comment" => options.training_comment,
        "max_grad_norm" => options.max_grad_norm,
        "caption_dropout_rate" => options.caption_dropout_rate,
        "caption_dropout_every_n_epochs" => options.caption_dropout_every_n_epochs,
        "caption_tag_dropout_rate" => options.caption_tag_dropout_rate,
        "face_crop_aug_range" => crop,
        "prior_loss_weight" => options.prior_loss_weight,
        "min_snr_gamma" => options.min_snr_gamma,
        "scale_weight_norms" => options.scale_weight_norms,
        "ip_noise_gamma" => options.ip_noise_gamma,
        "debiased_estimation" => options.debiased_estimation_loss,
        "noise_offset_random_strength" => options.noise_offset_random_strength,
        "ip_noise_gamma_random_strength" => options.ip_noise_gamma_random_strength,
        "loss_type" => options.loss_type.as_str(),
        "huber_schedule" => options.huber_schedule.as_str(),
        "huber_scale" => options.huber_scale,
        "huber_c" => options.huber_c,
        "fp8_base" => options.fp8_base,
        "fp8_base_unet" => options.fp8_base_unet,
        "validation_seed" => options.validation_seed,
        "validation_split" => options.validation_split,
        "max_validation_steps" => options.max_validation_steps,
        "validate_every_n_epochs" => options.validate_every_n_epochs,
        "validate_every_n_steps" => options.validate_every_n_steps,
        "resize_interpolation" => options.resize_interpolation.map(|filter| filter.as_str()),
    );
}

/// What the dataset knows.
fn add_dataset(
    entries: &mut BTreeMap<String, String>,
    options: &Options,
    run: &RunFacts,
    dataset: &DatasetFacts,
) {
    match dataset {
        DatasetFacts::Config { datasets, tag_frequency, dataset_dirs } => put!(entries,
            "datasets" => python_json(datasets),
            "tag_frequency" => python_json(tag_frequency),
            "dataset_dirs" => python_json(dataset_dirs),
        ),
        DatasetFacts::Folders {
            enable_bucket,
            bucket_no_upscale,
            min_bucket_reso,
            max_bucket_reso,
            dataset_dirs,
            reg_dataset_dirs,
            tag_frequency,
            bucket_info,
        } => put!(entries,
            "batch_size_per_device" => options.train_batch_size,
            "total_batch_size" => run.total_batch_size,
            "resolution" => format!("({}, {})", run.resolution.0, run.resolution.1),
            "color_aug" => options.color_aug,
            "flip_aug" => options.flip_aug,
            "random_crop" => options.random_crop,
            "shuffle_caption" => options.shuffle_caption,
            "enable_bucket" => *enable_bucket,
            "bucket_no_upscale" => *bucket_no_upscale,
            "min_bucket_reso" => *min_bucket_reso,
            "max_bucket_reso" => *max_bucket_reso,
            "keep_tokens" => options.keep_tokens,
            "dataset_dirs" => python_json(dataset_dirs),
            "reg_dataset_dirs" => python_json(reg_dataset_dirs),
            "tag_frequency" => python_json(tag_frequency),
            "bucket_info" => python_json(bucket_info),
        ),
    }
}

/// `ss_network_args`, where any were given.
fn add_network_args(entries: &mut BTreeMap<String, String>, options: &Options) -> Result<()> {
    let args = options.read_network_args()?;
    if args.pairs.is_empty() {
        return Ok(());
    }
    let mut object: serde_json::Map<String, Value> =
        args.pairs.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
    if !options.dim_from_weights && !object.contains_key("dropout") {
        // The reference passes its dropout on as if it were one of these.
        object.insert("dropout".to_owned(), Value::from(options.network_dropout));
    }
    entries.insert("ss_network_args".to_owned(), python_json(&Value::Object(object)));
    Ok(())
}

/// Name and hashes of a model file.
fn add_model(entries: &mut BTreeMap<String, String>, kind: &str, model: Option<&ModelFacts>) {
    let Some(model) = model else { return };
    entries.insert(format!("ss_{kind}_name"), model.name.clone());
    if let Some(hash) = &model.legacy_hash {
        entries.insert(format!("ss_{kind}_hash"), hash.clone());
    }
    if let Some(hash) = &model.sha256 {
        entries.insert(format!("ss_new_{kind}_hash"), hash.clone());
    }
}
