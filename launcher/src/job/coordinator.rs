//! Decides for all nodes of a job: when ranks start, when they halt, whether they start again.
//!
//! A state machine without clocks and sockets: what happens comes in as [`Event`]s with the time,
//! what is to be done comes out as [`Action`]s. One number, the *generation*, counts the starts; an
//! event of an earlier one changes nothing.
//!
//! The way: nodes join (*gathering*) until all are there, or the least number is there and the wait
//! is over; ranks run; the first failure halts all of them (*halting*), failures within
//! [`Policy::merge`] count as one; when every node has halted its ranks the nodes gather again, as
//! often as the budget of that cause allows. Ranks that end well on all nodes end the job.

use std::collections::BTreeMap;
use std::time::Duration;

use collectives::exit_code;
use serde::{Deserialize, Serialize};

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
}

/// What has happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is there and runs nothing.
    Joined { node: usize, facts: Facts },
    /// A node was heard from.
    Beat { node: usize },
    /// A node's connection ended.
    Lost { node: usize },
    /// A rank of a node failed.
    Failed { node: usize, generation: u64, failure: Failure },
    /// All ranks of a node have ended; the code is the worst.
    Ended { node: usize, generation: u64, code: i32 },
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
    Halt { node: usize, generation: u64, reason: String },
    /// This node asks its ranks to save and end.
    Stop { node: usize, generation: u64 },
    /// This node is told why it cannot take part.
    Refuse { node: usize, why: String },
    /// A line for the user.
    Say(String),
    /// The job is over; every node ends with this code.
    Finish { code: i32 },
}

/// A node as the coordinator knows it.
#[derive(Debug, Clone)]
struct Member {
    facts: Facts,
    heard: Duration,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It waits for a start.
    Ready,
    /// Its ranks run.
    Running,
    /// Its ranks have ended with this code.
    Ended(i32),
}

#[derive(Debug, Clone)]
enum Phase {
    Gathering { since: Duration, said: Duration },
    Running,
    Halting { since: Duration, first: (usize, Failure), more: usize },
    Over,
}

/// The state of the job.
#[derive(Debug)]
pub struct Coordinator {
    policy: Policy,
    phase: Phase,
    members: BTreeMap<usize, Member>,
    generation: u64,
    /// Starts after failures, by cause.
    restarts: BTreeMap<String, usize>,
    /// The job is to end: nothing starts any more.
    stopping: bool,
}

/// Between two lines that say who is waited for.
const SAY: Duration = Duration::from_secs(10);

impl Coordinator {
    /// A job whose nodes gather from `now` on. `generation` is that of the last start before, 0 for
    /// none.
    pub fn new(policy: Policy, generation: u64, now: Duration) -> Coordinator {
        Coordinator {
            policy,
            phase: Phase::Gathering { since: now, said: now },
            members: BTreeMap::new(),
            generation,
            restarts: BTreeMap::new(),
            stopping: false,
        }
    }

    /// Takes what has happened; gives what is to be done, in order.
    pub fn take(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.phase, Phase::Over) {
            return actions;
        }
        match event {
            Event::Joined { node, facts } => self.join(node, facts, now, &mut actions),
            Event::Beat { node } => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.heard = now;
                }
            }
            Event::Lost { node } => self.lose(node, "its connection ended", now, &mut actions),
            Event::Failed { node, generation, failure } if generation == self.generation => {
                self.fail(node, failure, now, &mut actions);
            }
            Event::Ended { node, generation, code } if generation == self.generation => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.heard = now;
                    member.state = State::Ended(code);
                }
            }
            // Of a start that is over.
            Event::Failed { .. } | Event::Ended { .. } => {}
            Event::StopAsked { why } => self.stop(&why, &mut actions),
            Event::Tick => self.look_for_silence(now, &mut actions),
        }
        self.go_on(now, &mut actions);
        actions
    }

    fn join(&mut self, node: usize, facts: Facts, now: Duration, actions: &mut Vec<Action>) {
        let refuse = |why: String| Action::Refuse { node, why };
        if node >= self.policy.nodes.1 {
            let most = self.policy.nodes.1;
            actions.push(refuse(format!("the job has nodes 0 to {}, this is: {node}", most - 1)));
            return;
        }
        if let Some(member) = self.members.get(&node) {
            actions.push(refuse(format!(
                "two launchers say that they are node {node}, on {} and {}",
                member.facts.host, facts.host
            )));
            return;
        }
        if let Some((other, member)) = self.members.iter().next() {
            let theirs = &member.facts;
            let differs =
                [("build", &theirs.build, &facts.build), ("config", &theirs.config, &facts.config)];
            let counts = (theirs.processes.to_string(), facts.processes.to_string());
            let differs =
                differs.into_iter().chain([("number of processes", &counts.0, &counts.1)]);
            if let Some((what, theirs, own)) = { differs }.find(|(_, theirs, own)| theirs != own) {
                actions.push(refuse(format!(
                    "its {what} differs from that of node {other}: {own} instead of {theirs}"
                )));
                return;
            }
        }
        self.members.insert(node, Member { facts, heard: now, state: State::Ready });
        // A node that comes back while the others run takes part from the next start on.
    }

    /// A node is gone.
    fn lose(&mut self, node: usize, how: &str, now: Duration, actions: &mut Vec<Action>) {
        let Some(member) = self.members.remove(&node) else { return };
        let how = format!("({}) is gone: {how}", member.facts.host);
        if member.state == State::Ready && !matches!(self.phase, Phase::Halting { .. }) {
            actions.push(Action::Say(format!("node {node} {how}")));
            return;
        }
        let failure = Failure { rank: None, code: exit_code::FAILURE, how };
        self.fail(node, failure, now, actions);
    }

    fn fail(&mut self, node: usize, failure: Failure, now: Duration, actions: &mut Vec<Action>) {
        match &mut self.phase {
            Phase::Halting { since, more, .. } => {
                // What fails while all are told to end, fails because of that.
                if now.saturating_sub(*since) <= self.policy.merge {
                    *more += 1;
                }
            }
            Phase::Running => {
                let who = who(node, &failure);
                actions.push(Action::Say(format!("{who} {}", failure.how)));
                let reason = format!("{who} {}", failure.how);
                for (node, member) in &self.members {
                    if member.state == State::Running {
                        let (node, reason) = (*node, reason.clone());
                        actions.push(Action::Halt { node, generation: self.generation, reason });
                    }
                }
                self.phase = Phase::Halting { since: now, first: (node, failure), more: 0 };
            }
            Phase::Gathering { .. } | Phase::Over => {}
        }
    }

    fn stop(&mut self, why: &str, actions: &mut Vec<Action>) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        actions.push(Action::Say(format!("{why}: asking all ranks to save and end")));
        for (node, member) in &self.members {
            if member.state == State::Running {
                actions.push(Action::Stop { node: *node, generation: self.generation });
            }
        }
    }

    fn look_for_silence(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let silent = self.members.iter();
        let silent = silent.filter(|(_, m)| now.saturating_sub(m.heard) > self.policy.silence);
        for node in silent.map(|(node, _)| *node).collect::<Vec<_>>() {
            let how = format!("not heard from for {:.1} s", self.policy.silence.as_secs_f64());
            self.lose(node, &how, now, actions);
        }
    }

    /// Changes the phase when its end is reached.
    fn go_on(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase.clone() {
            Phase::Gathering { since, said } => self.gather((since, said), now, actions),
            Phase::Running => {
                let running = self.members.values().filter(|m| m.state != State::Ready);
                let codes: Option<Vec<i32>> = running
                    .map(|member| match member.state {
                        State::Ended(code) => Some(code),
                        _ => None,
                    })
                    .collect();
                if let Some(code) = codes.and_then(|codes| codes.into_iter().max()) {
                    // Well or saved: a failure would have halted the job.
                    self.finish(code, actions);
                }
            }
            Phase::Halting { since, first, more } => {
                self.halt((since, first, more), now, actions);
            }
            Phase::Over => {}
        }
    }

    fn gather(
        &mut self,
        (since, said): (Duration, Duration),
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.stopping {
            self.finish(exit_code::REQUEUE, actions);
            return;
        }
        let (least, most) = self.policy.nodes;
        let first = self.restarts.is_empty();
        let wait = if first { self.policy.join_wait } else { self.policy.rejoin_wait };
        let waited = now.saturating_sub(since);
        let there = self.members.len();
        if there == most || (there >= least && waited >= wait) {
            self.start(actions);
        } else if waited >= wait.max(self.policy.join_wait) {
            actions.push(Action::Say(format!(
                "error: {there} of at least {least} nodes have come in {:.0} s, missing: {}",
                waited.as_secs_f64(),
                self.missing()
            )));
            self.finish(exit_code::REQUEUE, actions);
        } else if now.saturating_sub(said) >= SAY {
            actions.push(Action::Say(format!(
                "waiting for {} ({there} of {most} nodes are there), {:.0} s",
                self.missing(),
                waited.as_secs_f64()
            )));
            self.phase = Phase::Gathering { since, said: now };
        }
    }

    /// Ranks are numbered by node; what is there is numbered without gaps.
    fn start(&mut self, actions: &mut Vec<Action>) {
        self.generation += 1;
        let processes = || self.members.values().map(|member| member.facts.processes);
        let world_size = processes().sum();
        // Every node has as many as the others.
        let full_world_size = processes().max().unwrap_or(0) * self.policy.nodes.1;
        let mut first_rank = 0;
        for (node, member) in &mut self.members {
            member.state = State::Running;
            let (node, generation) = (*node, self.generation);
            actions.push(Action::Start {
                node,
                generation,
                first_rank,
                world_size,
                full_world_size,
            });
            first_rank += member.facts.processes;
        }
        self.phase = Phase::Running;
    }

    fn halt(
        &mut self,
        (since, (node, failure), more): (Duration, (usize, Failure), usize),
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let waited = now.saturating_sub(since);
        let still: Vec<usize> = self
            .members
            .iter()
            .filter(|(_, member)| member.state == State::Running)
            .map(|(node, _)| *node)
            .collect();
        if waited >= self.policy.halt_wait {
            for node in &still {
                self.members.remove(node);
                let why = "it did not end its ranks";
                actions.push(Action::Say(format!("node {node} is left behind: {why}")));
                actions.push(Action::Refuse { node: *node, why: why.to_owned() });
            }
        } else if !still.is_empty() || waited < self.policy.merge {
            return;
        }
        let who = who(node, &failure);
        if matches!(failure.code, exit_code::USAGE | exit_code::CONFIGURATION) {
            // The same command would fail again.
            self.finish(failure.code, actions);
            return;
        }
        if self.stopping {
            self.finish(failure.code, actions);
            return;
        }
        let cause = match failure.rank {
            Some(_) => format!("ranks that {}", failure.how),
            None => "nodes that are gone".to_owned(),
        };
        let used = self.restarts.entry(cause.clone()).or_insert(0);
        if *used >= self.policy.max_restarts {
            actions.push(Action::Say(format!(
                "error: {who} {}, and the restarts for {cause} are used up: {used}",
                failure.how
            )));
            self.finish(failure.code, actions);
            return;
        }
        *used += 1;
        let others = if more > 0 { format!(", and {more} more") } else { String::new() };
        let max = self.policy.max_restarts;
        actions.push(Action::Say(format!(
            "starting again after {who}{others}: {used} of {max} restarts for {cause}"
        )));
        for member in self.members.values_mut() {
            member.state = State::Ready;
        }
        self.phase = Phase::Gathering { since: now, said: now };
        self.gather((now, now), now, actions);
    }

    fn finish(&mut self, code: i32, actions: &mut Vec<Action>) {
        self.phase = Phase::Over;
        actions.push(Action::Finish { code });
    }

    /// `node 1` or `nodes 1, 3`.
    fn missing(&self) -> String {
        let missing = (0..self.policy.nodes.1).filter(|node| !self.members.contains_key(node));
        let missing: Vec<String> = missing.map(|node| node.to_string()).collect();
        let plural = if missing.len() == 1 { "" } else { "s" };
        format!("node{plural} {}", missing.join(", "))
    }
}

fn who(node: usize, failure: &Failure) -> String {
    match failure.rank {
        Some(rank) => format!("rank {rank} on node {node}"),
        None => format!("node {node}"),
    }
}

#[cfg(test)]
mod tests;
