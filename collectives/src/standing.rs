//! What a rank is doing, for those who watch it: the rank writes, its launcher reads.
//!
//! A few words in the shared segment. Each is right by itself; a reader in the middle of a change may
//! see the step before with the loss after, which a table on a screen can bear. `changes` counts every
//! sign of life, so that a watcher needs no clock in common with the rank.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// What a rank is at.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Phase {
    /// It reads its config and joins the others.
    #[default]
    Starting = 0,
    /// It opens models and data.
    Loading = 1,
    /// It encodes images to latents.
    Caching = 2,
    /// It trains.
    Training = 3,
    /// It computes the loss on what was held out.
    Validating = 4,
    /// It draws pictures.
    Sampling = 5,
    /// It writes files, or waits for the rank that does.
    Saving = 6,
}

impl Phase {
    /// All, by their numbers.
    pub const ALL: [Phase; 7] = [
        Phase::Starting,
        Phase::Loading,
        Phase::Caching,
        Phase::Training,
        Phase::Validating,
        Phase::Sampling,
        Phase::Saving,
    ];

    /// A word for tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Starting => "starting",
            Phase::Loading => "loading",
            Phase::Caching => "caching",
            Phase::Training => "training",
            Phase::Validating => "validating",
            Phase::Sampling => "sampling",
            Phase::Saving => "saving",
        }
    }
}

/// What a rank says of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Standing {
    /// What it is at.
    pub phase: Phase,
    /// Optimizer steps done, and those of the whole run; 0 of 0 before they are known.
    pub step: u64,
    /// See `step`.
    pub steps: u64,
    /// Loss of the last step; NaN before the first.
    pub loss: f32,
    /// Images a second over all ranks in the last step; 0 before the first.
    pub images_per_second: f32,
    /// Grows with every sign of life.
    pub changes: u64,
    /// Number of the last collective that it entered, from 1.
    pub entered: u64,
    /// Whether it is in that one still.
    pub is_inside: bool,
    /// Time spent in collectives since its start, which is nearly all waiting for others.
    pub waited: Duration,
}

/// Its words in the shared segment. Zeros are a rank that has said nothing.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Words {
    phase: AtomicU32,
    loss: AtomicU32,
    images_per_second: AtomicU32,
    step: AtomicU64,
    steps: AtomicU64,
    changes: AtomicU64,
    entered: AtomicU64,
    left: AtomicU64,
    waited: AtomicU64,
}

impl Words {
    /// The rank begins something else.
    pub fn enter_phase(&self, phase: Phase) {
        self.phase.store(phase as u32, Ordering::Relaxed);
        self.live();
    }

    /// A step is done.
    pub fn finish_step(&self, (step, steps): (u64, u64), loss: f32, images_per_second: f32) {
        self.step.store(step, Ordering::Relaxed);
        self.steps.store(steps, Ordering::Relaxed);
        self.loss.store(loss.to_bits(), Ordering::Relaxed);
        self.images_per_second.store(images_per_second.to_bits(), Ordering::Relaxed);
        self.live();
    }

    /// A sign of life.
    pub fn live(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Collective number `seq` begins.
    pub fn enter(&self, seq: u64) {
        self.entered.store(seq, Ordering::Relaxed);
        self.live();
    }

    /// It ended after this time.
    pub fn leave(&self, seq: u64, took: Duration) {
        self.left.store(seq, Ordering::Relaxed);
        self.waited.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        self.live();
    }

    /// All of it.
    pub fn read(&self) -> Standing {
        let changes = self.changes.load(Ordering::Acquire);
        let phase = self.phase.load(Ordering::Relaxed) as usize;
        let step = self.step.load(Ordering::Relaxed);
        let loss = f32::from_bits(self.loss.load(Ordering::Relaxed));
        let entered = self.entered.load(Ordering::Relaxed);
        Standing {
            phase: Phase::ALL.get(phase).copied().unwrap_or_default(),
            step,
            steps: self.steps.load(Ordering::Relaxed),
            loss: if self.steps.load(Ordering::Relaxed) == 0 { f32::NAN } else { loss },
            images_per_second: f32::from_bits(self.images_per_second.load(Ordering::Relaxed)),
            changes,
            entered,
            is_inside: self.left.load(Ordering::Relaxed) < entered,
            waited: Duration::from_nanos(self.waited.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_keep_their_numbers() {
        for (number, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, number, "{}", phase.name());
        }
    }

    #[test]
    fn what_was_said_is_read() {
        let words = Words::default();
        let silent = words.read();
        assert_eq!((silent.phase, silent.step, silent.is_inside), (Phase::Starting, 0, false));
        assert!(silent.loss.is_nan());
        words.enter_phase(Phase::Training);
        words.enter(4);
        assert!(words.read().is_inside);
        words.leave(4, Duration::from_millis(3));
        words.finish_step((7, 9), 0.5, 12.);
        let said = words.read();
        assert!(said.changes > silent.changes && !said.is_inside);
        let expected = Standing {
            phase: Phase::Training,
            step: 7,
            steps: 9,
            loss: 0.5,
            images_per_second: 12.,
            changes: 4,
            entered: 4,
            is_inside: false,
            waited: Duration::from_millis(3),
        };
        assert_eq!(said, expected);
    }
}
