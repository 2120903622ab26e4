//! Batches prepared in the background, in order, over the whole run.
//!
//! Epochs follow each other without a pause: the threads live as long as the loader. Everything
//! random in a batch is keyed by the global sample index, so it does not matter which thread or rank
//! prepares it, nor where a run begins.

use super::buckets::Size;
use super::caption::{CaptionMoment, caption_at};
use super::error::DatasetError;
use super::group::{Dataset, DatasetGroup, ImageEntry};
use super::latent_cache::LatentStore;
use super::latent_file::CachedLatents;
use super::order::{GlobalBatch, SampleKey, Sampler};
use super::ordered::Ordered;
use super::picture::{LATENT_SCALE, Picture, Variation, is_flipped, prepare};
use crate::rng::{Purpose, stream};
use crate::world::World;
use models::SizeIds;
use models::prompt::{CHUNK, ClipTokenizer, TokenLength, Tokenizers};
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// What a loader draws from.
#[derive(Clone)]
pub struct LoaderParts {
    /// The images.
    pub group: Arc<DatasetGroup>,
    /// Their order.
    pub sampler: Arc<Sampler>,
    /// For captions.
    pub tokenizers: Arc<Tokenizers>,
    /// Cached latents; without them batches hold pixels.
    pub latents: Option<Arc<LatentStore>>,
}

impl LoaderParts {
    /// The tokens of a caption.
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`].
    pub fn tokens(&self, caption: &str, options: &LoaderOptions) -> Result<Tokens, DatasetError> {
        let reading = (options.token_length, options.weighted_captions);
        Tokens::of(&self.tokenizers, caption, reading)
    }
}

/// The tokens of a caption, each list `[chunks, 77]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokens {
    /// For the text encoder.
    pub ids: Vec<u32>,
    /// For SDXL's second.
    pub ids_2: Option<Vec<u32>>,
    /// With `weighted_captions`; the same for both.
    pub weights: Option<Vec<f32>>,
}

impl Tokens {
    /// The tokens of a caption, `reading` being its length and whether brackets are weights.
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`].
    pub fn of(
        tokenizers: &Tokenizers,
        caption: &str,
        reading: (TokenLength, bool),
    ) -> Result<Self, DatasetError> {
        let (ids, weights) = read_caption(&tokenizers.first, caption, reading)?;
        let ids_2 = match &tokenizers.second {
            Some(tokenizer) => Some(read_caption(tokenizer, caption, reading)?.0),
            None => None,
        };
        Ok(Self { ids, ids_2, weights })
    }
}

fn read_caption(
    tokenizer: &ClipTokenizer,
    caption: &str,
    (length, weighted_captions): (TokenLength, bool),
) -> Result<(Vec<u32>, Option<Vec<f32>>), DatasetError> {
    if !weighted_captions {
        let ids = tokenizer.input_ids(caption, length)?;
        return Ok((ids.into_iter().flatten().collect(), None));
    }
    let weighted = tokenizer.weighted_input_ids(caption, length)?;
    let weights = weighted.weights.into_iter().flatten().collect();
    Ok((weighted.ids.into_iter().flatten().collect(), Some(weights)))
}

/// How a loader works.
#[derive(Debug, Clone)]
pub struct LoaderOptions {
    /// This rank.
    pub rank: usize,
    /// The ranks, and how they share a batch.
    pub world: World,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer steps of the whole run; batches end with the last of them.
    pub max_train_steps: u64,
    /// Optimizer step (from 0) to begin at.
    pub first_step: u64,
    /// Threads; see [`worker_count`].
    pub workers: usize,
    /// `max_token_length`.
    pub token_length: TokenLength,
    /// `weighted_captions`: brackets in captions are weights.
    pub weighted_captions: bool,
    /// `reproducible`: the samples of a smaller last batch fill the ranks one after the other
    /// instead of evenly, and a rank's share comes in one piece: its samples are computed one by one.
    pub fill_ranks: bool,
}

impl LoaderOptions {
    /// Parts in which a rank gets its share of a global batch.
    fn parts(&self) -> usize {
        if self.fill_ranks { 1 } else { self.world.micro_steps() }
    }
}

/// Threads of a loader: `max_data_loader_n_workers`, at most one less than this rank's share of the
/// processors, at least one.
pub fn worker_count(max_data_loader_n_workers: usize, local_world_size: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = cores / local_world_size.max(1);
    max_data_loader_n_workers.min(share.saturating_sub(1)).max(1)
}

/// One sample of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleMeta {
    /// The key of its randomness.
    pub global_index: u64,
    /// The image.
    pub image_path: PathBuf,
    /// 1, or `prior_loss_weight` for regularisation images.
    pub loss_weight: f32,
    /// The caption that was tokenized.
    pub caption: String,
    /// Mirrored left to right.
    pub flipped: bool,
    /// Width and height of the file.
    pub original_size: Size,
    /// Left and top of the image in its bucket, negative where it was cropped, as SDXL is told it.
    pub crop_left_top: (i64, i64),
}

impl SampleMeta {
    /// What SDXL is told of the image in a batch of `size` (width and height).
    pub fn sizes(&self, size: Size) -> SizeIds {
        let pair = |(width, height): Size| [height as f32, width as f32];
        let (left, top) = self.crop_left_top;
        let (original, target) = (pair(self.original_size), pair(size));
        SizeIds { original, crop: [top as f32, left as f32], target }
    }
}

/// The samples of one rank in one micro-step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch in the epoch, from 0.
    pub index: usize,
    /// Optimizer step, from 0.
    pub step: u64,
    /// Width and height in pixels.
    pub size: Size,
    /// Which part of this rank's share of the global batch, from 0: a micro-step each.
    pub part: usize,
    /// Samples of all ranks in the global batch: what the sum of losses is divided by.
    pub global_count: usize,
    /// Samples of one rank in a full global batch.
    pub full_share: usize,
    /// This rank's samples; may be empty where there are fewer than ranks or micro-steps.
    pub samples: Vec<SampleMeta>,
    /// RGB in [-1,1], `[B, height, width, 3]`; without a latent cache.
    pub images: Option<Vec<f32>>,
    /// Mean and log-variance of the VAE, not scaled, `[B, height / 8, width / 8, 8]`; with a cache.
    pub moments: Option<Vec<f32>>,
    /// Ids of all samples, `[B, chunks, 77]`.
    pub input_ids: Vec<u32>,
    /// The same for SDXL's second text encoder.
    pub input_ids_2: Option<Vec<u32>>,
    /// Weights of the tokens, `[B, chunks, 77]`; with `weighted_captions`.
    pub token_weights: Option<Vec<f32>>,
    /// Chunks of 77 ids to a caption: 1, 2 or 3.
    pub chunks: usize,
    /// Alpha of each latent pixel in [0,1], `[B, height / 8, width / 8]`; 1 for samples of subsets
    /// without `alpha_mask`. Absent if no sample of this rank has a mask.
    pub alpha_masks: Option<Vec<f32>>,
}

impl Batch {
    /// Samples of all ranks, told by one of the parts of a global batch.
    pub fn new_samples(&self) -> usize {
        if self.part == 0 { self.global_count } else { 0 }
    }

    /// A batch of sample `index` alone, which counts in the global batch as before.
    pub fn sample(&self, index: usize) -> Batch {
        let count = self.samples.len().max(1);
        fn part<T: Clone>(all: &[T], index: usize, count: usize) -> Vec<T> {
            let len = all.len() / count;
            all[index * len..(index + 1) * len].to_vec()
        }
        let values = |all: &Option<Vec<f32>>| all.as_ref().map(|all| part(all, index, count));
        Batch {
            samples: part(&self.samples, index, count),
            images: values(&self.images),
            moments: values(&self.moments),
            input_ids: part(&self.input_ids, index, count),
            input_ids_2: self.input_ids_2.as_ref().map(|all| part(all, index, count)),
            token_weights: values(&self.token_weights),
            alpha_masks: values(&self.alpha_masks),
            ..*self
        }
    }
}

/// Hands out batches prepared by background threads.
pub struct Loader {
    prepared: Ordered<Result<Batch, DatasetError>>,
    sampler: Arc<Sampler>,
    /// Parts of a global batch.
    parts: usize,
    /// Epoch, batch and part of the next batch.
    position: (u64, usize, usize),
}

impl Loader {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(parts: LoaderParts, options: LoaderOptions) -> Result<Self, DatasetError> {
        let sampler = parts.sampler.clone();
        let (epoch, range) = sampler.batches_of_step(options.first_step);
        let (end_epoch, end_range) = sampler.batches_of_step(options.max_train_steps);
        let per_epoch = sampler.batches_per_epoch() as u64;
        let first = epoch * per_epoch + range.start as u64;
        let end = end_epoch * per_epoch + end_range.start as u64;
        let workers = options.workers.max(1);
        let parts_of_batch = options.parts();
        let maker = BatchMaker::new(parts, options);
        let make = move |job: u64| {
            let number = first + job / parts_of_batch as u64;
            let part = (job % parts_of_batch as u64) as usize;
            maker.make(number / per_epoch, (number % per_epoch) as usize, part)
        };
        let jobs = end.saturating_sub(first) * parts_of_batch as u64;
        let prepared = Ordered::start(jobs, workers, workers * 2, make).map_err(|error| {
            DatasetError::file("start a data loading thread", Path::new(""), error)
        })?;
        Ok(Self { prepared, sampler, parts: parts_of_batch, position: (epoch, range.start, 0) })
    }

    /// Micro-steps of optimizer step `step` (from 0), the same number on all ranks: the parts of
    /// `gradient_accumulation_steps` global batches, or of what is left at the end of an epoch.
    pub fn batches_in_step(&self, step: usize) -> usize {
        self.sampler.batches_of_step(step as u64).1.len() * self.parts
    }

    /// The next batch of this rank, waiting for it.
    ///
    /// # Errors
    /// A file that went bad or away since the run began; asking beyond the last step.
    pub fn next_batch(&mut self) -> Result<Batch, DatasetError> {
        let (epoch, batch, part) = self.position;
        self.position = match batch + 1 < self.sampler.batches_per_epoch() {
            _ if part + 1 < self.parts => (epoch, batch, part + 1),
            true => (epoch, batch + 1, 0),
            false => (epoch + 1, 0, 0),
        };
        let failure =
            |message| DatasetError::Worker { epoch: epoch + 1, batch: batch + 1, message };
        match self.prepared.next() {
            Some(Ok(result)) => result,
            Some(Err(panic)) => Err(failure(panic)),
            None => Err(failure("there are no batches after the last step".into())),
        }
    }
}

/// Prepares any batch of a run.
pub(super) struct BatchMaker {
    parts: LoaderParts,
    options: LoaderOptions,
    /// The orders of the epochs that are in use.
    epochs: Mutex<BTreeMap<u64, Arc<Vec<GlobalBatch>>>>,
    /// Damaged images that were named.
    reported: Mutex<HashSet<PathBuf>>,
}

/// One sample before it is put into its batch.
struct Sample {
    meta: SampleMeta,
    content: Content,
    alpha: Option<Vec<f32>>,
}

enum Content {
    Pixels(Vec<f32>),
    Moments(Arc<CachedLatents>),
}

impl BatchMaker {
    pub(super) fn new(parts: LoaderParts, options: LoaderOptions) -> Self {
        Self { parts, options, epochs: Mutex::default(), reported: Mutex::default() }
    }

    fn order_of(&self, epoch: u64) -> Arc<Vec<GlobalBatch>> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = epochs.get(&epoch) {
            return order.clone();
        }
        // Threads are at most a few batches apart, so earlier epochs but one are done with.
        epochs.retain(|known, _| known + 1 >= epoch);
        let order = Arc::new(self.parts.sampler.epoch(epoch));
        epochs.insert(epoch, order.clone());
        order
    }

    fn make(&self, epoch: u64, index: usize, part: usize) -> Result<Batch, DatasetError> {
        let order = self.order_of(epoch);
        let global = &order[index];
        let LoaderOptions { rank, world, fill_ranks, .. } = self.options;
        let keys = match fill_ranks {
            true => global.filled_rank_samples(rank, self.full_share(global)),
            false => {
                let own = global.rank_samples(rank, world.ranks);
                let bound = |part: usize| (part * self.batch_size(global)).min(own.len());
                &own[bound(part)..bound(part + 1)]
            }
        };
        let step = self.parts.sampler.step_of_batch(epoch, index);
        Ok(Batch { part, ..self.fill(global, keys, (epoch, index, step))? })
    }

    /// The most samples that a rank computes at once.
    fn batch_size(&self, global: &GlobalBatch) -> usize {
        let dataset = &self.parts.group.datasets[global.dataset as usize];
        dataset.plan.options.batch_size.max(1)
    }

    /// Samples of one rank in a full global batch.
    fn full_share(&self, global: &GlobalBatch) -> usize {
        self.options.world.share(self.batch_size(global))
    }

    /// The batch of the samples `keys` out of `global`.
    pub(super) fn fill(
        &self,
        global: &GlobalBatch,
        keys: &[SampleKey],
        (epoch, index, step): (u64, usize, u64),
    ) -> Result<Batch, DatasetError> {
        let mut batch = Batch {
            epoch,
            index,
            step,
            size: global.size,
            part: 0,
            global_count: global.samples.len(),
            full_share: self.full_share(global),
            samples: Vec::with_capacity(keys.len()),
            images: self.parts.latents.is_none().then(Vec::new),
            moments: self.parts.latents.is_some().then(Vec::new),
            input_ids: Vec::with_capacity(keys.len() * CHUNK),
            input_ids_2: self.parts.tokenizers.second.as_ref().map(|_| Vec::new()),
            token_weights: self.options.weighted_captions.then(Vec::new),
            chunks: self.options.token_length.chunks(),
            alpha_masks: None,
        };
        let mut alphas = Vec::with_capacity(keys.len());
        for key in keys {
            let sample = self.sample(global, *key, (epoch, step))?;
            self.add_tokens(&mut batch, &sample.meta.caption)?;
            match (&mut batch.images, &mut batch.moments, sample.content) {
                (Some(images), _, Content::Pixels(rgb)) => images.extend(rgb),
                (_, Some(moments), Content::Moments(latents)) => {
                    moments.extend_from_slice(latents.moments_of(sample.meta.flipped));
                }
                _ => {}
            }
            alphas.push(sample.alpha);
            batch.samples.push(sample.meta);
        }
        if alphas.iter().any(Option::is_some) {
            let latent_pixels =
                (batch.size.0 as usize / LATENT_SCALE) * (batch.size.1 as usize / LATENT_SCALE);
            let masks = alphas.into_iter().map(|alpha| alpha.unwrap_or(vec![1.0; latent_pixels]));
            batch.alpha_masks = Some(masks.flatten().collect());
        }
        Ok(batch)
    }

    fn add_tokens(&self, batch: &mut Batch, caption: &str) -> Result<(), DatasetError> {
        let Tokens { ids, ids_2, weights } = self.parts.tokens(caption, &self.options)?;
        batch.input_ids.extend(ids);
        if let Some(all) = &mut batch.input_ids_2 {
            all.extend(ids_2.into_iter().flatten());
        }
        if let Some(all) = &mut batch.token_weights {
            all.extend(weights.into_iter().flatten());
        }
        Ok(())
    }

    fn sample(
        &self,
        global: &GlobalBatch,
        key: SampleKey,
        (epoch, step): (u64, u64),
    ) -> Result<Sample, DatasetError> {
        let dataset = &self.parts.group.datasets[global.dataset as usize];
        let seed = self.options.seed;
        let (entry, content, alpha, flipped) = match &self.parts.latents {
            Some(store) => {
                let entry = &dataset.images[key.image as usize];
                let latents = store.get(global.dataset, key.image)?;
                let options = &dataset.plan.subsets[entry.subset].options;
                let flipped = is_flipped(options, seed, key.global_index);
                let alpha = latents.alpha_of(flipped);
                (entry, Content::Moments(latents), alpha, flipped)
            }
            None => {
                let (entry, picture) = self.picture_or_substitute(dataset, global.size, key)?;
                (entry, Content::Pixels(picture.rgb), picture.alpha, picture.flipped)
            }
        };
        let options = &dataset.plan.subsets[entry.subset].options;
        let moment = CaptionMoment { epoch, step, max_train_steps: self.options.max_train_steps };
        let mut rng = stream(seed, Purpose::Caption, key.global_index, 0);
        let crop = super::buckets::crop_in_bucket(entry.bucket, entry.size);
        let left = if flipped { f64::from(entry.bucket.0) - crop[2] } else { crop[0] };
        let loss_weight = if entry.is_reg { dataset.plan.options.prior_loss_weight } else { 1.0 };
        let meta = SampleMeta {
            global_index: key.global_index,
            image_path: entry.path.clone(),
            loss_weight: loss_weight as f32,
            caption: caption_at(&entry.caption, options, moment, &mut rng),
            flipped,
            original_size: entry.size,
            crop_left_top: (left as i64, crop[1] as i64),
        };
        Ok(Sample { meta, content, alpha })
    }

    /// The picture of a sample, or, where its file cannot be decoded, that of the next image of the
    /// same size: a pure function of the files, so that every number of ranks trains the same. The
    /// headers of all files were read at the start; a latent cache leaves damaged images out
    /// altogether.
    fn picture_or_substitute<'a>(
        &self,
        dataset: &'a Dataset,
        size: Size,
        key: SampleKey,
    ) -> Result<(&'a ImageEntry, Picture), DatasetError> {
        let variation =
            Variation::Sample { seed: self.options.seed, global_index: key.global_index };
        let wanted = &dataset.images[key.image as usize];
        let first = match prepare(dataset, wanted, variation) {
            Ok(picture) => return Ok((wanted, picture)),
            Err(problem) => DatasetError::image(&wanted.path, problem),
        };
        if dataset.strict_data {
            return Err(first);
        }
        self.report_once(&wanted.path, &first);
        let count = dataset.images.len();
        (1..count)
            .map(|distance| &dataset.images[(key.image as usize + distance) % count])
            .filter(|entry| entry.bucket == size && entry.is_reg == wanted.is_reg)
            .find_map(|entry| Some((entry, prepare(dataset, entry, variation).ok()?)))
            .ok_or(first)
    }

    /// Names a damaged image once. Each rank names those of its samples.
    fn report_once(&self, path: &Path, error: &DatasetError) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if !reported.insert(path.to_owned()) {
            return;
        }
        let text = format!("{error}; another image of its size is used instead");
        if self.options.rank == 0 {
            crate::console::warn(&text);
        } else {
            // The console of higher ranks is silent, but no other rank knows of this image.
            let _ = writeln!(std::io::stderr().lock(), "warning: {text}");
        }
    }
}

#[cfg(test)]
mod tests;
