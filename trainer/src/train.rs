//! The training loop of one rank: one step is the list of verbs in [`Trainer::step`].
//!
//! Every rank runs the same steps in the same order; what only rank 0 does says so. Nothing a callee
//! does comes back here: each verb is one hop away.

use std::time::Instant;

use anyhow::{Context, Result};
use collectives::{Comm, Phase, signals};
use engine::{DType, ParamId, ParamStore};
use models::lora::{LoraNetwork, ParamGroup};

use crate::card::{CardWork, LossScale, Trained};
use crate::checkpoint::SavePoint;
use crate::console;
use crate::dataset::{Batch, Loader};
use crate::draws::draws_for;
use crate::ema::Ema;
use crate::gradients::{Control, Gradients};
use crate::inputs::StepInputs;
use crate::logs::Rate;
use crate::loss_history::SampleLoss;
use crate::lr::Schedule;
use crate::monitor::{Moment, Monitor, StepReport};
use crate::network::{learning_rate, limit_norms};
use crate::noising::Noising;
use crate::optimizer::{Optimize, StepInput, TensorStep};
use crate::options::Options;
use crate::plan::Plan;
use crate::precision::round_weights;
use crate::reduce::Ways;
use crate::reproducible::{self, Ready};
use crate::samples::Samples;
use crate::saver::Saver;
use crate::snapshot::Memory;
use crate::state::{Keeper, Start};
use crate::step::{Models, Setting, forward_backward};
use crate::validation::{Occasion, Validation};
use crate::watch::{Sighting, Watch, require_finite};

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
    /// How gradients go from card to card.
    pub ways: Ways,
    pub models: Models,
    pub network: LoraNetwork,
    pub params: ParamStore,
    pub optimizer: Box<dyn Optimize>,
    pub schedule: Schedule,
    pub noising: Noising,
    /// With `ema_decay`.
    pub ema: Option<Ema>,
    pub watch: Watch,
    /// Of fp16.
    pub loss_scale: LossScale,
    /// With `full_fp16` and `full_bf16`: what the weights are rounded to after each step.
    pub weights_type: Option<DType>,
    /// Where images are held out.
    pub validation: Option<Validation>,
    /// Where sample pictures are asked for.
    pub samples: Option<Samples>,
    /// Rank 0 only.
    pub saver: Option<Saver>,
    pub monitor: Monitor,
    /// Where the counts begin.
    pub start: Start,
    pub keeper: Keeper,
    /// On ranks that keep snapshots.
    pub memory: Option<Memory>,
}

/// Where a step is computed, and what is kept there from step to step.
pub(crate) enum Work {
    Host(Gradients),
    Card(Box<CardWork>),
}

impl Work {
    /// Memory that is only needed within steps goes; the next step takes it again.
    pub(crate) fn make_room(&mut self) {
        if let Self::Card(work) = self {
            work.make_room();
        }
    }
}

/// What comes with the gradient of a step.
#[derive(Default)]
struct Summed {
    /// Losses of this rank's samples.
    samples: Vec<SampleLoss>,
    /// Images, over all ranks.
    images: usize,
    /// Control words of all ranks.
    agreed: Control,
}

impl Trainer<'_> {
    /// Runs all epochs.
    pub fn run(mut self, loader: &mut Loader) -> Result<Ending> {
        let mut work = self.begin_work()?;
        self.monitor.start(self.comm, self.start.step)?;
        self.comm.enter_phase(Phase::Training);
        self.comm.finish_step((self.start.step, self.plan.steps), f32::NAN, 0.);
        self.sample_at_first(&mut work)?;
        for step in self.start.step..self.plan.steps {
            let moment = Moment {
                step: step + 1,
                epoch: step / self.plan.steps_per_epoch + 1,
                step_in_epoch: step % self.plan.steps_per_epoch,
            };
            let (report, stop) = match &mut work {
                Work::Host(gradients) => self.step(step, loader, gradients)?,
                Work::Card(work) => self.card_step(step, loader, work)?,
            };
            self.monitor.step(self.comm, moment, &report)?;
            self.tell_launcher(moment.step, &report);
            let epoch_ends = moment.step_in_epoch + 1 == self.plan.steps_per_epoch;
            let ends = step + 1 == self.plan.steps;
            self.validate_if_due(moment, epoch_ends || ends)?;
            if epoch_ends || ends {
                self.monitor.end_epoch(moment)?;
            }
            self.keep_what_is_due(moment, epoch_ends)?;
            if stop && !ends {
                self.monitor.stop()?;
                return self.stop(moment.step, moment.epoch);
            }
            if ends {
                self.save_last()?;
            }
            // Behind the files: samples that fail take none of them along.
            self.sample_if_due(moment, epoch_ends || ends, &mut work)?;
        }
        if self.start.step >= self.plan.steps {
            self.save_last()?;
        }
        self.monitor.stop()?;
        Ok(Ending::Complete)
    }

    fn save_last(&self) -> Result<()> {
        self.comm.enter_phase(Phase::Saving);
        self.save(SavePoint::Last, self.plan.steps, self.plan.epochs)?;
        self.comm.barrier().context("wait for the last file")
    }

    fn tell_launcher(&self, step: usize, report: &StepReport) {
        let loss = report.loss.map_or(f32::NAN, |loss| loss as f32);
        let rate = (report.images as f64 / report.seconds) as f32;
        self.comm.finish_step((step, self.plan.steps), loss, rate);
    }

    /// `reproducible` adds gradients up in an order of its own, which is the host's work.
    fn begin_work(&mut self) -> Result<Work> {
        if self.params.device().card().is_none() || self.options.reproducible {
            return Ok(Work::Host(Gradients::new(&self.params)));
        }
        let (network, params) = (&self.network, &self.params);
        let trained = Trained { network, params, optimizer: &mut *self.optimizer };
        Ok(Work::Card(Box::new(CardWork::new(self.options, (self.comm, self.ways), trained)?)))
    }

    /// One optimizer step, on all ranks.
    fn step(
        &mut self,
        step: usize,
        loader: &mut Loader,
        gradients: &mut Gradients,
    ) -> Result<(StepReport, bool)> {
        let started = Instant::now();
        let Summed { samples, images, agreed } = match self.options.reproducible {
            true => self.gradient_in_tree(step, loader, gradients)?,
            false => self.gradient(step, loader, gradients)?,
        };
        let norm = gradients.clip(self.options.max_grad_norm);
        let stop = agreed.stop > 0.;
        let mut report = StepReport {
            loss: None,
            samples,
            gradient_norm: norm,
            rates: self.rates(step),
            loss_scale: None,
            key_norms: None,
            seconds: 0.,
            images,
        };
        if !Watch::is_good(agreed, norm) {
            let own = gradients.first_non_finite();
            let own = Sighting::new(&report.samples, &self.network, own);
            self.leave_out(step, &own, gradients.first_non_finite_sum())?;
            report.seconds = started.elapsed().as_secs_f64();
            return Ok((report, stop));
        }
        self.watch.pass();
        let tensors = self.tensor_steps(step, gradients.touched());
        let input = StepInput {
            gradient: gradients.flat(),
            tensors: &tensors,
            schedule_factor: self.schedule.factor(self.start.schedule_of(step)),
        };
        self.optimizer.step(&mut self.params, &input)?;
        self.round_weights()?;
        self.settle(&mut report)?;
        report.loss = Some(f64::from(agreed.loss));
        report.seconds = started.elapsed().as_secs_f64();
        Ok((report, stop))
    }

    /// Rounds the weights where they are to be of half precision.
    pub(crate) fn round_weights(&mut self) -> Result<()> {
        match self.weights_type {
            Some(dtype) => round_weights(&mut self.params, dtype),
            None => Ok(()),
        }
    }

    /// What follows a step that moved the weights: limits to their norms, their average.
    pub(crate) fn settle(&mut self, report: &mut StepReport) -> Result<()> {
        report.key_norms = limit_norms(self.options, &self.network, &mut self.params)?;
        if report.key_norms.is_some() {
            self.round_weights()?;
        }
        if let Some(ema) = &mut self.ema {
            ema.update(&self.params.flat().to_vec_f32()?);
        }
        Ok(())
    }

    /// The gradient of a step, summed over micro-steps and ranks.
    fn gradient(
        &self,
        step: usize,
        loader: &mut Loader,
        gradients: &mut Gradients,
    ) -> Result<Summed> {
        gradients.clear();
        let micro_steps = loader.batches_in_step(self.start.data_of(step));
        let mut loss = 0.;
        let mut samples = Vec::new();
        let mut images = 0;
        for _ in 1..micro_steps {
            let batch = loader.next_batch()?;
            images += batch.new_samples();
            loss += self.micro_step(&batch, &mut samples, &mut |id, g| gradients.add(id, &g))?;
        }
        let batch = loader.next_batch()?;
        let mut reduction = gradients.start_reduction(self.comm);
        loss += self.micro_step(&batch, &mut samples, &mut |id, g| {
            reduction.add(id, &g).map_err(|error| engine::EngineError::Tape(format!("{error:#}")))
        })?;
        let own = Control {
            loss,
            non_finite: f32::from(u8::from(!loss.is_finite())),
            stop: f32::from(u8::from(signals::stop_requested())),
        };
        let agreed = reduction.finish(own)?;
        Ok(Summed { samples, images: images + batch.new_samples(), agreed })
    }

    /// The same, summed in an order that does not depend on the number of ranks.
    fn gradient_in_tree(
        &self,
        step: usize,
        loader: &mut Loader,
        gradients: &mut Gradients,
    ) -> Result<Summed> {
        gradients.clear();
        let mut sum = Summed::default();
        for _ in 0..loader.batches_in_step(self.start.data_of(step)) {
            let batch = loader.next_batch()?;
            let samples = &mut sum.samples;
            let mut one = |one: &Batch, ready: &mut Ready| self.micro_step(one, samples, ready);
            let agreed = reproducible::add_batch(&batch, gradients, self.comm, &mut one)?;
            sum.agreed = sum.agreed + agreed;
            sum.images += batch.new_samples();
        }
        Ok(sum)
    }

    /// The loss on the images that were held out, on all ranks. A run that ends within an epoch ends
    /// that epoch.
    fn validate_if_due(&mut self, moment: Moment, epoch_ends: bool) -> Result<()> {
        let Some(validation) = &self.validation else { return Ok(()) };
        let occasions = [
            (Occasion::Step, validation.is_due_after_step(moment.step)),
            (Occasion::Epoch, epoch_ends && validation.is_due_after_epoch(moment.epoch)),
        ];
        if occasions.iter().all(|(_, due)| !due) {
            return Ok(());
        }
        self.comm.enter_phase(Phase::Validating);
        let averaged = self.averaged_params()?;
        let params = averaged.as_ref().unwrap_or(&self.params);
        let result = validation.run(self.comm, (&self.models, params), &self.noising)?;
        self.comm.enter_phase(Phase::Training);
        let Some(loss) = result else { return Ok(()) };
        for (occasion, _) in occasions.into_iter().filter(|(_, due)| *due) {
            self.monitor.validated(moment, occasion, &loss)?;
        }
        Ok(())
    }

    /// A step that is not finite changes nothing; too many of them end the run on all ranks.
    pub(crate) fn leave_out(
        &mut self,
        step: usize,
        own: &Sighting,
        sum: Option<ParamId>,
    ) -> Result<()> {
        require_finite(&self.network, &self.params, step)?;
        let sum = sum.map(|id| self.network.key(id));
        self.watch.skip(self.comm, step + 1, own, sum)
    }

    /// Forward and backward of this rank's part of a batch; its share of the global loss. Adds the
    /// loss of each sample to `samples`.
    fn micro_step(
        &self,
        batch: &Batch,
        samples: &mut Vec<SampleLoss>,
        ready: &mut Ready,
    ) -> Result<f32> {
        if batch.samples.is_empty() {
            // The last batch of a bucket can be smaller than the number of ranks.
            return Ok(0.);
        }
        let micro = self.noising.micro_batch(batch)?;
        let inputs = StepInputs::new(self.params.device(), self.models.unet.config(), &micro)?;
        let setting = self.setting(batch);
        let models = (&self.models, &self.params);
        let forward = forward_backward(models, setting, &inputs, ready)?;
        let losses = forward.losses.to_vec_f32()?;
        samples.extend(self.sample_losses(batch, &losses));
        Ok(losses.iter().sum())
    }

    /// How the models are run on a batch.
    pub(crate) fn setting(&self, batch: &Batch) -> Setting {
        Setting {
            clip_skip: self.options.clip_skip,
            checkpointing: self.plan.checkpointing.clone(),
            draws: draws_for(&self.network, self.plan.seed, batch),
        }
    }

    /// The loss of each sample of this rank's part of a batch, from its share in the total.
    pub(crate) fn sample_losses<'b>(
        &self,
        batch: &'b Batch,
        losses: &'b [f32],
    ) -> impl Iterator<Item = SampleLoss> + use<'b> {
        let share = (batch.global_count * self.options.gradient_accumulation_steps) as f32;
        batch.samples.iter().zip(losses).map(move |(sample, loss)| SampleLoss {
            global_index: sample.global_index,
            image: sample.image_path.clone(),
            loss: loss * share,
        })
    }

    /// Learning rates of the groups in a step, for the logs.
    pub(crate) fn rates(&self, step: usize) -> Vec<Rate> {
        let estimate = self.optimizer.effective_scale();
        let step = self.start.schedule_of(step);
        let rate = |group: &ParamGroup| {
            let own = group.params.first().and_then(|id| self.optimizer.own_rate(*id));
            let given = self.schedule.rate(learning_rate(self.options, group), step);
            let lr = own.unwrap_or(given);
            Rate { label: group.label.clone(), lr, scaled: estimate.map(|d| d * lr) }
        };
        self.network.groups().iter().map(rate).collect()
    }

    /// The tensors that move: those that a gradient reached, with their learning rates. (PyTorch
    /// leaves parameters without a gradient alone: no weight decay.)
    pub(crate) fn tensor_steps(&self, step: usize, touched: &[bool]) -> Vec<TensorStep> {
        let step = self.start.schedule_of(step);
        let mut steps: Vec<TensorStep> = Vec::new();
        for group in self.network.groups() {
            let base = learning_rate(self.options, &group);
            if base == 0. {
                continue;
            }
            let lr = self.schedule.rate(base, step) as f32;
            let ids = group.params.into_iter().filter(|id| touched[id.0]);
            steps.extend(ids.map(|id| TensorStep { id, range: self.params.range(id), lr }));
        }
        steps.sort_by_key(|tensor| tensor.id);
        steps
    }

    /// Ends early because a signal asked for it: LoRA and state of the agreed step are saved under
    /// its number.
    fn stop(&self, step: usize, epoch: usize) -> Result<Ending> {
        // A job that starts again ends its ranks by the same signal, and wants no files of them.
        self.comm.check_aborted()?;
        self.comm.enter_phase(Phase::Saving);
        self.save_file(SavePoint::Step(step), step, epoch)?;
        self.save_state(SavePoint::Step(step), step, epoch)?;
        self.comm.barrier().context("wait for the state")?;
        console::note(&format!(
            "stopped on request after step {step} of {}; go on with `--resume auto`",
            self.plan.steps
        ));
        Ok(Ending::Stopped)
    }
}
