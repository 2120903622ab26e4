//! Batches that are the same every time: those of a validation.
//!
//! They are cut once, for a single rank, and dealt out to the ranks whole: what is in a batch, and so
//! every number that comes out of it, does not depend on how many ranks there are. Nothing is prepared
//! ahead; a validation is short beside the training between two of them.

use super::error::DatasetError;
use super::group::DatasetGroup;
use super::held_out::image_key;
use super::loader::{Batch, BatchMaker, LoaderOptions, LoaderParts};
use super::order::{GlobalBatch, SampleKey};
use crate::rng::{Purpose, stream};
use std::collections::BTreeMap;

/// The batches of a validation.
pub struct FixedBatches {
    maker: BatchMaker,
    batches: Vec<GlobalBatch>,
}

impl FixedBatches {
    /// Cuts the images of the parts into batches of their dataset's size, in an order drawn from the
    /// seed of `options`; of these the first `most`.
    pub fn new(parts: LoaderParts, options: LoaderOptions, most: Option<usize>) -> Self {
        let mut batches = cut(&parts.group, options.seed);
        batches.truncate(most.unwrap_or(usize::MAX));
        Self { maker: BatchMaker::new(parts, options), batches }
    }

    /// Number of batches, over all ranks.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether there is nothing to validate with.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Images in the batches before `index`.
    pub fn first_image(&self, index: usize) -> usize {
        self.batches.iter().take(index).map(|batch| batch.samples.len()).sum()
    }

    /// The whole of batch `index`. Whichever rank makes it, it is the same.
    ///
    /// # Errors
    /// A file that went bad or away since the run began; an index beyond the last batch.
    pub fn make(&self, index: usize) -> Result<Batch, DatasetError> {
        let Some(global) = self.batches.get(index) else {
            return Err(DatasetError::Worker {
                epoch: 0,
                batch: index,
                message: "there are no more batches to validate with".into(),
            });
        };
        self.maker.fill(global, &global.samples, (0, index, 0))
    }
}

/// All images, each once: images of one size together, as many as the dataset's batch size.
fn cut(group: &DatasetGroup, seed: u64) -> Vec<GlobalBatch> {
    let mut order: Vec<(u64, u32, u32)> = Vec::new();
    for (dataset, images) in group.datasets.iter().enumerate() {
        for (image, entry) in images.images.iter().enumerate() {
            let key = image_key(&entry.path);
            let draw = stream(seed, Purpose::ValidationOrder, key, dataset as u64).next_u64();
            order.push((draw, dataset as u32, image as u32));
        }
    }
    order.sort_unstable();
    let mut open: BTreeMap<(u32, super::buckets::Size), Vec<SampleKey>> = BTreeMap::new();
    let mut batches = Vec::new();
    for (_, dataset, image) in order {
        let Some(entry) = group.image(dataset, image) else { continue };
        let most = group.datasets[dataset as usize].plan.options.batch_size.max(1);
        let samples = open.entry((dataset, entry.bucket)).or_default();
        samples.push(SampleKey { global_index: image_key(&entry.path), image });
        if samples.len() == most {
            let samples = std::mem::take(samples);
            batches.push(GlobalBatch { dataset, size: entry.bucket, samples });
        }
    }
    let rest = open.into_iter().filter(|(_, samples)| !samples.is_empty());
    batches.extend(rest.map(|((dataset, size), samples)| GlobalBatch { dataset, size, samples }));
    batches
}
