//! Snapshots in memory: everything that a state on disk holds, left with the node's launcher every few
//! steps, from which the ranks of the next start of the same job go on.
//!
//! The first rank of each node writes its own copy; all copies are the same. Only the one of rank 0's
//! node is read, and given to all ranks as a state from disk is.

use std::cell::Cell;

use anyhow::{Context, Result, bail};
use collectives::{Env, Moment, Snapshots};

use crate::console;
use crate::state::{Carried, Facts, Files, pack_in_place, unpack};

/// Steps between snapshots where the launcher says nothing.
const EVERY: u64 = 20;
/// The file that holds the facts of a state; parts end in `.safetensors`.
const FACTS: &str = "facts.json";

/// This rank's access to the memory; the first rank of a node alone has it, and only where the
/// launcher may start it again.
#[derive(Debug)]
pub struct Memory {
    snapshots: Snapshots,
    every: u64,
    generation: u64,
    /// It failed once, which was told.
    has_failed: Cell<bool>,
}

impl Memory {
    /// The memory that the launcher has passed to this rank.
    pub fn open(env: &Env) -> Result<Option<Self>> {
        let Some(fd) = env.snapshot_fd else { return Ok(None) };
        let snapshots = Snapshots::attach(fd).with_context(|| {
            format!("the launcher has passed no memory for snapshots, descriptor: {fd}")
        })?;
        let every = env.snapshot_every.unwrap_or(EVERY).max(1);
        let has_failed = Cell::new(false);
        Ok(Some(Self { snapshots, every, generation: env.generation, has_failed }))
    }

    /// Whether a snapshot is due after `step` steps of a start that began after `first`.
    pub fn is_due(&self, step: usize, first: usize) -> bool {
        step == first + 1 || (step as u64).is_multiple_of(self.every)
    }

    /// Keeps what is carried. A failure is told once: the snapshot before stays good.
    pub fn keep(&self, facts: &Facts, carried: &Carried) -> Result<()> {
        let moment = Moment { generation: self.generation, step: facts.step as u64 };
        let json = serde_json::to_vec(facts)?;
        let write = |pieces: &[&[u8]]| self.snapshots.write(moment, pieces);
        if let Err(error) = pack_in_place((FACTS, &json), carried, write)?
            && !self.has_failed.replace(true)
        {
            console::warn(&format!(
                "step {} could not be kept in memory, the snapshot before is good: {error}",
                facts.step
            ));
        }
        Ok(())
    }

    /// The newest snapshot of an earlier start of this job.
    pub fn recall(&self) -> Result<Option<(Facts, Files)>> {
        let Some((moment, message)) = self.snapshots.read().context("read the snapshot")? else {
            return Ok(None);
        };
        if moment.generation >= self.generation {
            bail!(
                "the snapshot in memory is of start {}, this is start: {}",
                moment.generation,
                self.generation
            );
        }
        let mut files = unpack(&message)?;
        let facts = files.remove(FACTS).context("the snapshot in memory has no facts")?;
        let facts = serde_json::from_slice(&facts).context("the facts of the snapshot")?;
        Ok(Some((facts, files)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::OptimizerState;
    use crate::state::{f64_tensor, test_facts as facts};

    fn carried(values: usize) -> Carried {
        let mut state = OptimizerState::default();
        for part in 0..100 {
            let tensor = f64_tensor(&vec![0.1; values / 100]);
            state.tensors.insert(format!("exp_avg/{part}"), tensor);
        }
        state.numbers.insert("step".to_owned(), 12.);
        Carried::from([("weights", state.clone()), ("optimizer", state)])
    }

    fn memory(snapshots: &Snapshots, generation: u64) -> Memory {
        let env = Env {
            snapshot_fd: Some(snapshots.fd()),
            snapshot_every: Some(5),
            generation,
            ..Env::single()
        };
        Memory::open(&env).unwrap().unwrap()
    }

    #[test]
    fn what_is_kept_comes_back_in_the_next_start() {
        assert!(Memory::open(&Env::single()).unwrap().is_none());
        let snapshots = Snapshots::create().unwrap();
        let first = memory(&snapshots, 1);
        assert!(first.recall().unwrap().is_none());
        first.keep(&facts(), &carried(1000)).unwrap();
        let (read, files) = memory(&snapshots, 2).recall().unwrap().unwrap();
        assert_eq!(read, facts());
        let bytes = |part: &str| crate::state::to_bytes(&carried(1000)[part]).unwrap();
        assert_eq!(files["weights.safetensors"], bytes("weights"));
        assert_eq!(files.len(), 2);
        let error = first.recall().unwrap_err().to_string();
        assert!(error.ends_with("is of start 1, this is start: 1"), "{error}");
    }

    #[test]
    fn a_snapshot_is_due_after_the_first_step_and_every_few() {
        let memory = memory(&Snapshots::create().unwrap(), 1);
        let due: Vec<usize> = (3..=16).filter(|step| memory.is_due(*step, 2)).collect();
        assert_eq!(due, [3, 5, 10, 15]);
    }
}
