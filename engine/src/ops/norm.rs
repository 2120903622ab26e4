//! Normalisations with frozen scale and shift; they save their input and its statistics.

use crate::backend::GroupNormShape;
use crate::{Result, Tape, Tensor, Value};

/// Group normalisation over `[B,...,C]`, optionally followed by SiLU.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Frozen f32 `[C]`.
    pub gamma: Tensor,
    /// Frozen f32 `[C]`.
    pub beta: Tensor,
    /// Groups of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl GroupNorm {
    /// Normalises `x`.
    pub fn forward<'m>(&self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        self.run(tape, x, false)
    }

    /// Normalises `x` and applies SiLU in the same pass.
    pub fn forward_silu<'m>(&self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        self.run(tape, x, true)
    }

    fn run<'m>(&self, tape: &Tape<'m>, x: &Value, silu: bool) -> Result<Value> {
        let shape = GroupNormShape { groups: self.groups, eps: self.eps, silu };
        let backend = x.tensor().device().backend();
        let (y, stats) = backend.group_norm(x.tensor(), &self.gamma, &self.beta, shape)?;
        let (gamma, beta) = (self.gamma.clone(), self.beta.clone());
        let (saved, origin) = (x.tensor().clone(), x.origin());
        Ok(tape.record(y, &[x], move |dy, grads| {
            let backend = dy.device().backend();
            let affine = (&gamma, &beta);
            grads.add(origin, backend.group_norm_backward(dy, &saved, &stats, affine, shape)?)
        }))
    }
}

/// Layer normalisation of the last axis.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Frozen f32 `[C]`.
    pub gamma: Tensor,
    /// Frozen f32 `[C]`.
    pub beta: Tensor,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// Normalises `x`.
    pub fn forward<'m>(&self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        let backend = x.tensor().device().backend();
        let (y, stats) = backend.layer_norm(x.tensor(), &self.gamma, &self.beta, self.eps)?;
        let gamma = self.gamma.clone();
        let (saved, origin) = (x.tensor().clone(), x.origin());
        Ok(tape.record(y, &[x], move |dy, grads| {
            let backend = dy.device().backend();
            grads.add(origin, backend.layer_norm_backward(dy, &saved, &stats, &gamma)?)
        }))
    }
}
