//! What a run's states say, on all ranks, and how rank 0 writes them while the run goes on.

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
use crate::lease::Lease;
use crate::optimizer::OptimizerState;
use crate::plan::Plan;

/// The part that holds the trained weights.
pub const WEIGHTS: &str = "weights";
/// The part that no state is without.
pub const OPTIMIZER: &str = "optimizer";

/// What a run carries from step to step: the weights and the other parts, by their names.
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

    /// What a state after `step` steps, in `epoch` (from 1), says of itself; the same on all ranks.
    pub fn facts(&self, (step, epoch): (usize, usize)) -> Facts {
        Facts {
            version: VERSION,
            written_by: format!("lorarun {}", env!("CARGO_PKG_VERSION")),
            step,
            epoch,
            data_offset: self.start.data_offset,
            schedule_offset: self.start.schedule_offset,
            seed: self.seed,
            ranks: self.ranks,
            run: self.run.clone(),
        }
    }

    /// Writes the state after `step` steps, in `epoch` (from 1), and removes the one it outdates.
    pub fn save(
        &self,
        point: SavePoint,
        (step, epoch): (usize, usize),
        carried: &Carried,
        lease: &Lease,
    ) -> Result<()> {
        let path = self.saving.state_path(point);
        let mut files = Files::new();
        for (name, state) in carried {
            files.insert(parts::file_name(name), parts::to_bytes(state)?);
        }
        lease.check()?;
        folder::write(&path, &self.facts((step, epoch)), &files, || lease.check())
            .map_err(|error| lease.cause(error))
            .with_context(|| format!("the state after step {step} could not be saved"))?;
        console::note(&format!("saved {}", path.display()));
        if let Some(old) = self.saving.outdated_state(point)
            && old.is_dir()
        {
            lease.check()?;
            remove_folder(&old).context("cannot remove the outdated state")?;
            console::note(&format!("removed {}", old.display()));
        }
        Ok(())
    }
}

/// The trained tensors as f32 under their keys and in the order of files.
pub fn weights(network: &LoraNetwork, params: &ParamStore) -> Result<OptimizerState> {
    let flat = params.flat().to_vec_f32()?;
    let tensor = |id: ParamId| {
        let values = network.file_order(id, &flat[params.range(id)]);
        let tensor = OwnedTensor::from_f32(&network.file_shape(id), &values, Dtype::F32)?;
        Ok((network.key(id), tensor))
    };
    let tensors = (0..network.param_count()).map(ParamId).map(tensor).collect::<Result<_>>()?;
    Ok(OptimizerState { tensors, ..Default::default() })
}
