//! What the optimizers share that estimate the distance `d` to the solution and step by it
//! (D-Adaptation, arXiv:2301.07733; Prodigy, arXiv:2306.06101): one learning rate for all tensors,
//! sums over all tensors, and a state of a few numbers.

use anyhow::{Result, bail};

use super::tensors::{Slot, Slots};
use super::{OptimizerState, StepInput, state};

/// The learning rate of the step, by which `d` is scaled. There is one `d`, so tensors can have this
/// rate or none at all.
pub(super) fn common_rate(optimizer: &str, input: &StepInput) -> Result<f64> {
    one_rate(optimizer, input.tensors.iter().map(|tensor| f64::from(tensor.lr)))
}

/// The one of `rates` that is not 0; 0 where all are.
///
/// # Errors
/// There are several.
pub(super) fn one_rate(optimizer: &str, rates: impl Iterator<Item = f64>) -> Result<f64> {
    let mut found = 0.;
    for rate in rates.filter(|rate| *rate != 0.) {
        if ![0., rate].contains(&found) {
            bail!(
                "{optimizer} finds one learning rate for all tensors, the config gives several: \
                 `{found}` and `{rate}`\n\
                 hint: give the same `unet_lr` and `text_encoder_lr` (1.0), without factors for \
                 blocks or `loraplus_lr_ratio`; 0 leaves a part untrained"
            );
        }
        found = rate;
    }
    Ok(found)
}

/// Sums of what the tensors gave, in their order.
pub(super) fn sums<const N: usize>(parts: &[[f64; N]]) -> [f64; N] {
    let mut total = [0.; N];
    for part in parts {
        for (sum, x) in total.iter_mut().zip(part) {
            *sum += x;
        }
    }
    total
}

/// Saves the numbers of all and the states of the tensors.
pub(super) fn save<G: Slot, S: Slot>(global: &G, slots: &Slots<S>) -> Result<OptimizerState> {
    let mut writer = state::Writer::default();
    global.save("", &mut writer)?;
    slots.save(&mut writer)?;
    Ok(writer.finish())
}

/// Loads what [`save`] gave.
pub(super) fn load<G: Slot, S: Slot>(
    optimizer: &'static str,
    (global, slots): (&mut G, &mut Slots<S>),
    state: OptimizerState,
) -> Result<()> {
    let mut reader = state::Reader::new(optimizer, state);
    global.load("", &mut reader)?;
    slots.load(&mut reader)?;
    reader.finish()
}
