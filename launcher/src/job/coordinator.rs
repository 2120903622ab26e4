//! Decides for all nodes of a job: when ranks start, when they halt, whether they start again.
//!
//! A state machine without clocks and sockets: what happens comes in as [`Event`]s with the time,
//! what is to be done comes out as [`Action`]s. One number, the *generation*, counts the starts; an
//! event of an earlier one changes nothing.
//!
//! The way: nodes join (*gathering*) until all are there, or the least number is there and the wait
//! is over; ranks run; the first failure halts all of them (*halting*), failures within
//! [`Policy::merge`] count as one; when every node has halted its ranks the nodes gather again, as
//! often as the budget of that cause allows. A node that comes while ranks run takes part from the next
//! snapshot on: then all halt and start with it. Ranks that end well on all nodes end the job.

mod turns;

use std::collections::BTreeMap;
use std::time::Duration;

use collectives::{Moment, exit_code};

use super::event::{Action, Event, Facts, Failure, News, Policy};
use super::table::{JobState, NodeRow, Restart, Table};
use super::watch::Watch;

/// A node as the coordinator knows it.
#[derive(Debug, Clone)]
struct Member {
    facts: Facts,
    heard: Duration,
    state: State,
    /// The newest snapshot in its memory.
    kept: Option<Moment>,
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
    Gathering {
        since: Duration,
        said: Duration,
    },
    /// With the newest snapshot at the time when a node came that waits for the next one.
    Running {
        waiting_since: Option<Option<Moment>>,
    },
    Halting {
        since: Duration,
        why: Why,
    },
    Over,
}

/// Why ranks halt.
#[derive(Debug, Clone)]
enum Why {
    /// The first failure and its node, and how many came with it.
    Failed { node: usize, host: String, failure: Failure, more: usize },
    /// Nodes have come: `node 1 is back`.
    Back { reason: String },
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
    history: Vec<Restart>,
    watch: Watch,
    /// The job is to end: nothing starts any more.
    stopping: bool,
    /// Somebody has ended the ranks of a node at once; the code says how.
    ended_at_once: Option<i32>,
}

/// A member that was not heard from for this long may have lost its place to a new launcher.
const UNSURE: Duration = Duration::from_secs(1);
/// Clocks that differ by more seconds are worth a warning.
const SKEW: f64 = 2.0;

impl Coordinator {
    /// A job whose nodes gather from `now` on. `generation` is that of the last start before, 0 for
    /// none.
    pub fn new(policy: Policy, generation: u64, now: Duration) -> Coordinator {
        Coordinator {
            watch: Watch::new(policy.hang_timeout),
            policy,
            phase: Phase::Gathering { since: now, said: now },
            members: BTreeMap::new(),
            generation,
            restarts: BTreeMap::new(),
            history: Vec::new(),
            stopping: false,
            ended_at_once: None,
        }
    }

    /// Takes what has happened; gives what is to be done, in order.
    pub fn take(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.phase, Phase::Over) {
            return actions;
        }
        match event {
            Event::Joined { node, facts, skew } => {
                self.join(node, facts, skew, now, &mut actions);
            }
            Event::Beat { node, news } => self.hear(node, news, now),
            Event::Lost { node } => self.lose(node, "its connection ended", now, &mut actions),
            Event::Failed { node, generation, failure } if generation == self.generation => {
                self.fail(node, failure, now, &mut actions);
            }
            Event::Ended { node, generation, code, failure } if generation == self.generation => {
                self.note_end(node, (code, failure), now, &mut actions);
            }
            // Of a start that is over.
            Event::Failed { .. } | Event::Ended { .. } => {}
            Event::StopAsked { why } => self.stop(&why, &mut actions),
            Event::Tick => {
                self.look_for_silence(now, &mut actions);
                self.look_for_hangs(now, &mut actions);
            }
        }
        self.go_on(now, &mut actions);
        actions
    }

    /// The job as a table.
    pub fn table(&self, now: Duration) -> Table {
        let state = match self.phase {
            Phase::Gathering { .. } => JobState::Gathering,
            Phase::Running { .. } => JobState::Running,
            Phase::Halting { .. } => JobState::Halting,
            Phase::Over => JobState::Over,
        };
        let row = |(node, member): (&usize, &Member)| NodeRow {
            node: *node,
            host: member.facts.host.clone(),
            processes: member.facts.processes,
            is_running: member.state == State::Running,
            quiet_s: now.saturating_sub(member.heard).as_secs_f32(),
        };
        Table {
            job: String::new(),
            generation: self.generation,
            state,
            elapsed_s: now.as_secs_f64(),
            nodes_wanted: self.policy.nodes,
            nodes: self.members.iter().map(row).collect(),
            ranks: self.watch.rows(now),
            restarts: self.history.clone(),
            kept_step: self.kept().map(|moment| moment.step),
        }
    }

    /// What ranks would go on from: rank 0 reads the memory of node 0.
    fn kept(&self) -> Option<Moment> {
        self.members.get(&0)?.kept
    }

    /// Nobody but this node: what its ranks say of themselves is enough.
    fn is_alone(&self) -> bool {
        self.policy.nodes.1 == 1
    }

    fn join(
        &mut self,
        node: usize,
        facts: Facts,
        skew: f64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if let Some(member) = self.members.get(&node) {
            if member.facts.life == facts.life {
                self.lose(node, "its connection was interrupted", now, actions);
            } else if now.saturating_sub(member.heard) > UNSURE {
                actions.push(Action::Later { node });
                return;
            }
        }
        if let Err(why) = self.admit(node, &facts) {
            actions.push(Action::Refuse { node, why });
            return;
        }
        if skew.abs() > SKEW {
            let (by, to) = (skew.abs(), if skew > 0.0 { "ahead of" } else { "behind" });
            actions.push(Action::Say(format!(
                "warning: the clock of node {node} ({}) is {by:.1} s {to} that of node 0\n\
                 hint: times in logs and files will not fit; a time service (NTP) sets clocks",
                facts.host
            )));
        }
        let kept = self.kept();
        if let Phase::Running { waiting_since } = &mut self.phase {
            waiting_since.get_or_insert(kept);
            actions.push(Action::Say(format!(
                "node {node} ({}) has come: it takes part from the next snapshot on",
                facts.host
            )));
        }
        self.members.insert(node, Member { facts, heard: now, state: State::Ready, kept: None });
    }

    /// Whether a node fits to those that are there.
    fn admit(&self, node: usize, facts: &Facts) -> Result<(), String> {
        if node >= self.policy.nodes.1 {
            let most = self.policy.nodes.1;
            return Err(format!("the job has nodes 0 to {}, this is: {node}", most - 1));
        }
        if let Some(member) = self.members.get(&node) {
            return Err(format!(
                "two launchers say that they are node {node}, on {} and {}\n\
                 hint: every launcher needs a number of its own, `--node_rank`",
                member.facts.host, facts.host
            ));
        }
        let Some((other, member)) = self.members.iter().next() else { return Ok(()) };
        let theirs = &member.facts;
        let counts = (theirs.processes.to_string(), facts.processes.to_string());
        let all = [
            ("build", &theirs.build, &facts.build, "install the same `lorarun` on all nodes"),
            (
                "config",
                &theirs.config,
                &facts.config,
                "every node needs the same command, options of the command and config files",
            ),
            (
                "number of processes",
                &counts.0,
                &counts.1,
                "every node starts as many, `--nproc_per_node`",
            ),
        ];
        match all.into_iter().find(|(_, theirs, own, _)| theirs != own) {
            None => Ok(()),
            Some((what, theirs, own, hint)) => Err(format!(
                "its {what} differs from that of node {other}: {own} instead of {theirs}\n\
                 hint: {hint}"
            )),
        }
    }

    /// A node beats.
    fn hear(&mut self, node: usize, news: News, now: Duration) {
        let Some(member) = self.members.get_mut(&node) else { return };
        member.heard = now;
        member.kept = news.kept.max(member.kept);
        if news.generation == self.generation {
            self.watch.take((node, &member.facts.host), news.ranks, now);
        }
    }

    /// A node is gone.
    fn lose(&mut self, node: usize, how: &str, now: Duration, actions: &mut Vec<Action>) {
        let Some(member) = self.members.remove(&node) else { return };
        self.watch.forget(node);
        let is_halting = matches!(self.phase, Phase::Halting { .. });
        let ended_well = matches!(member.state, State::Ended(exit_code::DONE | exit_code::REQUEUE));
        if !is_halting && (member.state == State::Ready || ended_well) {
            let host = member.facts.host;
            actions.push(Action::Say(format!("node {node} ({host}) is gone: {how}")));
            return;
        }
        let failure = Failure {
            rank: None,
            // What was saved is good, and another start may find the node again.
            code: exit_code::REQUEUE,
            how: format!("is gone: {how}"),
            cause: "nodes that are gone".to_owned(),
            blames: None,
        };
        let host = member.facts.host;
        self.note_failure((node, host), failure, now, actions);
    }

    fn fail(&mut self, node: usize, failure: Failure, now: Duration, actions: &mut Vec<Action>) {
        let host = self.members.get(&node).map(|member| member.facts.host.clone());
        self.note_failure((node, host.unwrap_or_default()), failure, now, actions);
    }

    fn note_failure(
        &mut self,
        (node, host): (usize, String),
        failure: Failure,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        match &mut self.phase {
            Phase::Halting {
                since,
                why: Why::Failed { node: first, host: at, failure: known, more },
            } => {
                let is_consequence = failure.blames.is_some();
                if known.blames.is_some() && !is_consequence {
                    // What came first was a consequence of this one.
                    (*first, *at, *known) = (node, host, failure);
                } else if !is_consequence && now.saturating_sub(*since) <= self.policy.merge {
                    *more += 1;
                }
            }
            Phase::Halting { why, .. } => {
                *why = Why::Failed { node, host, failure, more: 0 };
            }
            Phase::Running { .. } => {
                let who = who((node, &host), &failure);
                let reason = format!("{who} {}", failure.how);
                let is_told = failure.blames.is_some() || self.is_alone();
                if !is_told && !is_final(failure.code) {
                    actions.push(Action::Say(reason.clone()));
                }
                self.halt_all(&reason, false, actions);
                let why = Why::Failed { node, host, failure, more: 0 };
                self.phase = Phase::Halting { since: now, why };
            }
            Phase::Gathering { .. } | Phase::Over => {}
        }
    }

    fn halt_all(&self, reason: &str, keep_flights: bool, actions: &mut Vec<Action>) {
        let running = self.members.iter().filter(|(_, member)| member.state == State::Running);
        actions.extend(running.map(|(node, _)| Action::Halt {
            node: *node,
            generation: self.generation,
            reason: reason.to_owned(),
            keep_flights,
        }));
    }

    /// All ranks of a node have ended.
    fn note_end(
        &mut self,
        node: usize,
        (code, failure): (i32, Option<Failure>),
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.members.get_mut(&node) else { return };
        member.heard = now;
        member.state = State::Ended(code);
        self.watch.forget(node);
        match (&mut self.phase, failure) {
            // It knows better now which of its ranks was the first.
            (
                Phase::Halting { why: Why::Failed { node: first, failure: known, .. }, .. },
                Some(failure),
            ) if *first == node && known.rank.is_some() => *known = failure,
            (Phase::Running { .. }, None)
                if !matches!(code, exit_code::DONE | exit_code::REQUEUE) =>
            {
                // Nobody failed: somebody has ended this node's ranks at once, and the job with them.
                self.ended_at_once = Some(code);
                let how = "was told to end at once".to_owned();
                let cause = how.clone();
                let failure = Failure { rank: None, code, how, cause, blames: None };
                self.fail(node, failure, now, actions);
            }
            _ => {}
        }
    }

    fn stop(&mut self, why: &str, actions: &mut Vec<Action>) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        if !self.is_alone() {
            actions.push(Action::Say(format!("{why}: asking all ranks to save and end")));
        }
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
            // Should it hear this, it ends its ranks.
            actions.push(Action::Leave { node, why: format!("it was {how}") });
            self.lose(node, &how, now, actions);
        }
    }

    fn look_for_hangs(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Running { .. }) {
            return;
        }
        let Some(verdict) = self.watch.verdict(now) else { return };
        let host = self.members.get(&verdict.node).map(|member| member.facts.host.clone());
        let host = host.unwrap_or_default();
        let failure = Failure {
            rank: Some(verdict.rank),
            code: exit_code::FAILURE,
            how: verdict.how,
            cause: "ranks that hang".to_owned(),
            blames: None,
        };
        let reason = format!("{} {}", who((verdict.node, &host), &failure), failure.how);
        let mut lines = vec![format!("error: {reason}")];
        lines.extend(self.watch.flight_lines(now).into_iter().map(|line| format!("  {line}")));
        actions.push(Action::Say(lines.join("\n")));
        self.halt_all(&reason, true, actions);
        let why = Why::Failed { node: verdict.node, host, failure, more: 0 };
        self.phase = Phase::Halting { since: now, why };
    }
}

/// Whether trying again cannot help: the same command would fail again.
fn is_final(code: i32) -> bool {
    matches!(code, exit_code::USAGE | exit_code::CONFIGURATION)
}

/// `rank 3 on node 1 (host)`.
fn who((node, host): (usize, &str), failure: &Failure) -> String {
    let host = if host.is_empty() { String::new() } else { format!(" ({host})") };
    match failure.rank {
        Some(rank) => format!("rank {rank} on node {node}{host}"),
        None => format!("node {node}{host}"),
    }
}

#[cfg(test)]
mod tests;
