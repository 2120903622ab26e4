//! One rank's connections to the ranks of its number on the other hosts, and sums over them.
//!
//! A rank of a host talks over TCP to its counterparts alone: with N ranks a host, N sums travel
//! side by side, each a N-th of the vector (`shm.rs` splits it). Between H hosts a vector is summed
//! as within a host: each host sums one shard and sends the sum to the others, 2 (H - 1) / H of the
//! bytes each way, and the sum of one chunk travels with the shards of the next. Hosts are added in
//! their order, so that every rank holds the same bits.
//!
//! No wait is deaf: while bytes are on their way, `watch` is asked at least every [`LOOK`] whether
//! the group still stands, and the deadline is looked at.

mod rendezvous;
mod seal;
mod wire;

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

pub(crate) use rendezvous::{Meeting, Seat, meet};
pub use seal::Token;
pub(crate) use wire::Label;
use wire::{Broken, Transfer};

use crate::error::{CollectiveError, Result};
use crate::shm::shard;
use crate::sums::{BLOCK, Order, Sums};

/// How often a waiting rank looks whether the group still stands.
const LOOK: Duration = Duration::from_millis(20);
/// Floats of a chunk: long enough that the turn-around of a message hardly counts.
const CHUNK: usize = 1 << 20;

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

/// A connection to one host.
#[derive(Debug)]
struct Peer {
    /// The rank at its other end.
    rank: usize,
    stream: TcpStream,
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
}

impl Mesh {
    /// Takes connected streams to the counterparts, by host: (rank, stream), `None` for the own.
    pub fn new(
        rank: usize,
        host: usize,
        streams: Vec<Option<(usize, TcpStream)>>,
    ) -> std::io::Result<Mesh> {
        let mut peers = Vec::new();
        for connection in streams {
            peers.push(match connection {
                None => None,
                Some((rank, stream)) => {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    Some(Peer { rank, stream })
                }
            });
        }
        let buffers = vec![Vec::new(); peers.len()];
        Ok(Mesh { rank, host, peers, incoming: buffers.clone(), outgoing: buffers })
    }

    /// Number of hosts.
    pub fn hosts(&self) -> usize {
        self.peers.len()
    }

    /// Number of this host.
    pub fn host(&self) -> usize {
        self.host
    }

    /// Ends all connections, so that the peers notice at once.
    pub fn close(&self) {
        for peer in self.peers.iter().flatten() {
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

    /// Replaces `values` with the sum over the counterparts of all hosts, added in `order`.
    pub fn all_reduce(&mut self, values: &mut [f32], order: Order, wait: &Wait<'_>) -> Result<()> {
        let hosts = self.hosts();
        let mut sums = Sums::new(order);
        // What is being summed now, and what was summed before and travels with it.
        let mut begin = 0;
        let mut before = 0..0;
        loop {
            let now = begin..values.len().min(begin + CHUNK);
            let own_before = within(&before, shard(before.len(), self.host, hosts));
            for host in (0..hosts).filter(|host| *host != self.host) {
                let part = within(&now, shard(now.len(), host, hosts));
                let buffer = &mut self.outgoing[host];
                buffer.clear();
                buffer.extend_from_slice(bytemuck::cast_slice(&values[own_before.clone()]));
                buffer.extend_from_slice(bytemuck::cast_slice(&values[part]));
            }
            if before.is_empty() && now.is_empty() && begin > 0 {
                return Ok(());
            }
            self.exchange(wait)?;
            let own = within(&now, shard(now.len(), self.host, hosts));
            for host in (0..hosts).filter(|host| *host != self.host) {
                let theirs = within(&before, shard(before.len(), host, hosts));
                let wanted = 4 * (theirs.len() + own.len());
                let got = self.incoming[host].len();
                if got != wanted {
                    return Err(self.confused(host, wait, wanted, got));
                }
                let bytes = &self.incoming[host][..4 * theirs.len()];
                bytemuck::cast_slice_mut(&mut values[theirs.clone()]).copy_from_slice(bytes);
            }
            self.sum_own(values, &before, &own, &mut sums);
            if now.is_empty() {
                return Ok(());
            }
            (begin, before) = (now.end, now);
        }
    }

    /// Sums the shard `own` of all hosts into `values`.
    fn sum_own(
        &self,
        values: &mut [f32],
        before: &std::ops::Range<usize>,
        own: &std::ops::Range<usize>,
        sums: &mut Sums,
    ) {
        let mut block = [0_f32; BLOCK];
        for start in own.clone().step_by(BLOCK) {
            let end = own.end.min(start + BLOCK);
            for host in 0..self.hosts() {
                let part = &mut block[..end - start];
                if host == self.host {
                    part.copy_from_slice(&values[start..end]);
                } else {
                    let skipped = shard(before.len(), host, self.hosts()).len() + start - own.start;
                    let bytes = &self.incoming[host][4 * skipped..4 * (skipped + part.len())];
                    bytemuck::cast_slice_mut(part).copy_from_slice(bytes);
                }
                sums.add(host, part);
            }
            values[start..end].copy_from_slice(&sums.finish()[..end - start]);
        }
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
                moved |= step.map_err(|broken| failure(self.rank, peer.rank, broken, wait))?;
                done &= transfer.is_done(&outgoing[host]);
            }
            if done {
                return Ok(());
            }
            if !moved {
                sleep_until_ready(&self.peers, &transfers, outgoing);
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                (wait.watch)()?;
                let waited = wait.start.elapsed();
                if waited >= wait.deadline {
                    let missing =
                        self.peers.iter().zip(&transfers).filter_map(|(peer, transfer)| {
                            peer.as_ref().filter(|_| !transfer.is_received()).map(|peer| peer.rank)
                        });
                    let missing_ranks = missing.collect();
                    let (op, seq) = (wait.op.clone(), wait.label.seq);
                    return Err(CollectiveError::Deadline { op, seq, waited, missing_ranks });
                }
            }
        }
    }

    /// Cannot happen between two builds that agree: labels are equal, so lengths are.
    fn confused(&self, host: usize, wait: &Wait<'_>, wanted: usize, got: usize) -> CollectiveError {
        CollectiveError::Mismatch {
            seq: wait.label.seq,
            rank: self.rank,
            ours: format!("{} with a part of {wanted} bytes", wait.op),
            peer: self.peers[host].as_ref().map_or(self.rank, |peer| peer.rank),
            theirs: format!("{} with a part of {got} bytes", wait.op),
        }
    }
}

/// A range within a range.
fn within(outer: &std::ops::Range<usize>, inner: std::ops::Range<usize>) -> std::ops::Range<usize> {
    outer.start + inner.start..outer.start + inner.end
}

fn failure(rank: usize, peer: usize, broken: Broken, wait: &Wait<'_>) -> CollectiveError {
    let (op, seq) = (wait.op.clone(), wait.label.seq);
    match broken {
        Broken::Lost(error) => {
            let how = match error.kind() {
                std::io::ErrorKind::UnexpectedEof => "it closed the connection",
                std::io::ErrorKind::TimedOut => "its host does not answer",
                _ => "the connection to its host broke",
            };
            CollectiveError::PeerLost { rank: peer, op, seq, how }
        }
        Broken::Other(theirs) if theirs.generation != wait.label.generation => {
            CollectiveError::PeerLost { rank: peer, op, seq, how: "it belongs to another start" }
        }
        Broken::Other(theirs) => {
            let theirs = (wait.describe)(theirs);
            CollectiveError::Mismatch { seq, rank, ours: op, peer, theirs }
        }
        Broken::Foreign => {
            CollectiveError::PeerLost { rank: peer, op, seq, how: "it sent what no rank sends" }
        }
    }
}

/// Waits until a connection can move something, [`LOOK`] at most.
fn sleep_until_ready(peers: &[Option<Peer>], transfers: &[Transfer], outgoing: &[Vec<u8>]) {
    let mut waiting = Vec::new();
    for ((peer, transfer), bytes) in peers.iter().zip(transfers).zip(outgoing) {
        let Some(peer) = peer else { continue };
        let mut events = 0;
        if !transfer.is_sent(bytes) {
            events |= libc::POLLOUT;
        }
        if !transfer.is_received() {
            events |= libc::POLLIN;
        }
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
