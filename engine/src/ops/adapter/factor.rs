//! Matrices made of trainable tensors: given whole, as a product, or through a Tucker core.
//!
//! A factor is `[rows, window·columns]`, the window innermost but one as in the engine's weights, so
//! that every form is one or two products of plain matrices.

use crate::backend::Gemm;
use crate::tape::Gradients;
use crate::{ParamId, Result, Tape, Tensor, Value};

/// A matrix over parameters `P`: names of them in an adapter, values while one is at work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factor<P = ParamId> {
    /// `[rows, ...]` as it is.
    Whole(P),
    /// `left[rows,r] · right[r, ...]`.
    Product {
        /// `[rows,r]`.
        left: P,
        /// `[r,columns]` or `[r,kh,kw,columns]`.
        right: P,
    },
    /// `Σ left[i,row] · core[i,kh,kw,j] · right[j,column]`.
    Tucker {
        /// `[r,kh,kw,r]`.
        core: P,
        /// `[r,rows]`, or `[rows,r]` with `left_by_rows`.
        left: P,
        /// `[r,columns]`.
        right: P,
        /// Read `left` with the rows outermost.
        left_by_rows: bool,
    },
}

/// A tensor read as a matrix, its outermost axis against all others.
fn by_first(t: &Tensor) -> Result<Tensor> {
    let rows = t.shape().first().copied().unwrap_or(1).max(1);
    t.reshape(&[rows, t.len() / rows])
}

/// `factor · op(a)·op(b)`.
fn product(a: (&Tensor, bool), b: (&Tensor, bool), factor: f32) -> Result<Tensor> {
    let backend = a.0.device().backend();
    backend.gemm(&Gemm { alpha: factor, ..Gemm::new(a.0, a.1, b.0, b.1) })
}

impl Factor {
    /// The same form over the values of a tape.
    pub(super) fn resolve(&self, tape: &Tape) -> Result<Factor<Value>> {
        Ok(match *self {
            Factor::Whole(whole) => Factor::Whole(tape.param(whole)?),
            Factor::Product { left, right } => {
                Factor::Product { left: tape.param(left)?, right: tape.param(right)? }
            }
            Factor::Tucker { core, left, right, left_by_rows } => Factor::Tucker {
                core: tape.param(core)?,
                left: tape.param(left)?,
                right: tape.param(right)?,
                left_by_rows,
            },
        })
    }
}

impl Factor<Value> {
    /// Its parameters.
    pub(super) fn params(&self) -> Vec<Value> {
        match self {
            Factor::Whole(whole) => vec![whole.clone()],
            Factor::Product { left, right } => vec![left.clone(), right.clone()],
            Factor::Tucker { core, left, right, .. } => {
                vec![core.clone(), left.clone(), right.clone()]
            }
        }
    }

    /// `scale` times the matrix, f32 `[rows, window·columns]`.
    pub(super) fn compose(&self, scale: f32) -> Result<Tensor> {
        match self {
            Factor::Whole(whole) => {
                let whole = by_first(whole.tensor())?;
                whole.device().backend().scale(&whole, scale)
            }
            Factor::Product { left, right } => {
                product((left.tensor(), false), (&by_first(right.tensor())?, false), scale)
            }
            Factor::Tucker { core, left, right, left_by_rows } => {
                let half = half(core, right)?;
                product((left.tensor(), !left_by_rows), (&half, false), scale)
            }
        }
    }

    /// Adds the gradients of the parameters, given that of [`Factor::compose`]'s result.
    pub(super) fn pull_back(
        &self,
        gradient: &Tensor,
        scale: f32,
        grads: &mut Gradients<'_, '_>,
    ) -> Result<()> {
        let mut add =
            |to: &Value, gradient: Tensor| grads.add(to.origin(), gradient.reshape(to.shape())?);
        match self {
            Factor::Whole(whole) => add(whole, gradient.device().backend().scale(gradient, scale)?),
            Factor::Product { left, right } => {
                let wide = by_first(right.tensor())?;
                add(left, product((gradient, false), (&wide, true), scale)?)?;
                add(right, product((left.tensor(), true), (gradient, false), scale)?)
            }
            Factor::Tucker { core, left, right, left_by_rows } => {
                let half = half(core, right)?;
                let of_left = if *left_by_rows {
                    product((gradient, false), (&half, true), scale)?
                } else {
                    product((&half, false), (gradient, true), scale)?
                };
                add(left, of_left)?;
                // [r, kh·kw·columns], then read as [r·kh·kw, columns].
                let of_half = product((left.tensor(), *left_by_rows), (gradient, false), scale)?;
                let columns = right.tensor().last_dim().max(1);
                let of_half = of_half.reshape(&[of_half.len() / columns, columns])?;
                add(core, product((&of_half, false), (right.tensor(), true), 1.)?)?;
                add(right, product((core.tensor(), true), (&of_half, false), 1.)?)
            }
        }
    }
}

/// `core·right`, `[r, kh·kw·columns]`.
fn half(core: &Value, right: &Value) -> Result<Tensor> {
    let half = product((core.tensor(), false), (right.tensor(), false), 1.)?;
    let rank = core.tensor().dim(0).max(1);
    half.reshape(&[rank, half.len() / rank])
}
