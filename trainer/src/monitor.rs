//! What is told about a run while it trains: progress, averages, the losses of images, logs.
//!
//! Every rank keeps the averages; rank 0 alone shows and writes. Nothing here changes the training.

use anyhow::{Context, Result, bail};
use collectives::Comm;

use crate::console;
use crate::dataset::DatasetGroup;
use crate::logs::{KeyNorms, Rate, RunLog, StepLog};
use crate::loss_history::{LossHistory, SampleLoss};
use crate::optimizer::OptimizerState;
use crate::options::Options;
use crate::plan::{Plan, Stamp};
use crate::progress::{LossRecorder, Progress};
use crate::samples::Sample;
use crate::validation::{Occasion, ValidationLoss};

/// Where in the run a step lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Finished optimizer steps, this one included.
    pub step: usize,
    /// Epoch, from 1.
    pub epoch: usize,
    /// Place of the step in its epoch, from 0.
    pub step_in_epoch: usize,
}

/// What a step has to tell.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Loss of the step; `None` where it was left out.
    pub loss: Option<f64>,
    /// Losses of this rank's samples.
    pub samples: Vec<SampleLoss>,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rates of the groups in this step.
    pub rates: Vec<Rate>,
    /// The loss scale of the step, in fp16.
    pub loss_scale: Option<f64>,
    /// With `scale_weight_norms`.
    pub key_norms: Option<KeyNorms>,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Images, over all ranks.
    pub images: usize,
}

/// Averages, progress and logs of a run.
pub struct Monitor {
    recorder: LossRecorder,
    /// Where there is a log to write it to: on all ranks, because all of them feed it.
    history: Option<LossHistory>,
    /// Rank 0 only, where a log was asked for.
    log: Option<RunLog>,
    /// Name of the log's folder, on all ranks.
    log_name: Option<String>,
    progress: Option<Progress>,
    steps: usize,
    epochs: usize,
    steps_per_epoch: usize,
}

impl Monitor {
    /// For a run from its start.
    pub fn new(options: &Options, plan: &Plan, group: &DatasetGroup, comm: &Comm) -> Result<Self> {
        Ok(Self {
            recorder: LossRecorder::default(),
            history: options.logging_dir.is_some().then(|| LossHistory::new(group)),
            log: match comm.rank() {
                0 => RunLog::new(options, Stamp::Clock.now())?,
                _ => None,
            },
            log_name: None,
            progress: None,
            steps: plan.steps,
            epochs: plan.epochs,
            steps_per_epoch: plan.steps_per_epoch,
        })
    }

    /// Opens the logs and shows the progress of a run of which `steps` steps are done. All ranks call
    /// it, which then know the name of rank 0's log.
    pub fn start(&mut self, comm: &Comm, steps: usize) -> Result<()> {
        if self.history.is_some() {
            let own = self.log.as_ref().map(RunLog::run).unwrap_or_default();
            let name = comm.broadcast(0, own.into()).context("name the log")?;
            self.log_name = Some(String::from_utf8(name)?);
        }
        if let Some(log) = &mut self.log {
            log.open(steps, steps / self.steps_per_epoch.max(1))?;
        }
        let mut progress = Progress::start(self.steps, self.epochs, comm.rank() == 0);
        progress.begin_after(steps);
        self.progress = Some(progress);
        Ok(())
    }

    /// A step is over. All ranks call it.
    pub fn step(&mut self, comm: &Comm, moment: Moment, report: &StepReport) -> Result<()> {
        self.recorder.add(moment.epoch - 1, moment.step_in_epoch, report.loss);
        if let (Some(history), Some(_)) = (&mut self.history, report.loss) {
            history.add(comm, &report.samples)?;
        }
        let average_loss = self.recorder.moving_average();
        if let Some(progress) = &mut self.progress {
            progress.step(moment.step, moment.epoch, average_loss, report.key_norms);
        }
        let Some(log) = &mut self.log else { return Ok(()) };
        log.step(&StepLog {
            step: moment.step,
            epoch: moment.epoch,
            loss: report.loss,
            average_loss,
            rates: report.rates.clone(),
            gradient_norm: report.gradient_norm,
            loss_scale: report.loss_scale,
            key_norms: report.key_norms,
            seconds: report.seconds,
            images: report.images,
        })
    }

    /// A validation is over.
    pub fn validated(
        &mut self,
        moment: Moment,
        occasion: Occasion,
        loss: &ValidationLoss,
    ) -> Result<()> {
        let training = self.recorder.moving_average();
        console::note(&format!(
            "validation after step {}: loss {:.4}, {:+.4} against training",
            moment.step,
            loss.average,
            loss.average - training
        ));
        let at = match occasion {
            Occasion::Step => moment.step,
            Occasion::Epoch => moment.epoch,
        };
        match &mut self.log {
            Some(log) => {
                let place = (moment.step, moment.epoch);
                log.validation(at, place, &loss.scalars(occasion, training))
            }
            None => Ok(()),
        }
    }

    /// A sample picture is made.
    pub fn sampled(&mut self, moment: Moment, sample: &Sample) -> Result<()> {
        match &mut self.log {
            Some(log) => log.sample((moment.step, moment.epoch), sample),
            None => Ok(()),
        }
    }

    /// An epoch is over, or the run within one.
    pub fn end_epoch(&mut self, moment: Moment) -> Result<()> {
        let average = self.recorder.moving_average();
        if let Some(progress) = &mut self.progress {
            progress.end_epoch(moment.step, moment.epoch, average);
        }
        let Some(log) = &mut self.log else { return Ok(()) };
        let records = self.history.iter().flat_map(LossHistory::records);
        log.epoch((moment.step, moment.epoch), average, records)
    }

    /// Leaves the last state of the progress on the screen and ends the logs.
    pub fn stop(&mut self) -> Result<()> {
        self.progress = None;
        self.log.as_mut().map_or(Ok(()), RunLog::finish)
    }

    /// Everything to go on from: the same on every rank.
    pub fn state(&self) -> Result<OptimizerState> {
        let mut state = OptimizerState::default();
        insert(&mut state, "average", self.recorder.state());
        if let Some(history) = &self.history {
            insert(&mut state, "images", history.state()?);
        }
        if let Some(name) = &self.log_name {
            let name = name.as_bytes().to_vec();
            let tensor = formats::OwnedTensor {
                dtype: formats::Dtype::U8,
                shape: vec![name.len()],
                data: name,
            };
            state.tensors.insert("log/run".to_owned(), tensor);
        }
        Ok(state)
    }

    /// Goes on from a state of [`Monitor::state`], before [`Monitor::start`].
    pub fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let (mut average, mut images) = (OptimizerState::default(), OptimizerState::default());
        for (key, tensor) in state.tensors {
            match key.split_once('/') {
                Some(("average", name)) => drop(average.tensors.insert(name.to_owned(), tensor)),
                Some(("images", name)) => drop(images.tensors.insert(name.to_owned(), tensor)),
                Some(("log", "run")) => {
                    if let (Some(log), Ok(run)) = (&mut self.log, std::str::from_utf8(&tensor.data))
                    {
                        log.continue_run(run);
                    }
                }
                _ => bail!("the saved logs hold something unknown: `{key}`"),
            }
        }
        for (key, number) in state.numbers {
            match key.split_once('/') {
                Some(("average", name)) => drop(average.numbers.insert(name.to_owned(), number)),
                _ => bail!("the saved logs hold something unknown: `{key}`"),
            }
        }
        self.recorder.load_state(&average)?;
        match &mut self.history {
            // A run without a log kept none; one that logs from now on starts at nothing.
            Some(history) if !images.tensors.is_empty() => history.load_state(images),
            _ => Ok(()),
        }
    }
}

fn insert(state: &mut OptimizerState, prefix: &str, part: OptimizerState) {
    let name = |key: String| format!("{prefix}/{key}");
    state.tensors.extend(part.tensors.into_iter().map(|(key, tensor)| (name(key), tensor)));
    state.numbers.extend(part.numbers.into_iter().map(|(key, number)| (name(key), number)));
}
