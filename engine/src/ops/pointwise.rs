//! Elementwise operations and the loss.

use crate::backend::{Activation, LossSpec};
use crate::{DType, EngineError, Result, Tape, Tensor, Value};

impl<'m> Tape<'m> {
    /// An activation; saves its input.
    pub fn activation(&self, kind: Activation, x: &Value) -> Result<Value> {
        let y = x.tensor().device().backend().activation(kind, x.tensor())?;
        let (saved, origin) = (x.tensor().clone(), x.origin());
        Ok(self.record(y, &[x], move |dy, grads| {
            let dx = dy.device().backend().activation_backward(kind, dy, &saved)?;
            grads.add(origin, dx)
        }))
    }

    /// `x[..C] · gelu(x[C..])` over the last axis of `[...,2C]`; saves its input.
    pub fn geglu(&self, x: &Value) -> Result<Value> {
        let y = x.tensor().device().backend().geglu(x.tensor())?;
        let (saved, origin) = (x.tensor().clone(), x.origin());
        Ok(self.record(y, &[x], move |dy, grads| {
            grads.add(origin, dy.device().backend().geglu_backward(&dy, &saved)?)
        }))
    }

    /// Sum of two values of one shape.
    pub fn add(&self, a: &Value, b: &Value) -> Result<Value> {
        let y = a.tensor().device().backend().add(a.tensor(), b.tensor())?;
        let (left, right) = (a.origin(), b.origin());
        Ok(self.record(y, &[a, b], move |dy, grads| {
            grads.add(left, dy.clone())?;
            grads.add(right, dy)
        }))
    }

    /// `x·factor`.
    pub fn scale(&self, x: &Value, factor: f32) -> Result<Value> {
        let y = x.tensor().device().backend().scale(x.tensor(), factor)?;
        let origin = x.origin();
        Ok(self.record(y, &[x], move |dy, grads| {
            grads.add(origin, dy.device().backend().scale(&dy, factor)?)
        }))
    }

    /// Another element type; the gradient is cast back.
    pub fn cast(&self, x: &Value, dtype: DType) -> Result<Value> {
        let before = x.tensor().dtype();
        if before == dtype {
            return Ok(x.clone());
        }
        let origin = x.origin();
        let y = x.tensor().to_dtype(dtype)?;
        Ok(self.record(y, &[x], move |dy, grads| grads.add(origin, dy.to_dtype(before)?)))
    }

    /// The weighted loss of each sample and their sum as a scalar to start the backward from.
    ///
    /// `pred` is `[B,...]`, `target` f32 of the same shape; see [`LossSpec`].
    pub fn loss(
        &self,
        pred: &Value,
        target: &Tensor,
        spec: &LossSpec,
    ) -> Result<(Vec<f32>, Value)> {
        let batch = pred.shape().first().copied().unwrap_or(0);
        if pred.shape() != target.shape() || spec.delta.len() != batch || spec.weight.len() != batch
        {
            let detail = format!(
                "prediction {:?}, target {:?}, {} weights, {} deltas",
                pred.shape(),
                target.shape(),
                spec.weight.len(),
                spec.delta.len()
            );
            return Err(EngineError::shape("loss", detail));
        }
        let (each, gradient) =
            pred.tensor().device().backend().loss(pred.tensor(), target, spec)?;
        let each = each.to_vec_f32()?;
        let total = each.iter().sum::<f32>();
        let total = Tensor::from_f32(pred.tensor().device(), &[], &[total], DType::F32)?;
        let origin = pred.origin();
        let value = self.record(total, &[pred], move |dy, grads| {
            let seed = dy.to_vec_f32()?[0];
            let scaled = if seed == 1. {
                gradient
            } else {
                gradient.device().backend().scale(&gradient, seed)?
            };
            grads.add(origin, scaled)
        });
        Ok((each, value))
    }
}
