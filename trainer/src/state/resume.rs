//! From a snapshot in memory or the option `resume` to weights and parts on every rank.
//!
//! A snapshot is of this very job, so it goes before what the options ask for, which is where the job
//! began. Rank 0 alone reads; the others get the bytes from it, so that only rank 0 needs to see the
//! folder, and what is wrong with a state ends all ranks with the same words.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use collectives::{Comm, Env};
use formats::OwnedTensor;
use serde::{Deserialize, Serialize};

use super::accelerate;
use super::facts::{DataFacts, Facts, RunFacts};
use super::find::{self, Found};
use super::fit::{self, Expected};
use super::folder::{Files, StateFolder};
use super::keeper::{OPTIMIZER, WEIGHTS};
use super::parts;
use super::start::{Here, Origin, Start};
use crate::checkpoint::Saving;
use crate::console;
use crate::dataset::{DatasetGroup, Sampler};
use crate::network::PreparedNetwork;
use crate::optimizer::OptimizerState;
use crate::options::Options;
use crate::plan::Plan;
use crate::snapshot::Memory;

/// What rank 0 has found, as all ranks know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Known {
    /// Nothing to go on from.
    Nothing,
    /// One of ours.
    Own { path: PathBuf, facts: Box<Facts>, why: Why },
    /// One of sd-scripts.
    Foreign { path: PathBuf, step: usize },
    /// It cannot be used.
    Unusable(String),
}

/// Why a run goes on from a state of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Why {
    /// The options ask for it.
    Asked,
    /// A cluster has started the job again.
    Restarted,
    /// The launcher has started the ranks again.
    Kept,
}

/// The state that a run goes on from.
#[derive(Clone, Debug)]
pub struct Resume {
    known: Known,
    /// Its files where it was kept in memory; on rank 0.
    kept: Option<Arc<Files>>,
}

/// Where to look for a state.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// What the user asks for.
    pub options: &'a Options,
    /// How this run was started.
    pub env: &'a Env,
    /// Where snapshots are.
    pub memory: Option<&'a Memory>,
}

/// What a state gives: values for the network, and the parts by name.
pub struct Loaded {
    parts: BTreeMap<String, OptimizerState>,
    weights: BTreeMap<String, OwnedTensor>,
    path: PathBuf,
    foreign: bool,
}

/// `resume = "auto"`.
const AUTO: &str = "auto";

impl Resume {
    /// Finds the state that the run goes on from; `None` where it begins anew. A collective.
    pub fn find(from: Sources<'_>, comm: &Comm) -> Result<Option<Self>> {
        let mut kept = None;
        let own = match comm.rank() {
            0 => {
                let known = match recall(from.memory) {
                    Some((facts, files)) => {
                        kept = Some(Arc::new(files));
                        let path = PathBuf::from("the snapshot in memory");
                        Ok(Known::Own { path, facts: Box::new(facts), why: Why::Kept })
                    }
                    None => look(from),
                };
                serde_json::to_vec(&known.unwrap_or_else(|e| Known::Unusable(format!("{e:#}"))))?
            }
            _ => Vec::new(),
        };
        let known = serde_json::from_slice(&comm.broadcast(0, own)?)?;
        match &known {
            Known::Unusable(error) => bail!("{error}"),
            Known::Nothing => Ok(None),
            Known::Own { .. } | Known::Foreign { .. } => Ok(Some(Self { known, kept })),
        }
    }

    /// The seed of the run that wrote the state.
    pub fn seed(&self) -> Option<u64> {
        match &self.known {
            Known::Own { facts, .. } => Some(facts.seed),
            _ => None,
        }
    }

    /// Checks that the state belongs to the run; says where it goes on and what differs.
    fn check(&self, run: &RunFacts, seed: u64) -> Result<Vec<String>> {
        match &self.known {
            Known::Own { path, facts, why } => {
                let notes = fit::check(facts, &Expected { run, seed })
                    .map_err(|error| error.context(format!("resume {}", path.display())))?;
                let step = facts.step;
                let from = match why {
                    Why::Kept => format!("goes on from step {step}, kept in memory"),
                    _ => format!("goes on from step {step}: {}", path.display()),
                };
                Ok(std::iter::once(from).chain(notes).collect())
            }
            Known::Foreign { path, step } => {
                Ok(vec![format!("goes on from step {step} of sd-scripts: {}", path.display())])
            }
            Known::Nothing | Known::Unusable(_) => Ok(Vec::new()),
        }
    }

    /// What the state says about its run; `None` for one of sd-scripts.
    pub fn facts(&self) -> Option<&Facts> {
        match &self.known {
            Known::Own { facts, .. } => Some(facts),
            _ => None,
        }
    }

    fn origin(&self) -> Origin<'_> {
        match &self.known {
            Known::Own { facts, .. } => Origin::State(facts),
            Known::Foreign { step, .. } => Origin::Foreign(*step),
            Known::Nothing | Known::Unusable(_) => Origin::Nothing,
        }
    }

    /// Reads the state on rank 0 and gives it to all. A collective.
    pub fn load(&self, comm: &Comm) -> Result<Loaded> {
        let (Known::Own { path, .. } | Known::Foreign { path, .. }) = &self.known else {
            bail!("there is no state to load");
        };
        let foreign = matches!(self.known, Known::Foreign { .. });
        let own = match comm.rank() {
            0 => {
                let read = match &self.kept {
                    Some(kept) => Ok(kept.clone()),
                    None if foreign => accelerate::read(path).map(Arc::new),
                    None => read_own(path).map(Arc::new),
                };
                let files = read.unwrap_or_else(|error| {
                    let words = format!("{error:#}").into_bytes();
                    Arc::new(Files::from([(FAILURE.to_owned(), words)]))
                });
                parts::pack(&files)
            }
            _ => Vec::new(),
        };
        let mut files = parts::unpack(&comm.broadcast(0, own)?)?;
        if let Some(error) = files.remove(FAILURE) {
            bail!("{}", String::from_utf8_lossy(&error));
        }
        let mut states = BTreeMap::new();
        for (name, bytes) in files {
            let whole = path.join(&name);
            let part = name.strip_suffix(".safetensors").unwrap_or(&name).to_owned();
            states.insert(part, parts::from_bytes(&whole, bytes)?);
        }
        let weights = states.remove(WEIGHTS).map(|state| state.tensors);
        let weights =
            weights.ok_or_else(|| anyhow!("the state has no weights: {}", path.display()))?;
        Ok(Loaded { parts: states, weights, path: path.clone(), foreign })
    }
}

/// Name of the message of a failed reading; no file of a state is called so.
const FAILURE: &str = "\0failure";

fn read_own(path: &Path) -> Result<Files> {
    StateFolder::open(path)?.read()
}

/// The snapshot that an earlier start of this job left.
fn recall(memory: Option<&Memory>) -> Option<(Facts, Files)> {
    memory?.recall().unwrap_or_else(|error| {
        console::warn(&format!("cannot go on from memory: {error:#}"));
        None
    })
}

/// Where `resume` leads, on rank 0.
fn look(Sources { options, env, .. }: Sources<'_>) -> Result<Known> {
    // Front ends write an empty text where nothing is asked for.
    let asked = options.resume.as_deref().filter(|path| !path.as_os_str().is_empty());
    let (asked, why) = match asked {
        Some(asked) => (asked, Why::Asked),
        None if env.restarted => {
            console::note("the cluster has started this job again: taken as `resume = \"auto\"`");
            (Path::new(AUTO), Why::Restarted)
        }
        None => return Ok(Known::Nothing),
    };
    let saving = Saving::from_options(options, 1)?;
    let found = match asked == Path::new(AUTO) {
        false => Some(find::named(asked)?),
        true => find::newest(&saving)?,
    };
    match found {
        Some(Found::Own(folder)) => {
            let StateFolder { path, facts, .. } = *folder;
            Ok(Known::Own { path, facts: Box::new(facts), why })
        }
        Some(Found::Foreign(path)) => {
            let step = accelerate::step(&path)?;
            Ok(Known::Foreign { path, step })
        }
        None => {
            console::note(&format!(
                "`resume = \"auto\"`: no state of this run yet, begins anew: {}",
                saving.output_dir.display()
            ));
            Ok(Known::Nothing)
        }
    }
}

/// Where a run begins. Checks the state, and tells what the user should know.
pub fn begin(
    resume: Option<&Resume>,
    options: &Options,
    run: &RunFacts,
    (plan, group): (&Plan, &DatasetGroup),
) -> Result<Start> {
    let mut notes = Vec::new();
    if let Some(resume) = resume {
        notes = resume.check(run, plan.seed)?;
    }
    let (start, remarks) = choose(resume, options, &run.data, (plan, group))?;
    for note in notes.iter().chain(&remarks) {
        console::note(note);
    }
    Ok(start)
}

/// [`begin`] once more without words, when images turned out to be damaged: steps may count
/// differently.
pub fn begin_again(
    resume: Option<&Resume>,
    options: &Options,
    data: &DataFacts,
    of_run: (&Plan, &DatasetGroup),
) -> Result<Start> {
    Ok(choose(resume, options, data, of_run)?.0)
}

fn choose(
    resume: Option<&Resume>,
    options: &Options,
    data: &DataFacts,
    (plan, group): (&Plan, &DatasetGroup),
) -> Result<(Start, Vec<String>)> {
    let origin = resume.map_or(Origin::Nothing, Resume::origin);
    let sampler = |data: &DataFacts| {
        Sampler::with_global_batches(group, plan.seed, &data.global_batches, data.accumulation)
    };
    let nearest = |before: &DataFacts, step: usize| {
        let samples = sampler(before).samples_before(step as u64);
        sampler(data).step_at(samples) as usize
    };
    let here = Here { data, run_steps: plan.steps, nearest: &nearest };
    let chosen = match resume.map(|resume| &resume.known) {
        Some(Known::Own { why: Why::Kept | Why::Restarted, .. }) => {
            // Where the job began, it began long ago: the state knows the counts.
            let on = Options { initial_step: None, initial_epoch: None, ..Options::clone(options) };
            Start::choose(&on, origin, &here)
        }
        _ => Start::choose(options, origin, &here),
    };
    match resume.map(|resume| &resume.known) {
        Some(Known::Own { path, .. } | Known::Foreign { path, .. }) => {
            chosen.map_err(|error| error.context(format!("resume {}", path.display())))
        }
        _ => chosen,
    }
}

impl Loaded {
    /// Puts the saved weights in place of those before the first step.
    pub fn replace_values(&mut self, prepared: &mut PreparedNetwork, plan: &Plan) -> Result<()> {
        let weights = std::mem::take(&mut self.weights);
        if self.foreign {
            let moments = self.parts.remove(accelerate::MOMENTS).unwrap_or_default().tensors;
            let takes_adamw = plan.optimizer.class == accelerate::ADAMW;
            let both = (weights, moments);
            let optimizer = accelerate::replace_values(&self.path, both, prepared, takes_adamw)?;
            self.parts.extend(optimizer.map(|state| (OPTIMIZER.to_owned(), state)));
            return Ok(());
        }
        let network = &prepared.network;
        for (id, value) in prepared.values.iter_mut().enumerate() {
            let id = engine::ParamId(id);
            let key = network.key(id);
            let tensor = weights
                .get(&key)
                .filter(|tensor| tensor.shape == network.file_shape(id))
                .ok_or_else(|| {
                    anyhow!("the state has no `{key}` that fits: {}", self.path.display())
                })?;
            *value = network.engine_order(id, tensor.to_f32());
        }
        Ok(())
    }

    /// The saved state of a part, once. One that the state lacks starts afresh, which is told
    /// (unless the state is sd-scripts', of which all is told already); the optimizer's must be
    /// there.
    pub fn take(&mut self, part: &str) -> Result<Option<OptimizerState>> {
        let state = self.parts.remove(part);
        if state.is_none() && !self.foreign {
            if part == OPTIMIZER {
                bail!("the state has no `{part}`: {}", self.path.display());
            }
            console::note(&format!("the state has no `{part}`, which starts afresh"));
        }
        Ok(state)
    }

    /// Names the parts that nobody took.
    pub fn finish(self) {
        for part in self.parts.keys() {
            console::note(&format!("this run has no use for the state's `{part}`"));
        }
    }
}
