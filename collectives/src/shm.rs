//! Collectives between ranks of one host through the shared segment.
//!
//! # Phases
//! All ranks pass numbered phases in lockstep (`group.rs`). Phase `t` writes data buffer `t % 3` of
//! the own rank, and peers' buffers are read only after having waited for the phase that wrote them.
//!
//! # All-reduce
//! The vector is cut into one shard per rank, which that rank adds up, and each shard into pieces.
//! Phase `k` writes piece `k` of the other ranks' shards into the own buffer, and beside them the sum
//! of an earlier piece of the own shard. After the wait: add up piece `k` of the own shard over all
//! ranks, one by one or in pairs, into the caller's memory; fetch the earlier sums of the other shards.
//! So a piece costs one wait and 2 (N - 1) / N copies of its bytes.
//!
//! On one host the earlier piece is `k - 1`. Between hosts it is a few more pieces behind: their sums
//! travel between hosts (`mesh`) while the next pieces are added up here.
//!
//! # Why three buffers
//! What phase `k` wrote is read by peers between their waits `k` and `k + 1`. Two buffers would do for
//! that, three keep broadcast and all-gather, which read a little later, as simple. The count runs on
//! from one collective to the next, so that no gap between collectives is needed.

use std::ops::Range;
use std::time::Duration;

use crate::error::Result;
use crate::group::{Call, Group, Op, Work};
use crate::mesh::{Goal, Sum};
use crate::segment::BUFFER_BYTES;
use crate::sums::{BLOCK, Order, Sums, add_two};

/// Floats in one buffer.
const CHUNK: usize = BUFFER_BYTES / size_of::<f32>();
/// Shards begin at multiples of a cache line.
const LINE: usize = 64 / size_of::<f32>();

impl Group {
    /// Waits until all ranks have called it.
    pub(crate) fn barrier(&mut self, deadline: Duration) -> Result<()> {
        self.call(Op::Barrier, 0, deadline, |group, call| {
            group.meet(call)?;
            group.across_hosts(call, |mesh, wait| mesh.gather(&[], wait)).map(drop)
        })
    }

    /// Replaces `values` with the sum over all ranks, added in `order`: the ranks of each host first,
    /// then the hosts.
    pub(crate) fn all_reduce(
        &mut self,
        values: &mut [f32],
        order: Order,
        deadline: Duration,
    ) -> Result<()> {
        let length = values.len();
        self.call(Op::AllReduce(order), length, deadline, |group, call| {
            let label = group.label(call);
            let own = shard(length, group.rank, group.world_size);
            let sum = group.mesh.as_mut().map(|mesh| mesh.begin_sum(own.len(), order, label));
            let mut across = Across { sum, own: own.clone() };
            if group.world_size == 1 {
                across.note_ready(own.len());
                group.meet(call)?;
            } else {
                group.sum_here(call, values, order, &mut across)?;
            }
            across.go(group, call, values, Goal::End)?;
            if let (Some(sum), Some(mesh)) = (across.sum, &mut group.mesh) {
                mesh.end_sum(sum);
            }
            Ok(())
        })
    }

    /// The part of an all-reduce that the ranks of this host do together; see the head of the file.
    fn sum_here(
        &mut self,
        call: &mut Call,
        values: &mut [f32],
        order: Order,
        across: &mut Across,
    ) -> Result<()> {
        let cut = Cut::new(values.len(), self.world_size);
        let lead = across.sum.as_ref().map_or(0, |sum| sum.lead().div_ceil(cut.piece));
        let lag = (1 + lead).min(cut.pieces).max(1);
        for phase in 0..cut.pieces + lag {
            let buffer = self.writable_buffer();
            let ready = phase.checked_sub(lag);
            for rank in 0..self.world_size {
                let piece = if rank == self.rank { ready } else { Some(phase) };
                let Some(range) = piece.map(|piece| cut.range(rank, piece)) else { continue };
                if rank == self.rank {
                    let wanted = range.end - across.own.start;
                    across.go(self, call, values, Goal::Floats(wanted))?;
                }
                self.put(buffer, rank * cut.piece, &values[range]);
            }
            self.meet_while(call, across.work(values).as_mut().map(|work| work as Work<'_>))?;
            if phase < cut.pieces {
                let range = cut.range(self.rank, phase);
                self.add_up(buffer, self.rank * cut.piece, &mut values[range.clone()], order);
                across.note_ready(range.end - across.own.start);
                across.go(self, call, values, Goal::Nothing)?;
            }
            for rank in (0..self.world_size).filter(|&rank| rank != self.rank) {
                if let Some(piece) = ready {
                    let range = cut.range(rank, piece);
                    self.fetch((rank, buffer), rank * cut.piece, &mut values[range]);
                }
            }
        }
        Ok(())
    }

    /// Gives every rank of this host the bytes of its rank `root`; those of the others are dropped.
    pub(crate) fn broadcast_here(
        &mut self,
        root: usize,
        mut bytes: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>> {
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

    /// The bytes of all ranks of this host, by rank. Lengths may differ.
    pub(crate) fn all_gather_here(
        &mut self,
        own: &[u8],
        deadline: Duration,
    ) -> Result<Vec<Vec<u8>>> {
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

    /// Copies floats into the own buffer, from its float `at` on.
    fn put(&self, buffer: usize, at: usize, floats: &[f32]) {
        assert!(at + floats.len() <= CHUNK, "{} floats at {at} of a buffer", floats.len());
        let target = self.segment.buffer(self.rank, buffer).cast::<f32>();
        // SAFETY: within bounds by the check; the buffer is this rank's to write in this phase (see
        // the head of the file) and cannot overlap the caller's memory.
        unsafe { std::ptr::copy_nonoverlapping(floats.as_ptr(), target.add(at), floats.len()) };
    }

    /// Adds up what the other ranks hold at float `at` of their buffers and `own`, into `own`.
    fn add_up(&self, buffer: usize, at: usize, own: &mut [f32], order: Order) {
        assert!(at + own.len() <= CHUNK, "{} floats at {at} of a buffer", own.len());
        if self.world_size == 2 {
            let peer = self.segment.buffer(1 - self.rank, buffer).cast::<f32>();
            // SAFETY: as below.
            let peer = unsafe { std::slice::from_raw_parts(peer.add(at), own.len()) };
            return add_two(own, peer);
        }
        let mut sums = Sums::new(order);
        for start in (0..own.len()).step_by(BLOCK) {
            let end = own.len().min(start + BLOCK);
            for rank in 0..self.world_size {
                let part = if rank == self.rank {
                    &own[start..end]
                } else {
                    let peer = self.segment.buffer(rank, buffer).cast::<f32>();
                    // SAFETY: within bounds by the check; its rank has finished the phase that wrote
                    // it and writes the buffer again after this rank has finished another phase. Any
                    // bits are valid floats.
                    unsafe { std::slice::from_raw_parts(peer.add(at + start), end - start) }
                };
                sums.add(rank, part);
            }
            own[start..end].copy_from_slice(&sums.finish()[..end - start]);
        }
    }

    /// Copies floats out of a rank's buffer, from its float `at` on.
    fn fetch(&self, (rank, buffer): (usize, usize), at: usize, into: &mut [f32]) {
        assert!(at + into.len() <= CHUNK, "{} floats at {at} of a buffer", into.len());
        let source = self.segment.buffer(rank, buffer).cast::<f32>();
        // SAFETY: within bounds by the check; `rank` has finished the phase that wrote it and writes
        // this buffer again only after this rank has finished another phase.
        unsafe { std::ptr::copy_nonoverlapping(source.add(at), into.as_mut_ptr(), into.len()) };
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

/// How a vector is cut: a shard for each rank, and each shard into pieces.
struct Cut {
    length: usize,
    world_size: usize,
    /// Floats of a piece; the last one of a shard may be shorter.
    piece: usize,
    /// Pieces of the longest shard.
    pieces: usize,
}

impl Cut {
    fn new(length: usize, world_size: usize) -> Cut {
        let piece = CHUNK / world_size / LINE * LINE;
        let longest = length.div_ceil(LINE).div_ceil(world_size) * LINE;
        Cut { length, world_size, piece, pieces: longest.div_ceil(piece) }
    }

    /// Where a piece of the shard of `rank` lies; empty past its end.
    fn range(&self, rank: usize, piece: usize) -> Range<usize> {
        let shard = shard(self.length, rank, self.world_size);
        let bound = |piece: usize| (shard.start + piece * self.piece).min(shard.end);
        bound(piece)..bound(piece + 1)
    }
}

/// The way of the own shard's sums over the other hosts, where there are any.
struct Across {
    sum: Option<Sum>,
    own: Range<usize>,
}

impl Across {
    /// So many floats of the own shard are added up over this host.
    fn note_ready(&mut self, floats: usize) {
        if let Some(sum) = &mut self.sum {
            sum.ready = floats;
        }
    }

    fn go(&mut self, group: &mut Group, call: &Call, values: &mut [f32], goal: Goal) -> Result<()> {
        let Some(sum) = &mut self.sum else { return Ok(()) };
        let own = &mut values[self.own.clone()];
        group.across_hosts(call, |mesh, wait| mesh.advance(sum, own, goal, wait)).map(drop)
    }

    /// What to do while waiting for the ranks of this host: what is on its way must not stand still,
    /// since theirs may wait for the other end of it.
    fn work<'w>(
        &'w mut self,
        values: &'w mut [f32],
    ) -> Option<impl FnMut(&mut Group, &Call) -> Result<()> + 'w> {
        self.sum
            .is_some()
            .then_some(|group: &mut Group, call: &Call| self.go(group, call, values, Goal::Nothing))
    }
}

/// The part of a vector of `length` floats that `rank` adds up.
pub(crate) fn shard(length: usize, rank: usize, world_size: usize) -> Range<usize> {
    let lines = length.div_ceil(LINE);
    let bound = |rank: usize| (lines * rank / world_size * LINE).min(length);
    bound(rank)..bound(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_shards_and_fit_into_a_buffer() {
        for length in [0, 1, 17, 4095, CHUNK, CHUNK + 1, 7 * CHUNK + 33] {
            for world_size in [2, 3, 4, 255] {
                let cut = Cut::new(length, world_size);
                assert!(cut.piece * world_size <= CHUNK && cut.piece > 0);
                let mut next = 0;
                for rank in 0..world_size {
                    for piece in 0..cut.pieces {
                        let range = cut.range(rank, piece);
                        assert_eq!(range.start, next);
                        assert!(range.len() <= cut.piece);
                        next = range.end;
                    }
                }
                assert_eq!(next, length);
            }
        }
    }

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
