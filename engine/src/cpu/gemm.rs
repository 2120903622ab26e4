//! Matrix products: checks operands and hands them to the blocked product.

use half::bf16;
use rayon::prelude::*;

use crate::backend::{Gemm, LowRank};
use crate::{DType, EngineError, Result, Tensor, pool};

/// Sizes of a checked product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

fn fail<T>(op: &'static str, detail: String) -> Result<T> {
    Err(EngineError::shape(op, detail))
}

/// Rows and columns of `t` read as `[rows, last axis]`, after an optional transposition.
fn matrix(t: &Tensor, trans: bool) -> (usize, usize) {
    let (rows, last) = (t.rows(), t.last_dim());
    if trans { (last, rows) } else { (rows, last) }
}

/// Checks an optional low-rank pair against an output of `m` by `n`; gives the rank.
pub(super) fn check_low_rank(
    op: &'static str,
    p: Option<&LowRank>,
    m: usize,
    n: usize,
) -> Result<usize> {
    let Some(p) = p else { return Ok(0) };
    let (rows, rank) = matrix(p.left, false);
    let (inner, cols) = matrix(p.right, p.trans_right);
    if rows != m || cols != n || inner != rank {
        let detail = format!(
            "low-rank left {:?} and right {:?}{} for an output of [{m}, {n}]",
            p.left.shape(),
            p.right.shape(),
            if p.trans_right { " transposed" } else { "" }
        );
        return fail(op, detail);
    }
    Ok(rank)
}

/// Checks an optional added tensor: `len` elements in the last axis `n`.
pub(super) fn check_added(
    op: &'static str,
    name: &str,
    t: Option<&Tensor>,
    rows: usize,
    n: usize,
) -> Result<()> {
    match t {
        Some(t) if t.len() != rows * n || t.last_dim() != n => {
            fail(op, format!("{name} is {:?}, the output [{rows}, {n}]", t.shape()))
        }
        _ => Ok(()),
    }
}

fn check(p: &Gemm) -> Result<Sizes> {
    let (m, k) = matrix(p.a, p.trans_a);
    let (inner, n) = matrix(p.b, p.trans_b);
    if inner != k {
        let mark = |t| if t { " transposed" } else { "" };
        let detail = format!(
            "a is {:?}{}, b is {:?}{}",
            p.a.shape(),
            mark(p.trans_a),
            p.b.shape(),
            mark(p.trans_b)
        );
        return fail("gemm", detail);
    }
    check_low_rank("gemm", p.low_rank.as_ref(), m, n)?;
    check_added("gemm", "bias", p.bias, 1, n)?;
    check_added("gemm", "residual", p.residual, m, n)?;
    Ok(Sizes { m, n, k })
}

/// The elements as f32.
pub(super) fn widened(t: &Tensor) -> Result<Vec<f32>> {
    t.to_vec_f32()
}

/// `[rows,cols]` to `[cols,rows]`.
pub(super) fn transposed(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.; data.len()];
    for (i, row) in data.chunks_exact(cols.max(1)).enumerate() {
        for (j, x) in row.iter().enumerate() {
            out[j * rows + i] = *x;
        }
    }
    out
}

/// A tensor of `dtype` from f32 results.
pub(super) fn rounded(shape: &[usize], data: &[f32], dtype: DType) -> Tensor {
    match dtype {
        DType::F32 => {
            let mut out = pool::take::<f32>(data.len());
            out.copy_from_slice(data);
            Tensor::from_pooled(shape, out)
        }
        DType::BF16 => {
            let mut out = pool::take::<bf16>(data.len());
            out.par_iter_mut().zip(data).for_each(|(o, x)| *o = bf16::from_f32(*x));
            Tensor::from_pooled(shape, out)
        }
    }
}

/// `out += alpha · a[m,k] · b[k,n]`.
fn multiply(out: &mut [f32], a: &[f32], b: &[f32], s: Sizes, alpha: f32) {
    if s.n == 0 {
        return;
    }
    out.par_chunks_mut(s.n).enumerate().for_each(|(i, row)| {
        for k in 0..s.k {
            let f = alpha * a[i * s.k + k];
            row.iter_mut().zip(&b[k * s.n..(k + 1) * s.n]).for_each(|(o, b)| *o += f * b);
        }
    });
}

/// Adds `left·right` and the optional addends to `out` `[m,n]`.
pub(super) fn add_rest(
    out: &mut [f32],
    (m, n): (usize, usize),
    low_rank: Option<&LowRank>,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<()> {
    if let Some(p) = low_rank {
        let k = p.left.last_dim();
        let mut right = widened(p.right)?;
        if p.trans_right {
            right = transposed(&right, n, k);
        }
        multiply(out, &widened(p.left)?, &right, Sizes { m, n, k }, 1.);
    }
    if let Some(bias) = bias {
        let bias = widened(bias)?;
        for row in out.chunks_exact_mut(n.max(1)) {
            row.iter_mut().zip(&bias).for_each(|(o, b)| *o += b);
        }
    }
    if let Some(residual) = residual {
        out.iter_mut().zip(&widened(residual)?).for_each(|(o, r)| *o += r);
    }
    Ok(())
}

/// See [`Gemm`]: `[m,n]`.
pub(super) fn gemm(p: &Gemm) -> Result<Tensor> {
    let s = check(p)?;
    let mut a = widened(p.a)?;
    if p.trans_a {
        a = transposed(&a, s.k, s.m);
    }
    let mut b = widened(p.b)?;
    if p.trans_b {
        b = transposed(&b, s.n, s.k);
    }
    let mut out = vec![0.; s.m * s.n];
    multiply(&mut out, &a, &b, s, p.alpha);
    add_rest(&mut out, (s.m, s.n), p.low_rank.as_ref(), p.bias, p.residual)?;
    Ok(rounded(&[s.m, s.n], &out, p.out))
}
