//! Linear layers with frozen weights and an optional LoRA.
//!
//! `y = x·Wᵀ + scale·(x·downᵀ)·upᵀ + b (+ residual)`. Only `x`, `down` and `up` get gradients; `x` is
//! saved for `down`'s, the frozen weight is shared, not copied.

use crate::backend::{Gemm, LowRank};
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

/// The tensors of an adapter in the compute type, and where their gradients go.
pub(super) struct Active {
    pub down: Value,
    pub up: Value,
    /// In the compute type, the rank's axes flattened: `[r,k]`.
    pub down_cast: Tensor,
    /// `scale·up` in the compute type, `[out,r]`.
    pub up_scaled: Tensor,
    pub scale: f32,
}

impl Adapter {
    pub(super) fn activate(&self, tape: &Tape, dtype: DType) -> Result<Active> {
        let (down, up) = (tape.param(self.down)?, tape.param(self.up)?);
        let backend = up.tensor().device().backend();
        let down_cast = down.tensor().to_dtype(dtype)?;
        let up_scaled = backend.scale(up.tensor(), self.scale)?.to_dtype(dtype)?;
        Ok(Active { down, up, down_cast, up_scaled, scale: self.scale })
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
        let active = match &self.adapter {
            Some(adapter) => Some(adapter.activate(tape, x.tensor().dtype())?),
            None => None,
        };
        let hidden = match &active {
            Some(a) => Some(backend.gemm(&Gemm::new(x.tensor(), false, &a.down_cast, true))?),
            None => None,
        };
        let low_rank = active.as_ref().zip(hidden.as_ref()).map(|(a, hidden)| LowRank {
            left: hidden,
            right: &a.up_scaled,
            trans_right: true,
        });
        let y = backend.gemm(&Gemm {
            low_rank,
            bias: self.bias.as_ref(),
            residual: residual.map(Value::tensor),
            ..Gemm::new(x.tensor(), false, &self.weight, true)
        })?;
        let y = y.reshape(&shape)?;

        let weight = self.weight.clone();
        let x_origin = x.origin();
        let residual_origin = residual.map(Value::origin);
        let mut inputs = vec![x];
        inputs.extend(residual);
        let params = active.as_ref().map(|a| (a.down.clone(), a.up.clone()));
        if let Some((down, up)) = &params {
            inputs.extend([down, up]);
        }
        let saved = active.zip(hidden).map(|(a, hidden)| (a, hidden, x.tensor().clone()));
        let x_tracked = x.is_tracked();
        let x_shape = x.shape().to_vec();
        Ok(tape.record(y, &inputs, move |dy, grads| {
            let backend = dy.device().backend();
            let mut through = None;
            if let Some((a, hidden, x)) = &saved {
                // dL/dh = dy·(scale·up), shared by the gradients of `down` and of `x`.
                let dh = backend.gemm(&Gemm::new(&dy, false, &a.up_scaled, false))?;
                let up =
                    Gemm { alpha: a.scale, out: DType::F32, ..Gemm::new(&dy, true, hidden, false) };
                grads.add(a.up.origin(), backend.gemm(&up)?.reshape(a.up.shape())?)?;
                let down = Gemm { out: DType::F32, ..Gemm::new(&dh, true, x, false) };
                grads.add(a.down.origin(), backend.gemm(&down)?.reshape(a.down.shape())?)?;
                through = Some((dh, a.down_cast.clone()));
            }
            if x_tracked {
                let low_rank = through.as_ref().map(|(dh, down)| LowRank {
                    left: dh,
                    right: down,
                    trans_right: false,
                });
                let dx = Gemm { low_rank, ..Gemm::new(&dy, false, &weight, false) };
                grads.add(x_origin, backend.gemm(&dx)?.reshape(&x_shape)?)?;
            }
            residual_origin.map_or(Ok(()), |origin| grads.add(origin, dy))
        }))
    }
}
