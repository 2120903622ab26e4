//! What `state.json` says about the run that wrote it. No number in it is a fraction: what must be
//! exact and is not whole lies in the tensor files.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the folder's layout; other ones are refused.
pub const VERSION: u32 = 1;

/// Facts about a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// [`VERSION`].
    pub version: u32,
    /// Program that wrote it.
    pub written_by: String,
    /// Optimizer steps done, as the run counts them.
    pub step: usize,
    /// Epochs begun, for people.
    pub epoch: usize,
    /// How far the count of steps is ahead of the data (`initial_step`).
    pub data_offset: i64,
    /// How far the count of steps is ahead of the learning rate's schedule.
    pub schedule_offset: i64,
    /// Seed: with the step, the state of all random numbers.
    pub seed: u64,
    /// Ranks whose batches make the global batches of the run. Fewer or more can have written the
    /// state: what it holds does not depend on that.
    pub ranks: usize,
    /// What the state belongs to.
    pub run: RunFacts,
}

/// What a run must share with the one that goes on from its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Name of the base model, for people.
    pub base_model: String,
    /// Hash over the base model's tensors.
    pub base_model_hash: String,
    /// `optimizer_type` as the metadata of files names it.
    pub optimizer: String,
    /// Keys and shapes of the trained tensors, in the order of the parameters.
    pub tensors: Vec<(String, Vec<usize>)>,
    /// Alpha of each module.
    pub alphas: BTreeMap<String, String>,
    /// The data.
    pub data: DataFacts,
    /// Options that shape the course of training and differ from their defaults, as TOML.
    pub options: BTreeMap<String, String>,
}

/// What the order of samples depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFacts {
    /// Hash over names, sizes, repeats and buckets of the images.
    pub images_hash: String,
    /// Hash over captions and the options of the datasets.
    pub captions_hash: String,
    /// Samples of an epoch.
    pub samples_per_epoch: u64,
    /// Optimizer steps of an epoch.
    pub steps_per_epoch: usize,
    /// Samples of all ranks in one micro-step, for each dataset.
    pub global_batches: Vec<usize>,
    /// Micro-steps of a step.
    pub accumulation: usize,
}

impl Facts {
    /// Which of two states is further, counted in epochs.
    pub fn cmp_epochs(&self, other: &Facts) -> Ordering {
        let per_epoch = |facts: &Facts| facts.run.data.steps_per_epoch.max(1) as u128;
        (self.step as u128 * per_epoch(other)).cmp(&(other.step as u128 * per_epoch(self)))
    }
}

impl DataFacts {
    /// Whether a position in one is the same position in the other.
    pub fn same_positions(&self, other: &DataFacts) -> bool {
        let key = |data: &DataFacts| {
            (data.images_hash.clone(), data.global_batches.clone(), data.accumulation)
        };
        key(self) == key(other) && self.steps_per_epoch == other.steps_per_epoch
    }

    /// Images of a step, for people: accumulation x batch of all ranks (first dataset).
    pub fn images_a_step(&self) -> String {
        let batch = self.global_batches.first().copied().unwrap_or(0);
        format!("{} x {batch}", self.accumulation)
    }
}
