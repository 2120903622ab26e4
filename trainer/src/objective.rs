//! What one step asks of the U-Net: noised latents, the target, and how the error counts.
//!
//! Follows sd-scripts' order of operations. Noise and timesteps are keyed by the global sample
//! index: they do not depend on the number of ranks, on the batch size or on what was drawn before.

use anyhow::{Context, Result, bail};
use engine::ElementLoss;
use models::{NoiseSchedule, ScheduleSettings};

use crate::noise::{Draw, NoiseShape};
use crate::options::{HuberSchedule, LossType, Options};
use crate::rng::{Purpose, stream};

/// SNR above which the debiased and v-prediction scales do not grow any more (SNR is infinite at
/// timestep 0 of some schedules); the reference's bound.
const SNR_CEILING: f32 = 1000.;

/// How much the loss of a timestep counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct TimestepWeighting {
    min_snr_gamma: Option<f32>,
    scale_v_pred_like_noise_pred: bool,
    v_pred_like_loss: Option<f32>,
    debiased: bool,
}

/// Threshold of the Huber losses as a function of the timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
struct HuberThreshold {
    schedule: HuberSchedule,
    c: f32,
    scale: f32,
}

/// The training objective of a run.
#[derive(Clone, Debug)]
pub struct Objective {
    schedule: NoiseSchedule,
    v_parameterization: bool,
    weighting: TimestepWeighting,
    element: ElementLoss,
    huber: HuberThreshold,
    noise: NoiseShape,
    timesteps: std::ops::Range<usize>,
}

/// One batch, ready for the U-Net: numbers on the host, whatever computes.
#[derive(Clone, Debug)]
pub struct Noised {
    /// `[B,h,w,4]`.
    pub shape: [usize; 4],
    /// Noised latents, of that shape.
    pub noisy: Vec<f32>,
    /// The noise, or v, of that shape.
    pub target: Vec<f32>,
    /// One per sample.
    pub timesteps: Vec<f32>,
    /// Loss of one element.
    pub element: ElementLoss,
    /// `c` of the Huber losses, one per sample.
    pub delta: Vec<f32>,
    /// Factor of each sample's mean in the total, `1/batch` included.
    pub weight: Vec<f32>,
    /// Factor of each element's loss, of `shape`.
    pub mask: Option<Vec<f32>>,
}

impl Noised {
    /// Weighs the loss of each latent pixel by `alphas` `[B,h,w]` in [0,1] (`alpha_mask`,
    /// `masked_loss`). The mean stays that over all pixels: a mask of half the picture halves the
    /// loss, as in sd-scripts.
    pub fn weigh_pixels(&mut self, alphas: &[f32]) -> Result<()> {
        let [batch, height, width, channels] = self.shape;
        if alphas.len() != batch * height * width {
            bail!(
                "a mask of {} pixels does not fit the batch shape: {:?}",
                alphas.len(),
                self.shape
            );
        }
        let of_pixel = |alpha: &f32| std::iter::repeat_n(*alpha, channels);
        self.mask = Some(alphas.iter().flat_map(of_pixel).collect());
        Ok(())
    }
}

impl Objective {
    /// Reads the objective from a run's options.
    pub fn from_options(options: &Options) -> Result<Self> {
        let settings = ScheduleSettings {
            zero_terminal_snr: options.zero_terminal_snr,
            ..ScheduleSettings::default()
        };
        let schedule = NoiseSchedule::new(settings);
        let steps = schedule.steps();
        let timesteps = options.min_timestep.unwrap_or(0)..options.max_timestep.unwrap_or(steps);
        if timesteps.is_empty() || timesteps.end > steps {
            bail!(
                "`min_timestep` and `max_timestep` leave no timestep within 0..{steps}: {timesteps:?}"
            );
        }
        Ok(Self {
            schedule,
            v_parameterization: options.v_parameterization,
            weighting: TimestepWeighting {
                min_snr_gamma: options.min_snr_gamma.map(|x| x as f32).filter(|x| *x != 0.),
                scale_v_pred_like_noise_pred: options.scale_v_pred_loss_like_noise_pred,
                v_pred_like_loss: options.v_pred_like_loss.map(|x| x as f32).filter(|x| *x != 0.),
                debiased: options.debiased_estimation_loss,
            },
            element: match options.loss_type {
                LossType::L2 => ElementLoss::L2,
                LossType::L1 => ElementLoss::L1,
                LossType::Huber => ElementLoss::Huber,
                LossType::SmoothL1 => ElementLoss::SmoothL1,
            },
            huber: HuberThreshold {
                schedule: options.huber_schedule,
                c: options.huber_c as f32,
                scale: options.huber_scale as f32,
            },
            noise: NoiseShape::from_options(options),
            timesteps,
        })
    }

    /// The random numbers of sample `index` for latents `[h,w,c]`.
    pub fn draw(&self, seed: u64, index: u64, shape: [usize; 3]) -> Draw {
        let span = self.timesteps.len() as u64;
        let timestep = stream(seed, Purpose::Timestep, index, 0).below(span) as usize;
        self.noise.draw(seed, index, shape, self.timesteps.start + timestep)
    }

    /// Noises `latents` (f32 `[B,h,w,c]`, already scaled) and says what to predict.
    ///
    /// `weights` is the factor of each sample's loss in the total, `1/batch` included.
    pub fn prepare(
        &self,
        latents: &[f32],
        shape: [usize; 4],
        draws: &[Draw],
        weights: &[f32],
    ) -> Result<Noised> {
        let sample = [shape[1], shape[2], shape[3]];
        let len = sample.iter().product::<usize>();
        let fits = latents.len() == shape[0] * len
            && draws.len() == shape[0]
            && weights.len() == shape[0]
            && draws.iter().all(|draw| self.noise.fits(draw, sample));
        if !fits {
            bail!("latents, draws and weights do not fit the batch shape: {shape:?}");
        }
        let mut noisy = Vec::with_capacity(latents.len());
        let mut target = Vec::with_capacity(latents.len());
        let (mut delta, mut weight) = (Vec::new(), Vec::new());
        for ((latents, draw), share) in latents.chunks_exact(len).zip(draws).zip(weights) {
            let noise = self.noise.noise(latents, sample, draw);
            let schedule = &self.schedule;
            let disturbed = self.noise.disturbed(&noise, draw);
            let mixed_in = disturbed.as_ref().unwrap_or(&noise);
            let mixed = schedule.add_noise(latents, mixed_in, draw.timestep);
            noisy.extend(mixed.context("timestep outside the schedule")?);
            if self.v_parameterization {
                let velocity = schedule.velocity(latents, &noise, draw.timestep);
                target.extend(velocity.context("timestep outside the schedule")?);
            } else {
                target.extend(noise);
            }
            delta.push(self.huber_threshold(draw.timestep));
            weight.push(share * self.timestep_weight(draw.timestep));
        }
        Ok(Noised {
            shape,
            noisy,
            target,
            timesteps: draws.iter().map(|d| d.timestep as f32).collect(),
            element: self.element,
            delta,
            weight,
            mask: None,
        })
    }

    /// Product of the weights that depend on the timestep only.
    fn timestep_weight(&self, timestep: usize) -> f32 {
        let snr = self.schedule.snr[timestep];
        let capped = snr.min(SNR_CEILING);
        let v_scale = capped / (capped + 1.);
        let mut weight = 1.;
        if let Some(gamma) = self.weighting.min_snr_gamma {
            let clipped = snr.min(gamma);
            weight *= clipped / if self.v_parameterization { snr + 1. } else { snr };
        }
        if self.weighting.scale_v_pred_like_noise_pred {
            weight *= v_scale;
        }
        if let Some(share) = self.weighting.v_pred_like_loss {
            weight *= 1. + share / v_scale;
        }
        if self.weighting.debiased {
            weight *= if self.v_parameterization { 1. / (capped + 1.) } else { 1. / capped.sqrt() };
        }
        weight
    }

    /// `c` of the Huber losses at a timestep (Huggingface diffusers PR 7488, sd-scripts). The
    /// schedule `snr` has no scale there, so that it has none here.
    fn huber_threshold(&self, timestep: usize) -> f32 {
        let HuberThreshold { schedule, c, scale } = self.huber;
        match schedule {
            HuberSchedule::Constant => c * scale,
            HuberSchedule::Exponential => {
                let rate = -c.ln() / self.schedule.steps() as f32;
                (-rate * timestep as f32).exp() * scale
            }
            HuberSchedule::Snr => {
                let alpha_bar = self.schedule.alphas_cumprod[timestep];
                let sigma = ((1. - alpha_bar) / alpha_bar).sqrt();
                (1. - c) / ((1. + sigma) * (1. + sigma)) + c
            }
        }
    }
}

#[cfg(test)]
mod tests;
