//! Sizes of products, convolutions and attentions, checked once for all devices.

use crate::backend::{AttentionKind, AttentionSaved, ConvGeometry, Gemm, LowRank};
use crate::{DType, EngineError, Result, Tensor};

/// Sizes of a checked product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GemmSizes {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner size.
    pub k: usize,
}

/// Rows and columns of `t` read as `[rows, last axis]`, after an optional transposition.
pub(crate) fn matrix(t: &Tensor, trans: bool) -> (usize, usize) {
    let (rows, last) = (t.rows(), t.last_dim());
    if trans { (last, rows) } else { (rows, last) }
}

fn mark(trans: bool) -> &'static str {
    if trans { " transposed" } else { "" }
}

/// Checks an optional low-rank pair against an output of `m` by `n`.
pub(crate) fn check_low_rank(
    op: &'static str,
    p: Option<&LowRank>,
    m: usize,
    n: usize,
) -> Result<()> {
    let Some(p) = p else { return Ok(()) };
    let (rows, rank) = matrix(p.left, false);
    let (inner, cols) = matrix(p.right, p.trans_right);
    if rows != m || cols != n || inner != rank {
        let detail = format!(
            "low-rank left {:?} and right {:?}{} for an output of [{m}, {n}]",
            p.left.shape(),
            p.right.shape(),
            mark(p.trans_right)
        );
        return Err(EngineError::shape(op, detail));
    }
    Ok(())
}

/// Checks an optional addend, `[rows, n]` however its outer axes are cut.
pub(crate) fn check_added(
    op: &'static str,
    name: &str,
    t: Option<&Tensor>,
    rows: usize,
    n: usize,
) -> Result<()> {
    match t {
        Some(t) if t.len() != rows * n || t.last_dim() != n => {
            let detail = format!("{name} is {:?}, the output [{rows}, {n}]", t.shape());
            Err(EngineError::shape(op, detail))
        }
        _ => Ok(()),
    }
}

/// Sizes of a product whose operands fit each other.
pub(crate) fn gemm_sizes(p: &Gemm) -> Result<GemmSizes> {
    const OP: &str = "gemm";
    let (m, k) = matrix(p.a, p.trans_a);
    let (inner, n) = matrix(p.b, p.trans_b);
    if inner != k {
        let (a, b) = (p.a.shape(), p.b.shape());
        let detail = format!("a is {a:?}{}, b is {b:?}{}", mark(p.trans_a), mark(p.trans_b));
        return Err(EngineError::shape(OP, detail));
    }
    check_low_rank(OP, p.low_rank.as_ref(), m, n)?;
    check_added(OP, "bias", p.bias, 1, n)?;
    check_added(OP, "residual", p.residual, m, n)?;
    Ok(GemmSizes { m, n, k })
}

/// Sizes of a checked convolution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvSizes {
    pub batch: usize,
    pub h: usize,
    pub w: usize,
    pub ci: usize,
    pub oh: usize,
    pub ow: usize,
    pub co: usize,
    pub geometry: ConvGeometry,
}

impl ConvSizes {
    /// `x` is `[B,H,W,Ci]`, `weight` `[Co,kh,kw,Ci]`.
    pub fn new(op: &'static str, x: &[usize], weight: &[usize], g: ConvGeometry) -> Result<Self> {
        let fail = || {
            let detail = format!("x is {x:?}, the weight {weight:?}, the window {g:?}");
            EngineError::shape(op, detail)
        };
        match (x, weight) {
            (&[batch, h, w, ci], &[co, kh, kw, inner])
                if ci == inner && (kh, kw) == g.kernel && g.stride > 0 && kh * kw > 0 =>
            {
                let (oh, ow) = g.output(h, w).ok_or_else(fail)?;
                Ok(Self { batch, h, w, ci, oh, ow, co, geometry: g })
            }
            _ => Err(fail()),
        }
    }

    /// Pixels of the window.
    pub fn taps(&self) -> usize {
        self.geometry.kernel.0 * self.geometry.kernel.1
    }

    /// Whether output pixels are input pixels: then rows of a matrix need no gathering.
    pub fn is_pointwise(&self) -> bool {
        let g = self.geometry;
        g.kernel == (1, 1) && g.stride == 1 && g.pad_before == 0 && g.pad_after == 0
    }
}

/// Sizes of a checked attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionSizes {
    /// Samples.
    pub batch: usize,
    /// Heads of a sample.
    pub heads: usize,
    /// Tokens that look.
    pub queries: usize,
    /// Tokens that are looked at.
    pub keys: usize,
    /// Elements of a head.
    pub dim: usize,
}

/// Sizes of an attention whose operands fit each other.
pub(crate) fn attention_sizes(
    op: &'static str,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    kind: AttentionKind,
) -> Result<AttentionSizes> {
    let heads = kind.heads;
    let fail = || Err(EngineError::shape(op, format!("q {q:?}, k {k:?}, v {v:?}, {kind:?}")));
    let (&[batch, queries, width], &[kb, keys, kw]) = (q.shape(), k.shape()) else {
        return fail();
    };
    let types = q.dtype() == k.dtype() && k.dtype() == v.dtype();
    let fits = (kb, kw) == (batch, width) && k.shape() == v.shape();
    if !types || !fits || q.is_empty() || k.is_empty() || heads == 0 || width % heads != 0 {
        return fail();
    }
    // The running maximum is one of unscaled scores.
    if kind.scale.is_nan() || kind.scale <= 0. {
        return fail();
    }
    Ok(AttentionSizes { batch, heads, queries, keys, dim: width / heads })
}

/// The same for its backward, which is also given the output, its gradient and the log-sum-exp.
pub(crate) fn attention_backward_sizes(
    op: &'static str,
    dy: &Tensor,
    saved: &AttentionSaved,
    kind: AttentionKind,
) -> Result<AttentionSizes> {
    let AttentionSaved { q, k, v, out, lse } = *saved;
    let s = attention_sizes(op, (q, k, v), kind)?;
    let fits = |t: &Tensor| t.shape() == q.shape() && t.dtype() == q.dtype();
    let known = lse.shape() == [s.batch, s.heads, s.queries] && lse.dtype() == DType::F32;
    if !fits(dy) || !fits(out) || !known {
        let detail = format!("q {q:?}, dy {dy:?}, out {out:?}, lse {lse:?}");
        return Err(EngineError::shape(op, detail));
    }
    Ok(s)
}
