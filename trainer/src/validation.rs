//! The loss on images that are not trained on: whether the LoRA still learns or only remembers.
//!
//! Images and timesteps, noise, captions and crops are the same every time and on any number of
//! ranks: four timesteps spread evenly over those that are trained (200, 400, 600, 800), each image
//! once at each of them. Whole batches are dealt out to the ranks; each sample's loss then goes to all
//! ranks, which take the mean in one order. Nothing of the training changes: all random numbers here
//! are keyed by the validation seed and the image, and no state is touched.
//!
//! The LoRA is validated in the form in which it is saved. `ema_decay`'s average is not looked at.

use anyhow::{Context, Result};
use collectives::{Comm, signals};
use engine::ParamStore;

use crate::dataset::FixedBatches;
use crate::inputs::StepInputs;
use crate::noising::Noising;
use crate::options::Options;
use crate::step::{Models, evaluate};

/// Timesteps that each image is validated at, as many as in the reference.
const TIMESTEPS: usize = 4;

/// When and on what a run is validated.
pub struct Validation {
    batches: FixedBatches,
    seed: u64,
    timesteps: Vec<usize>,
    clip_skip: Option<usize>,
    every_n_steps: Option<usize>,
    every_n_epochs: usize,
}

/// The result of a validation.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidationLoss {
    /// Mean over images and timesteps.
    pub average: f64,
    /// Timestep and mean over the images.
    pub by_timestep: Vec<(usize, f64)>,
}

/// What occasions a validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// `validate_every_n_steps`.
    Step,
    /// The end of an epoch.
    Epoch,
}

impl Validation {
    /// A validation with these batches.
    pub fn new(options: &Options, seed: u64, batches: FixedBatches) -> Self {
        let (low, high) = (options.min_timestep.unwrap_or(0), options.max_timestep.unwrap_or(1000));
        Self {
            batches,
            seed,
            timesteps: spread(low, high),
            clip_skip: options.clip_skip,
            every_n_steps: options.validate_every_n_steps.filter(|n| *n > 0),
            every_n_epochs: options.validate_every_n_epochs.unwrap_or(1).max(1),
        }
    }

    /// Whether to validate after `step` steps.
    pub fn is_due_after_step(&self, step: usize) -> bool {
        self.every_n_steps.is_some_and(|n| step.is_multiple_of(n))
    }

    /// Whether to validate after `epoch` epochs.
    pub fn is_due_after_epoch(&self, epoch: usize) -> bool {
        epoch.is_multiple_of(self.every_n_epochs)
    }

    /// The loss of the weights `params`. All ranks call it; all know the result. `None`: a signal
    /// asked the run to stop meanwhile.
    pub fn run(
        &self,
        comm: &Comm,
        (models, params): (&Models, &ParamStore),
        noising: &Noising,
    ) -> Result<Option<ValidationLoss>> {
        let images = self.batches.first_image(self.batches.len());
        // One place for each image and timestep, filled by one rank; the last says who was stopped.
        let mut losses = vec![0.; images * self.timesteps.len() + 1];
        for index in (comm.rank()..self.batches.len()).step_by(comm.world_size()) {
            if signals::stop_requested() {
                losses[images * self.timesteps.len()] = 1.;
                break;
            }
            comm.live();
            let batch = self.batches.make(index)?;
            let first = self.batches.first_image(index);
            for (row, timestep) in self.timesteps.iter().enumerate() {
                let micro = noising.micro_batch_at(&batch, self.seed, *timestep)?;
                let inputs = StepInputs::new(params.device(), models.unet.config(), &micro)?;
                let own = evaluate((models, params), self.clip_skip, &inputs)?;
                let at = row * images + first;
                losses[at..at + own.len()].copy_from_slice(&own);
            }
        }
        comm.all_reduce(&mut losses).context("exchange the validation loss")?;
        let stopped = losses.pop().is_some_and(|flag| flag > 0.);
        Ok((!stopped).then(|| self.summary(&losses, images)))
    }

    fn summary(&self, losses: &[f32], images: usize) -> ValidationLoss {
        let mean = |losses: &[f32]| {
            losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len().max(1) as f64
        };
        let rows = losses.chunks_exact(images.max(1));
        ValidationLoss {
            average: mean(losses),
            by_timestep: self.timesteps.iter().copied().zip(rows.map(mean)).collect(),
        }
    }
}

impl ValidationLoss {
    /// Tags and values for the logs. `training` is the moving average of the training loss.
    ///
    /// The reference logs average and divergence; the losses by timestep stand in its source as a
    /// comment, under these names.
    pub fn scalars(&self, occasion: Occasion, training: f64) -> Vec<(String, f64)> {
        let name = match occasion {
            Occasion::Step => "step",
            Occasion::Epoch => "epoch",
        };
        let mut scalars = vec![
            (format!("loss/validation/{name}_average"), self.average),
            (format!("loss/validation/{name}_divergence"), self.average - training),
        ];
        for (timestep, loss) in &self.by_timestep {
            scalars.push((format!("loss/validation/{name}_current_{timestep}"), *loss));
        }
        scalars
    }
}

/// Timesteps spread evenly between `low` and `high`, both left out.
fn spread(low: usize, high: usize) -> Vec<usize> {
    let step = (high as f64 - low as f64) / (TIMESTEPS + 1) as f64;
    (1..=TIMESTEPS).map(|n| (low as f64 + n as f64 * step) as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timesteps_are_those_of_the_reference() {
        // numpy.linspace(low, high, 6, dtype=int)[1:-1]
        assert_eq!(spread(0, 1000), [200, 400, 600, 800]);
        assert_eq!(spread(100, 903), [260, 421, 581, 742]);
        assert_eq!(spread(999, 1000), [999, 999, 999, 999]);
    }

    #[test]
    fn tags_are_those_of_the_reference() {
        let loss = ValidationLoss { average: 0.5, by_timestep: vec![(200, 0.25)] };
        assert_eq!(
            loss.scalars(Occasion::Epoch, 0.375),
            [
                ("loss/validation/epoch_average".to_owned(), 0.5),
                ("loss/validation/epoch_divergence".to_owned(), 0.125),
                ("loss/validation/epoch_current_200".to_owned(), 0.25),
            ]
        );
    }
}
