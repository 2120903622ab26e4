//! Group and layer normalisation over the last (channel) axis, forward and input gradient.
//!
//! Statistics are exact to f32: each block of rows gets its channel means, then the sums of squares
//! around them; blocks are joined in f64 in a fixed order (Chan et al., 1983). A fused SiLU is
//! recomputed in the backward pass instead of saved.

use rayon::prelude::*;

use super::elementwise::{CHUNK, owned};
use super::simd::{Scalar, vectorized, with_scalar};
use super::transcendental::{silu, silu_slope};
use crate::backend::GroupNormShape;
use crate::operands::check_same;
use crate::{EngineError, Result, Tensor, pool};

/// Independent sums of a row, as many as the widest vector has lanes.
const LANES: usize = 16;

/// Where things lie in `[B,...,C]`.
#[derive(Clone, Copy)]
struct Plan {
    /// Rows of one image.
    area: usize,
    /// Channels.
    width: usize,
    /// Channels of a group.
    per_group: usize,
    /// Rows of one task.
    block: usize,
}

fn plan(
    op: &'static str,
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    groups: usize,
) -> Result<Plan> {
    let fail = || {
        let detail = format!("{x:?} with {groups} groups, gamma {gamma:?}, beta {beta:?}");
        Err(EngineError::shape(op, detail))
    };
    let &[batch, .., width] = x.shape() else { return fail() };
    let affine = [gamma.len(), beta.len()] == [width, width];
    if x.is_empty() || groups == 0 || width % groups != 0 || !affine {
        return fail();
    }
    let area = x.len() / (batch * width);
    let block = (CHUNK / width).clamp(1, 64);
    Ok(Plan { area, width, per_group: width / groups, block })
}

/// Sums of one block of rows, per channel.
struct Moments {
    rows: usize,
    /// Mean of the block, rounded.
    center: Vec<f32>,
    /// What the rounding left: sum of `x - center`.
    rest: Vec<f32>,
    /// Sum of `(x - center)²`.
    square: Vec<f32>,
}

vectorized! {
    fn block_moments<T: Scalar>(rows: &[T], width: usize) -> Moments {
        let count = rows.len() / width;
        let (mut center, mut rest) = (vec![0f32; width], vec![0f32; width]);
        let mut square = vec![0f32; width];
        for row in rows.chunks_exact(width) {
            center.iter_mut().zip(row).for_each(|(s, x)| *s += x.to_f32());
        }
        let inverse = 1. / count as f32;
        center.iter_mut().for_each(|s| *s *= inverse);
        for row in rows.chunks_exact(width) {
            let sums = rest.iter_mut().zip(&mut square).zip(&center);
            for (((rest, square), center), x) in sums.zip(row) {
                let d = x.to_f32() - center;
                *rest += d;
                *square += d * d;
            }
        }
        Moments { rows: count, center, rest, square }
    }

    /// `out = (x - mean)·factor + shift`, then SiLU if `fused`.
    fn apply<T: Scalar>(out: &mut [T], x: &[T], channels: &Channels, fused: bool) {
        let width = channels.mean.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let scales = channels.mean.iter().zip(&channels.factor).zip(&channels.shift);
            for ((out, x), ((mean, factor), shift)) in out.iter_mut().zip(x).zip(scales) {
                let z = (x.to_f32() - mean) * factor + shift;
                *out = T::from_f32(if fused { silu(z) } else { z });
            }
        }
    }

    /// Per-channel sums of `dz` and `dz·(x - mean)` over a block of rows.
    fn block_slopes<T: Scalar>(
        dy: &[T],
        x: &[T],
        channels: &Channels,
        fused: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let width = channels.mean.len();
        let (mut plain, mut moment) = (vec![0f32; width], vec![0f32; width]);
        for (dy, x) in dy.chunks_exact(width).zip(x.chunks_exact(width)) {
            let scales = channels.mean.iter().zip(&channels.factor).zip(&channels.shift);
            let sums = plain.iter_mut().zip(&mut moment).zip(scales);
            for ((dy, x), ((plain, moment), ((mean, factor), shift))) in dy.iter().zip(x).zip(sums)
            {
                let d = x.to_f32() - mean;
                let dy = dy.to_f32();
                let dz = if fused { dy * silu_slope(d * factor + shift) } else { dy };
                *plain += dz;
                *moment += dz * d;
            }
        }
        (plain, moment)
    }

    /// `dy = dz·factor - offset - (x - mean)·slope`, in place.
    fn apply_backward<T: Scalar>(
        dy: &mut [T],
        x: &[T],
        channels: &Channels,
        fused: bool,
        lines: (&[f32], &[f32]),
    ) {
        let width = channels.mean.len();
        let (offset, slope) = lines;
        for (dy, x) in dy.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let scales = channels.mean.iter().zip(&channels.factor).zip(&channels.shift);
            let scales = scales.zip(offset.iter().zip(slope));
            for ((dy, x), (((mean, factor), shift), (offset, slope))) in
                dy.iter_mut().zip(x).zip(scales)
            {
                let d = x.to_f32() - mean;
                let before = dy.to_f32();
                let dz = if fused { before * silu_slope(d * factor + shift) } else { before };
                *dy = T::from_f32(dz * factor - offset - d * slope);
            }
        }
    }
}

/// The affine map of one image, per channel: `z = (x - mean)·factor + shift`.
struct Channels {
    mean: Vec<f32>,
    factor: Vec<f32>,
    shift: Vec<f32>,
}

impl Channels {
    /// From `[groups,2]` statistics.
    fn new(stats: &[f32], gamma: &[f32], beta: &[f32], per_group: usize) -> Self {
        let of = |channel: usize, which: usize| stats[channel / per_group * 2 + which];
        Self {
            mean: (0..gamma.len()).map(|c| of(c, 0)).collect(),
            factor: (0..gamma.len()).map(|c| of(c, 1) * gamma[c]).collect(),
            shift: beta.to_vec(),
        }
    }
}

/// Mean and 1/deviation of each group of an image.
fn image_stats<T: Scalar>(image: &[T], plan: Plan, eps: f32) -> Vec<f32> {
    let Plan { area, width, per_group, block } = plan;
    let blocks: Vec<Moments> =
        image.par_chunks(block * width).map(|rows| block_moments(rows, width)).collect();
    let mut stats = Vec::with_capacity(width / per_group * 2);
    let count = (area * per_group) as f64;
    for first in (0..width).step_by(per_group) {
        let group = first..first + per_group;
        let mut sum = 0f64;
        for b in &blocks {
            for c in group.clone() {
                sum += f64::from(b.center[c]) * b.rows as f64 + f64::from(b.rest[c]);
            }
        }
        let mean = sum / count;
        let mut square = 0f64;
        for b in &blocks {
            for c in group.clone() {
                let shift = f64::from(b.center[c]) - mean;
                square += f64::from(b.square[c])
                    + shift * (2. * f64::from(b.rest[c]) + shift * b.rows as f64);
            }
        }
        let variance = (square / count).max(0.);
        stats.push(mean as f32);
        stats.push((1. / (variance + f64::from(eps)).sqrt()) as f32);
    }
    stats
}

/// `x` is `[B,...,C]`; gives the result and f32 `[B,groups,2]` of mean and 1/deviation.
pub(super) fn group_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    shape: GroupNormShape,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "group_norm";
    let plan = plan(OP, x, gamma, beta, shape.groups)?;
    let (gamma, beta) = (gamma.elements::<f32>(OP)?, beta.elements::<f32>(OP)?);
    let (image, step) = (plan.area * plan.width, plan.block * plan.width);
    let mut all = Vec::with_capacity(x.dim(0) * shape.groups * 2);
    let out = with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>(OP)?;
        let mut out = pool::take::<T>(data.len());
        for (out, data) in out.chunks_exact_mut(image).zip(data.chunks_exact(image)) {
            let stats = image_stats(data, plan, shape.eps);
            let channels = Channels::new(&stats, &gamma, &beta, plan.per_group);
            all.extend(stats);
            out.par_chunks_mut(step)
                .zip(data.par_chunks(step))
                .for_each(|(out, x)| apply(out, x, &channels, shape.silu));
        }
        Tensor::from_pooled(x.shape(), out)
    });
    let stats =
        Tensor::from_f32(x.device(), &[x.dim(0), shape.groups, 2], &all, crate::DType::F32)?;
    Ok((out, stats))
}

/// Gradient of the input of [`group_norm`].
pub(super) fn group_norm_backward(
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    affine: (&Tensor, &Tensor),
    shape: GroupNormShape,
) -> Result<Tensor> {
    const OP: &str = "group_norm_backward";
    check_same(OP, &dy, x)?;
    let plan = plan(OP, x, affine.0, affine.1, shape.groups)?;
    if stats.len() != x.dim(0) * shape.groups * 2 {
        return Err(EngineError::shape(OP, format!("statistics {stats:?} for {x:?}")));
    }
    let (gamma, beta) = (affine.0.elements::<f32>(OP)?, affine.1.elements::<f32>(OP)?);
    let (gamma, beta): (&[f32], &[f32]) = (&gamma, &beta);
    let stats = stats.elements::<f32>(OP)?;
    let stats: &[f32] = &stats;
    let image = plan.area * plan.width;
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>(OP)?;
        let data: &[T] = &data;
        let mut dy = owned::<T>(OP, dy)?;
        dy.with_mut::<T, _>(OP, |dy| {
            let images = dy.chunks_exact_mut(image).zip(data.chunks_exact(image));
            for ((dy, x), stats) in images.zip(stats.chunks_exact(shape.groups * 2)) {
                let channels = Channels::new(stats, gamma, beta, plan.per_group);
                image_backward(dy, x, stats, (&channels, gamma), (plan, shape.silu));
            }
        })?;
        Ok(dy)
    })
}

fn image_backward<T: Scalar>(
    dy: &mut [T],
    x: &[T],
    stats: &[f32],
    affine: (&Channels, &[f32]),
    how: (Plan, bool),
) {
    let (Plan { area, width, per_group, block }, fused) = how;
    let (channels, gamma) = affine;
    let step = block * width;
    let blocks: Vec<(Vec<f32>, Vec<f32>)> = dy
        .par_chunks(step)
        .zip(x.par_chunks(step))
        .map(|(dy, x)| block_slopes(dy, x, channels, fused))
        .collect();
    let (mut offset, mut slope) = (vec![0f32; width], vec![0f32; width]);
    let count = (area * per_group) as f64;
    for (group, first) in (0..width).step_by(per_group).enumerate() {
        let inverse = f64::from(stats[group * 2 + 1]);
        let (mut plain, mut moment) = (0f64, 0f64);
        for (p, m) in &blocks {
            for c in first..first + per_group {
                plain += f64::from(p[c]) * f64::from(gamma[c]);
                moment += f64::from(m[c]) * f64::from(gamma[c]);
            }
        }
        let (plain, moment) = (plain / count * inverse, moment / count * inverse.powi(3));
        offset[first..first + per_group].fill(plain as f32);
        slope[first..first + per_group].fill(moment as f32);
    }
    dy.par_chunks_mut(step)
        .zip(x.par_chunks(step))
        .for_each(|(dy, x)| apply_backward(dy, x, channels, fused, (&offset, &slope)));
}

/// Adds `f` over a row in [`LANES`] independent sums.
#[inline(always)]
fn lane_sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    (whole..len).fold(lanes[0], |sum, i| sum + f(i))
}

vectorized! {
    fn layer_rows<T: Scalar>(
        out: &mut [T],
        x: &[T],
        stats: &mut [f32],
        affine: (&[f32], &[f32]),
        eps: f32,
    ) {
        let (gamma, beta) = affine;
        let width = gamma.len();
        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((out, x), stats) in rows.zip(stats.chunks_exact_mut(2)) {
            let scale = 1. / width as f32;
            let rough = lane_sum(width, |i| x[i].to_f32()) * scale;
            let mean = rough + lane_sum(width, |i| x[i].to_f32() - rough) * scale;
            let variance = lane_sum(width, |i| {
                let d = x[i].to_f32() - mean;
                d * d
            }) * scale;
            let inverse = 1. / (variance + eps).sqrt();
            stats.copy_from_slice(&[mean, inverse]);
            for (((out, x), gamma), beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
                *out = T::from_f32((x.to_f32() - mean) * inverse * gamma + beta);
            }
        }
    }

    fn layer_rows_backward<T: Scalar>(dy: &mut [T], x: &[T], stats: &[f32], gamma: &[f32]) {
        let width = gamma.len();
        let rows = dy.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((dy, x), stats) in rows.zip(stats.chunks_exact(2)) {
            let (mean, inverse) = (stats[0], stats[1]);
            let scale = inverse / width as f32;
            let plain = lane_sum(width, |i| dy[i].to_f32() * gamma[i]) * scale;
            let moment =
                lane_sum(width, |i| dy[i].to_f32() * gamma[i] * (x[i].to_f32() - mean)) * scale;
            let slope = moment * inverse * inverse;
            for ((dy, x), gamma) in dy.iter_mut().zip(x).zip(gamma) {
                let d = x.to_f32() - mean;
                *dy = T::from_f32(dy.to_f32() * gamma * inverse - plain - d * slope);
            }
        }
    }
}

fn check_layer(op: &'static str, x: &Tensor, gamma: &Tensor) -> Result<()> {
    if x.is_empty() || gamma.len() != x.last_dim() {
        return Err(EngineError::shape(op, format!("{x:?} with gamma {gamma:?}")));
    }
    Ok(())
}

/// Normalises the last axis; gives the result and f32 `[rows,2]` of mean and 1/deviation.
pub(super) fn layer_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "layer_norm";
    check_layer(OP, x, gamma)?;
    check_same(OP, gamma, beta)?;
    let (gamma, beta) = (gamma.elements::<f32>(OP)?, beta.elements::<f32>(OP)?);
    let (gamma, beta): (&[f32], &[f32]) = (&gamma, &beta);
    let step = (CHUNK / gamma.len()).max(1);
    let mut stats = pool::take::<f32>(x.rows() * 2);
    let out = with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>(OP)?;
        let mut out = pool::take::<T>(data.len());
        out.par_chunks_mut(step * gamma.len())
            .zip(data.par_chunks(step * gamma.len()))
            .zip(stats.par_chunks_mut(step * 2))
            .for_each(|((out, x), stats)| layer_rows(out, x, stats, (gamma, beta), eps));
        Tensor::from_pooled(x.shape(), out)
    });
    Ok((out, Tensor::from_pooled(&[x.rows(), 2], stats)))
}

/// Gradient of the input of [`layer_norm`].
pub(super) fn layer_norm_backward(
    dy: Tensor,
    x: &Tensor,
    stats: &Tensor,
    gamma: &Tensor,
) -> Result<Tensor> {
    const OP: &str = "layer_norm_backward";
    check_same(OP, &dy, x)?;
    check_layer(OP, x, gamma)?;
    if stats.len() != x.rows() * 2 {
        return Err(EngineError::shape(OP, format!("statistics {stats:?} for {x:?}")));
    }
    let (gamma, stats) = (gamma.elements::<f32>(OP)?, stats.elements::<f32>(OP)?);
    let (gamma, stats): (&[f32], &[f32]) = (&gamma, &stats);
    let step = (CHUNK / gamma.len()).max(1);
    with_scalar!(x.dtype(), T => {
        let data = x.elements::<T>(OP)?;
        let data: &[T] = &data;
        let mut dy = owned::<T>(OP, dy)?;
        dy.with_mut::<T, _>(OP, |dy| {
            dy.par_chunks_mut(step * gamma.len())
                .zip(data.par_chunks(step * gamma.len()))
                .zip(stats.par_chunks(step * 2))
                .for_each(|((dy, x), stats)| layer_rows_backward(dy, x, stats, gamma));
        })?;
        Ok(dy)
    })
}
