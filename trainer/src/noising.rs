//! From a loaded batch to what the models are asked: latents sampled, noised, prompts gathered.

use std::cell::RefCell;

use anyhow::{Context, Result};

use crate::dataset::{Batch, LatentEncoder, SampleMeta};
use crate::encoded::Encoded;
use crate::inputs::{MicroBatch, Prompts, SecondPrompts};
use crate::latents::{MOMENTS, VaeEncoder};
use crate::noise::Draw;
use crate::objective::{Noised, Objective};
use crate::rng::{Purpose, stream};

/// Channels of the latents.
const CHANNELS: usize = MOMENTS / 2;
/// Pixels of the image to one latent pixel, in each direction.
const LATENT_SCALE: usize = 8;

/// Turns batches into training inputs. All random numbers are keyed by the global sample index.
pub struct Noising {
    /// What to predict and how it counts.
    pub objective: Objective,
    /// Seed of the run.
    pub seed: u64,
    /// Factor of the latents.
    pub scaling: f32,
    /// Micro-steps of a step: each batch counts for its part.
    pub accumulation: usize,
    /// Encodes the images of a batch; `None` where latents are cached.
    pub vae: Option<RefCell<VaeEncoder>>,
    /// All captions, where they were encoded before the training.
    pub encoded: Option<Encoded>,
    /// Width of SDXL's pooled text; `None` for other families.
    pub pooled: Option<usize>,
}

impl Noising {
    /// Noises this rank's part of a batch.
    fn noise(&self, batch: &Batch) -> Result<Noised> {
        let share = (batch.global_count * self.accumulation) as f32;
        let weights: Vec<f32> = batch.samples.iter().map(|s| s.loss_weight / share).collect();
        self.noise_by(batch, &weights, self.seed, None)
    }

    /// Noises a batch for validation: for a seed, every image has the same noise at each timestep,
    /// and every sample counts for itself.
    fn noise_at(&self, batch: &Batch, seed: u64, timestep: usize) -> Result<Noised> {
        let weights: Vec<f32> = batch.samples.iter().map(|sample| sample.loss_weight).collect();
        self.noise_by(batch, &weights, seed, Some(timestep))
    }

    fn noise_by(
        &self,
        batch: &Batch,
        weights: &[f32],
        seed: u64,
        timestep: Option<usize>,
    ) -> Result<Noised> {
        let (width, height) = (batch.size.0 as usize, batch.size.1 as usize);
        let shape = [batch.samples.len(), height / LATENT_SCALE, width / LATENT_SCALE, CHANNELS];
        let moments = match (&batch.moments, &batch.images, &self.vae) {
            (Some(moments), _, _) => moments.clone(),
            (None, Some(images), Some(vae)) => {
                vae.borrow_mut().encode(images, [shape[0], height, width, 3])?
            }
            _ => anyhow::bail!("a batch has neither latents nor images that a VAE could encode"),
        };
        let latents = self.sample_latents(batch, &moments, seed)?;
        let of_sample = [shape[1], shape[2], CHANNELS];
        let draw = |sample: &SampleMeta| match timestep {
            None => self.objective.draw(seed, sample.global_index, of_sample),
            Some(timestep) => {
                let key = sample.global_index.wrapping_add(timestep as u64);
                Draw { timestep, ..self.objective.draw(seed, key, of_sample) }
            }
        };
        let draws: Vec<Draw> = batch.samples.iter().map(draw).collect();
        let mut noised = self.objective.prepare(&latents, shape, &draws, weights)?;
        if let Some(alphas) = &batch.alpha_masks {
            noised.weigh_pixels(alphas)?;
        }
        Ok(noised)
    }

    /// A draw from the VAE's posterior for each sample, scaled.
    fn sample_latents(&self, batch: &Batch, moments: &[f32], seed: u64) -> Result<Vec<f32>> {
        let len = moments.len() / batch.samples.len();
        let mut latents = Vec::with_capacity(moments.len() / 2);
        for (sample, moments) in batch.samples.iter().zip(moments.chunks(len)) {
            let mut rng = stream(seed, Purpose::LatentSample, sample.global_index, 0);
            let before = latents.len();
            for pixel in moments.chunks(MOMENTS) {
                let (means, logvars) = pixel.split_at(CHANNELS);
                latents.extend(means.iter().zip(logvars).map(|(mean, logvar)| {
                    (mean + (0.5 * logvar).exp() * rng.normal()) * self.scaling
                }));
            }
            latents[before..].iter().all(|x: &f32| x.is_finite()).then_some(()).with_context(
                || {
                    let why = match &self.vae {
                        Some(vae) => vae.borrow().blame(),
                        None => "its cached file is damaged\nhint: remove it".to_owned(),
                    };
                    format!("the latents of `{}`: {why}", sample.image_path.display())
                },
            )?;
        }
        Ok(latents)
    }

    /// What a micro-step is given for this rank's part of a batch.
    pub fn micro_batch(&self, batch: &Batch) -> Result<MicroBatch> {
        self.with_prompts(batch, self.noise(batch)?)
    }

    /// The same for validation; see [`Noising::noise_at`].
    pub fn micro_batch_at(&self, batch: &Batch, seed: u64, timestep: usize) -> Result<MicroBatch> {
        self.with_prompts(batch, self.noise_at(batch, seed, timestep)?)
    }

    fn with_prompts(&self, batch: &Batch, noised: Noised) -> Result<MicroBatch> {
        let prompts = self.prompts(batch)?;
        let encoded = match &self.encoded {
            Some(encoded) => Some(encoded.look_up(&prompts, batch.samples.len())?),
            None => None,
        };
        Ok(MicroBatch { noised, prompts, encoded })
    }

    /// The prompts of a batch.
    fn prompts(&self, batch: &Batch) -> Result<Prompts> {
        let second = match self.pooled {
            None => None,
            Some(pooled) => {
                let ids = batch.input_ids_2.clone().context("the batch has no second ids")?;
                let sizes = batch.samples.iter().map(|sample| sample.sizes(batch.size)).collect();
                Some(SecondPrompts { ids, pooled, sizes })
            }
        };
        let (ids, weights) = (batch.input_ids.clone(), batch.token_weights.clone());
        Ok(Prompts { ids, weights, chunks: batch.chunks, second })
    }
}
