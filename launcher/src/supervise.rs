//! Watches the ranks of one run on this machine: starts them, passes stop requests on, stops all
//! when one fails, and returns the exit code of the whole.
//!
//! Promises: the first failure ends every rank within [`STOP_GRACE`] and the time the kernel needs
//! to kill; no rank outlives the launcher; one thread and one loop decide everything.

use std::io::IsTerminal;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use collectives::{Author, Env, Segment, Snapshots, Token, exit_code, signals};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::cards::Ranks;
use crate::cli::{Command, Launch};
use crate::job::event::Failure;
use crate::job::flights::FlightFolder;
use crate::job::watch::RankReport;
use crate::output::{Pumps, RankOutput, Target, tell};
use crate::spawn::{Channel, WorkerSpec};
use crate::streams::Routes;
use crate::summary::{
    Ending, Status, describe_failure, exit_code_of, first_failure, is_failure, signal_name,
};
use crate::terminal::copy_size;

/// How long ranks have to end by themselves after a failure, before they are killed.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// How long ranks have to follow the call of one of them to stop, when none of them ends.
const STUCK_GRACE: Duration = Duration::from_secs(20);
/// How often the launcher looks for such a call.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long to read on what ended ranks have still to say.
const OUTPUT_GRACE: Duration = Duration::from_millis(300);

/// One rank as the launcher sees it.
struct Rank {
    pid: i32,
    output: RankOutput,
    /// The launcher has sent it a signal.
    was_told: bool,
    ended: bool,
}

/// A process has ended.
struct Exit {
    /// Number on this node.
    rank: usize,
    status: std::io::Result<std::process::ExitStatus>,
}

/// The run under way.
struct Run {
    segment: Segment,
    ranks: Vec<Rank>,
    /// The launcher's end of rank 0's terminal, where there is one.
    terminal: Option<OwnedFd>,
    /// In the order in which they were noticed.
    endings: Vec<Ending>,
    start: Instant,
    /// All ranks were asked to save and end.
    is_ending: bool,
    /// When that was asked by a signal whose repetition kills.
    asked: Option<Instant>,
    /// When ranks that still run are killed.
    kill_at: Option<Instant>,
    /// Signal whose repetition made the launcher kill.
    killed_by: Option<i32>,
    /// When an abort that no rank has followed was seen.
    aborted_at: Option<Instant>,
    /// They were ended for a reason that is not theirs.
    is_halted: bool,
    /// Where they record their collectives.
    flights: Option<FlightFolder>,
}

/// The signals that a launcher listens to.
pub struct Signals {
    interrupts: Signal,
    terminations: Signal,
    hangups: Signal,
    warnings: Signal,
    more_warnings: Signal,
    resizes: Signal,
}

impl Signals {
    /// Begins to listen: before the first rank starts, so that none is lost.
    pub fn listen() -> Result<Signals> {
        let to =
            |kind, name: &str| signal(kind).with_context(|| format!("cannot listen to {name}"));
        Ok(Signals {
            interrupts: to(SignalKind::interrupt(), "SIGINT")?,
            terminations: to(SignalKind::terminate(), "SIGTERM")?,
            hangups: to(SignalKind::hangup(), "SIGHUP")?,
            warnings: to(SignalKind::user_defined1(), "SIGUSR1")?,
            more_warnings: to(SignalKind::user_defined2(), "SIGUSR2")?,
            resizes: to(SignalKind::window_change(), "SIGWINCH")?,
        })
    }

    /// The number of the next one. Schedulers announce their SIGTERM by SIGUSR1 or SIGUSR2.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupts.recv() => libc::SIGINT,
            _ = self.terminations.recv() => libc::SIGTERM,
            _ = self.hangups.recv() => libc::SIGHUP,
            _ = self.warnings.recv() => libc::SIGUSR1,
            _ = self.more_warnings.recv() => libc::SIGUSR2,
            _ = self.resizes.recv() => libc::SIGWINCH,
        }
    }
}

/// The place of this node's ranks among all.
pub struct Place {
    /// Number of the start.
    pub generation: u64,
    /// Number among all of this node's first rank.
    pub first_rank: usize,
    /// Number of ranks on all nodes.
    pub world_size: usize,
    /// The same when no node is missing.
    pub full_world_size: usize,
    /// Where rank 0 is met by those of other nodes.
    pub meeting: (String, u16),
    /// The listener there, on the node that has rank 0.
    pub listener: Option<TcpListener>,
    /// Seals what nodes say to each other.
    pub token: Token,
    /// Where this node's first rank leaves snapshots, and every how many steps.
    pub snapshots: Option<(Arc<Snapshots>, u64)>,
    /// Whether a cluster has started this job again.
    pub restarted: bool,
}

/// The ranks of one start on this node.
pub struct LocalRanks {
    run: Run,
    exited: mpsc::UnboundedReceiver<Exit>,
    pumps: Pumps,
    looks: tokio::time::Interval,
}

impl LocalRanks {
    /// Starts all ranks of this node.
    pub fn start(
        launch: &Launch,
        ranks: &Ranks,
        command: &Command,
        place: Place,
    ) -> Result<LocalRanks> {
        let (exits, exited) = mpsc::unbounded_channel();
        let mut pumps = Pumps::new();
        let run = start((launch, ranks, command), place, &exits, &mut pumps)?;
        let looks = tokio::time::interval(LOOK_INTERVAL);
        Ok(LocalRanks { run, exited, pumps, looks })
    }

    /// Waits for what happens next and does what it asks for. Nothing is lost when it is dropped
    /// while it waits.
    pub async fn step(&mut self) {
        let kill_at = self.run.kill_at;
        let deadline = async {
            match kill_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(exit) = self.exited.recv() => {
                self.run.note_exit(exit);
                // Those that ended in the same moment, before their signals are sent.
                while let Ok(exit) = self.exited.try_recv() {
                    self.run.note_exit(exit);
                }
                self.run.stop_after_failure();
            }
            () = deadline => self.run.kill(),
            _ = self.looks.tick() => self.run.kill_if_stuck(),
        }
    }

    /// Whether no rank runs any more.
    pub fn have_ended(&self) -> bool {
        self.run.ranks.iter().all(|rank| rank.ended)
    }

    /// What a signal to the launcher asks for.
    pub fn take_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGWINCH => {
                if let Some(terminal) = &self.run.terminal {
                    copy_size(terminal);
                }
            }
            // An announcement, as SIGUSR1 is.
            libc::SIGUSR2 => self.run.stop_politely(libc::SIGUSR1),
            signal => self.run.stop_politely(signal),
        }
    }

    /// Ends the ranks because of something that is not theirs.
    pub fn halt(&mut self, reason: &str) {
        self.run.halt(reason);
    }

    /// Asks the ranks to save and end, unless they were asked already.
    pub fn stop(&mut self) {
        if !self.run.is_ending {
            self.run.is_ending = true;
            self.run.tell_all(libc::SIGTERM);
        }
    }

    /// The failure that halts them, in words for the other nodes.
    pub fn failure(&self) -> Option<Failure> {
        self.run.failure()
    }

    /// How the ranks do that run.
    pub fn reports(&self) -> Vec<RankReport> {
        self.run.reports()
    }

    /// Keeps what the ranks have recorded; gives the folder.
    pub fn keep_flights(&mut self) -> Option<&Path> {
        self.run.flights.as_mut().map(FlightFolder::keep)
    }

    /// Prints the summary of a failure and returns the exit code and the failure that it comes from,
    /// once all have ended.
    pub fn conclude(self) -> (i32, Option<Failure>) {
        self.pumps.finish(OUTPUT_GRACE);
        self.run.conclude()
    }
}

/// Starts all ranks. When one cannot be started, those before it are killed as their handles drop.
fn start(
    (launch, places, command): (&Launch, &Ranks, &Command),
    place: Place,
    exits: &mpsc::UnboundedSender<Exit>,
    pumps: &mut Pumps,
) -> Result<Run> {
    let count = places.count();
    let Place { generation, first_rank, world_size, meeting, listener, token, .. } = place;
    let segment = Segment::create_from(first_rank, count, generation)?;
    // Nothing but words after a hang depends on it.
    let flights = FlightFolder::create(launch.log_dir.as_deref(), generation).ok();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = launch.num_cpu_threads_per_process.unwrap_or((cores / count).max(1));
    let terminal = std::io::stderr().is_terminal();
    let mut workers = Vec::new();
    for local_rank in 0..count {
        let rank = first_rank + local_rank;
        let routes = Routes::of(launch, local_rank);
        let captured = launch.log_dir.is_some() || !routes.show_all();
        // Rank 0 draws its progress bar on the terminal, and its stdout is the run's data.
        let (stdout, stderr) = match (rank, terminal, captured) {
            (0, true, false) => (Channel::Inherited, Channel::Inherited),
            (0, true, true) => (Channel::Pipe, Channel::Terminal),
            (0, false, false) => (Channel::Inherited, Channel::Pipe),
            _ => (Channel::Pipe, Channel::Pipe),
        };
        let output = RankOutput::new(rank, launch.log_dir.as_deref(), routes)?;
        let snapshots = place.snapshots.as_ref().filter(|_| local_rank == 0);
        let worker = WorkerSpec {
            env: Env {
                rank,
                local_rank,
                world_size,
                local_world_size: count,
                master_addr: meeting.0.clone(),
                master_port: meeting.1,
                generation,
                segment_fd: Some(segment.fd()),
                meeting_fd: listener.as_ref().filter(|_| rank == 0).map(AsRawFd::as_raw_fd),
                token: token.clone(),
                flight_dir: flights.as_ref().map(|folder| folder.path().to_owned()),
                snapshot_fd: snapshots.map(|(memory, _)| memory.fd()),
                snapshot_every: snapshots.map(|(_, steps)| *steps),
                full_world_size: Some(place.full_world_size),
                restarted: place.restarted,
                threads: Some(threads),
                collective_timeout: Duration::from_secs_f64(launch.collective_timeout),
                card: places.card(local_rank),
                ..Env::single()
            },
            poses_as_host: places.poses_as_host(local_rank),
            binding: places.binding(local_rank).cloned(),
            arguments: command.arguments(),
            stdout,
            stderr,
        }
        .start()?;
        workers.push((worker, output));
    }
    let mut ranks = Vec::new();
    let mut drawn = None;
    for (local_rank, (mut worker, output)) in workers.into_iter().enumerate() {
        let rank = first_rank + local_rank;
        if let Some(stdout) = worker.stdout.take() {
            let output = if rank == 0 { output.plain() } else { output.clone() };
            pumps.add(stdout, output, Target::Stdout)?;
        }
        if let Some(stderr) = worker.stderr.take() {
            let output = if rank == 0 && terminal {
                drawn = Some(stderr.try_clone().context("cannot copy a descriptor")?);
                output.raw()
            } else {
                output.clone()
            };
            pumps.add(stderr, output, Target::Stderr)?;
        }
        ranks.push(Rank { pid: worker.pid, output, was_told: false, ended: false });
        let exits = exits.clone();
        tokio::spawn(async move {
            let status = worker.child.wait().await;
            // The receiver lives until all ranks have ended.
            drop(exits.send(Exit { rank: local_rank, status }));
        });
    }
    Ok(Run {
        segment,
        ranks,
        terminal: drawn,
        endings: Vec::new(),
        start: Instant::now(),
        is_ending: false,
        asked: None,
        kill_at: None,
        killed_by: None,
        aborted_at: None,
        is_halted: false,
        flights,
    })
}

impl Run {
    fn note_exit(&mut self, exit: Exit) {
        let rank = &mut self.ranks[exit.rank];
        rank.ended = true;
        // What the rank itself has started and left behind in its process group.
        send(rank.pid, libc::SIGKILL);
        self.endings.push(Ending {
            rank: self.segment.first_rank() + exit.rank,
            pid: rank.pid,
            status: exit.status.map_or(Status::Code(exit_code::FAILURE), Status::from),
            after: self.start.elapsed(),
            was_told: rank.was_told,
            last_words: None,
            last_lines: Vec::new(),
            log: rank.output.log_path().map(Into::into),
        });
    }

    /// Stops all ranks once one has failed.
    fn stop_after_failure(&mut self) {
        if self.kill_at.is_some() || self.killed_by.is_some() {
            return;
        }
        let record = self.segment.abort_record();
        let first = first_failure(&self.endings, record.as_ref())
            .or_else(|| self.endings.iter().find(|ending| is_failure(ending.status)));
        let Some(failure) = first else { return };
        // The flag wakes ranks out of collectives, so that they end by themselves; the signal
        // reaches those that compute.
        let reason = format!("rank {} {}", failure.rank, failure.status.describe());
        self.segment.abort(Author::Launcher, Some(failure.rank), &reason);
        self.tell_all(libc::SIGTERM);
        self.kill_at = Some(Instant::now() + STOP_GRACE);
    }

    /// Ends all ranks: the flag wakes them out of collectives, the signal out of work.
    fn halt(&mut self, reason: &str) {
        self.is_halted |= self.kill_at.is_none();
        self.segment.abort(Author::Launcher, None, reason);
        self.tell_all(libc::SIGTERM);
        self.kill_at.get_or_insert(Instant::now() + STOP_GRACE);
    }

    /// Ends ranks that were told to stop by one of them, and of which none has ended: a card that
    /// does not answer can hold all of them.
    fn kill_if_stuck(&mut self) {
        if self.kill_at.is_some() || self.ranks.iter().any(|rank| rank.ended) {
            return;
        }
        let Some(record) = self.segment.abort_record() else { return };
        if self.aborted_at.get_or_insert_with(Instant::now).elapsed() >= STUCK_GRACE {
            tell(&format!(
                "error: no rank has ended {STUCK_GRACE:?} after the stop called by {}: {}",
                record.by, record.reason
            ));
            self.kill();
        }
    }

    /// A signal to the launcher: the first is passed on as a polite request, a second one kills. The
    /// rules are those of `collectives::signals`.
    fn stop_politely(&mut self, signal: i32) {
        let name = signal_name(signal).unwrap_or("a signal");
        let Some(asked) = self.asked else {
            if signal != libc::SIGUSR1 {
                self.asked = Some(Instant::now());
            }
            if !self.is_ending {
                self.is_ending = true;
                tell(&format!(
                    "{name}: asking all ranks to save and end\n\
                     hint: press Ctrl-C again to end at once"
                ));
                self.tell_all(libc::SIGTERM);
            }
            return;
        };
        // Schedulers deliver one SIGTERM several times.
        let grace = Duration::from_secs(signals::REPEAT_GRACE_S.unsigned_abs());
        if signal == libc::SIGUSR1 || (signal != libc::SIGINT && asked.elapsed() <= grace) {
            return;
        }
        if self.killed_by.is_none() {
            tell(&format!("{name} again: ending all ranks at once"));
            self.killed_by = Some(signal);
        }
        self.kill();
    }

    fn kill(&mut self) {
        self.tell_all(libc::SIGKILL);
        // Should the kernel need longer (a rank in uninterruptible sleep), ask again.
        self.kill_at = Some(Instant::now() + STOP_GRACE);
    }

    fn tell_all(&mut self, signal: i32) {
        for rank in self.ranks.iter_mut().filter(|rank| !rank.ended) {
            rank.was_told = true;
            send(rank.pid, signal);
        }
    }

    /// The failure that the others end of.
    fn failure(&self) -> Option<Failure> {
        if self.is_halted || self.killed_by.is_some() {
            return None;
        }
        let record = self.segment.abort_record();
        let ending = first_failure(&self.endings, record.as_ref())?;
        let own = self.segment.first_rank()..self.segment.first_rank() + self.ranks.len();
        Some(Failure {
            rank: Some(ending.rank),
            code: ending.status.exit_code(),
            how: ending.status.describe(),
            cause: ending.status.cause(),
            blames: record.and_then(|record| record.culprit).filter(|rank| !own.contains(rank)),
        })
    }

    /// How the ranks do that run.
    fn reports(&self) -> Vec<RankReport> {
        let running = self.ranks.iter().enumerate().filter(|(_, rank)| !rank.ended);
        let report = |(local_rank, rank): (usize, &Rank)| {
            let number = self.segment.first_rank() + local_rank;
            let standing = self.segment.standing(local_rank);
            let flight = self.flights.as_ref().and_then(|folder| folder.last(number));
            let stopped = is_stopped(rank.pid);
            RankReport { flight, ..RankReport::new(number, rank.pid, &standing, stopped) }
        };
        running.map(report).collect()
    }

    /// Prints the summary of a failure and returns the exit code and that failure.
    fn conclude(mut self) -> (i32, Option<Failure>) {
        for ending in &mut self.endings {
            let local_rank = ending.rank - self.segment.first_rank();
            ending.last_words = self.segment.last_words(local_rank);
            ending.last_lines = self.ranks[local_rank].output.last_lines();
        }
        let record = self.segment.abort_record();
        if self.killed_by.is_none()
            && !self.is_halted
            && let Some(failure) = first_failure(&self.endings, record.as_ref())
        {
            tell(&describe_failure(failure, &self.endings, record.as_ref()));
        }
        (exit_code_of(&self.endings, record.as_ref(), self.killed_by), self.failure())
    }
}

/// Whether a process is stopped, as by SIGSTOP.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// Signals a rank's process group.
fn send(pid: i32, signal: i32) {
    // SAFETY: a plain system call. The group may be gone already; that is what was wanted.
    unsafe { libc::kill(-pid, signal) };
}
