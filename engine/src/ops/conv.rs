//! Convolutions with frozen weights and an optional LoRA, NHWC.
//!
//! The LoRA's `down` is a convolution of the same window with `r` outputs, its `up` is 1x1: fused
//! into the frozen convolution as a low-rank product. A 1x1 window runs as a GEMM in the backend.

use super::linear::Adapter;
use crate::backend::{Conv, ConvGeometry, Gemm, LowRank};
use crate::{DType, EngineError, Result, Tape, Tensor, Value};

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
        let active = match &self.adapter {
            Some(adapter) => Some(adapter.activate(tape, x.tensor().dtype())?),
            None => None,
        };
        let plain = |w| Conv {
            x: x.tensor(),
            w,
            geometry,
            low_rank: None,
            bias: None,
            per_image: None,
            residual: None,
        };
        let hidden = match &active {
            Some(a) => Some(backend.conv2d(&plain(&a.down_cast))?),
            None => None,
        };
        let low_rank = active.as_ref().zip(hidden.as_ref()).map(|(a, hidden)| LowRank {
            left: hidden,
            right: &a.up_scaled,
            trans_right: true,
        });
        let y = backend.conv2d(&Conv {
            low_rank,
            bias: self.bias.as_ref(),
            per_image: per_image.map(Value::tensor),
            residual: residual.map(Value::tensor),
            ..plain(&self.weight)
        })?;

        let weight = self.weight.clone();
        let x_origin = x.origin();
        let per_image_origin = per_image.filter(|v| v.is_tracked()).map(Value::origin);
        let residual_origin = residual.map(Value::origin);
        let mut inputs = vec![x];
        inputs.extend(per_image);
        inputs.extend(residual);
        let params = active.as_ref().map(|a| (a.down.clone(), a.up.clone()));
        if let Some((down, up)) = &params {
            inputs.extend([down, up]);
        }
        let saved = active.zip(hidden).map(|(a, hidden)| (a, hidden, x.tensor().clone()));
        let x_tracked = x.is_tracked();
        Ok(tape.record(y, &inputs, move |dy, grads| {
            let backend = dy.device().backend();
            let mut through: Option<(Tensor, Tensor)> = None;
            if let Some((a, hidden, x)) = &saved {
                let dh = backend.gemm(&Gemm::new(&dy, false, &a.up_scaled, false))?;
                let dh = dh.reshape(hidden.shape())?;
                let up =
                    Gemm { alpha: a.scale, out: DType::F32, ..Gemm::new(&dy, true, hidden, false) };
                grads.add(a.up.origin(), backend.gemm(&up)?.reshape(a.up.shape())?)?;
                grads.add(a.down.origin(), backend.conv2d_backward_weight(x, &dh, geometry)?)?;
                through = Some((dh, a.down_cast.clone()));
            }
            if let Some(origin) = per_image_origin {
                grads.add(origin, backend.sum_rows(&dy)?)?;
            }
            if x_tracked {
                let mut dx = backend.conv2d_backward_input(&dy, &weight, geometry, input, None)?;
                if let Some((dh, down)) = &through {
                    dx = backend.conv2d_backward_input(dh, down, geometry, input, Some(dx))?;
                }
                grads.add(x_origin, dx)?;
            }
            residual_origin.map_or(Ok(()), |origin| grads.add(origin, dy))
        }))
    }
}
