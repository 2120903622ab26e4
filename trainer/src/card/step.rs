//! One optimizer step on a card, as a list of verbs beside that of the CPU in `train.rs`.

use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result};
use collectives::{Comm, signals};
use engine::cuda::flat::clip_factor;
use engine::{DType, ParamId, ParamStore, Tensor};

use super::gradient::{Agreed, CardGradient};
use super::runner::Outcome;
use super::{Ahead, CardWork};
use crate::dataset::{Batch, Loader};
use crate::gradients::Control;
use crate::inputs::StepInputs;
use crate::loss_history::SampleLoss;
use crate::monitor::StepReport;
use crate::optimizer::{CardStep, StepInput};
use crate::reduce::Reducer;
use crate::step::{Models, Setting, forward_backward_onto};
use crate::train::Trainer;
use crate::watch::{Sighting, Watch};

/// The work of a micro-step, as often as it is given.
struct Pass<'a> {
    models: &'a Models,
    setting: Setting,
    inputs: &'a StepInputs,
    params: &'a mut ParamStore,
    gradient: &'a mut CardGradient,
    /// Where the micro-step is the whole step.
    end: Option<End<'a>>,
}

/// The sum over the ranks, as part of the work.
struct Sum<'a> {
    reducer: &'a mut Reducer,
    comm: &'a Comm,
}

/// What ends a step.
struct End<'a> {
    sum: Sum<'a>,
    update: Update<'a>,
}

/// The update of the weights.
struct Update<'a> {
    optimizer: &'a mut dyn CardStep,
    inverse_scale: &'a Tensor,
    max_norm: f32,
    /// Type that the weights are rounded to.
    rounded: Option<DType>,
}

/// A micro-step that was given to the card.
struct Given {
    batch: Batch,
    losses: Option<Tensor>,
}

/// What a step has left on the card.
struct Results {
    agreed: Agreed,
    /// Factor of the gradient, and its norm without the loss scale.
    clip: Vec<f32>,
}

impl Sum<'_> {
    /// Sends pieces that are ready.
    fn send(&mut self, gradient: &CardGradient, pieces: Vec<Range<usize>>) -> Result<()> {
        for piece in pieces {
            self.reducer.start(self.comm, gradient.whole(), piece)?;
        }
        Ok(())
    }

    /// Sends the rest; what the card is given from now on sees the sums.
    fn finish(&mut self, gradient: &mut CardGradient) -> Result<()> {
        let rest = gradient.rest();
        self.send(gradient, rest)?;
        self.reducer.finish(gradient.whole())
    }
}

impl End<'_> {
    fn give(
        &mut self,
        params: &mut ParamStore,
        gradient: &mut CardGradient,
        reached: &[bool],
    ) -> Result<Tensor> {
        gradient.close(reached)?;
        self.sum.finish(gradient)?;
        self.update.give(params, gradient)
    }
}

impl Pass<'_> {
    fn give(&mut self) -> Result<Outcome> {
        if self.end.is_some() {
            self.gradient.clear()?;
        }
        let mut reached = vec![false; self.params.count()];
        let (gradient, end) = (&mut *self.gradient, &mut self.end);
        let (models, flat) = ((self.models, &*self.params), gradient.whole().clone());
        let mut ready = |id: ParamId, _| {
            reached[id.0] = true;
            let Some(End { sum, .. }) = end else { return Ok(()) };
            let pieces = gradient.leaving(id);
            sum.send(gradient, pieces)
                .map_err(|error| engine::EngineError::Tape(format!("{error:#}")))
        };
        let (setting, ready) = (self.setting.clone(), (Some(&flat), &mut ready as _));
        let forward = forward_backward_onto(models, setting, self.inputs, ready)?;
        drop(flat);
        let losses = forward.losses.clone();
        drop(forward);
        self.gradient.add_losses(&losses)?;
        let clip = match &mut self.end {
            Some(end) => Some(end.give(self.params, self.gradient, &reached)?),
            None => None,
        };
        Ok(Outcome { losses, reached: Rc::from(reached), clip })
    }
}

impl Update<'_> {
    /// Clips and moves; gives factor and norm.
    fn give(&mut self, params: &mut ParamStore, gradient: &CardGradient) -> Result<Tensor> {
        let clip = clip_factor(&gradient.gradient()?, self.inverse_scale, self.max_norm)?;
        self.optimizer.give(params, &gradient.gradient()?, &gradient.touched()?, &clip)?;
        if let Some(dtype) = self.rounded {
            let rounded = params.flat().to_dtype(dtype)?.to_dtype(DType::F32)?;
            params.flat().copy_from(&rounded)?;
        }
        Ok(clip)
    }
}

impl Trainer<'_> {
    /// One optimizer step, on all ranks.
    pub(crate) fn card_step(
        &mut self,
        step: usize,
        loader: &mut Loader,
        work: &mut CardWork,
    ) -> Result<(StepReport, bool)> {
        let started = Instant::now();
        let micro_steps = loader.batches_in_step(self.start.data_of(step));
        let every: Vec<bool> = vec![true; self.params.count()];
        let moving = self.tensor_steps(step, &every);
        if let Some(optimizer) = self.optimizer.on_card() {
            optimizer.prepare(&moving)?;
        }
        work.inverse_scale.refill(&[1. / self.loss_scale.factor()])?;
        work.gradient.wish_to_stop(signals::stop_requested())?;
        work.reducer.arm(self.comm);
        let result = self.give_and_read((step, micro_steps), loader, work);
        let (given, results, samples) = work.reducer.conclude(result)?;
        let images = given.iter().map(|given| given.batch.new_samples()).sum();
        let mut report = StepReport {
            loss: None,
            samples,
            gradient_norm: f64::from(results.clip[1]),
            rates: self.rates(step),
            loss_scale: self.loss_scale.shown(),
            key_norms: None,
            seconds: 0.,
            images,
        };
        let stop = match work.reducer.is_alone() {
            true => signals::stop_requested(),
            false => results.agreed.control.stop > 0.,
        };
        self.conclude(step, work, &results, &mut report)?;
        report.seconds = started.elapsed().as_secs_f64();
        Ok((report, stop))
    }

    /// Gives the card the work of a step and reads what it leaves, all of which may wait for other
    /// ranks.
    fn give_and_read(
        &mut self,
        (step, micro_steps): (usize, usize),
        loader: &mut Loader,
        work: &mut CardWork,
    ) -> Result<(Vec<Given>, Results, Vec<SampleLoss>)> {
        let on_card = self.optimizer.on_card().is_some();
        // Sums over the host cannot be captured; without captures they can be part of the work, too.
        let sums_in_work = work.reducer.is_on_cards() || self.options.no_cuda_graph;
        let passes = self.options.gradient_accumulation_steps * self.plan.world.micro_steps();
        let in_one = passes == 1 && sums_in_work;
        let (given, clip) = match in_one && on_card {
            true => self.give_whole(step, loader, work)?,
            false => self.give_in_parts((step, micro_steps), loader, work)?,
        };
        let clip = clip.to_vec_f32()?;
        let results = Results { agreed: work.gradient.agreed()?, clip };
        let samples = self.read_losses(&given)?;
        Ok((given, results, samples))
    }

    /// What the host does when it knows loss and norm.
    fn conclude(
        &mut self,
        step: usize,
        work: &CardWork,
        results: &Results,
        report: &mut StepReport,
    ) -> Result<()> {
        let Control { loss, .. } = results.agreed.control;
        if !Watch::is_good(results.agreed.control, report.gradient_norm) {
            if loss.is_finite() && self.loss_scale.overflowed() {
                // Nothing has moved. The step counts, and the next is made with a lower scale.
                report.loss = Some(f64::from(loss));
                return Ok(());
            }
            return self.leave_out_on_card(step, work, &report.samples);
        }
        self.watch.pass();
        self.loss_scale.passed();
        match self.optimizer.on_card() {
            Some(optimizer) => optimizer.confirm(&results.agreed.touched),
            None => self.step_on_host(step, work, results)?,
        }
        self.settle(report)?;
        report.loss = Some(f64::from(loss));
        Ok(())
    }

    /// The whole step as one piece of work.
    fn give_whole(
        &mut self,
        step: usize,
        loader: &mut Loader,
        work: &mut CardWork,
    ) -> Result<(Vec<Given>, Tensor)> {
        let Ahead { batch, input } = self.next(loader, work)?;
        let setting = self.setting(&batch);
        let CardWork { buffers, gradient, inverse_scale, runner, reducer, .. } = &mut *work;
        let update = Update {
            optimizer: self.optimizer.on_card().context("the optimizer is not on the card")?,
            inverse_scale,
            max_norm: self.options.max_grad_norm as f32,
            rounded: self.weights_type,
        };
        let mut end = End { sum: Sum { reducer, comm: self.comm }, update };
        let params = &mut self.params;
        let (losses, clip) = match input {
            Some((shape, micro)) => {
                let buffers = buffers.get(&shape).context("the batch was not sent to the card")?;
                buffers.take(&micro, self.loss_scale.factor())?;
                let (models, inputs) = (&self.models, &buffers.inputs);
                let mut pass = Pass { models, setting, inputs, params, gradient, end: Some(end) };
                let outcome = runner.run(&shape, &mut || pass.give())?;
                (Some(outcome.losses), outcome.clip.context("the step has no update")?)
            }
            // The last batch of a bucket can be smaller than the number of ranks.
            None => {
                gradient.clear()?;
                let reached = vec![false; params.count()];
                (None, end.give(params, gradient, &reached)?)
            }
        };
        if step + 1 < self.plan.steps {
            self.fetch(loader, work)?;
        }
        Ok((vec![Given { batch, losses }], clip))
    }

    /// Micro-steps, the reduction over the ranks, and the update, one after the other.
    fn give_in_parts(
        &mut self,
        (step, micro_steps): (usize, usize),
        loader: &mut Loader,
        work: &mut CardWork,
    ) -> Result<(Vec<Given>, Tensor)> {
        work.gradient.clear()?;
        let mut reached = vec![false; self.params.count()];
        let mut given = Vec::with_capacity(micro_steps);
        for index in 0..micro_steps {
            let Ahead { batch, input } = self.next(loader, work)?;
            let mut losses = None;
            if let Some((shape, micro)) = input {
                let setting = self.setting(&batch);
                let CardWork { buffers, gradient, runner, .. } = &mut *work;
                let buffers = buffers.get(&shape).context("the batch was not sent to the card")?;
                buffers.take(&micro, self.loss_scale.factor())?;
                let (models, inputs) = (&self.models, &buffers.inputs);
                let params = &mut self.params;
                let mut pass = Pass { models, setting, inputs, params, gradient, end: None };
                let outcome = runner.run(&shape, &mut || pass.give())?;
                reached.iter_mut().zip(&*outcome.reached).for_each(|(all, one)| *all |= one);
                // The next replay writes to the same place.
                let kept = Tensor::zeros(work.device, outcome.losses.shape(), DType::F32)?;
                kept.copy_from(&outcome.losses)?;
                losses = Some(kept);
            }
            given.push(Given { batch, losses });
            if index + 1 < micro_steps || step + 1 < self.plan.steps {
                self.fetch(loader, work)?;
            }
        }
        work.gradient.close(&reached)?;
        let CardWork { gradient, reducer, .. } = &mut *work;
        Sum { reducer, comm: self.comm }.finish(gradient)?;
        let clip = self.update_on_card(work)?;
        Ok((given, clip))
    }

    /// Clips, and moves the weights where the optimizer is built for cards; gives factor and norm.
    fn update_on_card(&mut self, work: &CardWork) -> Result<Tensor> {
        let max_norm = self.options.max_grad_norm as f32;
        let inverse_scale = &work.inverse_scale;
        match self.optimizer.on_card() {
            Some(optimizer) => {
                let rounded = self.weights_type;
                let mut update = Update { optimizer, inverse_scale, max_norm, rounded };
                update.give(&mut self.params, &work.gradient)
            }
            None => Ok(clip_factor(&work.gradient.gradient()?, inverse_scale, max_norm)?),
        }
    }

    /// The step of an optimizer that is built for the host.
    fn step_on_host(&mut self, step: usize, work: &CardWork, results: &Results) -> Result<()> {
        let mut gradient = work.gradient.gradient()?.to_vec_f32()?;
        gradient.iter_mut().for_each(|x| *x *= results.clip[0]);
        let tensors = self.tensor_steps(step, &results.agreed.touched);
        let schedule_factor = self.schedule.factor(self.start.schedule_of(step));
        let input = StepInput { gradient: &gradient, tensors: &tensors, schedule_factor };
        self.optimizer.step(&mut self.params, &input)?;
        self.round_weights()
    }

    /// The batch that was sent ahead, or, at the start, one that is sent now.
    fn next(&self, loader: &mut Loader, work: &mut CardWork) -> Result<Ahead> {
        if work.ahead.is_none() {
            self.fetch(loader, work)?;
        }
        work.ahead.take().context("there is no batch for the step")
    }

    /// Loads and noises the next batch and sends it to the card, which computes meanwhile.
    fn fetch(&self, loader: &mut Loader, work: &mut CardWork) -> Result<()> {
        let batch = loader.next_batch()?;
        let micro = match batch.samples.is_empty() {
            true => None,
            false => Some(self.noising.micro_batch(&batch)?),
        };
        work.send(&self.models, batch, micro)
    }

    /// The losses of this rank's samples.
    fn read_losses(&self, given: &[Given]) -> Result<Vec<SampleLoss>> {
        let mut samples = Vec::new();
        for Given { batch, losses } in given {
            if let Some(losses) = losses {
                samples.extend(self.sample_losses(batch, &losses.to_vec_f32()?));
            }
        }
        Ok(samples)
    }

    fn leave_out_on_card(
        &mut self,
        step: usize,
        work: &CardWork,
        samples: &[SampleLoss],
    ) -> Result<()> {
        let sum = work.gradient.first_non_finite()?;
        // With several ranks this rank's own part is gone: the sum has taken its place.
        let own = sum.filter(|_| work.reducer.is_alone());
        let own = Sighting::new(samples, &self.network, own);
        self.leave_out(step, &own, sum)
    }
}
