//! The coordinator's side of the conversations: nodes come and go, what they say goes to the
//! [`Coordinator`], and what it decides goes to them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use collectives::{Token, exit_code};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::coordinator::Coordinator;
use super::event::{Action, Event, Facts, Policy};
use super::wire::{GREETING, Order, Receiver, Report, converse, is_unsealed};
use crate::output::tell;

/// How often time passes for the coordinator, and how often it says that it is there.
pub const BEAT: Duration = Duration::from_millis(500);
/// How long the last words to the nodes may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a node has to read the last order.
const LAST_WORD: Duration = Duration::from_secs(1);
/// A launcher that was itself kept from running does not blame others for the time.
const LONGEST_STEP: Duration = Duration::from_secs(1);

/// Where the listener that rank 0 is met at is handed over, within node 0.
pub type Meeting = Arc<Mutex<Option<std::net::TcpListener>>>;

/// Takes the listener of the latest start.
pub fn take_listener(meeting: &Meeting) -> Option<std::net::TcpListener> {
    meeting.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// A job to coordinate.
pub struct Hub {
    /// The way to node 0, in this process.
    pub own: UnixStream,
    /// Where other nodes come; `None` for a job of one node.
    pub listener: Option<TcpListener>,
    /// What the job allows.
    pub policy: Policy,
    /// Seals what is said.
    pub token: Token,
    /// Name of the job; nodes of another one are refused.
    pub job: String,
    /// This coordinator's own number.
    pub life: u64,
    /// For this node's rank 0.
    pub meeting: Meeting,
}

/// A node that wants to take part.
struct Guest {
    connection: u64,
    node: usize,
    facts: Facts,
    skew: f64,
    orders: mpsc::UnboundedSender<Order>,
}

/// What comes in from the connections.
enum Incoming {
    Joined(Guest),
    Said { connection: u64, report: Report },
    Closed { connection: u64 },
}

/// The nodes that take part, by connection.
#[derive(Default)]
struct Nodes {
    connections: BTreeMap<u64, (usize, mpsc::UnboundedSender<Order>)>,
    by_node: BTreeMap<usize, u64>,
}

impl Nodes {
    fn send(&self, node: usize, order: Order) {
        let connection = self.by_node.get(&node).and_then(|id| self.connections.get(id));
        if let Some((_, orders)) = connection {
            // Who is gone is noticed by its closed connection.
            drop(orders.send(order));
        }
    }

    fn send_all(&self, order: &Order) {
        for (_, orders) in self.connections.values() {
            drop(orders.send(order.clone()));
        }
    }

    /// Takes a node in; an earlier connection of the same node has nothing more to say.
    fn insert(&mut self, connection: u64, node: usize, orders: mpsc::UnboundedSender<Order>) {
        if let Some(earlier) = self.by_node.insert(node, connection) {
            self.connections.remove(&earlier);
        }
        self.connections.insert(connection, (node, orders));
    }

    fn remove(&mut self, connection: u64) -> Option<usize> {
        let (node, _) = self.connections.remove(&connection)?;
        self.by_node.remove(&node);
        Some(node)
    }

    fn leave(&mut self, node: usize) {
        if let Some(connection) = self.by_node.get(&node).copied() {
            // What was sent still goes out.
            self.remove(connection);
        }
    }
}

/// The coordinator at work.
struct Desk {
    coordinator: Coordinator,
    nodes: Nodes,
    meeting: Meeting,
    job: String,
    life: u64,
    is_alone: bool,
    /// Time of the job: it stands still while this process does.
    now: Duration,
    looked: Instant,
}

/// Coordinates until the job is over; gives its exit code.
pub async fn coordinate(hub: Hub) -> i32 {
    let Hub { own, listener, policy, token, job, life, meeting } = hub;
    let mut desk = Desk {
        is_alone: policy.nodes.1 == 1,
        coordinator: Coordinator::new(policy, 0, Duration::ZERO),
        nodes: Nodes::default(),
        meeting,
        job: job.clone(),
        life,
        now: Duration::ZERO,
        looked: Instant::now(),
    };
    let (sender, mut incoming) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let mut count = 0;
    let door = Door { token, job, incoming: sender };
    tasks.spawn(door.clone().serve(own, count, "this process".to_owned()));
    let mut beats = tokio::time::interval(BEAT);
    beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let over = tokio::select! {
            (stream, from) = accept(listener.as_ref()) => {
                count += 1;
                tasks.spawn(door.clone().serve(stream, count, from));
                None
            }
            // The door holds the other end.
            Some(incoming) = incoming.recv() => desk.take(incoming),
            _ = beats.tick() => desk.beat(),
        };
        while tasks.try_join_next().is_some() {}
        if let Some(code) = over {
            desk.nodes.send_all(&Order::Finish { code });
            // The writers end when their orders are out.
            desk.nodes.connections.clear();
            let all = async { while tasks.join_next().await.is_some() {} };
            drop(tokio::time::timeout(FAREWELL, all).await);
            return code;
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> (TcpStream, String) {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // It only delays frames.
                drop(stream.set_nodelay(true));
                return (stream, from.ip().to_string());
            }
            // Out of descriptors, for example: others may close theirs.
            Err(_) => tokio::time::sleep(BEAT).await,
        }
    }
}

impl Desk {
    fn now(&mut self) -> Duration {
        self.now += self.looked.elapsed().min(LONGEST_STEP);
        self.looked = Instant::now();
        self.now
    }

    fn beat(&mut self) -> Option<i32> {
        let now = self.now();
        let actions = self.coordinator.take(Event::Tick, now);
        let over = self.carry_out(actions);
        let table =
            Box::new(super::table::Table { job: self.job.clone(), ..self.coordinator.table(now) });
        self.nodes.send_all(&Order::Beat { table });
        over
    }

    fn take(&mut self, incoming: Incoming) -> Option<i32> {
        let event = match incoming {
            Incoming::Joined(guest) => return self.join(guest),
            Incoming::Said { connection, report } => {
                let (node, _) = self.nodes.connections.get(&connection)?;
                event_of(*node, report)?
            }
            Incoming::Closed { connection } => Event::Lost { node: self.nodes.remove(connection)? },
        };
        let now = self.now();
        let actions = self.coordinator.take(event, now);
        self.carry_out(actions)
    }

    /// A node comes: registered if it is taken, told why otherwise.
    fn join(&mut self, guest: Guest) -> Option<i32> {
        let Guest { connection, node, facts, skew, orders } = guest;
        let now = self.now();
        let mut actions = self.coordinator.take(Event::Joined { node, facts, skew }, now);
        let is_answer = |action: &Action| match action {
            Action::Refuse { node: other, .. } | Action::Later { node: other } => *other == node,
            _ => false,
        };
        match actions.iter().position(is_answer).map(|at| actions.remove(at)) {
            Some(Action::Refuse { why, .. }) => {
                tell(&format!("refused a node that says it is number {node}: {why}"));
                drop(orders.send(Order::Refuse { why }));
            }
            // Its connection closes without a word, and it comes again.
            Some(_) => {}
            None => {
                drop(orders.send(Order::Welcome { life: self.life }));
                self.nodes.insert(connection, node, orders);
            }
        }
        self.carry_out(actions)
    }

    /// Sends the orders; gives the exit code when the job is over.
    fn carry_out(&mut self, actions: Vec<Action>) -> Option<i32> {
        let mut port = None;
        let mut code = None;
        for action in actions {
            match action {
                Action::Start { node, generation, first_rank, world_size, full_world_size } => {
                    let meeting_port = match port.map_or_else(|| self.open_meeting(), Ok) {
                        Ok(open) => open,
                        Err(error) => {
                            let what = "cannot open a port for the ranks to meet";
                            tell(&format!("error: {what}: {error}"));
                            return Some(exit_code::FAILURE);
                        }
                    };
                    port = Some(meeting_port);
                    let order = Order::Start {
                        generation,
                        first_rank,
                        world_size,
                        full_world_size,
                        meeting_port,
                    };
                    self.nodes.send(node, order);
                }
                Action::Halt { node, generation, reason, keep_flights } => {
                    self.nodes.send(node, Order::Halt { generation, reason, keep_flights });
                }
                Action::Stop { node, generation } => {
                    self.nodes.send(node, Order::Stop { generation });
                }
                Action::Leave { node, why } => {
                    self.nodes.send(node, Order::Leave { why });
                    self.nodes.leave(node);
                }
                // Answers to a join, which went out with it.
                Action::Refuse { .. } | Action::Later { .. } => {}
                Action::Say(line) => tell(&line),
                Action::Finish { code: last } => code = Some(last),
            }
        }
        code
    }

    /// A fresh port for the ranks of one start; its listener waits for this node's rank 0. Ranks of one
    /// node meet in their shared memory.
    fn open_meeting(&self) -> io::Result<u16> {
        if self.is_alone {
            return Ok(crate::site::DEFAULT_PORT);
        }
        let listener = std::net::TcpListener::bind(("0.0.0.0", 0))?;
        let port = listener.local_addr()?.port();
        *self.meeting.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
        Ok(port)
    }
}

fn event_of(node: usize, report: Report) -> Option<Event> {
    Some(match report {
        // Nobody joins twice by one connection.
        Report::Join { .. } => return None,
        Report::Beat(news) => Event::Beat { node, news },
        Report::Failed { generation, failure } => Event::Failed { node, generation, failure },
        Report::Ended { generation, code, failure } => {
            Event::Ended { node, generation, code, failure }
        }
        Report::StopAsked { why } => Event::StopAsked { why: format!("{why} on node {node}") },
    })
}

/// What every connection needs.
#[derive(Clone)]
struct Door {
    token: Token,
    job: String,
    incoming: mpsc::UnboundedSender<Incoming>,
}

impl Door {
    /// One connection from its greeting to its end.
    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        connection: u64,
        from: String,
    ) {
        let greeting = async {
            let (mut sender, mut receiver) = converse(stream, &self.token, true).await?;
            let first = receiver.receive::<Report>().await;
            if first.as_ref().is_err_and(is_unsealed) {
                // Whatever this says, who has another token learns from it that it has.
                let why = "another token".to_owned();
                sender.send(&Order::Refuse { why }).await?;
                tell(&format!("refused a process at {from}: its token is not that of this job"));
            }
            io::Result::Ok((sender, receiver, first?))
        };
        // Strangers are let go without a word.
        let Ok(Ok((mut sender, receiver, first))) = tokio::time::timeout(GREETING, greeting).await
        else {
            return;
        };
        let Report::Join { node, job: theirs, facts, clock } = first else { return };
        let (orders, mut queue) = mpsc::unbounded_channel();
        if theirs == self.job {
            let skew = (clock as f64 - unix_ms() as f64) / 1e3;
            let guest = Guest { connection, node, facts, skew, orders };
            drop(self.incoming.send(Incoming::Joined(guest)));
        } else {
            let why = format!(
                "it belongs to the job `{theirs}`, not to `{}`\n\
                 hint: jobs on one host need ports of their own, `--main_process_port`",
                self.job
            );
            drop(orders.send(Order::Refuse { why }));
            drop(orders);
        }
        let write = async {
            while let Some(order) = queue.recv().await {
                if sender.send(&order).await.is_err() {
                    return;
                }
            }
            // The node closes when it has read the last one; to close on what it still sends could
            // cost it that.
            drop(sender.close().await);
            tokio::time::sleep(LAST_WORD).await;
        };
        let read = listen(receiver, connection, &self.incoming);
        // Orders may still be on their way out when the node has nothing more to say, and the other
        // way round: the conversation is over when either side is.
        tokio::select! {
            () = write => {}
            () = read => {}
        }
        drop(self.incoming.send(Incoming::Closed { connection }));
    }
}

async fn listen(
    mut receiver: Receiver,
    connection: u64,
    incoming: &mpsc::UnboundedSender<Incoming>,
) {
    while let Ok(report) = receiver.receive().await {
        if incoming.send(Incoming::Said { connection, report }).is_err() {
            return;
        }
    }
}

/// Milliseconds since 1970 by this host's clock.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
