//! Writes states while a run goes on; on rank 0 alone.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use engine::{ParamId, ParamStore};
use formats::atomic_folder::remove_folder;
use formats::{Dtype, OwnedTensor};
use models::lora::LoraNetwork;

use super::facts::{Facts, RunFacts, VERSION};
use super::folder::{self, Files};
use super::parts;
use super::start::Start;
use crate::checkpoint::{SavePoint, Saving};
use crate::console;
use crate::optimizer::OptimizerState;
use crate::plan::Plan;

/// The part that holds the trained weights.
pub const WEIGHTS: &str = "weights";
/// The part that no state is without.
pub const OPTIMIZER: &str = "optimizer";

/// What the parts of a run carry from step to step, by their names.
pub type Carried = BTreeMap<&'static str, OptimizerState>;

/// Knows everything about a run's states that does not change from step to step.
pub struct Keeper {
    saving: Saving,
    run: RunFacts,
    start: Start,
    seed: u64,
    ranks: usize,
}

impl Keeper {
    /// For a run that begins at `start`.
    pub fn new(plan: &Plan, run: RunFacts, start: Start) -> Self {
        let (saving, seed, ranks) = (plan.saving.clone(), plan.seed, plan.world.full);
        Self { saving, run, start, seed, ranks }
    }

    /// Whether a state is due at `point`.
    pub fn is_due(&self, point: SavePoint) -> bool {
        self.saving.state_due(point)
    }

    /// Writes the state after `step` steps, in `epoch` (from 1), and removes the one it outdates.
    pub fn save(
        &self,
        point: SavePoint,
        (step, epoch): (usize, usize),
        (network, params): (&LoraNetwork, &ParamStore),
        carried: &Carried,
    ) -> Result<()> {
        let path = self.saving.state_path(point);
        let facts = Facts {
            version: VERSION,
            written_by: format!("lorarun {}", env!("CARGO_PKG_VERSION")),
            step,
            epoch,
            data_offset: self.start.data_offset,
            schedule_offset: self.start.schedule_offset,
            seed: self.seed,
            ranks: self.ranks,
            run: self.run.clone(),
        };
        let mut files = Files::new();
        let weights = OptimizerState { tensors: weights(network, params)?, ..Default::default() };
        files.insert(format!("{WEIGHTS}.safetensors"), parts::to_bytes(&weights)?);
        for (name, state) in carried {
            files.insert(format!("{name}.safetensors"), parts::to_bytes(state)?);
        }
        folder::write(&path, &facts, &files)
            .with_context(|| format!("the state after step {step} could not be saved"))?;
        console::note(&format!("saved {}", path.display()));
        if let Some(old) = self.saving.outdated_state(point)
            && old.is_dir()
        {
            remove_folder(&old).context("cannot remove the outdated state")?;
            console::note(&format!("removed {}", old.display()));
        }
        Ok(())
    }
}

/// The trained tensors as f32 under their keys and in the order of files.
fn weights(network: &LoraNetwork, params: &ParamStore) -> Result<BTreeMap<String, OwnedTensor>> {
    (0..network.param_count())
        .map(ParamId)
        .map(|id| {
            let values = network.file_order(id, &params.tensor(id)?.to_vec_f32()?);
            let shape = network.file_shape(id);
            Ok((network.key(id), OwnedTensor::from_f32(&shape, &values, Dtype::F32)?))
        })
        .collect()
}
