//! Collectives between ranks of one host through the shared segment.
//!
//! # Phases
//! All ranks pass numbered phases in lockstep (`group.rs`). Phase `t` writes data buffer `t % 3` of
//! the own rank, and peers' buffers are read only after having waited for the phase that wrote them.
//!
//! # All-reduce
//! Chunk `k` of the vector is cut into one shard per rank. Phase `k`: copy the shards of the other
//! ranks into the own buffer. After the wait: sum the own shard over all ranks, one by one or in pairs,
//! into the caller's memory and into the own buffer; finishing phase `k + 1` (which also copied chunk
//! `k + 1`) publishes it; after that wait, fetch the sums of the other shards. So a chunk costs one
//! wait and 2 (N - 1) / N copies of its bytes.
//!
//! # Why three buffers
//! The sums of chunk `k` are read by peers between their waits `k + 1` and `k + 2`. A rank writes
//! the same buffer again in phase `k + 3`, which it enters after wait `k + 2`, that is when all
//! peers have finished phase `k + 2` and so are done reading. The count runs on from one collective
//! to the next, so that no gap between collectives is needed.

use std::time::Duration;

use crate::error::Result;
use crate::group::{Call, Group, Op};
use crate::segment::BUFFER_BYTES;
use crate::sums::{BLOCK, Order, Sums};

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
            let mut chunks = values.chunks_mut(CHUNK);
            let mut current = chunks.next();
            let mut buffer = group.writable_buffer();
            group.put_shards(buffer, current.as_deref().unwrap_or_default());
            group.meet(call)?;
            while let Some(chunk) = current {
                group.sum_own_shard(buffer, chunk, order);
                group.sum_over_hosts(call, buffer, chunk, order)?;
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

    /// Sums the own shard over all ranks, in `order`, into the chunk and the own buffer.
    fn sum_own_shard(&self, buffer: usize, chunk: &mut [f32], order: Order) {
        let own = shard(chunk.len(), self.rank, self.world_size);
        let target = self.segment.buffer(self.rank, buffer).cast::<f32>();
        let mut sums = Sums::new(order);
        for start in own.clone().step_by(BLOCK) {
            let end = own.end.min(start + BLOCK);
            for rank in 0..self.world_size {
                let part = if rank == self.rank {
                    &chunk[start..end]
                } else {
                    let peer = self.segment.buffer(rank, buffer).cast::<f32>();
                    // SAFETY: the range lies in the buffer; its rank has finished the phase that
                    // wrote it, writes only its own shard (disjoint from this one) in this phase
                    // and the buffer again two phases later. Any bits are valid floats.
                    unsafe { std::slice::from_raw_parts(peer.add(start), end - start) }
                };
                sums.add(rank, part);
            }
            let sum = &sums.finish()[..end - start];
            chunk[start..end].copy_from_slice(sum);
            // SAFETY: the own shard of the own buffer: within bounds, and no peer reads it before
            // this phase is finished.
            unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), target.add(start), sum.len()) };
        }
    }

    /// Adds the own shard's sums of the other hosts, in the chunk and in the own buffer.
    fn sum_over_hosts(
        &mut self,
        call: &Call,
        buffer: usize,
        chunk: &mut [f32],
        order: Order,
    ) -> Result<()> {
        let own = shard(chunk.len(), self.rank, self.world_size);
        let sum = &mut chunk[own.clone()];
        if self.across_hosts(call, |mesh, wait| mesh.all_reduce(sum, order, wait))?.is_some() {
            let target = self.segment.buffer(self.rank, buffer).cast::<f32>();
            // SAFETY: the own shard of the own buffer: within bounds, and no peer reads it before
            // this phase is finished.
            unsafe {
                std::ptr::copy_nonoverlapping(sum.as_ptr(), target.add(own.start), sum.len())
            };
        }
        Ok(())
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

/// The part of a chunk of `length` floats that `rank` sums.
pub(crate) fn shard(length: usize, rank: usize, world_size: usize) -> std::ops::Range<usize> {
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
