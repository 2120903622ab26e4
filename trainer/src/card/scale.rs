//! The loss scale of fp16: gradients are made with a loss that is multiplied by it, so that small ones
//! do not round to zero, and divided again before they are used.
//!
//! The rule is that of PyTorch's `torch.amp.GradScaler` with its defaults: start at 65536, halve when
//! a gradient is not finite (that step changes nothing), double after 2000 good steps in a row.

use anyhow::Result;

use crate::optimizer::OptimizerState;
use crate::optimizer::state::{Reader, Writer};

const START: f32 = 65536.;
const GOOD_STEPS: u32 = 2000;

/// The scale now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// `None`: the type of the arithmetic needs none.
    scale: Option<f32>,
    good: u32,
}

impl LossScale {
    /// The scale at the start of a run.
    pub fn new(needed: bool) -> Self {
        Self { scale: needed.then_some(START), good: 0 }
    }

    /// What the loss is multiplied by; 1 where no scale is needed.
    pub fn factor(&self) -> f32 {
        self.scale.unwrap_or(1.)
    }

    /// The scale for the logs, where there is one.
    pub fn shown(&self) -> Option<f64> {
        self.scale.map(f64::from)
    }

    /// A gradient was not finite although the loss was: halves the scale and is `true` if that can be
    /// the reason.
    pub fn overflowed(&mut self) -> bool {
        match &mut self.scale {
            // Below 1 the scale does not make gradients larger: it is not to blame.
            Some(scale) if *scale >= 1. => {
                (*scale, self.good) = (*scale / 2., 0);
                true
            }
            _ => false,
        }
    }

    /// A good step.
    pub fn passed(&mut self) {
        let Some(scale) = &mut self.scale else { return };
        self.good += 1;
        if self.good >= GOOD_STEPS {
            // The largest power of two below infinity is kept.
            (*scale, self.good) = ((*scale * 2.).min(2_f32.powi(127)), 0);
        }
    }

    /// Whether there is something to save.
    pub fn is_needed(&self) -> bool {
        self.scale.is_some()
    }

    /// Everything to go on from.
    pub fn state(&self) -> OptimizerState {
        let mut writer = Writer::default();
        writer.number("loss_scale", "", f64::from(self.factor()));
        writer.number("good_steps", "", f64::from(self.good));
        writer.finish()
    }

    /// Goes on from a state of [`LossScale::state`]; one that is not needed now is left alone.
    pub fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let mut reader = Reader::new("the loss scale", state);
        let scale = reader.number("loss_scale", "")? as f32;
        let good = reader.count("good_steps", "")?;
        reader.finish()?;
        anyhow::ensure!(
            scale > 0. && scale.is_finite(),
            "the saved loss scale is not one: {scale}"
        );
        if self.is_needed() {
            (self.scale, self.good) = (Some(scale), good);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_moves_as_pytorchs() {
        let mut scale = LossScale::new(true);
        assert_eq!(scale.factor(), 65536.);
        assert!(scale.overflowed() && scale.overflowed());
        assert_eq!(scale.factor(), 16384.);
        (0..1999).for_each(|_| scale.passed());
        assert!(scale.overflowed(), "an overflow ends the row of good steps");
        (0..1999).for_each(|_| scale.passed());
        assert_eq!(scale.factor(), 8192.);
        scale.passed();
        assert_eq!(scale.factor(), 16384.);
    }

    #[test]
    fn below_one_the_scale_is_not_to_blame() {
        let mut scale = LossScale::new(true);
        assert_eq!((0..100).filter(|_| scale.overflowed()).count(), 17);
        assert!(!LossScale::new(false).overflowed());
    }

    #[test]
    fn a_saved_scale_goes_on() {
        let mut scale = LossScale::new(true);
        scale.overflowed();
        scale.passed();
        let mut resumed = LossScale::new(true);
        resumed.load_state(scale.state()).unwrap();
        assert_eq!(resumed, scale);
        let mut plain = LossScale::new(false);
        plain.load_state(scale.state()).unwrap();
        assert_eq!(plain.factor(), 1.);
    }
}
