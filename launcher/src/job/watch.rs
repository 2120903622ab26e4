//! Watches the ranks of a job for signs of life, and says which one hangs.
//!
//! A rank that is in a collective waits for others and is no suspect while one is outside. Who is
//! outside has a deadline: ten times the longest time between two of its signs of life that was seen in
//! the same phase, but no less than that phase's floor, and no less than its first value until the
//! phase is known. Times are those of the coordinator, at the grain of the nodes' beats.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use collectives::recorder::{Flight, Recording, who_is_missing};
use collectives::{Phase, Standing};
use serde::{Deserialize, Serialize};

use super::table::RankRow;

/// A process that is stopped for longer hangs.
const STOPPED: Duration = Duration::from_secs(5);
/// The longest time seen, times this, is the deadline.
const MARGIN: u32 = 10;
/// Signs of life in a phase after which it is known.
const KNOWN: u32 = 20;
/// A collective in which all ranks are may take this long: the network may be slow.
const INSIDE: Duration = Duration::from_secs(60);
/// The share of waiting is that of this time.
const SHARE_OVER: Duration = Duration::from_secs(5);

/// What a node says of one of its ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    /// Its number among all.
    pub rank: usize,
    /// Its process.
    pub pid: i32,
    /// What it is at.
    pub phase: Phase,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: Option<f32>,
    /// Images a second over all ranks.
    pub images_per_second: Option<f32>,
    /// Grows with every sign of life.
    pub changes: u64,
    /// Number of the last collective that it entered.
    pub entered: u64,
    /// Whether it is in that one still.
    pub is_inside: bool,
    /// Time spent in collectives, in milliseconds.
    pub waited_ms: u64,
    /// Whether its process is stopped, by SIGSTOP or otherwise.
    pub is_stopped: bool,
    /// Its last entry in the flight recorder.
    pub flight: Option<FlightReport>,
}

impl RankReport {
    /// Puts together what a rank says of itself and what its node sees of its process.
    pub fn new(rank: usize, pid: i32, standing: &Standing, is_stopped: bool) -> RankReport {
        let number = |value: f32| Some(value).filter(|value| value.is_finite());
        RankReport {
            rank,
            pid,
            phase: standing.phase,
            step: standing.step,
            steps: standing.steps,
            loss: number(standing.loss),
            images_per_second: number(standing.images_per_second).filter(|value| *value > 0.0),
            changes: standing.changes,
            entered: standing.entered,
            is_inside: standing.is_inside,
            waited_ms: u64::try_from(standing.waited.as_millis()).unwrap_or(u64::MAX),
            is_stopped,
            flight: None,
        }
    }
}

/// An entry of the flight recorder. Its time counts backwards: hosts have clocks of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlightReport {
    /// Number since the start.
    pub seq: u64,
    /// `all_reduce of 5 floats`.
    pub op: String,
    /// Milliseconds since the rank entered it.
    pub entered_ms_ago: u64,
    /// Whether it succeeded; `None` while it is under way.
    pub left: Option<bool>,
}

/// What was learnt of a phase.
#[derive(Debug, Clone, Copy, Default)]
struct Learnt {
    /// Longest time between signs of life of a rank that was outside of collectives.
    longest: Duration,
    /// Signs of life since the last start.
    count: u32,
}

#[derive(Debug, Clone)]
struct Seen {
    node: usize,
    host: String,
    report: RankReport,
    /// When the report came.
    at: Duration,
    alive_at: Duration,
    stopped_since: Option<Duration>,
    /// Where the present share of waiting is counted from: time, and milliseconds waited.
    mark: (Duration, u64),
    share: Option<f32>,
}

/// A rank that hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Its node.
    pub node: usize,
    /// Its number among all.
    pub rank: usize,
    /// Words that follow "rank 2".
    pub how: String,
}

/// The ranks of a job, watched.
#[derive(Debug, Default)]
pub struct Watch {
    /// Holds for all phases where given.
    fixed: Option<Duration>,
    ranks: BTreeMap<usize, Seen>,
    learnt: BTreeMap<Phase, Learnt>,
    /// Longest time between signs of life of a rank in a collective.
    longest_inside: Duration,
}

impl Watch {
    /// Nothing seen yet. `fixed` is the deadline of all phases where it is not to be learnt.
    pub fn new(fixed: Option<Duration>) -> Watch {
        Watch { fixed, ..Watch::default() }
    }

    /// Ranks start anew: what they were at is forgotten, how long things take is not.
    pub fn begin(&mut self) {
        self.ranks.clear();
        // First steps take longer.
        self.learnt.values_mut().for_each(|learnt| learnt.count = 0);
    }

    /// The ranks of a node are gone.
    pub fn forget(&mut self, node: usize) {
        self.ranks.retain(|_, seen| seen.node != node);
    }

    /// Takes what a node says; ranks that it does not name have ended.
    pub fn take(&mut self, (node, host): (usize, &str), reports: Vec<RankReport>, now: Duration) {
        let named: Vec<usize> = reports.iter().map(|report| report.rank).collect();
        self.ranks.retain(|rank, seen| seen.node != node || named.contains(rank));
        for report in reports {
            let rank = report.rank;
            let Some(seen) = self.ranks.get_mut(&rank) else {
                let mark = (now, report.waited_ms);
                let stopped_since = report.is_stopped.then_some(now);
                let host = host.to_owned();
                let (at, alive_at, share) = (now, now, None);
                let seen = Seen { node, host, report, at, alive_at, stopped_since, mark, share };
                self.ranks.insert(rank, seen);
                continue;
            };
            if report.changes != seen.report.changes {
                let learnt = self.learnt.entry(report.phase).or_default();
                let gap = now.saturating_sub(seen.alive_at);
                if seen.report.is_inside {
                    self.longest_inside = self.longest_inside.max(gap);
                } else if seen.report.phase == report.phase {
                    learnt.longest = learnt.longest.max(gap);
                }
                learnt.count += 1;
                seen.alive_at = now;
            }
            seen.stopped_since = report.is_stopped.then(|| seen.stopped_since.unwrap_or(now));
            let passed = now.saturating_sub(seen.mark.0);
            if passed >= SHARE_OVER {
                let waited = report.waited_ms.saturating_sub(seen.mark.1) as f32 / 1e3;
                seen.share = Some((waited / passed.as_secs_f32()).clamp(0.0, 1.0));
                seen.mark = (now, report.waited_ms);
            }
            (seen.report, seen.at) = (report, now);
        }
    }

    /// How long a rank may go without a sign of life in a phase.
    pub fn deadline(&self, phase: Phase) -> Duration {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        // Reading a model over a network, or encoding images on a processor, shows no life for long.
        let (first, floor) = match phase {
            Phase::Starting => (600, 600),
            Phase::Loading | Phase::Caching => (900, 300),
            // The first step may compile, and on a processor it may be a long one.
            Phase::Training => (1800, 60),
            Phase::Validating | Phase::Saving => (600, 120),
            // The VAE makes a large picture in one piece.
            Phase::Sampling => (900, 300),
        };
        let learnt = self.learnt.get(&phase).copied().unwrap_or_default();
        let least = if learnt.count < KNOWN { first } else { floor };
        Duration::from_secs(least).max(learnt.longest * MARGIN)
    }

    /// The rank that keeps the others waiting for longer than it may.
    pub fn verdict(&self, now: Duration) -> Option<Verdict> {
        let stopped = self.ranks.values().filter_map(|seen| Some((seen, seen.stopped_since?)));
        let stopped = stopped.min_by_key(|(_, since)| *since);
        if let Some((seen, since)) = stopped.filter(|(_, s)| now.saturating_sub(*s) >= STOPPED) {
            let time = now.saturating_sub(since).as_secs_f64();
            let how = format!("hangs: its process is stopped (SIGSTOP) for {time:.1} s");
            return Some(Verdict { node: seen.node, rank: seen.report.rank, how });
        }
        let allowed = |seen: &Seen| match self.deadline(seen.report.phase) {
            deadline if !seen.report.is_inside || self.fixed.is_some() => deadline,
            deadline => deadline.max(INSIDE).max(self.longest_inside * MARGIN),
        };
        let is_late = |seen: &&Seen| now.saturating_sub(seen.alive_at) > allowed(seen);
        let outside = || self.ranks.values().filter(|seen| !seen.report.is_inside);
        let order = |seen: &&Seen| (seen.report.entered, seen.alive_at);
        let culprit = if outside().next().is_some() {
            outside().filter(is_late).min_by_key(order)?
        } else if self.ranks.values().all(|seen| is_late(&seen)) {
            self.ranks.values().min_by_key(order)?
        } else {
            return None;
        };
        let how = format!(
            "hangs: no sign of life for {:.1} s while {}, where {:.0} s are allowed",
            now.saturating_sub(culprit.alive_at).as_secs_f64(),
            culprit.report.phase.name(),
            allowed(culprit).as_secs_f64()
        );
        Some(Verdict { node: culprit.node, rank: culprit.report.rank, how })
    }

    /// Lines of the flight recorder: who never entered what the others wait in; otherwise what each
    /// rank did last.
    pub fn flight_lines(&self, now: Duration) -> Vec<String> {
        let clock = SystemTime::now();
        let recordings: Vec<Recording> = self
            .ranks
            .values()
            .map(|seen| Recording {
                rank: seen.report.rank,
                world_size: self.ranks.len(),
                generation: 0,
                process: seen.report.pid.unsigned_abs(),
                flights: seen.flight(clock, now).into_iter().collect(),
            })
            .collect();
        let missing = who_is_missing(&recordings, clock);
        if !missing.is_empty() {
            return missing;
        }
        let last = |recording: &Recording| {
            let what = match recording.flights.last() {
                None => "has entered no collective".to_owned(),
                Some(flight) => {
                    let ago = clock.duration_since(flight.entered).unwrap_or_default();
                    let state = if flight.left.is_none() { "is in" } else { "has left" };
                    let (op, seq, ago) = (&flight.op, flight.seq, ago.as_secs_f64());
                    format!("{state} `{op}` number {seq}, entered {ago:.1} s ago")
                }
            };
            format!("rank {} {what}", recording.rank)
        };
        recordings.iter().map(last).collect()
    }

    /// A row for each rank.
    pub fn rows(&self, now: Duration) -> Vec<RankRow> {
        let row = |seen: &Seen| RankRow {
            node: seen.node,
            host: seen.host.clone(),
            rank: seen.report.rank,
            pid: seen.report.pid,
            phase: seen.report.phase,
            step: seen.report.step,
            steps: seen.report.steps,
            loss: seen.report.loss,
            images_per_second: seen.report.images_per_second,
            wait_share: seen.share,
            is_waiting: seen.report.is_inside,
            quiet_s: now.saturating_sub(seen.alive_at).as_secs_f32(),
        };
        self.ranks.values().map(row).collect()
    }
}

impl Seen {
    /// Its last flight on this host's clock; where nothing was recorded, what its standing says.
    fn flight(&self, clock: SystemTime, now: Duration) -> Option<Flight> {
        let back = |ago: Duration| clock.checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH);
        if let Some(flight) = &self.report.flight {
            let ago = Duration::from_millis(flight.entered_ms_ago) + now.saturating_sub(self.at);
            return Some(Flight {
                seq: flight.seq,
                op: flight.op.clone(),
                entered: back(ago),
                left: flight.left.map(|succeeded| (clock, succeeded)),
            });
        }
        let entered = back(now.saturating_sub(self.alive_at));
        (self.report.entered > 0).then(|| Flight {
            seq: self.report.entered,
            op: "collective".to_owned(),
            entered,
            left: (!self.report.is_inside).then_some((clock, true)),
        })
    }
}

#[cfg(test)]
mod tests;
