//! Matrix products: checks operands, chooses the way of computing, owns the output.

mod blocked;
mod finish;
mod narrow;
mod operand;
mod pack;
#[cfg(test)]
pub(super) mod tests;

pub(super) use blocked::{Pair, Product};
pub(super) use finish::{Finish, Output, Place};
pub(super) use operand::{Data, Guard, Left, Patches, Right, Spread};

use half::bf16;

use super::features::Level;
use crate::backend::{Gemm, LowRank};
use crate::shapes::{GemmSizes as Sizes, gemm_sizes as check};
use crate::tensor::Element;
use crate::{DType, Result, Tensor, pool};

const OP: &str = "gemm";

/// A new tensor whose elements `fill` writes, all of them.
pub(super) fn produce(shape: &[usize], dtype: DType, fill: impl FnOnce(Output)) -> Tensor {
    let len = shape.iter().product();
    match dtype {
        DType::F32 => {
            let mut data = pool::take::<f32>(len);
            fill(Output::F32(data.as_mut_ptr()));
            Tensor::from_pooled(shape, data)
        }
        _ => {
            let mut data = pool::take::<bf16>(len);
            fill(Output::BF16(data.as_mut_ptr()));
            Tensor::from_pooled(shape, data)
        }
    }
}

/// Computes a product the best way for its shape.
///
/// # Safety
/// `p.finish.output` holds all that `p.finish.place` gives for `m` rows of `n`, and no one else uses
/// it meanwhile.
pub(super) unsafe fn multiply(level: Level, p: &Product) {
    // SAFETY: passed on from the caller.
    unsafe {
        if !narrow::run(level, p) {
            blocked::run(level, p);
        }
    }
}

/// Readable operands of a [`LowRank`].
pub(super) struct LowRankGuard<'a> {
    left: Guard<'a>,
    right: Guard<'a>,
    places: (Left, Right),
    rank: usize,
}

impl<'a> LowRankGuard<'a> {
    pub(super) fn new(p: &LowRank<'a>, n: usize, op: &'static str) -> Result<Self> {
        let rank = p.left.last_dim();
        let right =
            if p.trans_right { Right::Columns { stride: rank } } else { Right::plain(rank, n) };
        let places = (Left::Rows { stride: rank }, right);
        Ok(Self { left: Guard::new(p.left, op)?, right: Guard::new(p.right, op)?, places, rank })
    }

    pub(super) fn pair(&self) -> Pair<'_> {
        let (left, right) = &self.places;
        Pair { a: (self.left.data(), left), b: (self.right.data(), right), k: self.rank }
    }
}

/// See [`Gemm`]: `[m,n]`.
pub(super) fn gemm(p: &Gemm) -> Result<Tensor> {
    gemm_at(Level::best(), p)
}

fn gemm_at(level: Level, p: &Gemm) -> Result<Tensor> {
    let Sizes { m, n, k } = check(p)?;
    let plain = p.low_rank.is_none() && p.bias.is_none() && p.residual.is_none();
    if p.trans_a && plain && n < m && n <= 32 {
        return narrow_transposed(level, p, Sizes { m, n, k });
    }
    let (a, b) = (Guard::new(p.a, OP)?, Guard::new(p.b, OP)?);
    let left = if p.trans_a { Left::Columns { stride: m } } else { Left::Rows { stride: k } };
    let right = if p.trans_b { Right::Columns { stride: k } } else { Right::plain(k, n) };
    let low_rank = p.low_rank.as_ref().map(|p| LowRankGuard::new(p, n, OP)).transpose()?;
    let bias = p.bias.map(Tensor::to_vec_f32).transpose()?;
    let residual = p.residual.map(|t| Guard::new(t, OP)).transpose()?;
    Ok(produce(&[m, n], p.out, |output| {
        let product = Product {
            m,
            n,
            main: Pair { a: (a.data(), &left), b: (b.data(), &right), k },
            low_rank: low_rank.as_ref().map(LowRankGuard::pair),
            finish: Finish {
                alpha: p.alpha,
                bias: bias.as_deref(),
                per_image: None,
                residual: residual.as_ref().map(Guard::data),
                accumulate: false,
                output,
                n,
                place: Place::Same,
            },
        };
        // SAFETY: the output was made for `m` by `n` elements and is written here alone.
        unsafe { multiply(level, &product) };
    }))
}

/// A tall narrow result with k across the rows of `a` (the gradient of a LoRA `up`): computed as its
/// transpose, so that the long side lies along the vectors and `a` is read in order.
fn narrow_transposed(level: Level, p: &Gemm, s: Sizes) -> Result<Tensor> {
    let turned = Gemm {
        a: p.b,
        trans_a: !p.trans_b,
        b: p.a,
        trans_b: !p.trans_a,
        alpha: p.alpha,
        low_rank: None,
        bias: None,
        residual: None,
        out: p.out,
    };
    let turned = gemm_at(level, &turned)?;
    Ok(match p.out {
        DType::F32 => turn::<f32>(&turned.elements(OP)?, s),
        _ => turn::<bf16>(&turned.elements(OP)?, s),
    })
}

/// `[n,m]` to `[m,n]`.
fn turn<T: Element>(from: &[T], s: Sizes) -> Tensor {
    let mut out = pool::take::<T>(from.len());
    for (j, row) in from.chunks_exact(s.m.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(i, x)| out[i * s.n + j] = *x);
    }
    Tensor::from_pooled(&[s.m, s.n], out)
}
