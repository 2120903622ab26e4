//! The way of a run: from checked options to a trained file, on one rank.

use anyhow::{Context, Result};
use collectives::{Comm, Env};

use crate::base::Base;
use crate::checkpoint::check_writable;
use crate::console;
use crate::data_plan::{dataset_defaults, dataset_input};
use crate::dataset::{DatasetGroup, plan_datasets};
use crate::lr::Schedule;
use crate::memory::{peak_resident, show_bytes};
use crate::network::PreparedNetwork;
use crate::objective::Objective;
use crate::optimizer::Optimizer;
use crate::options::{Options, Parsed};
use crate::plan::{Plan, choose_seed, describe};
use crate::progress::format_summary;
use crate::saver::{DatasetNumbers, Saver};
use crate::step::Models;
use crate::tensorboard::RunLog;
use crate::train::{Ending, Trainer};

/// A run that is resolved and checked; nothing heavy has happened yet.
pub struct Run {
    options: Options,
    comm: Comm,
    base: Base,
    group: DatasetGroup,
    prepared: PreparedNetwork,
    plan: Plan,
}

impl Run {
    /// Finds the data, opens the model, chooses the modules. What fails here is a wrong
    /// configuration.
    pub fn prepare(parsed: &Parsed, env: &Env) -> Result<Self> {
        let options = parsed.options.clone();
        for note in &parsed.notes {
            console::note(note);
        }
        let datasets = plan_datasets(&dataset_input(parsed)?, &dataset_defaults(&options)?)?;
        let group = DatasetGroup::open(datasets, options.strict_data)?;
        if options.cache_latents {
            group.check_latents_cacheable()?;
        }
        for warning in &group.warnings {
            console::warn(warning);
        }
        let base = Base::open(&options)?;
        for note in &base.files.notes {
            console::note(note);
        }
        let comm = Comm::connect(env).context("connect the ranks")?;
        let seed = agree_on_seed(&options, &comm)?;
        let prepared = PreparedNetwork::new(&options, &base, seed)?;
        let plan = Plan::new(&options, &group, &base, seed, comm.world_size())?;
        let rows = describe(&options, &plan, &group, &base, &prepared);
        let rows: Vec<(&str, String)> = rows.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        console::note(&format_summary("plan", &rows));
        for note in &prepared.notes {
            console::note(note);
        }
        Ok(Self { options, comm, base, group, prepared, plan })
    }

    /// Whether the user asked for the plan alone.
    pub fn is_dry(&self) -> bool {
        self.options.dry_run
    }

    /// Prints options and files of the plan as data.
    pub fn print_plan(&self) {
        console::data(&self.options.to_toml());
        for path in self.plan.saving.planned(self.plan.steps, self.plan.epochs) {
            console::data(&format!("# writes {}", path.display()));
        }
    }
}

/// Ranks that chose a seed each would train different things.
fn agree_on_seed(options: &Options, comm: &Comm) -> Result<u64> {
    if let Some(seed) = options.seed {
        return Ok(seed);
    }
    let own = choose_seed(options).to_le_bytes().to_vec();
    let agreed = comm.broadcast(0, own).context("agree on a seed")?;
    let bytes: [u8; 8] = agreed.try_into().map_err(|_| anyhow::anyhow!("not a seed"))?;
    Ok(u64::from_le_bytes(bytes))
}
