//! What the coordinator hears and what it orders: the words of its state machine.

use std::time::Duration;

use collectives::Moment;
use serde::{Deserialize, Serialize};

use super::watch::RankReport;

/// What the job allows.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Least and largest number of nodes.
    pub nodes: (usize, usize),
    /// How long the first start waits for the largest number.
    pub join_wait: Duration,
    /// How long a start after a failure waits for a node that is gone.
    pub rejoin_wait: Duration,
    /// Starts after a failure, for each cause.
    pub max_restarts: usize,
    /// A node that was not heard from for this long is gone.
    pub silence: Duration,
    /// Failures this close together are one.
    pub merge: Duration,
    /// How long nodes have to halt their ranks before they count as gone.
    pub halt_wait: Duration,
    /// A rank without a sign of life for this long hangs; `None` learns it from the run.
    pub hang_timeout: Option<Duration>,
}

/// What a node says of itself when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its name, for messages.
    pub host: String,
    /// Processes that it will start.
    pub processes: usize,
    /// What it was built from; different builds do not run together.
    pub build: String,
    /// A number for config and arguments; different ones do not run together.
    pub config: String,
    /// A number drawn by this launcher: the same one that comes again has lost its connection.
    pub life: u64,
}

/// How a rank failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its number among all; `None` when it is the node that failed.
    pub rank: Option<usize>,
    /// What a shell would show.
    pub code: i32,
    /// Words that follow "rank 2" or "node 1".
    pub how: String,
    /// Words for all failures of this kind, which share a budget.
    pub cause: String,
    /// The rank of another node that it names as the one to blame.
    pub blames: Option<usize>,
}

/// What a node says with every beat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct News {
    /// Of which start its ranks are.
    pub generation: u64,
    /// Its ranks that run.
    pub ranks: Vec<RankReport>,
    /// The newest snapshot in its memory.
    pub kept: Option<Moment>,
}

/// What has happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is there and runs nothing; its clock is ahead by these seconds.
    Joined { node: usize, facts: Facts, skew: f64 },
    /// A node was heard from.
    Beat { node: usize, news: News },
    /// A node's connection ended.
    Lost { node: usize },
    /// A rank of a node failed.
    Failed { node: usize, generation: u64, failure: Failure },
    /// All ranks of a node have ended; the code is that of the node, the failure the one that it
    /// comes from after all.
    Ended { node: usize, generation: u64, code: i32, failure: Option<Failure> },
    /// Somebody asks that the job is saved and ends.
    StopAsked { why: String },
    /// Time passes.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// This node starts its ranks.
    Start {
        node: usize,
        generation: u64,
        first_rank: usize,
        world_size: usize,
        full_world_size: usize,
    },
    /// This node ends its ranks, and says when all have ended.
    Halt { node: usize, generation: u64, reason: String, keep_flights: bool },
    /// This node asks its ranks to save and end.
    Stop { node: usize, generation: u64 },
    /// The node that has just joined is told why it cannot take part.
    Refuse { node: usize, why: String },
    /// The node that has just joined should try again in a moment.
    Later { node: usize },
    /// A node that took part is left behind: it ends its ranks and may join anew.
    Leave { node: usize, why: String },
    /// A line for the user.
    Say(String),
    /// The job is over; every node ends with this code.
    Finish { code: i32 },
}
