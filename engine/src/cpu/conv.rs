//! Convolutions of NHWC maps as implicit matrix products: windows are gathered while packing, so
//! neither im2col nor col2im ever lies in memory.
//!
//! The input gradient is again a convolution: of `dy` with the turned weights at stride 1, and for a
//! longer stride one such product for each phase of the input pixels, so that no zero is multiplied.
//! The weight gradient runs k over input pixels, with all taps of a channel as rows: `x` is read once.

#[cfg(test)]
mod tests;

use super::features::Level;
use super::gemm::{
    Data, Finish, Guard, Left, LowRankGuard, Output, Pair, Patches, Place, Product, Right, Spread,
    multiply, produce,
};
use crate::backend::{Conv, ConvGeometry};
use crate::shapes::{ConvSizes as Sizes, check_added, check_low_rank};
use crate::{DType, EngineError, Result, Tensor};

/// Offsets of the taps from `stride · output pixel`.
fn offsets(s: &Sizes) -> Vec<(isize, isize)> {
    let (kh, kw) = s.geometry.kernel;
    let pad = s.geometry.pad_before.cast_signed();
    let offset = |t: usize| ((t / kw).cast_signed() - pad, (t % kw).cast_signed() - pad);
    (0..kh * kw).map(offset).collect()
}

/// See [`Conv`]: `[B,OH,OW,Co]`.
pub(super) fn conv2d(p: &Conv) -> Result<Tensor> {
    conv2d_at(Level::best(), p)
}

fn conv2d_at(level: Level, p: &Conv) -> Result<Tensor> {
    const OP: &str = "conv2d";
    let s = Sizes::new(OP, p.x.shape(), p.w.shape(), p.geometry)?;
    let rows = s.batch * s.oh * s.ow;
    check_low_rank(OP, p.low_rank.as_ref(), rows, s.co)?;
    check_added(OP, "bias", p.bias, 1, s.co)?;
    check_added(OP, "per_image", p.per_image, s.batch, s.co)?;
    check_added(OP, "residual", p.residual, rows, s.co)?;
    let (x, w) = (Guard::new(p.x, OP)?, Guard::new(p.w, OP)?);
    let left = if s.is_pointwise() {
        Left::Rows { stride: s.ci }
    } else {
        Left::Patches(Patches {
            h: s.h,
            w: s.w,
            c: s.ci,
            grid: (s.oh, s.ow),
            stride: s.geometry.stride,
            taps: offsets(&s),
        })
    };
    let k = s.taps() * s.ci;
    let right = Right::Columns { stride: k };
    let low_rank = p.low_rank.as_ref().map(|p| LowRankGuard::new(p, s.co, OP)).transpose()?;
    let bias = p.bias.map(Tensor::to_vec_f32).transpose()?;
    let shift = p.per_image.map(Tensor::to_vec_f32).transpose()?;
    let residual = p.residual.map(|t| Guard::new(t, OP)).transpose()?;
    Ok(produce(&[s.batch, s.oh, s.ow, s.co], p.x.dtype(), |output| {
        let product = Product {
            m: rows,
            n: s.co,
            main: Pair { a: (x.data(), &left), b: (w.data(), &right), k },
            low_rank: low_rank.as_ref().map(LowRankGuard::pair),
            finish: Finish {
                alpha: 1.,
                bias: bias.as_deref(),
                per_image: shift.as_deref().map(|shift| (shift, s.oh * s.ow)),
                residual: residual.as_ref().map(Guard::data),
                accumulate: false,
                output,
                n: s.co,
                place: Place::Same,
            },
        };
        // SAFETY: the output was made for `rows` by `co` elements and is written here alone.
        unsafe { multiply(level, &product) };
    }))
}

/// Gradient of the input `[B,H,W,Ci]`, added to `onto`.
pub(super) fn conv2d_backward_input(
    dy: &Tensor,
    w: &Tensor,
    geometry: ConvGeometry,
    input: (usize, usize),
    onto: Option<Tensor>,
) -> Result<Tensor> {
    backward_input_at(Level::best(), dy, w, geometry, input, onto)
}

fn backward_input_at(
    level: Level,
    dy: &Tensor,
    w: &Tensor,
    geometry: ConvGeometry,
    input: (usize, usize),
    onto: Option<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_input";
    let (batch, ci) = (dy.shape().first().copied().unwrap_or(0), w.last_dim());
    let shape = [batch, input.0, input.1, ci];
    let s = Sizes::new(OP, &shape, w.shape(), geometry)?;
    let onto_fits = onto.as_ref().is_none_or(|t| t.shape() == shape);
    if dy.shape() != [batch, s.oh, s.ow, s.co] || !onto_fits {
        let onto = onto.map(|t| t.shape().to_vec());
        let detail = format!("dy is {:?}, the input {shape:?}, onto {onto:?}", dy.shape());
        return Err(EngineError::shape(OP, detail));
    }
    let dtype = dy.dtype();
    let (dy, w) = (Guard::new(dy, OP)?, Guard::new(w, OP)?);
    let operands = (dy.data(), w.data());
    let mut onto = onto;
    let in_place = onto.as_mut().is_some_and(|t| t.dtype() == dtype && t.is_unique());
    match onto {
        Some(mut t) if in_place => {
            match dtype {
                DType::F32 => t.with_mut::<f32, _>(OP, |out| {
                    phases(level, &s, operands, Output::F32(out.as_mut_ptr()), Add::InPlace);
                })?,
                _ => t.with_mut::<half::bf16, _>(OP, |out| {
                    phases(level, &s, operands, Output::BF16(out.as_mut_ptr()), Add::InPlace);
                })?,
            }
            Ok(t)
        }
        onto => {
            let guard = onto.as_ref().map(|t| Guard::new(t, OP)).transpose()?;
            let add = guard.as_ref().map_or(Add::Nothing, |g| Add::Tensor(g.data()));
            Ok(produce(&shape, dtype, |output| phases(level, &s, operands, output, add)))
        }
    }
}

/// What the input gradient is added to.
#[derive(Clone, Copy)]
enum Add<'a> {
    Nothing,
    /// What the output holds.
    InPlace,
    /// Another tensor of the output's shape.
    Tensor(Data<'a>),
}

/// One product for each phase of the input pixels. `output` holds `[B,H,W,Ci]`.
fn phases(level: Level, s: &Sizes, (dy, w): (Data, Data), output: Output, add: Add) {
    let stride = s.geometry.stride;
    for phase in 0..stride * stride {
        let first = (phase / stride, phase % stride);
        if first.0 >= s.h || first.1 >= s.w {
            continue;
        }
        let grid = ((s.h - first.0).div_ceil(stride), (s.w - first.1).div_ceil(stride));
        let (kept, offsets) = phase_taps(s, first);
        let k = kept.len() * s.co;
        let left = if s.is_pointwise() {
            Left::Rows { stride: s.co }
        } else {
            Left::Patches(Patches { h: s.oh, w: s.ow, c: s.co, grid, stride: 1, taps: offsets })
        };
        let taps = kept.iter().map(|tap| tap * s.ci).collect();
        let right = Right::Rows { inner: s.co.max(1), taps, stride: s.taps() * s.ci };
        let place = match stride {
            1 => Place::Same,
            step => Place::Every { grid, image: (s.h, s.w), step, first },
        };
        let product = Product {
            m: s.batch * grid.0 * grid.1,
            n: s.ci,
            main: Pair { a: (dy, &left), b: (w, &right), k },
            low_rank: None,
            finish: Finish {
                alpha: 1.,
                bias: None,
                per_image: None,
                residual: match add {
                    Add::Tensor(data) => Some(data),
                    Add::InPlace | Add::Nothing => None,
                },
                accumulate: matches!(add, Add::InPlace),
                output,
                n: s.ci,
                place,
            },
        };
        // SAFETY: the output holds all pixels, each belongs to one phase, phases run in turn.
        unsafe { multiply(level, &product) };
    }
}

/// The taps that reach the input pixels `first + stride·q`, and the output pixel of each from `q`.
fn phase_taps(s: &Sizes, first: (usize, usize)) -> (Vec<usize>, Vec<(isize, isize)>) {
    let g = s.geometry;
    let step = g.stride.cast_signed();
    let offset = |first: usize, tap: usize| {
        let from = (first + g.pad_before).cast_signed() - tap.cast_signed();
        (from % step == 0).then_some(from / step)
    };
    let reach = |tap: usize| {
        let (ky, kx) = (tap / g.kernel.1, tap % g.kernel.1);
        Some((tap, (offset(first.0, ky)?, offset(first.1, kx)?)))
    };
    (0..s.taps()).filter_map(reach).unzip()
}

/// Gradient of the weight, f32 `[Co,kh,kw,Ci]`.
pub(super) fn conv2d_backward_weight(
    x: &Tensor,
    dy: &Tensor,
    geometry: ConvGeometry,
) -> Result<Tensor> {
    backward_weight_at(Level::best(), x, dy, geometry)
}

fn backward_weight_at(
    level: Level,
    x: &Tensor,
    dy: &Tensor,
    geometry: ConvGeometry,
) -> Result<Tensor> {
    const OP: &str = "conv2d_backward_weight";
    let (kh, kw) = geometry.kernel;
    let shape = [dy.last_dim(), kh, kw, x.last_dim()];
    let s = Sizes::new(OP, x.shape(), &shape, geometry)?;
    if dy.shape() != [s.batch, s.oh, s.ow, s.co] {
        let detail = format!("x is {:?}, dy {:?}, the window {geometry:?}", x.shape(), dy.shape());
        return Err(EngineError::shape(OP, detail));
    }
    let left = if s.is_pointwise() {
        Left::Columns { stride: s.co }
    } else {
        Left::Spread(Spread {
            h: s.h,
            w: s.w,
            oh: s.oh,
            ow: s.ow,
            c: s.co,
            stride: geometry.stride,
            taps: offsets(&s),
        })
    };
    let k = s.batch * s.h * s.w;
    let right = Right::plain(k, s.ci);
    let (x, dy) = (Guard::new(x, OP)?, Guard::new(dy, OP)?);
    Ok(produce(&shape, DType::F32, |output| {
        let product = Product {
            m: s.taps() * s.co,
            n: s.ci,
            main: Pair { a: (dy.data(), &left), b: (x.data(), &right), k },
            low_rank: None,
            finish: Finish {
                alpha: 1.,
                bias: None,
                per_image: None,
                residual: None,
                accumulate: false,
                output,
                n: s.ci,
                place: Place::Swapped { taps: s.taps(), channels: s.co },
            },
        };
        // SAFETY: the output holds `taps·co` rows of `ci` and is written here alone.
        unsafe { multiply(level, &product) };
    }))
}
