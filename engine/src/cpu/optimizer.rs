//! AdamW in PyTorch's order of operations (Loshchilov & Hutter, arXiv:1711.05101), and sums into a
//! flat gradient.

use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::simd::vectorized;
use crate::backend::AdamWStep;
use crate::{EngineError, Result, Tensor};

/// The scalars of one step, worked out in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub decay: f32,
    pub keep1: f32,
    pub take1: f32,
    pub keep2: f32,
    pub take2: f32,
    pub root_correction2: f32,
    pub step_size: f32,
    pub eps: f32,
}

impl Factors {
    /// For learning rate and weight decay, the decay rates of both moments, and the step from 1 on.
    pub(crate) fn new(
        (lr, weight_decay): (f32, f64),
        (beta1, beta2): (f64, f64),
        eps: f32,
        step: u32,
    ) -> Self {
        let correction = |beta: f64| 1. - beta.powi(step.min(i32::MAX as u32) as i32);
        let lr = f64::from(lr);
        Self {
            decay: (1. - lr * weight_decay) as f32,
            keep1: beta1 as f32,
            take1: (1. - beta1) as f32,
            keep2: beta2 as f32,
            take2: (1. - beta2) as f32,
            root_correction2: correction(beta2).sqrt() as f32,
            step_size: (lr / correction(beta1)) as f32,
            eps,
        }
    }

    /// Of a step over a range.
    pub(crate) fn of(p: &AdamWStep) -> Self {
        Self::new((p.lr, f64::from(p.weight_decay)), (p.beta1, p.beta2), p.eps, p.step)
    }
}

vectorized! {
    fn update(f: Factors, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((param, grad), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let decayed = *param * f.decay;
            // PyTorch's `lerp` picks the end it is nearer to: exact for a zero distance.
            *m = if f.take1 < 0.5 {
                *m + f.take1 * (grad - *m)
            } else {
                grad - (grad - *m) * f.keep1
            };
            *v = *v * f.keep2 + f.take2 * grad * grad;
            let denominator = v.sqrt() / f.root_correction2 + f.eps;
            *param = decayed - f.step_size * (*m / denominator);
        }
    }
}

/// One optimizer step over `p.range` of flat f32 tensors of one length (`grad` too); `param` and the
/// moments change in place.
pub(super) fn adamw(
    p: &AdamWStep,
    param: &mut Tensor,
    grad: &Tensor,
    moments: (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let (m, v) = moments;
    let grad = grad.elements::<f32>("adamw")?;
    let grad: &[f32] = &grad;
    if [param.len(), m.len(), v.len()] != [grad.len(); 3]
        || p.step == 0
        || p.range.start > p.range.end
        || p.range.end > grad.len()
    {
        let detail = format!(
            "range {:?} of {} parameters, {} gradients, moments of {} and {}, step {}",
            p.range,
            param.len(),
            grad.len(),
            m.len(),
            v.len(),
            p.step
        );
        return Err(EngineError::shape("adamw", detail));
    }
    let (factors, range) = (Factors::of(p), p.range.clone());
    param.with_mut::<f32, _>("adamw", |param| {
        m.with_mut::<f32, _>("adamw", |m| {
            v.with_mut::<f32, _>("adamw", |v| {
                param[range.clone()]
                    .par_chunks_mut(CHUNK)
                    .zip(grad[range.clone()].par_chunks(CHUNK))
                    .zip(m[range.clone()].par_chunks_mut(CHUNK))
                    .zip(v[range].par_chunks_mut(CHUNK))
                    .for_each(|(((param, grad), m), v)| update(factors, param, grad, m, v));
            })
        })
    })??
}

/// `flat[offset..offset + x.len()] += x`, f32, in place.
pub(super) fn add_at(flat: &mut Tensor, offset: usize, x: &Tensor) -> Result<()> {
    const OP: &str = "add_at";
    let end = offset + x.len();
    if end > flat.len() {
        return Err(EngineError::shape(OP, format!("{x:?} at {offset} of {flat:?}")));
    }
    let x = x.elements::<f32>(OP)?;
    let x: &[f32] = &x;
    flat.with_mut::<f32, _>(OP, |flat| {
        flat[offset..end]
            .par_chunks_mut(CHUNK)
            .zip(x.par_chunks(CHUNK))
            .for_each(|(sum, x)| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x));
    })
}
