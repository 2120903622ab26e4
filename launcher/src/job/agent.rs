//! A node of a job: starts and ends its ranks as the coordinator says, and says what becomes of them.
//!
//! Node 0 runs the coordinator beside its own ranks, and talks to it like the others. A node that
//! hears nothing of the coordinator for [`SILENCE`] ends its ranks: at most one side of a broken network
//! goes on. It then looks for the coordinator until [`GONE`] and joins anew if it finds the same one;
//! otherwise it asks to be started again (75).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use collectives::{Snapshots, Token, exit_code};
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinHandle;

use super::event::{Facts, Failure, News, Policy};
use super::hub::{BEAT, Hub, Meeting, coordinate, take_listener};
use super::reach::{Link, Reached, Search};
use super::table::SharedTable;
use super::wire::{self, Order, Report, draw_life};
use crate::cards::Ranks;
use crate::cli::{Command, Launch};
use crate::output::tell;
use crate::site::Site;
use crate::summary::signal_name;
use crate::supervise::{LocalRanks, Place, Signals};

/// A coordinator that was not heard from for this long may be on the other side of a broken network.
const SILENCE: Duration = Duration::from_secs(3);
/// One that was not heard from for this long is gone.
const GONE: Duration = Duration::from_secs(8);
/// How long the coordinator has for its last words.
const FAREWELL: Duration = Duration::from_secs(3);

/// What this node brings to a job.
pub struct Node<'a> {
    /// Its place.
    pub site: &'a Site,
    /// Options of the launcher.
    pub launch: &'a Launch,
    /// Its processes.
    pub ranks: &'a Ranks,
    /// What they run.
    pub command: &'a Command,
    /// What the job allows.
    pub policy: Policy,
    /// Seals what nodes say.
    pub token: Token,
    /// Where the newest table of the job is put.
    pub table: SharedTable,
}

/// Takes part until the job is over; gives the exit code.
///
/// # Errors
/// An address that cannot be used, memory that cannot be had.
pub fn take_part(node: &Node<'_>) -> Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the launcher's event loop")?;
    runtime.block_on(run(node))
}

async fn run(node: &Node<'_>) -> Result<i32> {
    let mut signals = Signals::listen()?;
    let meeting = Meeting::default();
    let search = search(node)?;
    let (link, coordinator) = if node.site.node == 0 {
        let (own, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let coordinator = open_hub(node, theirs, &meeting).await?;
        (search.join_own(own).await?, Some(coordinator))
    } else {
        match search.reach(node.policy.join_wait, &mut signals).await {
            Reached::Welcome(link) => (link, None),
            Reached::Refused => return Ok(exit_code::USAGE),
            Reached::Signalled => return Ok(exit_code::REQUEUE),
            Reached::Nobody(waited, error) => {
                tell(&format!(
                    "error: node 0 was not reached in {:.0} s at {}:{}: {error}\n\
                     hint: every node must reach that address and port; a firewall may be between",
                    waited.as_secs_f64(),
                    search.address,
                    search.port
                ));
                return Ok(exit_code::REQUEUE);
            }
        }
    };
    let snapshots = match node.policy.max_restarts {
        0 => None,
        _ => {
            let memory = Snapshots::create().context("cannot make memory for snapshots")?;
            Some((Arc::new(memory), node.launch.job.snapshot_every))
        }
    };
    let heard = Instant::now();
    let mut agent = Agent { node, meeting, search, link, local: None, snapshots, heard };
    let code = agent.take_part(&mut signals).await?;
    if let Some(coordinator) = coordinator {
        // It has said its last word, or this node gives up and nobody is left to hear it.
        drop(tokio::time::timeout(FAREWELL, coordinator).await);
    }
    Ok(code)
}

async fn open_hub(node: &Node<'_>, own: UnixStream, meeting: &Meeting) -> Result<JoinHandle<i32>> {
    let port = node.site.port;
    let listener = match node.policy.nodes.1 {
        1 => None,
        _ => Some(TcpListener::bind(("0.0.0.0", port)).await.with_context(|| {
            format!(
                "cannot coordinate the job at port {port}\n\
                 hint: `--main_process_port` chooses another one, the same on all nodes"
            )
        })?),
    };
    if listener.is_some() && node.token.is_empty() && !is_loopback(&node.site.address) {
        tell(&format!(
            "warning: this job has no token: whoever reaches port {port} can take part in it\n\
             hint: set `LORARUN_TOKEN` to the same secret on all nodes, or use `--rdzv_token_file`"
        ));
    }
    let hub = Hub {
        own,
        listener,
        policy: node.policy.clone(),
        token: node.token.clone(),
        job: node.site.job.clone(),
        life: draw_life().context("cannot draw a number")?,
        meeting: meeting.clone(),
    };
    Ok(tokio::spawn(coordinate(hub)))
}

/// Whether other hosts cannot mean this one by the address.
fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn search(node: &Node<'_>) -> Result<Search> {
    let facts = Facts {
        host: crate::summary::host_name(),
        processes: node.ranks.count(),
        build: concat!(env!("CARGO_PKG_VERSION"), " ", env!("BUILD_COMMIT")).to_owned(),
        config: node.command.digest(),
        life: draw_life().context("cannot draw a number")?,
    };
    let site = node.site;
    Ok(Search {
        address: site.address.clone(),
        port: site.port,
        token: node.token.clone(),
        node: site.node,
        job: site.job.clone(),
        facts,
    })
}

struct Agent<'a> {
    node: &'a Node<'a>,
    meeting: Meeting,
    search: Search,
    link: Link,
    local: Option<Local>,
    /// What outlives the ranks, where they may be started again.
    snapshots: Option<(Arc<Snapshots>, u64)>,
    /// When the coordinator was last heard.
    heard: Instant,
}

/// This node's ranks of the present start.
struct Local {
    generation: u64,
    ranks: LocalRanks,
    /// Their failure is known to the coordinator, or was ordered by it.
    is_reported: bool,
}

/// How a conversation with the coordinator ends.
enum Parted {
    /// The job is over, with this code.
    Over(i32),
    /// The coordinator is out of reach, or has left this node behind.
    Left(String),
}

impl Agent<'_> {
    async fn take_part(&mut self, signals: &mut Signals) -> Result<i32> {
        loop {
            let why = match self.serve(signals).await {
                Parted::Over(code) => {
                    self.end_ranks("the job is over").await;
                    return Ok(code);
                }
                Parted::Left(why) => why,
            };
            if self.node.site.node == 0 {
                self.end_ranks("the coordinator is gone").await;
                anyhow::bail!("the coordinator of this job has ended unexpectedly: {why}");
            }
            if let Some(code) = self.come_back(&why, signals).await {
                return Ok(code);
            }
        }
    }

    /// One conversation with the coordinator.
    async fn serve(&mut self, signals: &mut Signals) -> Parted {
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_beat = Instant::now();
        loop {
            tokio::select! {
                order = self.link.orders.recv() => match order {
                    Some(Ok(order)) => {
                        self.heard = Instant::now();
                        if let Some(parted) = self.obey(order).await {
                            return parted;
                        }
                    }
                    Some(Err(error)) if wire::is_unsealed(&error) => {
                        return Parted::Left("what it said was not sealed".to_owned());
                    }
                    Some(Err(_)) | None => {
                        return Parted::Left("its connection ended".to_owned());
                    }
                },
                () = step(&mut self.local) => self.report().await,
                signal = signals.next() => self.take_signal(signal).await,
                _ = beats.tick() => {
                    self.beat().await;
                    if last_beat.elapsed() > SILENCE {
                        // It was this process that did not run.
                        self.heard = Instant::now();
                    }
                    last_beat = Instant::now();
                    if self.heard.elapsed() > SILENCE {
                        let why = format!("it was not heard from for {SILENCE:?}");
                        return Parted::Left(why);
                    }
                }
            }
        }
    }

    /// Does what the coordinator says.
    async fn obey(&mut self, order: Order) -> Option<Parted> {
        match order {
            Order::Beat { table } => self.node.table.set(*table),
            Order::Start { generation, first_rank, world_size, full_world_size, meeting_port } => {
                let Node { site, launch, ranks, command, token, .. } = self.node;
                let place = Place {
                    generation,
                    first_rank,
                    world_size,
                    full_world_size,
                    snapshots: self.snapshots.clone(),
                    restarted: site.restarts > 0,
                    meeting: (site.address.clone(), meeting_port),
                    listener: take_listener(&self.meeting),
                    token: token.clone(),
                };
                match LocalRanks::start(launch, ranks, command, place) {
                    Ok(ranks) => {
                        self.local = Some(Local { generation, ranks, is_reported: false });
                        // The coordinator knows at once whom it watches.
                        self.beat().await;
                    }
                    Err(error) => self.fail_to_start(generation, &error).await,
                }
            }
            Order::Halt { generation, reason, keep_flights } => {
                if let Some(local) = self.local.as_mut().filter(|l| l.generation == generation) {
                    local.is_reported = true;
                    if keep_flights && let Some(folder) = local.ranks.keep_flights() {
                        tell(&format!("what ranks recorded is kept: {}", folder.display()));
                    }
                    local.ranks.halt(&reason);
                }
            }
            Order::Stop { generation } => {
                if let Some(local) = self.local.as_mut().filter(|l| l.generation == generation) {
                    local.ranks.stop();
                }
            }
            // Said once, before this conversation.
            Order::Welcome { .. } => {}
            Order::Refuse { why } => {
                tell(&format!("error: node {} cannot take part: {why}", self.node.site.node));
                return Some(Parted::Over(exit_code::USAGE));
            }
            Order::Leave { why } => return Some(Parted::Left(why)),
            Order::Finish { code } => return Some(Parted::Over(code)),
        }
        None
    }

    async fn fail_to_start(&mut self, generation: u64, error: &anyhow::Error) {
        tell(&format!("error: {error:#}"));
        let code = exit_code::FAILURE;
        let failure = Failure {
            rank: None,
            code,
            how: format!("cannot start its ranks: {error:#}"),
            cause: "ranks that cannot be started".to_owned(),
            blames: None,
        };
        let failed = Report::Failed { generation, failure: failure.clone() };
        self.send(&failed).await;
        self.send(&Report::Ended { generation, code, failure: Some(failure) }).await;
    }

    /// A coordinator that is gone is noticed by its silence.
    async fn send(&mut self, report: &Report) {
        drop(self.link.sender.send(report).await);
    }

    /// Says that this node is there, and how its ranks do.
    async fn beat(&mut self) {
        let kept = self.snapshots.as_ref().and_then(|(memory, _)| memory.newest());
        let (generation, ranks) = match &self.local {
            Some(local) => (local.generation, local.ranks.reports()),
            None => (0, Vec::new()),
        };
        self.send(&Report::Beat(News { generation, ranks, kept })).await;
    }

    /// Tells the coordinator what has become of the ranks.
    async fn report(&mut self) {
        let Some(local) = &mut self.local else { return };
        let generation = local.generation;
        if let Some(failure) = local.ranks.failure().filter(|_| !local.is_reported) {
            local.is_reported = true;
            self.send(&Report::Failed { generation, failure }).await;
        }
        if self.local.as_ref().is_some_and(|local| local.ranks.have_ended()) {
            // With the last snapshot that they have left.
            self.beat().await;
            let Some(local) = self.local.take() else { return };
            let (code, failure) = local.ranks.conclude();
            self.send(&Report::Ended { generation, code, failure }).await;
        }
    }

    /// The first signal is the job's to follow; a second one ends this node's ranks at once.
    async fn take_signal(&mut self, signal: i32) {
        if let Some(local) = &mut self.local {
            local.ranks.take_signal(signal);
        }
        if signal != libc::SIGWINCH {
            let why = signal_name(signal).unwrap_or("a signal").to_owned();
            self.send(&Report::StopAsked { why }).await;
        }
    }

    /// Ends the ranks and looks for the coordinator; gives the exit code when it is gone.
    async fn come_back(&mut self, why: &str, signals: &mut Signals) -> Option<i32> {
        let (node, site) = (self.node.site.node, self.node.site);
        let (address, port) = (&site.address, site.port);
        tell(&format!(
            "node {node} has lost node 0 at {address}:{port}: {why}; its ranks are ended, and it \
             tries to come back"
        ));
        self.end_ranks("the coordinator is out of reach").await;
        let life = self.link.life;
        let limit = GONE.saturating_sub(self.heard.elapsed());
        let how = match self.search.reach(limit, signals).await {
            Reached::Welcome(link) if link.life == life => {
                tell(&format!("node {node} has reached node 0 again"));
                (self.link, self.heard) = (link, Instant::now());
                return None;
            }
            Reached::Welcome(_) => "another launcher is in its place".to_owned(),
            Reached::Nobody(_, error) => {
                let quiet = self.heard.elapsed().as_secs_f64();
                format!("not heard from for {quiet:.0} s, {error}")
            }
            Reached::Refused => return Some(exit_code::USAGE),
            Reached::Signalled => return Some(exit_code::REQUEUE),
        };
        tell(&format!(
            "error: node 0, which coordinates the job at {address}:{port}, is gone: {how}\n\
             hint: the last complete checkpoint is good; start the job again (exit code 75)"
        ));
        Some(exit_code::REQUEUE)
    }

    async fn end_ranks(&mut self, reason: &str) {
        let Some(mut local) = self.local.take() else { return };
        local.ranks.halt(reason);
        while !local.ranks.have_ended() {
            local.ranks.step().await;
        }
        local.ranks.conclude();
    }
}

async fn step(local: &mut Option<Local>) {
    match local {
        Some(local) => local.ranks.step().await,
        None => std::future::pending().await,
    }
}
