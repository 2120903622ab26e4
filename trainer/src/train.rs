//! The training loop of one rank: one step is the list of verbs in [`Trainer::step`].
//!
//! Every rank runs the same steps in the same order; what only rank 0 does says so. Nothing a callee
//! does comes back here: each verb is one hop away.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use collectives::{Comm, signals};
use engine::ParamStore;
use models::lora::{LoraNetwork, Part};

use crate::checkpoint::SavePoint;
use crate::console;
use crate::dataset::{Batch, Loader};
use crate::gradients::{Control, Gradients};
use crate::lr::Schedule;
use crate::network::learning_rate;
use crate::noising::Noising;
use crate::optimizer::{Optimize, StepInput, TensorStep};
use crate::options::Options;
use crate::plan::Plan;
use crate::progress::{LossRecorder, Progress};
use crate::saver::Saver;
use crate::step::{Models, Setting, forward_backward};
use crate::tensorboard::{RunLog, StepLog};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Complete,
    /// Asked to stop; what was learned is saved.
    Stopped,
}

/// Everything a run holds while it trains.
pub struct Trainer<'a> {
    pub options: &'a Options,
    pub plan: &'a Plan,
    pub comm: &'a Comm,
    pub models: Models,
    pub network: LoraNetwork,
    pub params: ParamStore,
    pub optimizer: Box<dyn Optimize>,
    pub schedule: Schedule,
    pub noising: Noising,
    /// Rank 0 only.
    pub saver: Option<Saver>,
    /// Rank 0 only, where a log was asked for.
    pub log: Option<RunLog>,
}

/// What a step reports.
struct StepResult {
    loss: f64,
    gradient_norm: f64,
    stop: bool,
}

impl Trainer<'_> {
    /// Runs all epochs.
    pub fn run(mut self, loader: &mut Loader) -> Result<Ending> {
        let mut gradients = Gradients::new(&self.params);
        let mut recorder = LossRecorder::default();
        let mut progress =
            Progress::start(self.plan.steps, self.plan.epochs, self.comm.rank() == 0);
        for step in 0..self.plan.steps {
            let (epoch, step_in_epoch) =
                (step / self.plan.steps_per_epoch, step % self.plan.steps_per_epoch);
            let started = Instant::now();
            let result = self.step(step, loader, &mut gradients)?;
            recorder.add(epoch, step_in_epoch, result.loss);
            let average = recorder.moving_average();
            progress.step(step + 1, epoch + 1, average);
            let values = StepLog {
                loss: result.loss,
                average_loss: average,
                text_encoder_lr: self.rate(Part::TextEncoder, step),
                unet_lr: self.rate(Part::Unet, step),
                grad_norm: Some(result.gradient_norm),
                seconds: started.elapsed().as_secs_f64(),
            };
            if let Some(log) = &mut self.log {
                log.step(step + 1, &values)?;
            }
            let epoch_ends = step_in_epoch + 1 == self.plan.steps_per_epoch;
            self.save_what_is_due(step + 1, epoch + 1, epoch_ends)?;
            if epoch_ends {
                progress.end_epoch(step + 1, epoch + 1, average);
                if let Some(log) = &mut self.log {
                    log.epoch(epoch + 1, average)?;
                }
            }
            if result.stop && step + 1 < self.plan.steps {
                drop(progress);
                return self.stop(step + 1, epoch + 1);
            }
        }
        if !self.plan.steps.is_multiple_of(self.plan.steps_per_epoch) {
            progress.end_epoch(self.plan.steps, self.plan.epochs, recorder.moving_average());
        }
        drop(progress);
        self.save(SavePoint::Last, self.plan.steps, self.plan.epochs)?;
        self.comm.barrier().context("wait for the last file")?;
        Ok(Ending::Complete)
    }

    /// One optimizer step, on all ranks.
    fn step(
        &mut self,
        step: usize,
        loader: &mut Loader,
        gradients: &mut Gradients,
    ) -> Result<StepResult> {
        gradients.clear();
        let micro_steps = loader.batches_in_step(step);
        let mut loss = 0.;
        for _ in 1..micro_steps {
            let batch = loader.next_batch()?;
            loss += self.micro_step(&batch, &mut |id, g| gradients.add(id, &g))?;
        }
        let batch = loader.next_batch()?;
        let mut reduction = gradients.start_reduction(self.comm);
        loss += self.micro_step(&batch, &mut |id, g| {
            reduction.add(id, &g).map_err(|error| engine::EngineError::Tape(format!("{error:#}")))
        })?;
        let own = Control {
            loss,
            non_finite: f32::from(u8::from(!loss.is_finite())),
            stop: f32::from(u8::from(signals::stop_requested())),
        };
        let agreed = reduction.finish(own)?;
        let norm = gradients.clip(self.options.max_grad_norm);
        self.refuse_non_finite(step, &batch, own, agreed, norm)?;
        let tensors = self.tensor_steps(step, gradients.touched());
        let input = StepInput {
            gradient: gradients.flat(),
            tensors: &tensors,
            schedule_factor: self.schedule.factor(step),
        };
        self.optimizer.step(&mut self.params, &input)?;
        Ok(StepResult { loss: f64::from(agreed.loss), gradient_norm: norm, stop: agreed.stop > 0. })
    }

    /// Forward and backward of this rank's part of a batch; its share of the global loss.
    fn micro_step(
        &self,
        batch: &Batch,
        ready: &mut dyn FnMut(engine::ParamId, engine::Tensor) -> engine::Result<()>,
    ) -> Result<f32> {
        if batch.samples.is_empty() {
            // The last batch of a bucket can be smaller than the number of ranks.
            return Ok(0.);
        }
        let noised = self.noising.noise(batch)?;
        let prompts = self.noising.prompts(batch);
        let setting = Setting {
            clip_skip: self.options.clip_skip,
            checkpointing: self.options.gradient_checkpointing,
        };
        let models = (&self.models, &self.params);
        let forward = forward_backward(models, setting, &prompts, &noised, ready)?;
        Ok(forward.losses.iter().sum())
    }

    /// All ranks stop here together, before the optimizer spreads the damage.
    fn refuse_non_finite(
        &self,
        step: usize,
        batch: &Batch,
        own: Control,
        agreed: Control,
        norm: f64,
    ) -> Result<()> {
        if agreed.non_finite == 0. && norm.is_finite() {
            return Ok(());
        }
        let images: Vec<String> =
            batch.samples.iter().map(|s| s.image_path.display().to_string()).collect();
        let whose = match (own.non_finite > 0., self.comm.world_size()) {
            (true, _) | (false, 1) => format!("the last images were: {}", images.join(", ")),
            (false, _) => "on another rank".to_owned(),
        };
        bail!(
            "the loss or its gradient is not finite at step {}: {whose}\n\
             hint: lower `learning_rate`, check the images, or use `mixed_precision = \"no\"`; files \
             saved before this step are good",
            step + 1
        );
    }

    fn rate(&self, part: Part, step: usize) -> Option<f64> {
        let trained = self.network.module_count(part) > 0;
        trained.then(|| self.schedule.rate(learning_rate(self.options, part), step))
    }

    /// The tensors that move: those that a gradient reached, with their learning rates. (PyTorch
    /// leaves parameters without a gradient alone: no weight decay.)
    fn tensor_steps(&self, step: usize, touched: &[bool]) -> Vec<TensorStep> {
        let mut steps: Vec<TensorStep> = Vec::new();
        for group in self.network.groups() {
            let base = learning_rate(self.options, group.part);
            if base == 0. {
                continue;
            }
            let lr = self.schedule.rate(base, step) as f32;
            let ids = group.params.map(engine::ParamId).filter(|id| touched[id.0]);
            steps.extend(ids.map(|id| TensorStep { id, range: self.params.range(id), lr }));
        }
        steps.sort_by_key(|tensor| tensor.id);
        steps
    }

    fn save_what_is_due(&self, step: usize, epoch: usize, epoch_ends: bool) -> Result<()> {
        let saving = &self.plan.saving;
        if saving.due_after_step(step) {
            self.save(SavePoint::Step(step), step, epoch)?;
        }
        if epoch_ends && saving.due_after_epoch(epoch, self.plan.epochs) {
            self.save(SavePoint::Epoch(epoch), step, epoch)?;
        }
        Ok(())
    }

    fn save(&self, point: SavePoint, step: usize, epoch: usize) -> Result<()> {
        let Some(saver) = &self.saver else { return Ok(()) };
        match self.optimizer.evaluation_weights(&self.params)? {
            Some(weights) => {
                let params = self.params.with_values(&weights)?;
                saver.save(&self.network, &params, point, (step, epoch))
            }
            None => saver.save(&self.network, &self.params, point, (step, epoch)),
        }
    }

    /// Ends early because a signal asked for it: the agreed step is saved under its number.
    fn stop(&self, step: usize, epoch: usize) -> Result<Ending> {
        self.save(SavePoint::Step(step), step, epoch)?;
        self.comm.barrier().context("wait for the file")?;
        console::note(&format!(
            "stopped on request after step {step} of {}; `network_weights` continues from the file",
            self.plan.steps
        ));
        Ok(Ending::Stopped)
    }
}
