//! The coordinator's side of the conversations: nodes come and go, what they say goes to the
//! [`Coordinator`], and what it decides goes to them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use collectives::Token;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::coordinator::{Action, Coordinator, Event, Facts, Policy};
use super::wire::{GREETING, Order, Receiver, Report, converse};
use crate::output::tell;

/// How often time passes for the coordinator, and how often it says that it is there.
pub const BEAT: Duration = Duration::from_millis(500);
/// How long the last words to the nodes may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Where the listener that rank 0 is met at is handed over, within node 0.
pub type Meeting = Arc<Mutex<Option<std::net::TcpListener>>>;

/// Takes the listener of the latest start.
pub fn take_listener(meeting: &Meeting) -> Option<std::net::TcpListener> {
    meeting.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// A job to coordinate.
pub struct Hub {
    /// Where nodes come.
    pub listener: TcpListener,
    /// What the job allows.
    pub policy: Policy,
    /// Seals what is said.
    pub token: Token,
    /// Name of the job; nodes of another one are refused.
    pub job: String,
    /// For this node's rank 0.
    pub meeting: Meeting,
}

/// What comes in from the connections.
enum Incoming {
    Joined { connection: u64, node: usize, facts: Facts, orders: mpsc::UnboundedSender<Order> },
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

    fn remove(&mut self, connection: u64) -> Option<usize> {
        let (node, _) = self.connections.remove(&connection)?;
        self.by_node.remove(&node);
        Some(node)
    }
}

/// Coordinates until the job is over; gives its exit code.
pub async fn coordinate(hub: Hub) -> i32 {
    let Hub { listener, policy, token, job, meeting } = hub;
    let start = Instant::now();
    let mut coordinator = Coordinator::new(policy, 0, Duration::ZERO);
    let (sender, mut incoming) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let mut nodes = Nodes::default();
    let mut beats = tokio::time::interval(BEAT);
    let mut count = 0;
    loop {
        let event = tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    count += 1;
                    let (sender, token, job) = (sender.clone(), token.clone(), job.clone());
                    tasks.spawn(async move { serve(stream, count, &token, &job, &sender).await });
                }
                continue;
            }
            Some(incoming) = incoming.recv() => match incoming {
                Incoming::Joined { connection, node, facts, orders } => {
                    let refusals = join(&mut coordinator, &mut nodes, connection, (node, facts, orders), start);
                    carry_out(refusals, &mut nodes, &meeting)
                }
                Incoming::Said { connection, report } => match nodes.connections.get(&connection) {
                    None => continue,
                    Some((node, _)) => take(&mut coordinator, event_of(*node, report), start, &mut nodes, &meeting),
                },
                Incoming::Closed { connection } => match nodes.remove(connection) {
                    None => continue,
                    Some(node) => take(&mut coordinator, Event::Lost { node }, start, &mut nodes, &meeting),
                },
            },
            _ = beats.tick() => {
                nodes.send_all(&Order::Beat);
                take(&mut coordinator, Event::Tick, start, &mut nodes, &meeting)
            }
        };
        while tasks.try_join_next().is_some() {}
        if let Some(code) = event {
            nodes.send_all(&Order::Finish { code });
            // The writers end when their orders are out.
            nodes.connections.clear();
            drop(
                tokio::time::timeout(FAREWELL, async {
                    while tasks.join_next().await.is_some() {}
                })
                .await,
            );
            return code;
        }
    }
}

/// A node comes: registered if it is taken, told why otherwise.
fn join(
    coordinator: &mut Coordinator,
    nodes: &mut Nodes,
    connection: u64,
    (node, facts, orders): (usize, Facts, mpsc::UnboundedSender<Order>),
    start: Instant,
) -> Vec<Action> {
    let is_new = !nodes.by_node.contains_key(&node);
    let mut actions = coordinator.take(Event::Joined { node, facts }, start.elapsed());
    let refused = actions.iter().position(
        |action| matches!(action, Action::Refuse { node: refused, .. } if *refused == node),
    );
    if let Some(at) = refused {
        if let Action::Refuse { why, .. } = actions.remove(at) {
            tell(&format!("refused a node that says it is number {node}: {why}"));
            drop(orders.send(Order::Refuse { why }));
        }
    } else if is_new {
        nodes.by_node.insert(node, connection);
        nodes.connections.insert(connection, (node, orders));
    }
    actions
}

fn event_of(node: usize, report: Report) -> Event {
    match report {
        // Joining twice says no more than a beat.
        Report::Join { .. } | Report::Beat => Event::Beat { node },
        Report::Failed { generation, failure } => Event::Failed { node, generation, failure },
        Report::Ended { generation, code } => Event::Ended { node, generation, code },
        Report::StopAsked { why } => Event::StopAsked { why: format!("{why} on node {node}") },
    }
}

fn take(
    coordinator: &mut Coordinator,
    event: Event,
    start: Instant,
    nodes: &mut Nodes,
    meeting: &Meeting,
) -> Option<i32> {
    let actions = coordinator.take(event, start.elapsed());
    carry_out(actions, nodes, meeting)
}

/// Sends the orders; gives the exit code when the job is over.
fn carry_out(actions: Vec<Action>, nodes: &mut Nodes, meeting: &Meeting) -> Option<i32> {
    let mut port = None;
    let mut code = None;
    for action in actions {
        match action {
            Action::Start { node, generation, first_rank, world_size, full_world_size } => {
                let meeting_port = match port.map_or_else(|| open_meeting(meeting), Ok) {
                    Ok(open) => open,
                    Err(error) => {
                        tell(&format!("error: cannot open a port for the ranks to meet: {error}"));
                        return Some(collectives::exit_code::FAILURE);
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
                nodes.send(node, order);
            }
            Action::Halt { node, generation, reason } => {
                nodes.send(node, Order::Halt { generation, reason });
            }
            Action::Stop { node, generation } => nodes.send(node, Order::Stop { generation }),
            Action::Refuse { node, why } => {
                nodes.send(node, Order::Refuse { why });
                if let Some(connection) = nodes.by_node.get(&node).copied() {
                    nodes.remove(connection);
                }
            }
            Action::Say(line) => tell(&line),
            Action::Finish { code: last } => code = Some(last),
        }
    }
    code
}

/// A fresh port for the ranks of one start; its listener waits for this node's rank 0.
fn open_meeting(meeting: &Meeting) -> io::Result<u16> {
    let listener = std::net::TcpListener::bind(("0.0.0.0", 0))?;
    let port = listener.local_addr()?.port();
    *meeting.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    Ok(port)
}

/// One connection from its greeting to its end.
async fn serve(
    stream: TcpStream,
    connection: u64,
    token: &Token,
    job: &str,
    incoming: &mpsc::UnboundedSender<Incoming>,
) {
    let greeting = async {
        let (sender, mut receiver) = converse(stream, token, true).await?;
        let first: Report = receiver.receive().await?;
        io::Result::Ok((sender, receiver, first))
    };
    // Strangers are let go without a word.
    let Ok(Ok((mut sender, receiver, first))) = tokio::time::timeout(GREETING, greeting).await
    else {
        return;
    };
    let Report::Join { node, job: theirs, facts } = first else { return };
    let (orders, mut queue) = mpsc::unbounded_channel();
    if theirs == job {
        drop(incoming.send(Incoming::Joined { connection, node, facts, orders }));
    } else {
        let why = format!("it belongs to the job `{theirs}`, not to `{job}`");
        drop(orders.send(Order::Refuse { why }));
        drop(orders);
    }
    let write = async {
        while let Some(order) = queue.recv().await {
            if sender.send(&order).await.is_err() {
                break;
            }
        }
    };
    let read = listen(receiver, connection, incoming);
    // Orders may still be on their way out when the node has nothing more to say, and the other way
    // round: the conversation is over when either side is.
    tokio::select! {
        () = write => {}
        () = read => {}
    }
    drop(incoming.send(Incoming::Closed { connection }));
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
