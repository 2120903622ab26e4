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

use crate::error::{CollectiveError, Result};
use crate::group::{Group, Op, Order};
use crate::segment::BUFFER_BYTES;

/// Floats in one buffer.
const CHUNK: usize = BUFFER_BYTES / size_of::<f32>();
/// Floats summed at a time: 16 kB stay in the first-level cache while all ranks are added.
const BLOCK: usize = 4096;
/// Shards begin at multiples of a cache line.
const LINE: usize = 64 / size_of::<f32>();

impl Group {
    /// Waits until all ranks have called it.
    pub(crate) fn barrier(&mut self, deadline: Duration) -> Result<()> {
        self.call(Op::Barrier, 0, deadline, Group::meet)
    }

    /// Replaces `values` with the sum over all ranks, added in `order`.
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

/// Partial sums of one block; ranks are added from 0 on.
struct Sums {
    order: Order,
    /// The first `depth` are in use.
    blocks: Vec<[f32; BLOCK]>,
    depth: usize,
}

impl Sums {
    fn new(order: Order) -> Self {
        Self { order, blocks: Vec::new(), depth: 0 }
    }

    /// Adds the part of the next rank.
    fn add(&mut self, rank: usize, part: &[f32]) {
        // In pairs a rank ends as many pairs as its number ends in ones: 1 ends (0 1), 3 ends (2 3)
        // and ((0 1) (2 3)).
        let merges = match self.order {
            Order::Ranks => u32::from(rank > 0),
            Order::Pairs => rank.trailing_ones(),
        };
        if merges == 0 {
            if self.blocks.len() == self.depth {
                self.blocks.push([0.0; BLOCK]);
            }
            self.blocks[self.depth][..part.len()].copy_from_slice(part);
            self.depth += 1;
            return;
        }
        add(&mut self.blocks[self.depth - 1], part);
        (1..merges).for_each(|_| self.merge());
    }

    /// Adds the last block to the one before.
    fn merge(&mut self) {
        self.depth -= 1;
        let (before, last) = self.blocks.split_at_mut(self.depth);
        add(&mut before[self.depth - 1], &last[0]);
    }

    /// The sum; the next block begins anew.
    fn finish(&mut self) -> &[f32] {
        while self.depth > 1 {
            self.merge();
        }
        self.depth = 0;
        &self.blocks[0]
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (total, value) in sum.iter_mut().zip(part) {
        *total += value;
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
    fn ranks_are_added_one_by_one_or_in_pairs() {
        let parts: Vec<f32> = (0..8).map(|rank| 1.1_f32.powi(rank * 7)).collect();
        let sum = |order, world_size: usize| {
            let mut sums = Sums::new(order);
            for (rank, part) in parts[..world_size].iter().enumerate() {
                sums.add(rank, &[*part]);
            }
            sums.finish()[0].to_bits()
        };
        fn tree(parts: &[f32]) -> f32 {
            match parts {
                [one] => *one,
                _ => {
                    let (left, right) = parts.split_at(parts.len() / 2);
                    tree(left) + tree(right)
                }
            }
        }
        for world_size in [1, 2, 4, 8] {
            let one_by_one: f32 = parts[1..world_size].iter().fold(parts[0], |sum, x| sum + x);
            assert_eq!(sum(Order::Ranks, world_size), one_by_one.to_bits());
            assert_eq!(sum(Order::Pairs, world_size), tree(&parts[..world_size]).to_bits());
        }
        assert_ne!(sum(Order::Ranks, 8), sum(Order::Pairs, 8), "the orders cannot be told apart");
        let odd = (parts[0] + parts[1]) + parts[2];
        assert_eq!(sum(Order::Pairs, 3), odd.to_bits());
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
