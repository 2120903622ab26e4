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

    /// The weighted loss of each sample, f32 `[B]`: where the backward starts. The gradient is that of
    /// their sum.
    ///
    /// `pred` is `[B,...]`, `target` f32 of the same shape; see [`LossSpec`].
    pub fn loss(&self, pred: &Value, target: &Tensor, spec: &LossSpec) -> Result<Value> {
        let batch = pred.shape().first().copied().unwrap_or(0);
        let lists = [&spec.delta, &spec.weight, &spec.gradient_weight].map(Tensor::len);
        if pred.shape() != target.shape() || lists != [batch; 3] {
            let detail = format!(
                "prediction {:?}, target {:?}, deltas and weights {lists:?}",
                pred.shape(),
                target.shape()
            );
            return Err(EngineError::shape("loss", detail));
        }
        let (each, gradient) =
            pred.tensor().device().backend().loss(pred.tensor(), target, spec)?;
        let origin = pred.origin();
        // The kernel has made the gradient along with the loss; what arrives here is only the start.
        Ok(self.record(each, &[pred], move |_, grads| grads.add(origin, gradient)))
    }
}
