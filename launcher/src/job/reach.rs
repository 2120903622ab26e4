//! How a node finds the coordinator: it tries until it is welcome, is refused, or the time is over.

use std::io;
use std::time::{Duration, Instant};

use anyhow::Result;
use collectives::Token;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::event::Facts;
use super::hub::unix_ms;
use super::wire::{self, Order, Report, Sender, converse};
use crate::output::tell;
use crate::summary::signal_name;
use crate::supervise::Signals;

/// One attempt may take this long.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// The first line that says who is waited for comes after this time.
const SAY_FIRST: Duration = Duration::from_secs(3);
/// Between two such lines.
const SAY: Duration = Duration::from_secs(10);

/// Whom a node looks for, and what it says of itself.
#[derive(Debug, Clone)]
pub struct Search {
    /// Host of node 0.
    pub address: String,
    /// Port of its coordinator.
    pub port: u16,
    /// Seals what is said.
    pub token: Token,
    /// Number of this node.
    pub node: usize,
    /// Name of the job.
    pub job: String,
    /// What this node is.
    pub facts: Facts,
}

/// The conversation with the coordinator.
pub struct Link {
    /// To it.
    pub sender: Sender,
    /// From it; `Err` once, when it ended.
    pub orders: mpsc::UnboundedReceiver<io::Result<Order>>,
    /// The coordinator's own number.
    pub life: u64,
}

/// How a search ends.
pub enum Reached {
    /// This node takes part.
    Welcome(Link),
    /// It must not; the user was told.
    Refused,
    /// A signal came first; the user was told.
    Signalled,
    /// The time is over: after how long, and what stood in the way the last time.
    Nobody(Duration, String),
}

/// Why one attempt was in vain.
enum Miss {
    /// Another attempt may succeed.
    NotYet(String),
    /// None will.
    Never(String),
}

impl Search {
    /// Tries for as long as `limit`.
    pub async fn reach(&self, limit: Duration, signals: &mut Signals) -> Reached {
        let start = Instant::now();
        let mut said = start;
        loop {
            let error = tokio::select! {
                attempt = self.attempt() => match attempt {
                    Ok(link) => return Reached::Welcome(link),
                    Err(Miss::Never(why)) => {
                        tell(&format!("error: node {} cannot take part: {why}", self.node));
                        return Reached::Refused;
                    }
                    Err(Miss::NotYet(error)) => error,
                },
                signal = signals.next() => {
                    if signal == libc::SIGWINCH {
                        continue;
                    }
                    let name = signal_name(signal).unwrap_or("a signal");
                    tell(&format!("{name} while node 0 was waited for: nothing to save"));
                    return Reached::Signalled;
                }
            };
            if start.elapsed() >= limit {
                return Reached::Nobody(start.elapsed(), error);
            }
            if said.elapsed() >= (if said == start { SAY_FIRST } else { SAY }) {
                said = Instant::now();
                let waited = start.elapsed().as_secs_f64();
                let (address, port) = (&self.address, self.port);
                tell(&format!(
                    "waiting for node 0, {waited:.0} s, tried {address}:{port}: {error}"
                ));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn attempt(&self) -> Result<Link, Miss> {
        let attempt = async {
            let stream = TcpStream::connect((self.address.as_str(), self.port)).await;
            let stream = stream.map_err(|error| Miss::NotYet(error.to_string()))?;
            // It only delays frames.
            drop(stream.set_nodelay(true));
            self.greet(stream).await
        };
        match tokio::time::timeout(ATTEMPT, attempt).await {
            Ok(result) => result,
            Err(_) => Err(Miss::NotYet("it does not answer".to_owned())),
        }
    }

    /// Joins over a connection that is there.
    async fn greet(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Link, Miss> {
        let (mut sender, mut receiver) =
            converse(stream, &self.token, false).await.map_err(|error| {
                Miss::NotYet(match wire::is_unsealed(&error) {
                    true => "what answers there coordinates no job of this program".to_owned(),
                    false => error.to_string(),
                })
            })?;
        let (node, job, facts) = (self.node, self.job.clone(), self.facts.clone());
        let greeting = Report::Join { node, job, facts, clock: unix_ms() };
        let first = async {
            sender.send(&greeting).await?;
            receiver.receive::<Order>().await
        };
        let life = match first.await {
            Ok(Order::Welcome { life }) => life,
            Ok(Order::Refuse { why }) => return Err(Miss::Never(why)),
            Err(error) if wire::is_unsealed(&error) => {
                return Err(Miss::Never(format!(
                    "its token is not that of node 0 at {}:{}\n\
                     hint: every node needs the same `LORARUN_TOKEN` or `--rdzv_token_file`",
                    self.address, self.port
                )));
            }
            // The job ends just now, or an earlier life of this node is still remembered.
            Ok(_) => return Err(Miss::NotYet("it is busy".to_owned())),
            Err(error) => return Err(Miss::NotYet(error.to_string())),
        };
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
        Ok(Link { sender, orders, life })
    }

    /// Joins the coordinator of this process.
    ///
    /// # Errors
    /// A coordinator that does not want it.
    pub async fn join_own(&self, stream: tokio::net::UnixStream) -> Result<Link> {
        self.greet(stream).await.map_err(|miss| match miss {
            Miss::NotYet(why) | Miss::Never(why) => anyhow::anyhow!("cannot join the job: {why}"),
        })
    }
}
