//! The average of the LoRA over its steps (`ema_decay`): an exponential moving average, which is
//! smoother than the last weights and often the better picture.
//!
//! After each optimizer step `average += (1 - decay) * (weights - average)`, in f32, element by
//! element: every rank computes the same. In the first steps the decay is lower,
//! `min(ema_decay, (1 + n) / (10 + n))` after `n` updates (as in timm and diffusers), so that the
//! start, which is noise, is forgotten. The average goes into files of its own beside the usual ones;
//! training, validation and the usual files do not see it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use engine::ParamStore;

use crate::optimizer::OptimizerState;
use crate::optimizer::state::{Reader, Writer};

/// The file of the average beside `path`: `cat-ema.safetensors` beside `cat.safetensors`.
pub fn average_path(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let suffix = path.extension().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-ema.{suffix}"))
}

/// The average so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Ema {
    decay: f64,
    updates: u32,
    average: Vec<f32>,
}

impl Ema {
    /// Starts at the given weights. `decay` lies in 0..1.
    pub fn new(decay: f64, params: &ParamStore) -> Result<Self> {
        Ok(Self { decay, updates: 0, average: params.flat().to_vec_f32()? })
    }

    /// Takes the weights after an optimizer step in.
    pub fn update(&mut self, weights: &[f32]) {
        let updates = f64::from(self.updates);
        let decay = self.decay.min((1. + updates) / (10. + updates));
        let share = (1. - decay) as f32;
        for (average, weight) in self.average.iter_mut().zip(weights) {
            *average += share * (weight - *average);
        }
        self.updates = self.updates.saturating_add(1);
    }

    /// The average, as long as the flat tensor of the parameters.
    pub fn average(&self) -> &[f32] {
        &self.average
    }

    /// Everything to go on from.
    pub fn state(&self) -> Result<OptimizerState> {
        let mut writer = Writer::default();
        writer.number("updates", "", f64::from(self.updates));
        writer.values("average", "", &self.average)?;
        Ok(writer.finish())
    }

    /// Goes on from a state of [`Ema::state`].
    pub fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let mut reader = Reader::new("the averaged weights", state);
        self.updates = reader.count("updates", "")?;
        self.average = reader.values("average", "", self.average.len())?;
        reader.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Device;

    fn start(decay: f64) -> Ema {
        let params = ParamStore::new(Device::Cpu, &[(vec![2], vec![0., 1.])]).unwrap();
        Ema::new(decay, &params).unwrap()
    }

    #[test]
    fn the_average_follows_the_weights_faster_at_the_start() {
        let mut ema = start(0.5);
        ema.update(&[1., 1.]);
        // The first decay is 1/10: nine tenths of the way.
        assert_eq!(ema.average(), [0.9, 1.]);
        ema.update(&[0., 1.]);
        let second = 0.9 * (2. / 11.);
        assert!((ema.average()[0] - second).abs() < 1e-6, "{}", ema.average()[0]);
        for _ in 0..100 {
            ema.update(&[2., 1.]);
        }
        assert!((ema.average()[0] - 2.).abs() < 1e-5);
        let before = ema.average()[0];
        ema.update(&[4., 1.]);
        assert!((ema.average()[0] - (before + 4.) / 2.).abs() < 1e-5, "the decay is 0.5 by now");
    }

    #[test]
    fn the_average_has_a_file_of_its_own() {
        let path = average_path(Path::new("out/my.cat-step00000010.safetensors"));
        assert_eq!(path, Path::new("out/my.cat-step00000010-ema.safetensors"));
    }

    #[test]
    fn a_resumed_average_goes_on_to_the_bit() {
        let mut ema = start(0.99);
        ema.update(&[0.3, -0.7]);
        let mut resumed = start(0.99);
        resumed.load_state(ema.state().unwrap()).unwrap();
        for ema in [&mut ema, &mut resumed] {
            ema.update(&[0.1, 0.2]);
        }
        assert_eq!(ema, resumed);
        let mut state = ema.state().unwrap();
        state.tensors.clear();
        let message = resumed.load_state(state).unwrap_err().to_string();
        assert!(message.contains("`average`"), "{message}");
    }
}
