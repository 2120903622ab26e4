//! Low-rank updates of which a few ranks are trained at a time (DyLoRA, arXiv:2210.07558).
//!
//! The ranks lie in blocks, each a parameter of its own. A pass draws one block: all blocks take
//! part in the product, the drawn one alone gets a gradient, and the update grows by
//! `√(blocks/(drawn+1))`, so that the first ranks learn to do without the later ones. Without draws
//! (outside of training) the last block counts as drawn: an ordinary low-rank update.

use super::draws::{Drawn, one};
use crate::backend::{Gemm, LowRank};
use crate::tape::Gradients;
use crate::{DType, ParamId, Result, Tape, Tensor, Value};

/// A low-rank update in blocks of ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedAdapter {
    /// First of `blocks` parameters, `[u,in]` or `[u,kh,kw,in]` each.
    pub down: ParamId,
    /// First of `blocks` parameters, `[u,out]` each: transposed, so that blocks are rows.
    pub up: ParamId,
    /// Number of blocks.
    pub blocks: usize,
    /// `alpha/r`, times the multiplier.
    pub scale: f32,
    /// Key of the module's draws.
    pub module: u64,
}

/// The adapter at work on one input.
pub(in crate::ops) struct Active {
    /// The drawn block of `down` and `up`.
    params: [Value; 2],
    block: usize,
    scale: f32,
    x: Tensor,
    down_cast: Tensor,
    /// `scale·up` in the compute type, `[r,out]`.
    up_scaled: Tensor,
    /// `[...,r]`.
    hidden: Tensor,
}

impl NestedAdapter {
    pub(super) fn activate(
        &self,
        tape: &Tape,
        x: &Value,
        apply: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Active> {
        let last = self.blocks.saturating_sub(1);
        let block = tape.draws().map_or(last, |draws| {
            let draw = one(draws, Drawn::Block, self.module);
            ((draw * self.blocks as f32) as usize).min(last)
        });
        let scale = self.scale * (self.blocks as f32 / (block + 1) as f32).sqrt();
        let params =
            [tape.param(ParamId(self.down.0 + block))?, tape.param(ParamId(self.up.0 + block))?];
        let x = x.tensor().clone();
        let backend = x.device().backend();
        let down_cast = tape.joined_params(self.down, self.blocks)?.to_dtype(x.dtype())?;
        let up = tape.joined_params(self.up, self.blocks)?;
        let up_scaled = backend.scale(&up, scale)?.to_dtype(x.dtype())?;
        let hidden = apply(&down_cast)?;
        Ok(Active { params, block, scale, x, down_cast, up_scaled, hidden })
    }
}

impl Active {
    /// The product that the layer adds to its own.
    pub(super) fn low_rank(&self) -> LowRank<'_> {
        LowRank { left: &self.hidden, right: &self.up_scaled, trans_right: false }
    }

    /// The trainable inputs.
    pub(super) fn params(&self) -> &[Value] {
        &self.params
    }

    /// `down` in the compute type.
    pub(super) fn down(&self) -> &Tensor {
        &self.down_cast
    }

    /// The columns of the drawn block.
    fn of_block(&self, x: &Tensor) -> Result<Tensor> {
        let backend = x.device().backend();
        let ranks = self.params[0].tensor().dim(0);
        let start = self.block * ranks;
        let behind = if start > 0 { backend.split_last(x, start)?.1 } else { x.clone() };
        if behind.last_dim() == ranks {
            return Ok(behind);
        }
        Ok(backend.split_last(&behind, ranks)?.0)
    }

    /// Adds the gradients of the drawn block; gives that of the hidden values, `[...,r]`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        down_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let backend = dy.device().backend();
        let dh = backend.gemm(&Gemm::new(dy, false, &self.up_scaled, true))?;
        let dh = dh.reshape(self.hidden.shape())?;
        let [down, up] = &self.params;
        let hidden = self.of_block(&self.hidden)?;
        let product = Gemm::new(&hidden, true, dy, false);
        let gradient = backend.gemm(&Gemm { alpha: self.scale, out: DType::F32, ..product })?;
        grads.add(up.origin(), gradient.reshape(up.shape())?)?;
        let gradient = down_gradient(&self.x, &self.of_block(&dh)?)?;
        grads.add(down.origin(), gradient.reshape(down.shape())?)?;
        Ok(dh)
    }
}
