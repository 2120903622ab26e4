//! A node of a job: starts and ends its ranks as the coordinator says, and says what becomes of them.
//!
//! Node 0 runs the coordinator beside its own ranks, and talks to it like the others. A node that
//! hears nothing of the coordinator for [`SILENCE`] ends its ranks and asks to be started again (75):
//! at most one side of a broken network goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use collectives::{Snapshots, Token, exit_code};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::coordinator::{Facts, Policy};
use super::hub::{BEAT, Hub, Meeting, coordinate, take_listener};
use super::wire::{self, Order, Report, Sender, converse};
use crate::cards::Ranks;
use crate::cli::{Command, Launch};
use crate::output::tell;
use crate::site::Site;
use crate::summary::signal_name;
use crate::supervise::{LocalRanks, Place, Signals};

/// A coordinator that was not heard from for this long is gone.
const SILENCE: Duration = Duration::from_secs(3);
/// Between two attempts to reach the coordinator.
const PAUSE: Duration = Duration::from_millis(200);
/// Between two lines that say that it is waited for.
const SAY: Duration = Duration::from_secs(10);

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
}

/// Takes part until the job is over; gives the exit code.
///
/// # Errors
/// An address that cannot be used, ranks that cannot be started.
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
    let coordinator = match node.site.node {
        0 => Some(open_hub(node, &meeting).await?),
        _ => None,
    };
    let Some(link) = reach(node, &mut signals).await? else { return Ok(exit_code::REQUEUE) };
    let snapshots = match node.policy.max_restarts {
        0 => None,
        _ => {
            let memory = Snapshots::create().context("cannot make memory for snapshots")?;
            Some((Arc::new(memory), node.launch.job.snapshot_every))
        }
    };
    let heard = Instant::now();
    let mut agent = Agent { node, meeting, link, local: None, snapshots, heard };
    let code = agent.serve(&mut signals).await?;
    if let Some(coordinator) = coordinator {
        // It has said its last word, or this node gives up and nobody is left to hear it.
        drop(tokio::time::timeout(SILENCE, coordinator).await);
    }
    Ok(code)
}

async fn open_hub(node: &Node<'_>, meeting: &Meeting) -> Result<JoinHandle<i32>> {
    let port = node.site.port;
    let listener = TcpListener::bind(("0.0.0.0", port)).await.with_context(|| {
        format!(
            "cannot coordinate the job at port {port}\n\
             hint: `--main_process_port` chooses another one, the same on all nodes"
        )
    })?;
    let hub = Hub {
        listener,
        policy: node.policy.clone(),
        token: node.token.clone(),
        job: node.site.job.clone(),
        meeting: meeting.clone(),
    };
    Ok(tokio::spawn(coordinate(hub)))
}

/// The conversation with the coordinator.
struct Link {
    sender: Sender,
    /// `Err` once, when it ended.
    orders: mpsc::UnboundedReceiver<std::io::Result<Order>>,
}

/// Reaches the coordinator; `None` when a signal or the time ended the attempt.
async fn reach(node: &Node<'_>, signals: &mut Signals) -> Result<Option<Link>> {
    let site = node.site;
    // Node 0 talks to itself whatever its name resolves to.
    let address = if site.node == 0 { "127.0.0.1" } else { site.address.as_str() };
    let start = Instant::now();
    let mut said = start;
    loop {
        let attempt = async {
            let connect = TcpStream::connect((address, site.port));
            let stream = tokio::time::timeout(SILENCE, connect).await??;
            converse(stream, &node.token, false).await
        };
        let error = tokio::select! {
            attempt = attempt => match attempt {
                Ok((mut sender, mut receiver)) => {
                    let facts = facts(node);
                    sender.send(&Report::Join { node: site.node, job: site.job.clone(), facts }).await
                        .context("cannot greet the coordinator")?;
                    let (queue, orders) = mpsc::unbounded_channel();
                    tokio::spawn(async move {
                        loop {
                            let order = receiver.receive::<Order>().await;
                            let is_last = order.is_err();
                            if queue.send(order).is_err() || is_last {
                                return;
                            }
                        }
                    });
                    return Ok(Some(Link { sender, orders }));
                }
                Err(error) => error,
            },
            signal = signals.next() => {
                if signal == libc::SIGWINCH {
                    continue;
                }
                tell(&format!("{} before the job began", signal_name(signal).unwrap_or("a signal")));
                return Ok(None);
            }
        };
        if start.elapsed() >= node.policy.join_wait {
            tell(&format!(
                "error: node 0 was not reached in {:.0} s at {address}:{}: {error}\n\
                 hint: every node must reach that address and port; a firewall may be between",
                start.elapsed().as_secs_f64(),
                site.port
            ));
            return Ok(None);
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            tell(&format!(
                "waiting for node 0, {:.0} s, tried {address}:{}: {error}",
                start.elapsed().as_secs_f64(),
                site.port
            ));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn facts(node: &Node<'_>) -> Facts {
    Facts {
        host: crate::summary::host_name(),
        processes: node.ranks.count(),
        build: concat!(env!("CARGO_PKG_VERSION"), " ", env!("BUILD_COMMIT")).to_owned(),
        config: node.command.digest(),
    }
}

struct Agent<'a> {
    node: &'a Node<'a>,
    meeting: Meeting,
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

impl Agent<'_> {
    async fn serve(&mut self, signals: &mut Signals) -> Result<i32> {
        let mut beats = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                order = self.link.orders.recv() => match order {
                    Some(Ok(order)) => {
                        self.heard = Instant::now();
                        if let Some(code) = self.obey(order)? {
                            self.end_ranks("the job is over").await;
                            return Ok(code);
                        }
                    }
                    Some(Err(error)) if wire::is_unsealed(&error) => {
                        self.end_ranks("the coordinator cannot be trusted").await;
                        tell(&format!("error: node 0 was refused: {error}"));
                        return Ok(exit_code::USAGE);
                    }
                    Some(Err(_)) | None => return Ok(self.give_up("its connection ended").await),
                },
                () = step(&mut self.local) => self.report().await,
                signal = signals.next() => self.take_signal(signal).await,
                _ = beats.tick() => {
                    drop(self.link.sender.send(&Report::Beat).await);
                    if self.heard.elapsed() > SILENCE {
                        return Ok(self.give_up("it was not heard from for 3 s").await);
                    }
                }
            }
        }
    }

    /// Does what the coordinator says; gives the exit code when that is the end.
    fn obey(&mut self, order: Order) -> Result<Option<i32>> {
        match order {
            Order::Beat => {}
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
                let ranks = LocalRanks::start(launch, ranks, command, place)?;
                self.local = Some(Local { generation, ranks, is_reported: false });
            }
            Order::Halt { generation, reason } => {
                if let Some(local) = self.local.as_mut().filter(|l| l.generation == generation) {
                    local.is_reported = true;
                    local.ranks.halt(&reason);
                }
            }
            Order::Stop { generation } => {
                if let Some(local) = self.local.as_mut().filter(|l| l.generation == generation) {
                    local.ranks.stop();
                }
            }
            Order::Refuse { why } => {
                tell(&format!("error: node {} cannot take part: {why}", self.node.site.node));
                return Ok(Some(exit_code::USAGE));
            }
            Order::Finish { code } => return Ok(Some(code)),
        }
        Ok(None)
    }

    /// Tells the coordinator what has become of the ranks.
    async fn report(&mut self) {
        let Some(local) = &mut self.local else { return };
        let generation = local.generation;
        if let Some(failure) = local.ranks.failure().filter(|_| !local.is_reported) {
            local.is_reported = true;
            // A coordinator that is gone is noticed by its silence.
            drop(self.link.sender.send(&Report::Failed { generation, failure }).await);
        }
        if local.ranks.have_ended()
            && let Some(local) = self.local.take()
        {
            let code = local.ranks.conclude();
            drop(self.link.sender.send(&Report::Ended { generation, code }).await);
        }
    }

    /// The first signal is the job's to follow; a second one ends this node's ranks at once.
    async fn take_signal(&mut self, signal: i32) {
        if let Some(local) = &mut self.local {
            local.ranks.take_signal(signal);
        }
        if signal != libc::SIGWINCH {
            let why = signal_name(signal).unwrap_or("a signal").to_owned();
            drop(self.link.sender.send(&Report::StopAsked { why }).await);
        }
    }

    /// Goes without the coordinator: what was saved is good, and the job can be started again.
    async fn give_up(&mut self, how: &str) -> i32 {
        let site = self.node.site;
        tell(&format!(
            "error: node 0, which coordinates the job at {}:{}, is gone: {how}\n\
             hint: the last complete checkpoint is good; start the job again (exit code 75)",
            site.address, site.port
        ));
        self.end_ranks("the coordinator is gone").await;
        exit_code::REQUEUE
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
