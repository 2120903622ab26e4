//! How gradients on a card are summed over the ranks.

use std::ops::Range;

use anyhow::{Context, Result};
use collectives::{Comm, Pending};
use engine::Tensor;

/// The way from card to card.
pub enum Reducer {
    /// One rank: nothing to do.
    Alone,
    /// Through the host and the ranks' shared memory.
    Staged(Vec<(Range<usize>, Pending)>),
}

impl Reducer {
    /// The way for the ranks of `comm`.
    pub fn new(comm: &Comm) -> Self {
        if comm.world_size() == 1 { Self::Alone } else { Self::Staged(Vec::new()) }
    }

    /// Whether there is nothing to reduce.
    pub fn is_alone(&self) -> bool {
        matches!(self, Self::Alone)
    }

    /// Starts the sum of `range` of `flat` over the ranks; all ranks in the same order.
    pub fn start(&mut self, comm: &Comm, flat: &Tensor, range: Range<usize>) -> Result<()> {
        if let Self::Staged(under_way) = self {
            let values = flat.view(range.start, &[range.len()])?.to_vec_f32()?;
            under_way.push((range, comm.all_reduce_start(values)));
        }
        Ok(())
    }

    /// Waits for all sums and writes them where the parts were.
    pub fn finish(&mut self, flat: &Tensor) -> Result<()> {
        if let Self::Staged(under_way) = self {
            for (range, pending) in under_way.drain(..) {
                let values = pending.wait().context("gradient all-reduce")?;
                flat.view(range.start, &[range.len()])?.refill(&values)?;
            }
        }
        Ok(())
    }
}
