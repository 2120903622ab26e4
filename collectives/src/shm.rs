//! Collectives between ranks of one host through the shared segment.
//!
//! # Phases
//! Work proceeds in numbered *phases* that all ranks pass in lockstep. A rank finishes a phase by
//! adding one to its `progress` word and may then wait until every peer has finished it too. Phase
//! `t` writes data buffer `t % 3` of the own rank, and reads the peers' buffers only after having
//! waited for the phase that wrote them.
//!
//! # All-reduce
//! Chunk `k` of the vector is cut into one shard per rank. Phase `k`: copy the shards of the other
//! ranks into the own buffer. After the wait: sum the own shard over all ranks, in rank order, into
//! the caller's memory and into the own buffer; finishing phase `k + 1` (which also copied chunk
//! `k + 1`) publishes it; after that wait, fetch the sums of the other shards. So a chunk costs one
//! wait and 2 (N - 1) / N copies of its bytes.
//!
//! # Why three buffers
//! The sums of chunk `k` are read by peers between their waits `k + 1` and `k + 2`. A rank writes
//! the same buffer again in phase `k + 3`, which it enters after wait `k + 2`, that is when all
//! peers have finished phase `k + 2` and so are done reading. The count runs on from one collective
//! to the next, so that no gap between collectives is needed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::{CollectiveError, Result};
use crate::futex;
use crate::liveness::Watch;
use crate::segment::{ABORT_BIT, ABSENT, Author, BUFFER_BYTES, BUFFERS, JOINED, LEFT, Segment};

/// Floats in one buffer.
const CHUNK: usize = BUFFER_BYTES / size_of::<f32>();
/// Floats summed at a time: 16 kB stay in the first-level cache while all ranks are added.
const BLOCK: usize = 4096;
/// Shards begin at multiples of a cache line.
const LINE: usize = 64 / size_of::<f32>();
/// How often a waiting rank looks whether its peers still live.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(100);

/// What a rank calls; equal on all ranks, or the call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    /// First meeting of all ranks.
    Connect,
    Barrier,
    /// Lengths must be equal.
    AllReduce,
    /// From this rank; the others learn the length.
    Broadcast(usize),
    /// Lengths may differ.
    AllGather,
}

impl Op {
    /// What is announced: the kind in the low byte, the root above.
    fn code(self) -> u64 {
        match self {
            Op::Connect => 1,
            Op::Barrier => 2,
            Op::AllReduce => 3,
            Op::AllGather => 4,
            Op::Broadcast(root) => 5 | (root as u64) << 8,
        }
    }

    /// Words for an announcement, also for one that this rank did not make.
    fn describe(code: u64, length: u64) -> String {
        match code & 0xff {
            1 => "connect".to_owned(),
            2 => "barrier".to_owned(),
            3 => format!("all_reduce of {length} floats"),
            4 => "all_gather".to_owned(),
            5 => format!("broadcast from rank {}", code >> 8),
            _ => format!("unknown collective {code}"),
        }
    }
}

/// One collective under way.
struct Call {
    op: Op,
    seq: u64,
    start: Instant,
    deadline: Duration,
    agreed: bool,
}

/// One rank's end of the group. Used by one thread at a time.
pub(crate) struct Group {
    segment: Arc<Segment>,
    rank: usize,
    world_size: usize,
    /// Phases finished.
    phase: u64,
    /// Collectives begun.
    seq: u64,
    watches: Vec<Option<Watch>>,
    last_look: Instant,
    spins: u32,
    failed: Option<CollectiveError>,
}

impl Group {
    /// Joins the group and waits until all ranks have joined.
    pub(crate) fn join(segment: Arc<Segment>, rank: usize, deadline: Duration) -> Result<Group> {
        let world_size = segment.world_size();
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let slot = segment.slot(rank);
        slot.pid.store(std::process::id(), Ordering::Relaxed);
        slot.state.store(JOINED, Ordering::Release);
        let mut group = Group {
            rank,
            world_size,
            phase: 0,
            seq: 0,
            watches: (0..world_size).map(|_| None).collect(),
            last_look: Instant::now(),
            // Spinning pays only where every rank has a core to itself.
            spins: if world_size <= cores { 2000 } else { 20 },
            failed: None,
            segment,
        };
        group.call(Op::Connect, 0, deadline, Group::meet)?;
        Ok(group)
    }

    /// Waits until all ranks have called it.
    pub(crate) fn barrier(&mut self, deadline: Duration) -> Result<()> {
        self.call(Op::Barrier, 0, deadline, Group::meet)
    }

    /// Replaces `values` with the sum over all ranks, added in rank order.
    pub(crate) fn all_reduce(&mut self, values: &mut [f32], deadline: Duration) -> Result<()> {
        let length = values.len();
        self.call(Op::AllReduce, length, deadline, |group, call| {
            let mut chunks = values.chunks_mut(CHUNK);
            let mut current = chunks.next();
            let mut buffer = group.writable_buffer();
            group.put_shards(buffer, current.as_deref().unwrap_or_default());
            group.meet(call)?;
            while let Some(chunk) = current {
                group.sum_own_shard(buffer, chunk);
                let next = chunks.next();
                let next_buffer = group.writable_buffer();
                group.put_shards(next_buffer, next.as_deref().unwrap_or_default());
                group.meet(call)?;
                group.fetch_shards(buffer, chunk);
                (current, buffer) = (next, next_buffer);
            }
            Ok(())
        })
    }

    /// Gives every rank the bytes of `root`; those of the other ranks are dropped.
    pub(crate) fn broadcast(
        &mut self,
        root: usize,
        mut bytes: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>> {
        if root >= self.world_size {
            return Err(CollectiveError::NoSuchRoot { root, world_size: self.world_size });
        }
        let sends = root == self.rank;
        if !sends {
            bytes.clear();
        }
        self.call(Op::Broadcast(root), bytes.len(), deadline, |group, call| {
            let mut done = 0;
            loop {
                let buffer = group.writable_buffer();
                if sends {
                    group.put_bytes(buffer, &bytes[done..bytes.len().min(done + BUFFER_BYTES)]);
                }
                group.meet(call)?;
                let total = group.announced_length(call, root);
                let part = (total - done).min(BUFFER_BYTES);
                if !sends {
                    group.fetch_bytes(root, buffer, part, &mut bytes);
                }
                done += part;
                if done == total {
                    return Ok(());
                }
            }
        })?;
        Ok(bytes)
    }

    /// The bytes of all ranks, by rank. Lengths may differ.
    pub(crate) fn all_gather(&mut self, own: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        self.call(Op::AllGather, own.len(), deadline, |group, call| {
            let mut gathered: Vec<Vec<u8>> = vec![Vec::new(); group.world_size];
            let mut done = 0;
            loop {
                let buffer = group.writable_buffer();
                let start = done.min(own.len());
                group.put_bytes(buffer, &own[start..own.len().min(done + BUFFER_BYTES)]);
                group.meet(call)?;
                done += BUFFER_BYTES;
                let mut longest = 0;
                for (peer, bytes) in gathered.iter_mut().enumerate() {
                    let total = group.announced_length(call, peer);
                    longest = longest.max(total);
                    let part = (total - bytes.len()).min(BUFFER_BYTES);
                    group.fetch_bytes(peer, buffer, part, bytes);
                }
                if done >= longest {
                    return Ok(gathered);
                }
            }
        })
    }

    /// Runs one collective: announces it, and on failure tells the peers and closes the group.
    fn call<T>(
        &mut self,
        op: Op,
        length: usize,
        deadline: Duration,
        run: impl FnOnce(&mut Group, &mut Call) -> Result<T>,
    ) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.seq += 1;
        let announcement = &self.segment.slot(self.rank).announcements[(self.seq % 2) as usize];
        announcement.seq.store(self.seq, Ordering::Relaxed);
        announcement.kind.store(op.code(), Ordering::Relaxed);
        announcement.length.store(length as u64, Ordering::Relaxed);
        let mut call = Call { op, seq: self.seq, start: Instant::now(), deadline, agreed: false };
        run(self, &mut call).inspect_err(|error| {
            let culprit = match error {
                CollectiveError::PeerLost { rank, .. } => Some(*rank),
                CollectiveError::Deadline { missing_ranks, .. } => missing_ranks.first().copied(),
                _ => None,
            };
            if !matches!(error, CollectiveError::Aborted { .. }) {
                self.segment.abort(Author::Rank(self.rank), culprit, &error.to_string());
            }
            self.failed = Some(error.clone());
        })
    }

    /// Finishes this rank's phase and waits for the peers to finish theirs.
    fn meet(&mut self, call: &mut Call) -> Result<()> {
        self.phase += 1;
        let slot = self.segment.slot(self.rank);
        slot.progress.fetch_add(ABORT_BIT << 1, Ordering::SeqCst);
        // Either the sleeper sees the new count before it sleeps, or it is counted here.
        if slot.sleepers.load(Ordering::SeqCst) > 0 {
            futex::wake_all(&slot.progress);
        }
        for peer in 0..self.world_size {
            self.wait_for(peer, call)?;
        }
        if !call.agreed {
            self.check_agreement(call)?;
            call.agreed = true;
        }
        Ok(())
    }

    /// Waits until `peer` has finished the phase that this rank has finished last.
    fn wait_for(&mut self, peer: usize, call: &Call) -> Result<()> {
        let segment = self.segment.clone();
        let slot = segment.slot(peer);
        for _ in 0..self.spins {
            if self.has_arrived(peer)? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        loop {
            slot.sleepers.fetch_add(1, Ordering::SeqCst);
            let seen = slot.progress.load(Ordering::SeqCst);
            let arrived = self.has_arrived(peer);
            let waited = call.start.elapsed();
            if let Ok(false) = arrived {
                let left = call.deadline.saturating_sub(waited);
                futex::wait(&slot.progress, seen, left.min(LIVENESS_INTERVAL));
            }
            slot.sleepers.fetch_sub(1, Ordering::SeqCst);
            if arrived? || self.has_arrived(peer)? {
                return Ok(());
            }
            self.look_for_lost_peers(call)?;
            if waited >= call.deadline {
                return Err(CollectiveError::Deadline {
                    op: self.describe(call),
                    seq: call.seq,
                    waited,
                    missing_ranks: self.missing_ranks(),
                });
            }
        }
    }

    /// Whether `peer` has come as far as this rank; an abort is an error.
    fn has_arrived(&self, peer: usize) -> Result<bool> {
        let word = self.segment.slot(peer).progress.load(Ordering::SeqCst);
        if word & ABORT_BIT != 0 {
            let record = self.segment.await_abort_record();
            return Err(CollectiveError::Aborted {
                by: record.by,
                culprit: record.culprit,
                reason: record.reason,
            });
        }
        let own = (self.phase as u32) << 1;
        Ok(word.wrapping_sub(own) as i32 >= 0)
    }

    /// Ranks that have not come as far as this one.
    fn missing_ranks(&self) -> Vec<usize> {
        (0..self.world_size).filter(|&peer| matches!(self.has_arrived(peer), Ok(false))).collect()
    }

    /// Fails when a rank that is still missing will never arrive.
    fn look_for_lost_peers(&mut self, call: &Call) -> Result<()> {
        if self.last_look.elapsed() < LIVENESS_INTERVAL {
            return Ok(());
        }
        self.last_look = Instant::now();
        for peer in self.missing_ranks() {
            let slot = self.segment.slot(peer);
            let how = match slot.state.load(Ordering::Acquire) {
                ABSENT => continue,
                LEFT => "it left the group",
                _ => {
                    let pid = slot.pid.load(Ordering::Relaxed);
                    if !self.watches[peer].get_or_insert_with(|| Watch::on(pid)).is_gone() {
                        continue;
                    }
                    "its process has ended"
                }
            };
            // It may have finished this phase before it went.
            if !self.has_arrived(peer)? {
                let op = self.describe(call);
                return Err(CollectiveError::PeerLost { rank: peer, op, seq: call.seq, how });
            }
        }
        Ok(())
    }

    /// Checks that all ranks have announced this collective.
    fn check_agreement(&self, call: &Call) -> Result<()> {
        let announced = |rank: usize| {
            let announcement = &self.segment.slot(rank).announcements[(call.seq % 2) as usize];
            let kind = announcement.kind.load(Ordering::Relaxed);
            // Only a sum needs equal lengths.
            let length = match kind == Op::AllReduce.code() {
                true => announcement.length.load(Ordering::Relaxed),
                false => 0,
            };
            (announcement.seq.load(Ordering::Relaxed), kind, length)
        };
        let ours = announced(self.rank);
        for peer in 0..self.world_size {
            let theirs = announced(peer);
            if theirs != ours {
                return Err(CollectiveError::Mismatch {
                    seq: call.seq,
                    rank: self.rank,
                    ours: self.describe(call),
                    peer,
                    theirs: Op::describe(theirs.1, theirs.2),
                });
            }
        }
        Ok(())
    }

    /// Words for the collective under way.
    fn describe(&self, call: &Call) -> String {
        Op::describe(call.op.code(), self.announced_length(call, self.rank) as u64)
    }

    /// The length that `rank` has announced for the collective under way.
    fn announced_length(&self, call: &Call, rank: usize) -> usize {
        let announcement = &self.segment.slot(rank).announcements[(call.seq % 2) as usize];
        announcement.length.load(Ordering::Relaxed) as usize
    }

    /// The buffer that this rank writes in the phase it is in.
    fn writable_buffer(&self) -> usize {
        (self.phase % BUFFERS as u64) as usize
    }

    /// Copies a chunk into the own buffer, except for the own shard, which nobody else reads.
    fn put_shards(&self, buffer: usize, chunk: &[f32]) {
        let own = shard(chunk.len(), self.rank, self.world_size);
        let target = self.segment.buffer(self.rank, buffer).cast::<f32>();
        for range in [0..own.start, own.end..chunk.len()] {
            let source = &chunk[range.clone()];
            // SAFETY: a chunk has at most CHUNK floats, so the range lies in the buffer; the buffer
            // is this rank's to write in this phase (see the head of the file) and cannot overlap
            // the caller's memory.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source.as_ptr(),
                    target.add(range.start),
                    source.len(),
                );
            }
        }
    }

    /// Sums the own shard over all ranks, in rank order, into the chunk and the own buffer.
    fn sum_own_shard(&self, buffer: usize, chunk: &mut [f32]) {
        let own = shard(chunk.len(), self.rank, self.world_size);
        let target = self.segment.buffer(self.rank, buffer).cast::<f32>();
        let mut sum = [0.0f32; BLOCK];
        for start in own.clone().step_by(BLOCK) {
            let end = own.end.min(start + BLOCK);
            let sum = &mut sum[..end - start];
            for rank in 0..self.world_size {
                let part = if rank == self.rank {
                    &chunk[start..end]
                } else {
                    let peer = self.segment.buffer(rank, buffer).cast::<f32>();
                    // SAFETY: the range lies in the buffer; its rank has finished the phase that
                    // wrote it, writes only its own shard (disjoint from this one) in this phase
                    // and the buffer again two phases later. Any bits are valid floats.
                    unsafe { std::slice::from_raw_parts(peer.add(start), sum.len()) }
                };
                if rank == 0 {
                    sum.copy_from_slice(part);
                } else {
                    for (total, value) in sum.iter_mut().zip(part) {
                        *total += value;
                    }
                }
            }
            chunk[start..end].copy_from_slice(sum);
            // SAFETY: the own shard of the own buffer: within bounds, and no peer reads it before
            // this phase is finished.
            unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), target.add(start), sum.len()) };
        }
    }

    /// Copies the other ranks' summed shards into the chunk.
    fn fetch_shards(&self, buffer: usize, chunk: &mut [f32]) {
        for rank in (0..self.world_size).filter(|&rank| rank != self.rank) {
            let range = shard(chunk.len(), rank, self.world_size);
            let peer = self.segment.buffer(rank, buffer).cast::<f32>();
            let target = &mut chunk[range.clone()];
            // SAFETY: within bounds; `rank` has finished the phase in which it wrote its sums, and
            // writes this buffer again only after this rank has finished another phase.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    peer.add(range.start),
                    target.as_mut_ptr(),
                    target.len(),
                );
            }
        }
    }

    /// Copies at most a buffer of bytes into the own buffer.
    fn put_bytes(&self, buffer: usize, bytes: &[u8]) {
        assert!(bytes.len() <= BUFFER_BYTES, "{} bytes in one buffer", bytes.len());
        let target = self.segment.buffer(self.rank, buffer);
        // SAFETY: within bounds by the check; the buffer is this rank's to write in this phase.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Appends the first `length` bytes of a rank's buffer.
    fn fetch_bytes(&self, rank: usize, buffer: usize, length: usize, into: &mut Vec<u8>) {
        assert!(length <= BUFFER_BYTES, "{length} bytes in one buffer");
        let source = self.segment.buffer(rank, buffer);
        // SAFETY: within bounds by the check; `rank` has finished the phase that wrote it and
        // writes this buffer again only after this rank has finished another phase.
        into.extend_from_slice(unsafe { std::slice::from_raw_parts(source, length) });
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let slot = self.segment.slot(self.rank);
        slot.state.store(LEFT, Ordering::Release);
        futex::wake_all(&slot.progress);
    }
}

/// The part of a chunk of `length` floats that `rank` sums.
fn shard(length: usize, rank: usize, world_size: usize) -> std::ops::Range<usize> {
    let lines = length.div_ceil(LINE);
    let bound = |rank: usize| (lines * rank / world_size * LINE).min(length);
    bound(rank)..bound(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_a_chunk_without_gap_or_overlap() {
        for length in [0, 1, 15, 16, 17, 100, 4095, CHUNK] {
            for world_size in 1..=5 {
                let mut next = 0;
                for rank in 0..world_size {
                    let range = shard(length, rank, world_size);
                    assert_eq!(range.start, next);
                    assert!(range.end >= range.start);
                    next = range.end;
                }
                assert_eq!(next, length);
            }
        }
    }
}
