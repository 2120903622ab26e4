//! The facts by which a state and a run recognise each other.

use std::collections::BTreeMap;

use engine::ParamId;
use formats::Weights;
use models::lora::LoraNetwork;
use sha2::{Digest, Sha256};

use super::facts::{DataFacts, RunFacts};
use crate::base::Base;
use crate::dataset::{DatasetGroup, Sampler};
use crate::options::{Group, OPTIONS, Options, Support};
use crate::plan::Plan;

/// Bytes of each tensor that go into the hash of a model: enough to tell models apart, cheap for a
/// file of gigabytes.
const HASHED_BYTES: usize = 4096;

/// Options that are compared more exactly elsewhere, or only say where things lie and how fast they
/// go.
const PRIVATE: [&str; 27] = [
    "seed",
    "pretrained_model_name_or_path",
    "network_weights",
    "dim_from_weights",
    "optimizer_type",
    "train_batch_size",
    "gradient_accumulation_steps",
    "allow_batch_change",
    "gradient_checkpointing",
    "dataset_config",
    "train_data_dir",
    "reg_data_dir",
    "in_json",
    "cache_latents",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "text_encoder_batch_size",
    "skip_cache_check",
    "vae_batch_size",
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "strict_data",
    "tokenizer_cache_dir",
    "sdxl",
    "device",
    "threads",
];

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The facts of this run.
pub fn run_facts(
    options: &Options,
    plan: &Plan,
    base: &Base,
    network: &LoraNetwork,
    group: &DatasetGroup,
) -> anyhow::Result<RunFacts> {
    let tensor = |id| (network.key(id), network.file_shape(id).to_vec());
    let alphas = network.modules().iter();
    Ok(RunFacts {
        base_model: base.files.name.clone(),
        base_model_hash: model_hash(&base.parts().map(|(_, weights)| weights).collect::<Vec<_>>())?,
        optimizer: plan.optimizer.class.clone(),
        tensors: (0..network.param_count()).map(ParamId).map(tensor).collect(),
        alphas: alphas.map(|m| (m.target.name.clone(), m.rank.alpha.to_string())).collect(),
        data: data_facts(group, plan, options),
        options: trajectory_options(options),
    })
}

fn model_hash(parts: &[&dyn Weights]) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    for weights in parts {
        for name in weights.names() {
            let tensor = weights.get(&name)?;
            hasher.update(name.as_bytes());
            hasher.update(format!("{:?}{:?}", tensor.dtype, tensor.shape).as_bytes());
            hasher.update(&tensor.data[..tensor.data.len().min(HASHED_BYTES)]);
        }
    }
    Ok(hex(hasher))
}

/// Facts about the data of a run.
pub fn data_facts(group: &DatasetGroup, plan: &Plan, options: &Options) -> DataFacts {
    let mut images = Sha256::new();
    let mut captions = Sha256::new();
    for dataset in &group.datasets {
        images.update(b"dataset");
        for image in &dataset.images {
            let name = image.path.file_name().unwrap_or_default().to_string_lossy();
            let line = format!(
                "{name}\0{:?}\0{}\0{:?}\0{:?}\0{}\n",
                image.size, image.repeats, image.bucket, image.resized, image.is_reg
            );
            images.update(line.as_bytes());
            captions.update(format!("{name}\0{}\n", image.caption).as_bytes());
        }
        for subset in &dataset.plan.subsets {
            captions.update(format!("{:?}\n", subset.options).as_bytes());
        }
    }
    let accumulation = options.gradient_accumulation_steps;
    let sampler = Sampler::new(group, plan.seed, plan.world.full, accumulation);
    DataFacts {
        images_hash: hex(images),
        captions_hash: hex(captions),
        samples_per_epoch: sampler.samples_per_epoch(),
        steps_per_epoch: plan.steps_per_epoch,
        global_batches: group
            .batch_sizes()
            .into_iter()
            .map(|size| plan.world.global_batch(size))
            .collect(),
        accumulation: accumulation.max(1),
    }
}

/// Options that shape the course of training and differ from their defaults.
fn trajectory_options(options: &Options) -> BTreeMap<String, String> {
    let shapes = |group| {
        matches!(
            group,
            Group::Model
                | Group::Network
                | Group::Dataset
                | Group::Captions
                | Group::Training
                | Group::Optimizer
                | Group::NoiseAndLoss
        )
    };
    OPTIONS
        .iter()
        .filter(|spec| shapes(spec.group) && !spec.is_default(options))
        .filter(|spec| !matches!(spec.support, Support::NoEffect(_)))
        .filter(|spec| !PRIVATE.contains(&spec.name))
        .filter_map(|spec| Some((spec.name.to_owned(), (spec.read)(options)?.to_string())))
        .collect()
}
