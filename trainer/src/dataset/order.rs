//! The order of samples: a pure function of seed, epoch and position; ranks only slice it.
//!
//! **Global batch.** A dataset with batch size `b` on `w` ranks is cut into global batches of
//! `b * w` samples of one bucket, and rank `r` takes its part of each. So 1 rank of batch 4, 2 ranks
//! of batch 2 and 4 ranks of batch 1 see the same batches of the same samples in the same order.
//!
//! `w` is the number of ranks that the run is made for; where fewer or more are there
//! ([`World`](crate::world::World)), they share the same global batches.
//!
//! **Rest.** The last batch of a bucket may be smaller. Its samples are spread as evenly as
//! possible; a rank may get none, takes part in every collective all the same, and weighs what it
//! has: a sum over its samples divided by the count of the *global* batch, which makes the sum over
//! ranks the mean that a single rank would have computed.
//!
//! **Epoch.** Its length is the number of global batches over all datasets. One optimizer step takes
//! `gradient_accumulation_steps` of them, the last step of an epoch what is left, so an epoch has
//! `ceil(batches / gradient_accumulation_steps)` steps.
//!
//! **Keys.** Sample number `n` of epoch `e` has the global index `e * samples_per_epoch + n`, counted
//! in the order of use. Noise, timestep, caption, crop and flip are keyed by it.

use super::buckets::Size;
use super::group::DatasetGroup;
use crate::rng::{Purpose, stream};
use std::ops::Range;

/// A sample of a batch: which image, and the key of its randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleKey {
    /// `epoch * samples_per_epoch + position`.
    pub global_index: u64,
    /// Index of the image in its dataset.
    pub image: u32,
}

/// The samples that all ranks together use in one micro-step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalBatch {
    /// Index of the dataset.
    pub dataset: u32,
    /// Width and height in pixels of every sample.
    pub size: Size,
    /// At least one sample, at most batch size times ranks.
    pub samples: Vec<SampleKey>,
}

impl GlobalBatch {
    /// The part of the samples that `rank` of `world_size` computes; may be empty.
    pub fn rank_range(&self, rank: usize, world_size: usize) -> Range<usize> {
        let (share, rest) = (self.samples.len() / world_size, self.samples.len() % world_size);
        let start = rank * share + rank.min(rest);
        start..start + share + usize::from(rank < rest)
    }

    /// The part of `rank` where ranks are filled one after the other with `share` samples each.
    pub fn filled_rank_samples(&self, rank: usize, share: usize) -> &[SampleKey] {
        let bound = |rank: usize| (rank * share).min(self.samples.len());
        &self.samples[bound(rank)..bound(rank + 1)]
    }

    /// The samples of [`Self::rank_range`].
    pub fn rank_samples(&self, rank: usize, world_size: usize) -> &[SampleKey] {
        &self.samples[self.rank_range(rank, world_size)]
    }
}

/// A bucket as the sampler needs it.
#[derive(Debug, Clone)]
struct Pool {
    dataset: u32,
    size: Size,
    global_batch: usize,
    items: Vec<u32>,
}

/// Cuts epochs into global batches.
#[derive(Debug, Clone)]
pub struct Sampler {
    pools: Vec<Pool>,
    seed: u64,
    accumulation: usize,
    batches_per_epoch: usize,
    samples_per_epoch: u64,
}

impl Sampler {
    /// A sampler over all buckets of `group`, for a run made for `world_size` ranks and
    /// `gradient_accumulation_steps` batches to a step (both at least 1; 0 counts as 1).
    pub fn new(
        group: &DatasetGroup,
        seed: u64,
        world_size: usize,
        gradient_accumulation_steps: usize,
    ) -> Self {
        let sizes = group.batch_sizes().into_iter();
        let global_batches: Vec<usize> = sizes.map(|size| size * world_size.max(1)).collect();
        Self::with_global_batches(group, seed, &global_batches, gradient_accumulation_steps)
    }

    /// The same for global batches of so many samples in each dataset.
    pub fn with_global_batches(
        group: &DatasetGroup,
        seed: u64,
        global_batches: &[usize],
        gradient_accumulation_steps: usize,
    ) -> Self {
        let mut pools = Vec::new();
        let of_datasets = group.datasets.iter().zip(global_batches).enumerate();
        for (number, (dataset, global_batch)) in of_datasets {
            let global_batch = (*global_batch).max(1);
            for bucket in &dataset.buckets {
                pools.push(Pool {
                    dataset: number as u32,
                    size: bucket.size,
                    global_batch,
                    items: bucket.items.clone(),
                });
            }
        }
        Self {
            batches_per_epoch: pools.iter().map(|p| p.items.len().div_ceil(p.global_batch)).sum(),
            samples_per_epoch: pools.iter().map(|p| p.items.len() as u64).sum(),
            pools,
            seed,
            accumulation: gradient_accumulation_steps.max(1),
        }
    }

    /// Global batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.batches_per_epoch
    }

    /// Samples in an epoch, over all ranks.
    pub fn samples_per_epoch(&self) -> u64 {
        self.samples_per_epoch
    }

    /// Optimizer steps in an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.batches_per_epoch.div_ceil(self.accumulation)
    }

    /// Global batches to a step.
    pub fn gradient_accumulation_steps(&self) -> usize {
        self.accumulation
    }

    /// Epoch (from 0) and the batches in it that optimizer step `step` (from 0) uses.
    pub fn batches_of_step(&self, step: u64) -> (u64, Range<usize>) {
        let per_epoch = self.steps_per_epoch().max(1) as u64;
        let start = (step % per_epoch) as usize * self.accumulation;
        (step / per_epoch, start..(start + self.accumulation).min(self.batches_per_epoch))
    }

    /// Optimizer step (from 0) that batch `batch` of `epoch` (both from 0) belongs to.
    pub fn step_of_batch(&self, epoch: u64, batch: usize) -> u64 {
        epoch * self.steps_per_epoch() as u64 + (batch / self.accumulation) as u64
    }

    /// Samples that the optimizer steps before `step` (from 0) use.
    pub fn samples_before(&self, step: u64) -> u64 {
        let (epoch, batches) = self.batches_of_step(step);
        let order = self.epoch(epoch);
        let used: usize = order[..batches.start].iter().map(|batch| batch.samples.len()).sum();
        epoch * self.samples_per_epoch + used as u64
    }

    /// The last optimizer step (from 0) before which at most `samples` samples are used.
    pub fn step_at(&self, samples: u64) -> u64 {
        let per_epoch = self.samples_per_epoch.max(1);
        let (epoch, mut left) = (samples / per_epoch, samples % per_epoch);
        let mut step = epoch * self.steps_per_epoch() as u64;
        for batches in self.epoch(epoch).chunks(self.accumulation) {
            let used = batches.iter().map(|batch| batch.samples.len() as u64).sum::<u64>();
            if used > left {
                break;
            }
            left -= used;
            step += 1;
        }
        step
    }

    /// All batches of an epoch (from 0): every bucket shuffled and cut, then the batches shuffled.
    pub fn epoch(&self, epoch: u64) -> Vec<GlobalBatch> {
        let mut batches: Vec<(&Pool, Vec<u32>)> = Vec::with_capacity(self.batches_per_epoch);
        for (number, pool) in self.pools.iter().enumerate() {
            let mut items = pool.items.clone();
            stream(self.seed, Purpose::BucketOrder, epoch, number as u64).shuffle(&mut items);
            batches.extend(items.chunks(pool.global_batch).map(|chunk| (pool, chunk.to_vec())));
        }
        stream(self.seed, Purpose::BatchOrder, epoch, 0).shuffle(&mut batches);
        let mut next = epoch * self.samples_per_epoch;
        batches
            .into_iter()
            .map(|(pool, images)| {
                let samples = images
                    .into_iter()
                    .map(|image| {
                        next += 1;
                        SampleKey { global_index: next - 1, image }
                    })
                    .collect();
                GlobalBatch { dataset: pool.dataset, size: pool.size, samples }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(world_size: usize, batch_size: usize, accumulation: usize) -> Sampler {
        let sizes = [((512, 512), 10u32), ((640, 384), 7), ((384, 640), 1)];
        let global_batch = world_size * batch_size;
        let mut pools = Vec::new();
        for (size, count) in sizes {
            pools.push(Pool { dataset: 0, size, global_batch, items: (0..count).collect() });
        }
        Sampler {
            batches_per_epoch: pools.iter().map(|p| p.items.len().div_ceil(global_batch)).sum(),
            samples_per_epoch: 18,
            pools,
            seed: 5,
            accumulation,
        }
    }

    #[test]
    fn an_epoch_uses_every_sample_once_with_running_indices() {
        let sampler = sampler(2, 2, 1);
        for epoch in [0, 3] {
            let batches = sampler.epoch(epoch);
            assert_eq!(batches.len(), sampler.batches_per_epoch());
            assert_eq!(batches.len(), 3 + 2 + 1);
            let indices: Vec<u64> =
                batches.iter().flat_map(|b| b.samples.iter().map(|s| s.global_index)).collect();
            assert_eq!(indices, (epoch * 18..epoch * 18 + 18).collect::<Vec<_>>());
            let mut seen: Vec<(Size, u32)> =
                batches.iter().flat_map(|b| b.samples.iter().map(|s| (b.size, s.image))).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 18);
        }
        assert_ne!(sampler.epoch(0)[0].samples, sampler.epoch(1)[0].samples);
        assert_eq!(sampler.epoch(2), sampler.epoch(2));
    }

    #[test]
    fn ranks_times_batch_size_is_all_that_counts() {
        let reference = sampler(1, 4, 1).epoch(1);
        assert_eq!(reference, sampler(2, 2, 1).epoch(1));
        assert_eq!(reference, sampler(4, 1, 1).epoch(1));
        for world_size in [1, 2, 3, 4, 7] {
            for batch in &reference {
                let parts: Vec<SampleKey> = (0..world_size)
                    .flat_map(|rank| batch.rank_samples(rank, world_size).to_vec())
                    .collect();
                assert_eq!(parts, batch.samples);
                let counts: Vec<usize> =
                    (0..world_size).map(|rank| batch.rank_range(rank, world_size).len()).collect();
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            }
        }
    }

    #[test]
    fn samples_and_steps_find_each_other_whatever_the_batch() {
        for sampler in [sampler(2, 2, 1), sampler(1, 3, 2), sampler(1, 7, 1)] {
            let per_epoch = sampler.steps_per_epoch() as u64;
            assert_eq!(sampler.samples_before(0), 0);
            assert_eq!(sampler.samples_before(3 * per_epoch), 3 * 18);
            for step in 0..2 * per_epoch {
                let (before, after) =
                    (sampler.samples_before(step), sampler.samples_before(step + 1));
                assert!(before < after);
                for samples in before..after {
                    assert_eq!(sampler.step_at(samples), step, "{samples}");
                }
            }
        }
    }

    #[test]
    fn steps_end_with_their_epoch() {
        let sampler = sampler(2, 2, 4);
        assert_eq!((sampler.batches_per_epoch(), sampler.steps_per_epoch()), (6, 2));
        assert_eq!(sampler.batches_of_step(0), (0, 0..4));
        assert_eq!(sampler.batches_of_step(1), (0, 4..6));
        assert_eq!(sampler.batches_of_step(2), (1, 0..4));
        assert_eq!(sampler.step_of_batch(0, 3), 0);
        assert_eq!(sampler.step_of_batch(0, 5), 1);
        assert_eq!(sampler.step_of_batch(2, 0), 4);
    }
}
