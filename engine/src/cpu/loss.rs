//! The weighted loss of each sample and its gradient, in one pass with f64 sums.

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

vectorized! {
    /// Sum of the losses of a chunk; the gradient, times `factor`, goes to `grad`.
    fn chunk<T: Scalar>(
        grad: &mut [T],
        pred: &[T],
        target: &[f32],
        kind: ElementLoss,
        scale: (f32, f32),
    ) -> f64 {
        let (delta, factor) = scale;
        let mut sum = 0f64;
        for ((grad, pred), target) in grad.iter_mut().zip(pred).zip(target) {
            let (loss, slope) = element(kind, pred.to_f32() - target, delta);
            sum += f64::from(loss);
            *grad = T::from_f32(slope * factor);
        }
        sum
    }
}

/// Weighted mean loss of each sample (f32 `[B]`) and the gradient of `pred` of their sum.
pub(super) fn loss(pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(Tensor, Tensor)> {
    let batch = pred.shape().first().copied().unwrap_or(0);
    let lists = [spec.delta.len(), spec.weight.len()];
    if pred.shape() != target.shape() || lists != [batch, batch] {
        let detail = format!(
            "prediction {:?}, target {:?}, {} deltas, {} weights",
            pred.shape(),
            target.shape(),
            lists[0],
            lists[1]
        );
        return Err(EngineError::shape("loss", detail));
    }
    let size = pred.len().checked_div(batch).unwrap_or(0);
    if size == 0 {
        return Err(EngineError::shape("loss", format!("{:?} has no elements", pred.shape())));
    }
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
        let data: &[T] = &data;
        let mut grad = pool::take::<T>(data.len());
        let mut each = Vec::with_capacity(batch);
        for (sample, grad) in grad.chunks_exact_mut(size).enumerate() {
            let range = sample * size..(sample + 1) * size;
            let weight = spec.weight[sample];
            let scale = (spec.delta[sample], (f64::from(weight) / size as f64) as f32);
            if let Some(masks) = &masks {
                let pairs = data[range.clone()].iter().zip(&aims[range.clone()]);
                let mut sum = 0f64;
                for ((grad, (pred, target)), mask) in grad.iter_mut().zip(pairs).zip(&masks[range]) {
                    let (loss, slope) = element(spec.element, pred.to_f32() - target, scale.0);
                    sum += f64::from(loss * mask);
                    *grad = T::from_f32(slope * mask * scale.1);
                }
                each.push((f64::from(weight) * sum / size as f64) as f32);
                continue;
            }
            let partial: Vec<f64> = grad
                .par_chunks_mut(CHUNK)
                .zip(data[range.clone()].par_chunks(CHUNK))
                .zip(aims[range].par_chunks(CHUNK))
                .map(|((grad, pred), target)| chunk(grad, pred, target, spec.element, scale))
                .collect();
            let mean = partial.iter().sum::<f64>() / size as f64;
            each.push((f64::from(weight) * mean) as f32);
        }
        let each = Tensor::from_f32(pred.device(), &[batch], &each, DType::F32)?;
        Ok((each, Tensor::from_pooled(pred.shape(), grad)))
    })
}
