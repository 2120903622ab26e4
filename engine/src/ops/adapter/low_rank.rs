//! Low-rank updates, fused into the layer's own product: the wide update is never made.
//!
//! `scale·(x·downᵀ)·upᵀ`; `down` is applied as a weight of the layer's kind, `up` as a matrix. `x` is
//! saved for `down`'s gradient. In training, hidden values may be dropped: the others grow to make up
//! for them.

use super::draws::{Dropouts, masked};
use crate::backend::{Gemm, LowRank};
use crate::tape::Gradients;
use crate::{DType, ParamId, Result, Tape, Tensor, Value};

/// A low-rank update of a layer (Hu et al., arXiv:2106.09685).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRankAdapter {
    /// `[r,in]` for a linear layer, `[r,kh,kw,in]` for a convolution.
    pub down: ParamId,
    /// `[out,r]`.
    pub up: ParamId,
    /// `alpha/r`, times the multiplier.
    pub scale: f32,
    /// What is left out in training.
    pub dropouts: Dropouts,
    /// Key of the module's draws.
    pub module: u64,
}

/// The adapter's tensors in the compute type, and what its backward needs.
pub(in crate::ops) struct Active {
    /// `down` and `up`.
    params: [Value; 2],
    scale: f32,
    x: Tensor,
    /// `down` in the compute type.
    down_cast: Tensor,
    /// `scale·up` in the compute type, `[out,r]`.
    up_scaled: Tensor,
    /// `down` applied to the input, `[...,r]`, masked.
    hidden: Tensor,
    /// Factors of the hidden values, f32.
    mask: Option<Tensor>,
}

impl LowRankAdapter {
    /// Applies `down` to `x` by the given operation of the layer's kind.
    pub(super) fn activate(
        &self,
        tape: &Tape,
        x: &Value,
        apply: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Active> {
        let (down, up, x) = (tape.param(self.down)?, tape.param(self.up)?, x.tensor().clone());
        let down_cast = tape.scaled_param(self.down, 1., x.dtype())?;
        let up_scaled = tape.scaled_param(self.up, self.scale, x.dtype())?;
        let hidden = apply(&down_cast)?;
        let mask = self.dropouts.mask(tape, self.module, x.dim(0), &hidden)?;
        let hidden = masked(hidden, mask.as_ref())?;
        let params = [down, up];
        Ok(Active { params, scale: self.scale, x, down_cast, up_scaled, hidden, mask })
    }
}

impl Active {
    /// The product that the layer adds to its own.
    pub(super) fn low_rank(&self) -> LowRank<'_> {
        LowRank { left: &self.hidden, right: &self.up_scaled, trans_right: true }
    }

    /// The trainable inputs.
    pub(super) fn params(&self) -> &[Value] {
        &self.params
    }

    /// `down` in the compute type.
    pub(super) fn down(&self) -> &Tensor {
        &self.down_cast
    }

    /// Adds the gradients of `up` and `down`; gives that of the hidden values, `[...,r]`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        down_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let [down, up] = &self.params;
        let backend = dy.device().backend();
        // dL/dh = dy·(scale·up), shared by the gradients of `down` and of the input.
        let dh = backend.gemm(&Gemm::new(dy, false, &self.up_scaled, false))?;
        let dh = masked(dh.reshape(self.hidden.shape())?, self.mask.as_ref())?;
        let product = Gemm::new(dy, true, &self.hidden, false);
        add_product(grads, up, &Gemm { alpha: self.scale, out: DType::F32, ..product })?;
        if down.shape().len() == 2 {
            let product = Gemm::new(&dh, true, &self.x, false);
            add_product(grads, down, &Gemm { out: DType::F32, ..product })?;
        } else {
            let gradient = down_gradient(&self.x, &dh)?;
            grads.add(down.origin(), gradient.reshape(down.shape())?)?;
        }
        Ok(dh)
    }
}

/// Adds a product to the gradient of a parameter: where that is summed, if it has such a place.
fn add_product(grads: &mut Gradients<'_, '_>, to: &Value, product: &Gemm) -> Result<()> {
    if let (Some(place), Some(card)) = (grads.place(to.origin())?, to.tensor().device().card()) {
        card.gemm_onto(product, &place)?;
        return grads.placed(to.origin());
    }
    let gradient = product.a.device().backend().gemm(product)?;
    grads.add(to.origin(), gradient.reshape(to.shape())?)
}
