//! Group and layer normalisation.

use super::{Check, for_types, on_both, random, random_on_both, worst_error};
use crate::backend::GroupNormShape;
use crate::{DType, Device, Result, Tensor};

/// `[B,...,C]`, the groups, and whether SiLU follows.
type Map = (&'static [usize], usize, bool);

/// Whole packs and none, groups across packs, one pixel, more chunks than one, many channels.
const MAPS: [Map; 9] = [
    (&[2, 8, 8, 320], 32, true),
    (&[2, 8, 8, 320], 32, false),
    (&[3, 7, 11, 64], 32, true),
    (&[3, 5, 5, 30], 3, true),
    (&[1, 77, 40], 4, false),
    (&[1, 4, 4, 1280], 32, true),
    (&[1, 9, 9, 960], 32, true),
    (&[1, 48, 48, 32], 32, true),
    (&[3, 3, 3, 320], 1, true),
];

const BIG_MAPS: [Map; 5] = [
    (&[4, 64, 64, 320], 32, true),
    (&[2, 8, 8, 2560], 32, true),
    (&[2, 32, 32, 1920], 32, true),
    (&[1, 64, 64, 1280], 32, false),
    (&[1, 512, 512, 128], 32, true),
];

/// `[..., width]`: lines of text encoders and blocks, tails, and more than a warp keeps.
const LINES: [&[usize]; 7] =
    [&[3, 77, 768], &[2, 9, 320], &[3, 5, 40], &[5, 2, 7], &[1, 3, 1280], &[1, 2, 5120], &[17, 33]];

const BIG_LINES: [&[usize]; 3] = [&[4, 4096, 320], &[3, 1024, 640], &[2, 77, 1280]];

/// All checks of this kind.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    for (maps, big) in [(&MAPS[..], false), (&BIG_MAPS, true)] {
        for map in maps {
            let (shape, groups, silu) = *map;
            let name = |what| format!("norm {what} {shape:?} {groups} groups, SiLU {silu}");
            let forward = for_types(&name("group_norm"), 1., move |device, dtype| {
                group_forward(device, *map, dtype)
            });
            let backward = for_types(&name("group_norm_backward"), 1., move |device, dtype| {
                group_backward(device, *map, dtype)
            });
            let flagged = |check: Check| if big { check.big() } else { check };
            all.extend(forward.into_iter().chain(backward).map(flagged));
        }
    }
    // Its gradient is what rounding leaves: forward alone.
    all.extend(for_types("norm group_norm one pixel, two channels", 1., |device, dtype| {
        group_forward(device, (&[3, 1, 1, 64], 32, true), dtype)
    }));
    all.push(Check::new("norm group_norm far from zero f32", 1e-4, far_from_zero));
    for (lines, big) in [(&LINES[..], false), (&BIG_LINES, true)] {
        for shape in lines {
            let name = |what| format!("norm {what} {shape:?}");
            let forward = for_types(&name("layer_norm"), 1., |device, dtype| {
                layer_forward(device, shape, dtype)
            });
            let backward = for_types(&name("layer_norm_backward"), 1., |device, dtype| {
                layer_backward(device, shape, dtype)
            });
            let flagged = |check: Check| if big { check.big() } else { check };
            all.extend(forward.into_iter().chain(backward).map(flagged));
        }
    }
    all.extend(for_types("norm layer_norm width 1", 1., |device, dtype| {
        layer_forward(device, &[3, 1], dtype)
    }));
    all.extend(for_types("norm backward of a view that is shared", 1., shared_view));
    all
}

/// Scales around 1 and shifts around 0, f32 on both sides.
fn affine(device: Device, width: usize) -> Result<[(Tensor, Tensor); 2]> {
    let near_one: Vec<f32> = super::noise(width, 90).iter().map(|x| 1. + 0.2 * x).collect();
    let gamma = Tensor::from_f32(Device::Cpu, &[width], &near_one, DType::F32)?;
    let beta = random(&[width], 91)?;
    Ok([on_both(device, &gamma, DType::F32)?, on_both(device, &beta, DType::F32)?])
}

/// Inputs whose mean and deviation are neither 0 nor 1, so that no factor of them can be missed.
fn inputs(device: Device, shape: &[usize], seed: u32, dtype: DType) -> Result<(Tensor, Tensor)> {
    let data = super::noise(shape.iter().product(), seed);
    let data: Vec<f32> = data.iter().map(|x| 3. * x + 0.7).collect();
    on_both(device, &Tensor::from_f32(Device::Cpu, shape, &data, DType::F32)?, dtype)
}

fn group_shape((_, groups, silu): Map) -> GroupNormShape {
    GroupNormShape { groups, eps: 1e-5, silu }
}

fn group_forward(device: Device, map: Map, dtype: DType) -> Result<f32> {
    let (x, reference) = inputs(device, map.0, 1, dtype)?;
    compare_group(device, map, (&x, &reference))
}

fn compare_group(device: Device, map: Map, (x, reference): (&Tensor, &Tensor)) -> Result<f32> {
    let [gamma, beta] = affine(device, x.last_dim())?;
    let shape = group_shape(map);
    let (y, stats) = device.backend().group_norm(x, &gamma.0, &beta.0, shape)?;
    let want = Device::Cpu.backend().group_norm(reference, &gamma.1, &beta.1, shape)?;
    worst_error([(&y, &want.0), (&stats, &want.1)])
}

/// A mean of a thousand deviations must not cost the deviations.
fn far_from_zero(device: Device) -> Result<f32> {
    let map: Map = (&[2, 16, 16, 64], 8, false);
    let far: Vec<f32> = random(map.0, 5)?.to_vec_f32()?.iter().map(|x| x + 1024.).collect();
    let far = Tensor::from_f32(Device::Cpu, map.0, &far, DType::F32)?;
    let (x, reference) = on_both(device, &far, DType::F32)?;
    let [gamma, beta] = affine(device, x.last_dim())?;
    let shape = group_shape(map);
    let (y, _) = device.backend().group_norm(&x, &gamma.0, &beta.0, shape)?;
    let (want, _) = Device::Cpu.backend().group_norm(&reference, &gamma.1, &beta.1, shape)?;
    worst_error([(&y, &want)])
}

fn group_backward(device: Device, map: Map, dtype: DType) -> Result<f32> {
    let (x, reference) = inputs(device, map.0, 2, dtype)?;
    let (dy, reference_dy) = random_on_both(device, map.0, 3, dtype)?;
    let [gamma, beta] = affine(device, x.last_dim())?;
    let (shape, cpu) = (group_shape(map), Device::Cpu.backend());
    let card = device.backend();
    let (_, stats) = card.group_norm(&x, &gamma.0, &beta.0, shape)?;
    let dx = card.group_norm_backward(dy, &x, &stats, (&gamma.0, &beta.0), shape)?;
    let (_, stats) = cpu.group_norm(&reference, &gamma.1, &beta.1, shape)?;
    let affine = (&gamma.1, &beta.1);
    let want = cpu.group_norm_backward(reference_dy, &reference, &stats, affine, shape)?;
    worst_error([(&dx, &want)])
}

fn layer_forward(device: Device, shape: &[usize], dtype: DType) -> Result<f32> {
    let (x, reference) = inputs(device, shape, 6, dtype)?;
    let [gamma, beta] = affine(device, x.last_dim())?;
    let (y, stats) = device.backend().layer_norm(&x, &gamma.0, &beta.0, 1e-5)?;
    let want = Device::Cpu.backend().layer_norm(&reference, &gamma.1, &beta.1, 1e-5)?;
    worst_error([(&y, &want.0), (&stats, &want.1)])
}

fn layer_backward(device: Device, shape: &[usize], dtype: DType) -> Result<f32> {
    let (x, reference) = inputs(device, shape, 7, dtype)?;
    let (dy, reference_dy) = random_on_both(device, shape, 8, dtype)?;
    let [gamma, beta] = affine(device, x.last_dim())?;
    let (_, stats) = device.backend().layer_norm(&x, &gamma.0, &beta.0, 1e-5)?;
    let dx = device.backend().layer_norm_backward(dy, &x, &stats, &gamma.0)?;
    let cpu = Device::Cpu.backend();
    let (_, stats) = cpu.layer_norm(&reference, &gamma.1, &beta.1, 1e-5)?;
    let want = cpu.layer_norm_backward(reference_dy, &reference, &stats, &gamma.1)?;
    worst_error([(&dx, &want)])
}

/// Views that start between two packs; the gradient that somebody still reads must stay as it is.
fn shared_view(device: Device, dtype: DType) -> Result<f32> {
    let shape = [2, 3, 5, 32];
    let len = shape.iter().product::<usize>();
    let view = |seed| -> Result<[Tensor; 2]> {
        let (there, here) = inputs(device, &[len + 1], seed, dtype)?;
        Ok([there.view(1, &shape)?, here.view(1, &shape)?])
    };
    let ([x, reference], [dy, reference_dy]) = (view(9)?, view(10)?);
    let [gamma, beta] = affine(device, 32)?;
    let (map, cpu): (Map, _) = ((&[], 4, true), Device::Cpu.backend());
    let (card, group) = (device.backend(), group_shape(map));
    let (_, stats) = card.group_norm(&x, &gamma.0, &beta.0, group)?;
    let dx = card.group_norm_backward(dy.clone(), &x, &stats, (&gamma.0, &beta.0), group)?;
    let (_, rows) = card.layer_norm(&x, &gamma.0, &beta.0, 1e-5)?;
    let line = card.layer_norm_backward(dy.clone(), &x, &rows, &gamma.0)?;
    let (_, stats) = cpu.group_norm(&reference, &gamma.1, &beta.1, group)?;
    let pair = (&gamma.1, &beta.1);
    let want = cpu.group_norm_backward(reference_dy.clone(), &reference, &stats, pair, group)?;
    let (_, rows) = cpu.layer_norm(&reference, &gamma.1, &beta.1, 1e-5)?;
    let want_line = cpu.layer_norm_backward(reference_dy.clone(), &reference, &rows, &gamma.1)?;
    worst_error([(&dx, &want), (&line, &want_line), (&dy, &reference_dy)])
}
