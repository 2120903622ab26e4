//! Convolutions with frozen weights and an optional adapter, NHWC.
//!
//! A LoRA's `down` is a convolution of the same window with `r` outputs, its `up` is 1x1: fused
//! into the frozen convolution as a low-rank product. A 1x1 window runs as a GEMM in the backend.

use super::adapter::{self, Adapter};
use crate::backend::{Conv, ConvGeometry};
use crate::{EngineError, Result, Tape, Tensor, Value};

/// A convolution.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// Frozen `[out,kh,kw,in]`.
    pub weight: Tensor,
    /// Frozen f32 `[out]`.
    pub bias: Option<Tensor>,
    /// Window.
    pub geometry: ConvGeometry,
    /// Trainable update.
    pub adapter: Option<Adapter>,
}

impl Conv2d {
    /// `[B,H,W,in]` to `[B,OH,OW,out]`.
    pub fn forward<'m>(&self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        self.run(tape, x, None, None)
    }

    /// Adds `per_image` `[B,out]` to every pixel of its image.
    pub fn forward_shifted<'m>(
        &self,
        tape: &Tape<'m>,
        x: &Value,
        per_image: &Value,
    ) -> Result<Value> {
        self.run(tape, x, Some(per_image), None)
    }

    /// Adds `residual` `[B,OH,OW,out]`.
    pub fn forward_add<'m>(&self, tape: &Tape<'m>, x: &Value, residual: &Value) -> Result<Value> {
        self.run(tape, x, None, Some(residual))
    }

    fn check(&self, x: &Value) -> Result<(usize, usize)> {
        let fail = || {
            let detail = format!("x is {:?}, the weight {:?}", x.shape(), self.weight.shape());
            EngineError::shape("conv2d", detail)
        };
        match x.shape() {
            [_, h, w, c] if *c == self.weight.last_dim() => {
                self.geometry.output(*h, *w).map(|_| (*h, *w)).ok_or_else(fail)
            }
            _ => Err(fail()),
        }
    }

    fn run<'m>(
        &self,
        tape: &Tape<'m>,
        x: &Value,
        per_image: Option<&Value>,
        residual: Option<&Value>,
    ) -> Result<Value> {
        let input = self.check(x)?;
        let geometry = self.geometry;
        let backend = x.tensor().device().backend();
        let product = |w: &Tensor| backend.conv2d(&plain(x.tensor(), w, geometry));
        let active = adapter::activate(self.adapter.as_ref(), tape, x, &self.weight, product)?;
        let replaced = active.weight()?;
        let y = backend.conv2d(&Conv {
            low_rank: active.low_rank(),
            bias: self.bias.as_ref(),
            per_image: per_image.map(Value::tensor),
            residual: residual.map(Value::tensor),
            ..plain(x.tensor(), replaced.as_ref().unwrap_or(&self.weight), geometry)
        })?;

        let weight = self.weight.clone();
        let (x_origin, x_tracked) = (x.origin(), x.is_tracked());
        let per_image_origin = per_image.filter(|v| v.is_tracked()).map(Value::origin);
        let residual_origin = residual.map(Value::origin);
        let params = active.params().to_vec();
        let frozen = [x].into_iter().chain(per_image).chain(residual);
        let inputs: Vec<&Value> = frozen.chain(&params).collect();
        Ok(tape.record(y, &inputs, move |dy, grads| {
            let backend = dy.device().backend();
            let through = active.backward(&dy, grads, x_tracked, |x, d| {
                backend.conv2d_backward_weight(x, d, geometry)
            })?;
            if let Some(origin) = per_image_origin {
                grads.add(origin, backend.sum_rows(&dy)?)?;
            }
            if x_tracked {
                let weight = through.weight(&weight);
                let mut dx = backend.conv2d_backward_input(&dy, weight, geometry, input, None)?;
                if let Some((dh, down)) = active.input_term(&through) {
                    dx = backend.conv2d_backward_input(dh, down, geometry, input, Some(dx))?;
                }
                grads.add(x_origin, dx)?;
            }
            residual_origin.map_or(Ok(()), |origin| grads.add(origin, dy))
        }))
    }
}

/// A convolution without additions.
fn plain<'a>(x: &'a Tensor, w: &'a Tensor, geometry: ConvGeometry) -> Conv<'a> {
    Conv { x, w, geometry, low_rank: None, bias: None, per_image: None, residual: None }
}
