//! Ranks that `mpirun` has started: the same collectives over MPI, for sites that require it.
//!
//! Every process is a host of its own here; bytes go from rank to rank by non-blocking sends and
//! receives, and this crate adds them up in rank order (or in pairs), so that the sums are the bits of
//! the way over TCP with one rank a host. Waits have deadlines, but MPI cannot go on without a rank:
//! what would be an error elsewhere ends the whole job here (`MPI_Abort`), with its reason on stderr.
//! Restarts are then the site's business. Calls are made by one thread at a time.

use std::io::Write;
use std::ops::Range;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};

use crate::error::{CollectiveError, Result};
use crate::group::Op;
use crate::shm::shard;
use crate::sums::{BLOCK, Order, Sums};

/// Largest message: MPI counts in 32 bits.
const MESSAGE: usize = 1 << 30;
/// How long a rank naps between two looks at its messages once it has waited for long.
const NAP: Duration = Duration::from_micros(50);
/// Looks without a nap.
const SPINS: u32 = 2000;
/// Words of a head: number, kind and length of a collective.
const HEAD: usize = 24;

/// All ranks of an MPI job.
pub(crate) struct World {
    ranks: SimpleCommunicator,
    rank: usize,
    size: usize,
    /// Collectives begun.
    seq: u64,
    /// Ends MPI when it is dropped, after `ranks`.
    _universe: Universe,
}

// SAFETY: MPI was initialised for calls from any thread, one at a time (`Threading::Serialized`), and
// a `World` is used behind a lock.
unsafe impl Send for World {}

/// One collective under way.
struct Call {
    op: Op,
    length: usize,
    start: Instant,
    deadline: Duration,
}

impl World {
    /// Joins the job of this process, which must be rank `rank` of `size`.
    pub fn join(rank: usize, size: usize) -> Result<World> {
        let unsupported = |what: String| CollectiveError::Unsupported {
            what,
            hint: "start ranks by the MPI that this program was built with",
        };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| unsupported("MPI was initialised already".to_owned()))?;
        if threading < Threading::Serialized {
            return Err(unsupported(format!("MPI cannot be called by threads: {threading:?}")));
        }
        let ranks = universe.world();
        let found = (ranks.rank() as usize, ranks.size() as usize);
        if found != (rank, size) {
            return Err(unsupported(format!(
                "the environment says rank {rank} of {size}, MPI says: {} of {}",
                found.0, found.1
            )));
        }
        Ok(World { ranks, rank, size, seq: 0, _universe: universe })
    }

    /// As [`Comm::all_reduce`](crate::Comm::all_reduce).
    pub fn all_reduce(
        &mut self,
        values: &mut [f32],
        order: Order,
        deadline: Duration,
    ) -> Result<()> {
        let length = values.len();
        let call = self.begin(Op::AllReduce(order), length, deadline)?;
        let part = |rank: usize| shard(length, rank, self.size);
        let own = part(self.rank);
        // The own part of every rank's vector comes here...
        let mut parts = vec![vec![0.0_f32; own.len()]; self.size];
        let outgoing: Vec<&[u8]> =
            (0..self.size).map(|rank| bytemuck::cast_slice(&values[part(rank)])).collect();
        let incoming = parts.iter_mut().map(|part| bytemuck::cast_slice_mut(part)).collect();
        self.exchange(&outgoing, incoming, &call);
        parts[self.rank].copy_from_slice(&values[own.clone()]);
        add_up(&parts, &mut values[own.clone()], order);
        // ...and its sum goes to every rank.
        let total = values[own].to_vec();
        let outgoing = vec![bytemuck::cast_slice(&total); self.size];
        let ranges: Vec<Range<usize>> = (0..self.size).map(part).collect();
        let mut incoming: Vec<&mut [u8]> = Vec::new();
        let mut rest = values;
        for range in ranges {
            let (part, behind) = rest.split_at_mut(range.len());
            incoming.push(bytemuck::cast_slice_mut(part));
            rest = behind;
        }
        self.exchange(&outgoing, incoming, &call);
        Ok(())
    }

    /// As [`Comm::barrier`](crate::Comm::barrier).
    pub fn barrier(&mut self, deadline: Duration) -> Result<()> {
        self.begin(Op::Barrier, 0, deadline).map(drop)
    }

    /// As [`Comm::broadcast`](crate::Comm::broadcast).
    pub fn broadcast(
        &mut self,
        root: usize,
        bytes: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>> {
        if root >= self.size {
            return Err(CollectiveError::NoSuchRoot { root, world_size: self.size });
        }
        let own = if root == self.rank { bytes } else { Vec::new() };
        Ok(self.gather(Op::Broadcast(root), &own, deadline)?.swap_remove(root))
    }

    /// As [`Comm::all_gather`](crate::Comm::all_gather).
    pub fn all_gather(&mut self, own: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        self.gather(Op::AllGather, own, deadline)
    }

    fn gather(&mut self, op: Op, own: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let call = self.begin_with(op, own.len(), deadline)?;
        let mut gathered: Vec<Vec<u8>> = call.1.iter().map(|length| vec![0; *length]).collect();
        let outgoing = vec![own; self.size];
        let incoming = gathered.iter_mut().map(Vec::as_mut_slice).collect();
        self.exchange(&outgoing, incoming, &call.0);
        gathered[self.rank].copy_from_slice(own);
        Ok(gathered)
    }

    /// Begins a collective to which all ranks bring as much.
    fn begin(&mut self, op: Op, length: usize, deadline: Duration) -> Result<Call> {
        let (call, lengths) = self.begin_with(op, length, deadline)?;
        match lengths.iter().position(|theirs| *theirs != length) {
            None => Ok(call),
            Some(peer) => Err(self.mismatch(&call, peer, op.code(), lengths[peer])),
        }
    }

    /// Begins a collective: every rank hears of the others that they are in it, too, and what they
    /// bring.
    fn begin_with(
        &mut self,
        op: Op,
        length: usize,
        deadline: Duration,
    ) -> Result<(Call, Vec<usize>)> {
        self.seq += 1;
        let call = Call { op, length, start: Instant::now(), deadline };
        let words = [self.seq, op.code(), length as u64];
        let own: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut heads = vec![[0_u8; HEAD]; self.size];
        let outgoing = vec![own.as_slice(); self.size];
        let incoming = heads.iter_mut().map(<[u8; HEAD]>::as_mut_slice).collect();
        self.exchange(&outgoing, incoming, &call);
        heads[self.rank].copy_from_slice(&own);
        let mut lengths = Vec::new();
        for (peer, head) in heads.iter().enumerate() {
            let word = |at: usize| {
                head[8 * at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
            };
            if (word(0), word(1)) != (self.seq, op.code()) {
                return Err(self.mismatch(&call, peer, word(1), word(2) as usize));
            }
            lengths.push(word(2) as usize);
        }
        Ok((call, lengths))
    }

    fn mismatch(&self, call: &Call, peer: usize, code: u64, length: usize) -> CollectiveError {
        CollectiveError::Mismatch {
            seq: self.seq,
            rank: self.rank,
            ours: Op::describe(call.op.code(), call.length as u64),
            peer,
            theirs: Op::describe(code, length as u64),
        }
    }

    /// Sends `outgoing` to each rank and fills `incoming` with what each sent; nothing goes to and comes
    /// from this one. Ends the job at the deadline.
    fn exchange(&self, outgoing: &[&[u8]], incoming: Vec<&mut [u8]>, call: &Call) {
        mpi::request::scope(|scope| {
            let mut pending = Vec::new();
            for (rank, bytes) in incoming.into_iter().enumerate() {
                if rank == self.rank {
                    continue;
                }
                let peer = self.ranks.process_at_rank(rank as i32);
                for message in bytes.chunks_mut(MESSAGE) {
                    pending.push((rank, peer.immediate_receive_into(scope, message)));
                }
            }
            for (rank, bytes) in outgoing.iter().enumerate() {
                if rank == self.rank {
                    continue;
                }
                let peer = self.ranks.process_at_rank(rank as i32);
                for message in bytes.chunks(MESSAGE) {
                    pending.push((rank, peer.immediate_send(scope, message)));
                }
            }
            let mut looks = 0;
            while !pending.is_empty() {
                let tested = pending.into_iter();
                pending = tested
                    .filter_map(|(rank, request)| Some((rank, request.test().err()?)))
                    .collect();
                looks += 1;
                if looks > SPINS && !pending.is_empty() {
                    let missing = pending.iter().map(|(rank, _)| *rank);
                    self.end_if_late(call, missing);
                    std::thread::sleep(NAP);
                }
            }
        });
    }

    /// Ends the job when the deadline has passed.
    fn end_if_late(&self, call: &Call, missing: impl Iterator<Item = usize>) {
        let waited = call.start.elapsed();
        if waited < call.deadline {
            return;
        }
        let mut missing_ranks: Vec<usize> = missing.collect();
        missing_ranks.sort_unstable();
        missing_ranks.dedup();
        let op = Op::describe(call.op.code(), call.length as u64);
        let error = CollectiveError::Deadline { op, seq: self.seq, waited, missing_ranks };
        // A reader of stderr that went away leaves nobody to tell.
        drop(writeln!(std::io::stderr().lock(), "error: rank {}: {error}", self.rank));
        self.ranks.abort(crate::exit_code::FAILURE);
    }
}

/// Adds the parts of all ranks up.
fn add_up(parts: &[Vec<f32>], total: &mut [f32], order: Order) {
    let mut sums = Sums::new(order);
    for start in (0..total.len()).step_by(BLOCK) {
        let end = total.len().min(start + BLOCK);
        for (rank, part) in parts.iter().enumerate() {
            sums.add(rank, &part[start..end]);
        }
        total[start..end].copy_from_slice(&sums.finish()[..end - start]);
    }
}
