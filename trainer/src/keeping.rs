//! What a run keeps: files of the LoRA, states and snapshots, when they are due, and how a state is
//! gone on from.

use anyhow::{Context, Result};
use collectives::Phase;
use engine::ParamStore;

use crate::checkpoint::SavePoint;
use crate::ema::Ema;
use crate::monitor::Moment;
use crate::state::{Carried, Loaded, OPTIMIZER, WEIGHTS, weights};
use crate::train::Trainer;
use crate::watch::require_finite;

impl Trainer<'_> {
    /// The weights to save and to validate with, where the optimizer keeps others than it trains.
    pub(crate) fn averaged_params(&self) -> Result<Option<ParamStore>> {
        let weights = self.optimizer.evaluation_weights(&self.params)?;
        Ok(weights.map(|weights| self.params.with_values(&weights)).transpose()?)
    }

    /// Writes the files that are due after a step, and keeps a snapshot where one is due.
    pub(crate) fn keep_what_is_due(&self, moment: Moment, epoch_ends: bool) -> Result<()> {
        let Moment { step, epoch, .. } = moment;
        if let Some(saver) = &self.saver {
            saver.lease().look()?;
        }
        let saving = &self.plan.saving;
        if self.watch.is_alarmed() {
            // Nobody knows yet whether the weights are to blame: good files must not make way.
            return Ok(());
        }
        let due = [
            (SavePoint::Step(step), saving.due_after_step(step)),
            (
                SavePoint::Epoch(epoch),
                epoch_ends && saving.due_after_epoch(epoch, self.plan.epochs),
            ),
        ];
        for (point, _) in due.into_iter().filter(|(_, due)| *due) {
            self.comm.enter_phase(Phase::Saving);
            self.save(point, step, epoch)?;
            self.comm.enter_phase(Phase::Training);
        }
        let saved = due.iter().any(|(point, due)| *due && self.keeper.is_due(*point));
        match &self.memory {
            // After the files: who goes on from here need not write them again.
            Some(memory) if saved || memory.is_due(step, self.start.step) => {
                require_finite(&self.network, &self.params, step)?;
                memory.keep(&self.keeper.facts((step, epoch)), &self.carried()?)
            }
            _ => Ok(()),
        }
    }

    /// What this run carries from step to step; the same on all ranks.
    fn carried(&self) -> Result<Carried> {
        let mut carried = Carried::from([
            (WEIGHTS, weights(&self.network, &self.params)?),
            (OPTIMIZER, self.optimizer.state()?),
            ("watch", self.watch.state()),
            ("monitor", self.monitor.state()?),
        ]);
        if self.loss_scale.is_needed() {
            carried.insert("loss_scale", self.loss_scale.state());
        }
        if let Some(ema) = &self.ema {
            carried.insert("ema", ema.state()?);
        }
        Ok(carried)
    }

    /// Goes on from what another run carried.
    pub fn restore(&mut self, mut loaded: Loaded) -> Result<()> {
        if let Some(state) = loaded.take(OPTIMIZER)? {
            self.optimizer.load_state(state).context("the state's optimizer does not fit")?;
        }
        if let Some(state) = loaded.take("watch")? {
            self.watch.load_state(state)?;
        }
        if let Some(state) = loaded.take("monitor")? {
            self.monitor.load_state(state)?;
        }
        if self.loss_scale.is_needed()
            && let Some(state) = loaded.take("loss_scale")?
        {
            self.loss_scale.load_state(state)?;
        }
        if let Some(ema) = &mut self.ema {
            // The average begins at the weights, which are the state's.
            *ema = Ema::new(self.options.ema_decay.unwrap_or_default(), &self.params)?;
            if let Some(state) = loaded.take("ema")? {
                ema.load_state(state)?;
            }
        }
        loaded.finish();
        Ok(())
    }

    /// Writes, on rank 0, the LoRA of `point`, and the state where one is due.
    pub(crate) fn save(&self, point: SavePoint, step: usize, epoch: usize) -> Result<()> {
        self.save_file(point, step, epoch)?;
        match self.keeper.is_due(point) {
            true => self.save_state(point, step, epoch),
            false => Ok(()),
        }
    }

    pub(crate) fn save_state(&self, point: SavePoint, step: usize, epoch: usize) -> Result<()> {
        let Some(saver) = &self.saver else { return Ok(()) };
        self.keeper.save(point, (step, epoch), &self.carried()?, saver.lease())
    }

    pub(crate) fn save_file(&self, point: SavePoint, step: usize, epoch: usize) -> Result<()> {
        require_finite(&self.network, &self.params, step)?;
        let Some(saver) = &self.saver else { return Ok(()) };
        let averaged = self.averaged_params()?;
        let params = averaged.as_ref().unwrap_or(&self.params);
        saver.save(&self.network, params, point, (step, epoch))?;
        if let Some(ema) = &self.ema {
            let average = self.params.with_values(ema.average())?;
            saver.save_average(&self.network, &average, point, (step, epoch))?;
        }
        Ok(())
    }
}
