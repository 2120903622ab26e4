//! Linear layers with frozen weights and an optional adapter.
//!
//! `y = x·Wᵀ + scale·(x·downᵀ)·upᵀ + b (+ residual)` with a LoRA. Only `x` and the adapter get
//! gradients; the frozen weight is shared, not copied.

use super::adapter::{self, Adapter};
use crate::backend::{Gemm, LowRank};
use crate::{DType, EngineError, Result, Tape, Tensor, Value};

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
        let product = |w: &Tensor| backend.gemm(&Gemm::new(x.tensor(), false, w, true));
        let active = adapter::activate(self.adapter.as_ref(), tape, x, &self.weight, product)?;
        let replaced = active.weight()?;
        let y = backend.gemm(&Gemm {
            low_rank: active.low_rank(),
            bias: self.bias.as_ref(),
            residual: residual.map(Value::tensor),
            ..Gemm::new(x.tensor(), false, replaced.as_ref().unwrap_or(&self.weight), true)
        })?;
        let y = y.reshape(&shape)?;

        let weight = self.weight.clone();
        let (x_origin, x_shape, x_tracked) = (x.origin(), x.shape().to_vec(), x.is_tracked());
        let residual_origin = residual.map(Value::origin);
        let params = active.params().to_vec();
        let inputs: Vec<&Value> = [x].into_iter().chain(residual).chain(&params).collect();
        Ok(tape.record(y, &inputs, move |dy, grads| {
            let backend = dy.device().backend();
            let through = active.backward(&dy, grads, x_tracked, |x, d| {
                backend.gemm(&Gemm { out: DType::F32, ..Gemm::new(d, true, x, false) })
            })?;
            if x_tracked {
                let low_rank = active.input_term(&through);
                let low_rank =
                    low_rank.map(|(left, right)| LowRank { left, right, trans_right: false });
                let dx = Gemm { low_rank, ..Gemm::new(&dy, false, through.weight(&weight), false) };
                grads.add(x_origin, backend.gemm(&dx)?.reshape(&x_shape)?)?;
            }
            residual_origin.map_or(Ok(()), |origin| grads.add(origin, dy))
        }))
    }
}
