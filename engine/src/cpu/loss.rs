//! The weighted loss of each sample and its gradient, in one pass with f64 sums.

use std::ops::Range;

use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::simd::{Scalar, vectorized, with_scalar};
use crate::backend::{ElementLoss, LossSpec};
use crate::{DType, EngineError, Result, Tensor, pool};

/// Loss and derivative of one difference.
#[inline(always)]
fn element(kind: ElementLoss, d: f32, c: f32) -> (f32, f32) {
    match kind {
        ElementLoss::L2 => (d * d, 2. * d),
        ElementLoss::L1 => {
            let sign = f32::from(d > 0.) - f32::from(d < 0.);
            (d.abs(), sign)
        }
        ElementLoss::Huber => {
            let root = (d * d + c * c).sqrt();
            (2. * c * (root - c), 2. * c * (d / root.max(f32::MIN_POSITIVE)))
        }
        ElementLoss::SmoothL1 => {
            let root = (d * d + c * c).sqrt();
            (2. * (root - c), 2. * (d / root.max(f32::MIN_POSITIVE)))
        }
    }
}

/// Prediction, target and, if there is one, mask of some elements.
#[derive(Clone, Copy)]
struct Elements<'a, T> {
    pred: &'a [T],
    target: &'a [f32],
    mask: Option<&'a [f32]>,
}

impl<'a, T: Sync> Elements<'a, T> {
    fn part(self, range: Range<usize>) -> Self {
        Self {
            pred: &self.pred[range.clone()],
            target: &self.target[range.clone()],
            mask: self.mask.map(|mask| &mask[range]),
        }
    }
}

vectorized! {
    /// Sum of the losses of a chunk; the gradient, times `factor`, goes to `grad`.
    fn chunk<T: Scalar>(
        grad: &mut [T],
        x: Elements<T>,
        kind: ElementLoss,
        delta: f32,
        factor: f32,
    ) -> f64 {
        let mut sum = 0f64;
        let pairs = grad.iter_mut().zip(x.pred).zip(x.target);
        if let Some(mask) = x.mask {
            for (((grad, pred), target), mask) in pairs.zip(mask) {
                let (loss, slope) = element(kind, pred.to_f32() - target, delta);
                sum += f64::from(loss * mask);
                *grad = T::from_f32(slope * mask * factor);
            }
        } else {
            for ((grad, pred), target) in pairs {
                let (loss, slope) = element(kind, pred.to_f32() - target, delta);
                sum += f64::from(loss);
                *grad = T::from_f32(slope * factor);
            }
        }
        sum
    }
}

/// Weighted mean loss of each sample (f32 `[B]`) and the gradient of `pred` of their sum.
pub(super) fn loss(pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(Tensor, Tensor)> {
    let batch = pred.shape().first().copied().unwrap_or(0);
    let lists = [&spec.delta, &spec.weight, &spec.gradient_weight];
    if pred.shape() != target.shape() || lists.iter().any(|list| list.len() != batch) {
        let detail = format!(
            "prediction {:?}, target {:?}, deltas and weights {lists:?}",
            pred.shape(),
            target.shape()
        );
        return Err(EngineError::shape("loss", detail));
    }
    let size = pred.len().checked_div(batch).unwrap_or(0);
    if size == 0 {
        return Err(EngineError::shape("loss", format!("{:?} has no elements", pred.shape())));
    }
    let [deltas, weights, gradient_weights] = lists.map(|list| list.elements::<f32>("loss"));
    let (deltas, weights, gradient_weights) = (deltas?, weights?, gradient_weights?);
    let aims = target.elements::<f32>("loss")?;
    let aims: &[f32] = &aims;
    let masks = match &spec.mask {
        Some(mask) if mask.shape() == pred.shape() => Some(mask.elements::<f32>("loss")?),
        Some(mask) => {
            let detail = format!("prediction {:?}, mask {:?}", pred.shape(), mask.shape());
            return Err(EngineError::shape("loss", detail));
        }
        None => None,
    };
    with_scalar!(pred.dtype(), T => {
        let data = pred.elements::<T>("loss")?;
        let all = Elements { pred: &data, target: aims, mask: masks.as_deref() };
        let mut grad = pool::take::<T>(data.len());
        let mut each = Vec::with_capacity(batch);
        for (sample, grad) in grad.chunks_exact_mut(size).enumerate() {
            let of_sample = all.part(sample * size..(sample + 1) * size);
            let (weight, delta) = (f64::from(weights[sample]), deltas[sample]);
            let factor = (f64::from(gradient_weights[sample]) / size as f64) as f32;
            let partial: Vec<f64> = grad
                .par_chunks_mut(CHUNK)
                .enumerate()
                .map(|(index, grad)| {
                    let x = of_sample.part(index * CHUNK..index * CHUNK + grad.len());
                    chunk(grad, x, spec.element, delta, factor)
                })
                .collect();
            each.push((weight * partial.iter().sum::<f64>() / size as f64) as f32);
        }
        let each = Tensor::from_f32(pred.device(), &[batch], &each, DType::F32)?;
        Ok((each, Tensor::from_pooled(pred.shape(), grad)))
    })
}
