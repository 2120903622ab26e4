//! Matrix products: the vendor library's, the low-rank part of an adapter as a second one that adds
//! to the first.

use super::card::Card;
use super::driver::{Address, Matmul, Matrix};
use super::optimizer;
use crate::backend::{Backend, Gemm, LowRank};
use crate::shapes::{GemmSizes, gemm_sizes};
use crate::{DType, EngineError, Result, Tensor};

const OP: &str = "gemm";

/// `t` as elements of type `dtype`, made if it is stored otherwise: 8-bit weights are widened here,
/// for as long as the product takes.
pub(super) fn in_type(card: &'static Card, t: &Tensor, dtype: DType) -> Result<Tensor> {
    if t.dtype() == dtype { Ok(t.clone()) } else { card.cast(t, dtype) }
}

/// See [`Gemm`]; result `[m,n]`.
pub(super) fn gemm(card: &'static Card, p: &Gemm) -> Result<Tensor> {
    let GemmSizes { m, n, .. } = gemm_sizes(p)?;
    let out = card.empty(&[m, n], p.out)?;
    multiply(card, p, &out)?;
    Ok(out)
}

impl Card {
    /// `place += x`, f32, in place whoever shares it: the gradient of a parameter.
    pub(crate) fn add_onto(&'static self, place: &Tensor, x: &Tensor) -> Result<()> {
        if place.len() != x.len() {
            return Err(EngineError::shape(
                "add_at",
                format!("{x:?} cannot be added to {place:?}"),
            ));
        }
        optimizer::add_onto(self, place, x)
    }

    /// Adds a product without additions of its own to `onto`, which has the type and as many
    /// elements as its result.
    pub(crate) fn gemm_onto(&'static self, p: &Gemm, onto: &Tensor) -> Result<()> {
        let GemmSizes { m, n, .. } = gemm_sizes(p)?;
        if onto.len() != m * n || onto.dtype() != p.out || p.residual.is_some() {
            let detail = format!("a product of [{m}, {n}] cannot be added to {onto:?}");
            return Err(EngineError::shape(OP, detail));
        }
        let onto = onto.reshape(&[m, n])?;
        multiply(self, &Gemm { residual: Some(&onto), ..*p }, &onto)
    }
}

/// Writes a product to `out`, which may be its residual.
fn multiply(card: &'static Card, p: &Gemm, out: &Tensor) -> Result<()> {
    let GemmSizes { m, n, k } = gemm_sizes(p)?;
    let dtype = p.a.dtype();
    let b = in_type(card, p.b, dtype)?;
    let bias = p.bias.map(|bias| in_type(card, bias, p.out)).transpose()?;
    let residual = p.residual.map(|residual| in_type(card, residual, p.out)).transpose()?;
    let address = |t: &Option<Tensor>| t.as_ref().map(|t| t.address(OP)).transpose();
    card.driver().matmul(&Matmul {
        m,
        n,
        k,
        a: Matrix { address: p.a.address(OP)?, dtype, transposed: p.trans_a },
        b: Matrix { address: b.address(OP)?, dtype, transposed: p.trans_b },
        alpha: p.alpha,
        c: address(&residual)?,
        bias: address(&bias)?,
        d: out.address(OP)?,
        d_dtype: p.out,
    })?;
    if let Some(low_rank) = &p.low_rank {
        add_low_rank(card, low_rank, dtype, (m, n), None, out)?;
    }
    Ok(())
}

/// `out[m,n] += left·right + bias`, the factors in type `dtype`.
pub(super) fn add_low_rank(
    card: &'static Card,
    p: &LowRank,
    dtype: DType,
    (m, n): (usize, usize),
    bias: Option<Address>,
    out: &Tensor,
) -> Result<()> {
    let (left, right) = (in_type(card, p.left, dtype)?, in_type(card, p.right, dtype)?);
    let out_address = out.address(OP)?;
    card.driver().matmul(&Matmul {
        m,
        n,
        k: left.last_dim(),
        a: Matrix { address: left.address(OP)?, dtype, transposed: false },
        b: Matrix { address: right.address(OP)?, dtype, transposed: p.trans_right },
        alpha: 1.,
        c: Some(out_address),
        bias,
        d: out_address,
        d_dtype: out.dtype(),
    })
}
