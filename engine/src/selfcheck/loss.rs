//! The weighted loss of each sample and its gradient.

use super::{Check, for_types, on_both, random, random_on_both, worst_error};
use crate::backend::{ElementLoss, LossSpec};
use crate::{DType, Device, Result, Tensor};

const KINDS: [ElementLoss; 4] =
    [ElementLoss::L2, ElementLoss::L1, ElementLoss::Huber, ElementLoss::SmoothL1];

/// All checks of this kind: one part of a sample, several, and tails.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    for kind in KINDS {
        for masked in [false, true] {
            for shape in [&[3_usize, 7, 5, 4][..], &[2, 33, 32, 4], &[1, 1]] {
                let name = format!("loss {kind:?} {shape:?} masked {masked}");
                all.extend(for_types(&name, 1., move |device, dtype| {
                    compare(device, (kind, masked), shape, dtype)
                }));
            }
            let shape = [8_usize, 64, 64, 4];
            let name = format!("loss {kind:?} {shape:?} masked {masked}");
            let big = for_types(&name, 1., move |device, dtype| {
                compare(device, (kind, masked), &shape, dtype)
            });
            all.extend(big.into_iter().map(Check::big));
        }
    }
    all
}

fn compare(
    device: Device,
    (kind, masked): (ElementLoss, bool),
    shape: &[usize],
    dtype: DType,
) -> Result<f32> {
    let (pred, reference) = random_on_both(device, shape, 20, dtype)?;
    let (target, reference_target) = random_on_both(device, shape, 21, DType::F32)?;
    let list = |first: f32| -> Vec<f32> { (0..shape[0]).map(|i| first + i as f32 / 8.).collect() };
    let (deltas, weights) = (list(0.1), list(0.5));
    // The loss scale of fp16 is in the gradient alone.
    let scaled: Vec<f32> = weights.iter().map(|weight| weight * 1024.).collect();
    let spec = |device: Device, mask: Option<Tensor>| -> Result<LossSpec> {
        let mut spec = LossSpec::new(device, kind, &deltas, &weights)?;
        spec.gradient_weight = Tensor::from_f32(device, &[shape[0]], &scaled, DType::F32)?;
        spec.mask = mask;
        Ok(spec)
    };
    let (there, here) = on_both(device, &random(shape, 22)?, DType::F32)?;
    let (there, here) = if masked { (Some(there), Some(here)) } else { (None, None) };
    let (losses, gradient) = device.backend().loss(&pred, &target, &spec(device, there)?)?;
    let cpu = Device::Cpu.backend();
    let want = cpu.loss(&reference, &reference_target, &spec(Device::Cpu, here)?)?;
    worst_error([(&losses, &want.0), (&gradient, &want.1)])
}
