//! One rank's connections to the ranks of its number on the other hosts, and sums over them.
//!
//! A rank of a host talks over TCP to its counterparts alone: with N ranks a host, N sums travel
//! side by side, each a N-th of the vector (`shm.rs` splits it). Between H hosts each adds up one part
//! of every segment and sends the total to the others (`sum.rs`). Hosts are added in their order, so
//! that every rank holds the same bits.
//!
//! # Why every host talks to every other one
//! A ring moves as many bytes, 2 (H - 1) / H of the vector out of and into each host, but hands partial
//! sums on: what a host adds depends on where the ring begins, each part in another order, and a sum is
//! there after 2 (H - 1) hops of a message instead of 2. Here foreign parts arrive as they are, so that
//! any order of additions can be had (`Order::Pairs`, too). The price is H - 1 connections a rank: N
//! ranks on each of H hosts keep N (H - 1) H / 2 lines, and a switch sees H - 1 senders at one port.
//! At 8 hosts of 8 cards that is 56 connections a host; beyond some 32 hosts (parts of 128 kB from 31
//! sides, 248 connections a host) a ring of hosts or a tree would be better.
//!
//! No wait is deaf: while bytes are on their way, `watch` is asked at least every [`LOOK`] whether
//! the group still stands, and the deadline is looked at.

mod door;
mod rendezvous;
mod seal;
mod side;
mod sum;
mod wire;

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

pub(crate) use rendezvous::{Meeting, Seat, meet};
pub use seal::Token;
use side::{Side, Word};
pub(crate) use sum::Sum;
pub(crate) use wire::Label;
use wire::{Broken, Transfer};

use crate::error::{CollectiveError, Result};
use crate::segment::AbortRecord;
use crate::sums::Order;

/// How often a waiting rank looks whether the group still stands.
const LOOK: Duration = Duration::from_millis(20);
/// How long after the deadline a rank of another host is still awaited.
const GRACE: Duration = Duration::from_millis(500);
/// How long to listen for the reason of who has closed a connection.
const LAST_WORD: Duration = Duration::from_millis(100);

/// How far a sum is to go before the caller gets on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// What can be moved without waiting.
    Nothing,
    /// So many floats from the start are summed over all hosts.
    Floats(usize),
    /// All are, and no host waits for this one.
    End,
}

/// What a rank waits for, in words and numbers.
pub(crate) struct Wait<'w> {
    pub label: Label,
    /// For messages: `all_reduce of 5 floats`.
    pub op: String,
    pub start: Instant,
    pub deadline: Duration,
    /// Fails when the group of this host has been called to stop.
    pub watch: &'w dyn Fn() -> Result<()>,
    /// Words for what a peer calls instead.
    pub describe: &'w dyn Fn(Label) -> String,
}

/// The connected streams to one counterpart.
#[derive(Debug)]
pub(crate) struct Way {
    /// The rank at the other end.
    pub rank: usize,
    pub data: TcpStream,
    /// See `side.rs`.
    pub side: TcpStream,
}

/// A connection to one host.
#[derive(Debug)]
struct Peer {
    /// The rank at its other end.
    rank: usize,
    stream: TcpStream,
    side: Side,
}

/// This rank's connections to its counterparts.
#[derive(Debug)]
pub(crate) struct Mesh {
    rank: usize,
    host: usize,
    /// By host; `None` for the own.
    peers: Vec<Option<Peer>>,
    /// What came from each host.
    incoming: Vec<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    /// Memory of the last sum, by host.
    slots: Vec<Vec<f32>>,
}

impl Mesh {
    /// Takes the ways to the counterparts, by host; `None` for the own.
    pub fn new(rank: usize, host: usize, ways: Vec<Option<Way>>) -> std::io::Result<Mesh> {
        let connect = |way: Way| {
            way.data.set_nodelay(true)?;
            way.data.set_nonblocking(true)?;
            Ok(Peer { rank: way.rank, stream: way.data, side: Side::new(way.side)? })
        };
        let peers: std::io::Result<Vec<Option<Peer>>> =
            ways.into_iter().map(|way| way.map(connect).transpose()).collect();
        let peers = peers?;
        let buffers = vec![Vec::new(); peers.len()];
        let slots = Vec::new();
        Ok(Mesh { rank, host, peers, incoming: buffers.clone(), outgoing: buffers, slots })
    }

    /// Number of hosts.
    pub fn hosts(&self) -> usize {
        self.peers.len()
    }

    /// Number of this host.
    pub fn host(&self) -> usize {
        self.host
    }

    /// Ends all connections, so that the peers notice at once; `record` says why.
    pub fn close(&self, record: Option<&AbortRecord>) {
        for peer in self.peers.iter().flatten() {
            if let Some(record) = record {
                peer.side.say(record);
            }
            peer.side.close();
            // It may have ended already.
            drop(peer.stream.shutdown(Shutdown::Both));
        }
    }

    /// The bytes of the counterparts of all hosts, by host, the own among them. Lengths may differ.
    pub fn gather(&mut self, own: &[u8], wait: &Wait<'_>) -> Result<Vec<Vec<u8>>> {
        for (host, buffer) in self.outgoing.iter_mut().enumerate() {
            buffer.clear();
            if host != self.host {
                buffer.extend_from_slice(own);
            }
        }
        self.exchange(wait)?;
        let mut gathered = self.incoming.clone();
        gathered[self.host] = own.to_vec();
        Ok(gathered)
    }

    /// Begins a sum of `length` floats over the counterparts of all hosts, added in `order`.
    pub fn begin_sum(&mut self, length: usize, order: Order, label: Label) -> Sum {
        Sum::new(length, (self.host, self.hosts()), order, label, &mut self.slots)
    }

    /// Goes on with a sum of `values` until `goal` is reached. Nothing but this sum may use the mesh
    /// until its end is.
    pub fn advance(
        &mut self,
        sum: &mut Sum,
        values: &mut [f32],
        goal: Goal,
        wait: &Wait<'_>,
    ) -> Result<()> {
        let mut looked = Instant::now();
        loop {
            let (mut moved, mut done) = (false, true);
            for (host, peer) in self.peers.iter_mut().enumerate() {
                let Some(peer) = peer else { continue };
                let step = sum.step(host, &mut peer.stream, values);
                moved |= step.map_err(|broken| failure(self.rank, peer, broken, wait))?;
                done &= sum.is_done_with(host);
            }
            moved |= sum.add_up(values);
            let reached = match goal {
                Goal::Nothing => true,
                Goal::Floats(floats) => sum.done() >= floats,
                // What was added up just now has still to be sent.
                Goal::End => done && sum.done() == values.len(),
            };
            if reached {
                return Ok(());
            }
            if !moved {
                sleep_until_ready(&self.peers, |host| {
                    (sum.wants(host, true), sum.wants(host, false))
                });
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                look(&mut self.peers, wait, |host| !sum.is_received(host))?;
            }
        }
    }

    /// Ends a sum that has reached its end.
    pub fn end_sum(&mut self, sum: Sum) {
        self.slots = sum.into_slots();
    }

    /// Sends `outgoing` to each host and fills `incoming` with what each sent.
    fn exchange(&mut self, wait: &Wait<'_>) -> Result<()> {
        let (outgoing, incoming) = (&self.outgoing, &mut self.incoming);
        let mut transfers: Vec<Transfer> =
            outgoing.iter().map(|bytes| Transfer::new(wait.label, bytes)).collect();
        let mut looked = Instant::now();
        loop {
            let (mut moved, mut done) = (false, true);
            for (host, peer) in self.peers.iter_mut().enumerate() {
                let Some(peer) = peer else { continue };
                let transfer = &mut transfers[host];
                if transfer.is_done(&outgoing[host]) {
                    continue;
                }
                let step = transfer.step(
                    &mut peer.stream,
                    wait.label,
                    &outgoing[host],
                    &mut incoming[host],
                );
                moved |= step.map_err(|broken| failure(self.rank, peer, broken, wait))?;
                done &= transfer.is_done(&outgoing[host]);
            }
            if done {
                return Ok(());
            }
            if !moved {
                sleep_until_ready(&self.peers, |host| {
                    let transfer = &transfers[host];
                    (!transfer.is_sent(&outgoing[host]), !transfer.is_received())
                });
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                look(&mut self.peers, wait, |host| !transfers[host].is_received())?;
            }
        }
    }
}

/// Fails when this host has been called to stop, another one has given up or fallen silent, or the
/// deadline has passed; `lacks` says of a host whether something of it is missing.
fn look(
    peers: &mut [Option<Peer>],
    wait: &Wait<'_>,
    mut lacks: impl FnMut(usize) -> bool,
) -> Result<()> {
    (wait.watch)()?;
    for peer in peers.iter_mut().flatten() {
        // A line that is closed without a word: what it has sent before may still be read.
        let Some(word @ (Word::Farewell(_) | Word::Silent)) = peer.side.listen() else { continue };
        return Err(lost(peer.rank, Some(word), "it closed the connection", wait));
    }
    let waited = wait.start.elapsed();
    // Ranks of the same host as the missing one know better which one it is: they are the first to
    // say so.
    if waited < wait.deadline + GRACE.min(wait.deadline / 4) {
        return Ok(());
    }
    let peers = peers.iter().enumerate().filter_map(|(host, peer)| Some((host, peer.as_ref()?)));
    let missing = peers.filter(|(host, _)| lacks(*host)).map(|(_, peer)| peer.rank);
    let missing_ranks = missing.collect();
    let (op, seq) = (wait.op.clone(), wait.label.seq);
    Err(CollectiveError::Deadline { op, seq, waited, missing_ranks })
}

/// What the end of a connection means, given what was said beside it.
fn lost(rank: usize, word: Option<Word>, how: &'static str, wait: &Wait<'_>) -> CollectiveError {
    let (op, seq) = (wait.op.clone(), wait.label.seq);
    match word {
        Some(Word::Farewell(AbortRecord { by, culprit, reason })) => {
            CollectiveError::Aborted { by, culprit, reason }
        }
        Some(Word::Silent) => {
            CollectiveError::PeerLost { rank, op, seq, how: "its host does not answer" }
        }
        Some(Word::Closed) | None => CollectiveError::PeerLost { rank, op, seq, how },
    }
}

fn failure(own: usize, peer: &mut Peer, broken: Broken, wait: &Wait<'_>) -> CollectiveError {
    let (op, seq, rank) = (wait.op.clone(), wait.label.seq, peer.rank);
    match broken {
        Broken::Lost(error) => {
            let how = match error.kind() {
                std::io::ErrorKind::UnexpectedEof => "it closed the connection",
                std::io::ErrorKind::TimedOut => "its host does not answer",
                _ => "the connection to its host broke",
            };
            lost(rank, peer.side.last_word(LAST_WORD), how, wait)
        }
        Broken::Other(theirs) if theirs.generation != wait.label.generation => {
            CollectiveError::PeerLost { rank, op, seq, how: "it belongs to another start" }
        }
        Broken::Other(theirs) => {
            let theirs = (wait.describe)(theirs);
            CollectiveError::Mismatch { seq, rank: own, ours: op, peer: rank, theirs }
        }
        Broken::Foreign => {
            CollectiveError::PeerLost { rank, op, seq, how: "it sent what no rank sends" }
        }
    }
}

/// Waits until a connection can move something of what `wants` names (to send, to receive), [`LOOK`]
/// at most.
fn sleep_until_ready(peers: &[Option<Peer>], mut wants: impl FnMut(usize) -> (bool, bool)) {
    let mut waiting = Vec::new();
    for (host, peer) in peers.iter().enumerate() {
        let Some(peer) = peer else { continue };
        let (send, receive) = wants(host);
        let events = if send { libc::POLLOUT } else { 0 } | if receive { libc::POLLIN } else { 0 };
        if events != 0 {
            waiting.push(libc::pollfd { fd: peer.stream.as_raw_fd(), events, revents: 0 });
        }
    }
    // SAFETY: the pointer and the length are those of one vector of valid entries. The result is not
    // needed: whatever happened, the connections are tried again.
    unsafe {
        libc::poll(waiting.as_mut_ptr(), waiting.len() as libc::nfds_t, LOOK.as_millis() as i32)
    };
}

#[cfg(test)]
mod tests;
