//! Linear layers with frozen weights and an optional LoRA.
//!
//! `y = x·Wᵀ + scale·(x·downᵀ)·upᵀ + b (+ residual)`. Only `x`, `down` and `up` get gradients; `x` is
//! saved for `down`'s, the frozen weight is shared, not copied.

use crate::backend::{Gemm, LowRank};
use crate::tape::Gradients;
use crate::{DType, EngineError, ParamId, Result, Tape, Tensor, Value};

/// A low-rank update of a layer (Hu et al., arXiv:2106.09685).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adapter {
    /// `[r,in]` for a linear layer, `[r,kh,kw,in]` for a convolution.
    pub down: ParamId,
    /// `[out,r]`.
    pub up: ParamId,
    /// `alpha/r`, times the multiplier.
    pub scale: f32,
}

/// A linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Frozen `[out,in]`.
    pub weight: Tensor,
    /// Frozen f32 `[out]`.
    pub bias: Option<Tensor>,
    /// Trainable update.
    pub adapter: Option<Adapter>,
}

/// An adapter at work on one input: its tensors in the compute type, and what its backward needs.
pub(super) struct Active {
    down: Value,
    up: Value,
    scale: f32,
    x: Tensor,
    /// `down` in the compute type.
    pub down_cast: Tensor,
    /// `scale·up` in the compute type, `[out,r]`.
    up_scaled: Tensor,
    /// `down` applied to the input, `[...,r]`.
    hidden: Tensor,
}

impl Adapter {
    /// Applies `down` to `x` by the given operation of the layer's kind.
    pub(super) fn activate(
        &self,
        tape: &Tape,
        x: &Value,
        apply: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Active> {
        let (down, up, x) = (tape.param(self.down)?, tape.param(self.up)?, x.tensor().clone());
        let backend = x.device().backend();
        let down_cast = down.tensor().to_dtype(x.dtype())?;
        let up_scaled = backend.scale(up.tensor(), self.scale)?.to_dtype(x.dtype())?;
        let hidden = apply(&down_cast)?;
        Ok(Active { down, up, scale: self.scale, x, down_cast, up_scaled, hidden })
    }
}

impl Active {
    /// The product that the layer adds to its own.
    pub(super) fn low_rank(&self) -> LowRank<'_> {
        LowRank { left: &self.hidden, right: &self.up_scaled, trans_right: true }
    }

    /// The trainable inputs of the layer.
    pub(super) fn params(&self) -> [Value; 2] {
        [self.down.clone(), self.up.clone()]
    }

    /// Adds the gradients of `up` and `down`; gives that of the hidden values, `[...,r]`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        down_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let backend = dy.device().backend();
        // dL/dh = dy·(scale·up), shared by the gradients of `down` and of the input.
        let dh = backend.gemm(&Gemm::new(dy, false, &self.up_scaled, false))?;
        let dh = dh.reshape(self.hidden.shape())?;
        let up = Gemm::new(dy, true, &self.hidden, false);
        let up = backend.gemm(&Gemm { alpha: self.scale, out: DType::F32, ..up })?;
        grads.add(self.up.origin(), up.reshape(self.up.shape())?)?;
        let down = down_gradient(&self.x, &dh)?;
        grads.add(self.down.origin(), down.reshape(self.down.shape())?)?;
        Ok(dh)
    }
}

impl Linear {
    /// `[...,in]` to `[...,out]`.
    pub fn forward<'m>(&self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        self.run(tape, x, None)
    }

    /// `forward(x) + residual` in one pass over the output.
    pub fn forward_add<'m>(&self, tape: &Tape<'m>, x: &Value, residual: &Value) -> Result<Value> {
        self.run(tape, x, Some(residual))
    }

    fn run<'m>(&self, tape: &Tape<'m>, x: &Value, residual: Option<&Value>) -> Result<Value> {
        let (out_dim, in_dim) = (self.weight.dim(0), self.weight.last_dim());
        if x.tensor().last_dim() != in_dim {
            let detail = format!("x is {:?}, the weight {:?}", x.shape(), self.weight.shape());
            return Err(EngineError::shape("linear", detail));
        }
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out_dim;
        }
        let backend = x.tensor().device().backend();
        let active = self.adapter.as_ref().map(|adapter| {
            let product = |down: &Tensor| backend.gemm(&Gemm::new(x.tensor(), false, down, true));
            adapter.activate(tape, x, product)
        });
        let active = active.transpose()?;
        let y = backend.gemm(&Gemm {
            low_rank: active.as_ref().map(Active::low_rank),
            bias: self.bias.as_ref(),
            residual: residual.map(Value::tensor),
            ..Gemm::new(x.tensor(), false, &self.weight, true)
        })?;
        let y = y.reshape(&shape)?;

        let weight = self.weight.clone();
        let (x_origin, x_shape, x_tracked) = (x.origin(), x.shape().to_vec(), x.is_tracked());
        let residual_origin = residual.map(Value::origin);
        let params = active.as_ref().map(Active::params);
        let inputs: Vec<&Value> =
            [x].into_iter().chain(residual).chain(params.iter().flatten()).collect();
        Ok(tape.record(y, &inputs, move |dy, grads| {
            let backend = dy.device().backend();
            let through = active.as_ref().map(|active| {
                active.backward(&dy, grads, |x, dh| {
                    backend.gemm(&Gemm { out: DType::F32, ..Gemm::new(dh, true, x, false) })
                })
            });
            let through = through.transpose()?;
            if x_tracked {
                let low_rank = through.as_ref().zip(active.as_ref()).map(|(dh, active)| LowRank {
                    left: dh,
                    right: &active.down_cast,
                    trans_right: false,
                });
                let dx = Gemm { low_rank, ..Gemm::new(&dy, false, &weight, false) };
                grads.add(x_origin, backend.gemm(&dx)?.reshape(&x_shape)?)?;
            }
            residual_origin.map_or(Ok(()), |origin| grads.add(origin, dy))
        }))
    }
}
