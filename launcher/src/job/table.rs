//! The job as a table: what is known of every node and rank, and why ranks were started again.
//!
//! The coordinator fills it from what nodes say with their beats, and sends it to all of them, so that
//! every node can show all of the job.

use std::sync::{Arc, Mutex, PoisonError};

use collectives::Phase;
use serde::{Deserialize, Serialize};

/// The job at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Name of the job; empty where it has none.
    pub job: String,
    /// Number of the present start, from 1; 0 before the first.
    pub generation: u64,
    /// What the job is at.
    pub state: JobState,
    /// Seconds since the coordinator began.
    pub elapsed_s: f64,
    /// Least and largest number of nodes that it runs on.
    pub nodes_wanted: (usize, usize),
    /// The nodes that are there, by number.
    pub nodes: Vec<NodeRow>,
    /// The ranks that run, by number.
    pub ranks: Vec<RankRow>,
    /// Starts after a failure or with another number of nodes, the oldest first.
    pub restarts: Vec<Restart>,
    /// The step that ranks would go on from if they had to start again now.
    pub kept_step: Option<u64>,
}

/// What a job is at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Nodes are waited for.
    #[default]
    Gathering,
    /// Ranks run.
    Running,
    /// Ranks are being ended, to start again or for good.
    Halting,
    /// It has ended.
    Over,
}

impl JobState {
    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            JobState::Gathering => "gathering",
            JobState::Running => "running",
            JobState::Halting => "halting",
            JobState::Over => "over",
        }
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its number.
    pub node: usize,
    /// Name of its host.
    pub host: String,
    /// Processes that it starts.
    pub processes: usize,
    /// Whether its ranks run; false for one that waits for the next start, or whose ranks have ended.
    pub is_running: bool,
    /// Seconds since it was last heard from.
    pub quiet_s: f32,
}

/// A rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankRow {
    /// Its node.
    pub node: usize,
    /// Name of that node's host.
    pub host: String,
    /// Its number among all.
    pub rank: usize,
    /// Its process on that host.
    pub pid: i32,
    /// What it is at.
    pub phase: Phase,
    /// Optimizer steps done.
    pub step: u64,
    /// Those of the whole run; 0 before they are known.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: Option<f32>,
    /// Images a second over all ranks.
    pub images_per_second: Option<f32>,
    /// Share of the last seconds, 0 to 1, that it spent in collectives, which is nearly all waiting
    /// for others.
    pub wait_share: Option<f32>,
    /// Whether it is in a collective now.
    pub is_waiting: bool,
    /// Seconds since its last sign of life.
    pub quiet_s: f32,
}

/// A start that was not the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Restart {
    /// Number of the start that ended.
    pub generation: u64,
    /// Seconds since the coordinator began.
    pub at_s: f64,
    /// What had happened: `rank 3 on node 1 (host) was killed by signal 9`.
    pub reason: String,
    /// The kind of failure that it counts for; `None` where it counts for none.
    pub cause: Option<String>,
    /// The step that ranks went on from; `None` where nothing was kept.
    pub from_step: Option<u64>,
}

/// The newest table of this node.
#[derive(Debug, Clone, Default)]
pub struct SharedTable(Arc<Mutex<Table>>);

impl SharedTable {
    /// A copy of it.
    pub fn get(&self) -> Table {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a newer one in its place.
    pub fn set(&self, table: Table) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = table;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_survives_the_journey() {
        let table = Table {
            job: "night".to_owned(),
            generation: 2,
            state: JobState::Running,
            elapsed_s: 12.5,
            nodes_wanted: (1, 2),
            nodes: vec![NodeRow {
                node: 0,
                host: "h0".to_owned(),
                processes: 1,
                is_running: true,
                quiet_s: 0.25,
            }],
            ranks: vec![RankRow {
                node: 0,
                host: "h0".to_owned(),
                rank: 0,
                pid: 7,
                phase: Phase::Training,
                step: 3,
                steps: 9,
                // What is no number has no place in JSON.
                loss: None,
                images_per_second: Some(2.5),
                wait_share: Some(0.5),
                is_waiting: true,
                quiet_s: 0.5,
            }],
            restarts: vec![Restart {
                generation: 1,
                at_s: 3.5,
                reason: "rank 0 on node 0 (h0) was killed by signal 9".to_owned(),
                cause: None,
                from_step: Some(2),
            }],
            kept_step: Some(2),
        };
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&text).unwrap(), table);
        let shared = SharedTable::default();
        shared.clone().set(table.clone());
        assert_eq!(shared.get(), table);
        assert_eq!(table.state.name(), "running");
    }
}
