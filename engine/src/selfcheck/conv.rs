//! Convolutions forward and backward, with and without the vendor library's help.

use super::{Check, for_types, random_on_both, relative_error, worst_error};
use crate::backend::{Conv, ConvGeometry, LowRank};
use crate::{DType, Device, Result, Tensor};

/// Batch, height, width, channels in and out.
type Size = [usize; 5];

pub(super) fn checks() -> Vec<Check> {
    let same = ConvGeometry::square(3, 1, 1);
    let down = ConvGeometry::square(3, 2, 1);
    // The VAE's: nothing before the first pixel.
    let lopsided = ConvGeometry { kernel: (3, 3), stride: 2, pad_before: 0, pad_after: 1 };
    let point = ConvGeometry::square(1, 1, 0);
    let mut checks = Vec::new();
    for (name, size, geometry) in [
        ("3x3", [3, 5, 7, 8, 16], same),
        ("3x3 odd channels", [1, 4, 6, 3, 5], same),
        ("3x3 stride 2", [2, 7, 6, 8, 8], down),
        ("3x3 stride 2 lopsided", [1, 6, 8, 4, 8], lopsided),
        ("1x1", [2, 3, 5, 8, 12], point),
    ] {
        checks.extend(all_ways(name, size, geometry));
    }
    for (name, size, geometry) in [
        ("3x3", [2, 64, 64, 320, 320], same),
        ("3x3 wide", [1, 8, 8, 2560, 1280], same),
        ("3x3 stride 2", [3, 64, 48, 320, 320], down),
        ("3x3 of latents", [1, 64, 64, 4, 320], same),
        ("3x3 to latents", [1, 64, 64, 320, 4], same),
        ("3x3 stride 2 lopsided", [1, 128, 128, 128, 128], lopsided),
    ] {
        checks.extend(all_ways(name, size, geometry).into_iter().map(Check::big));
    }
    checks
}

fn all_ways(name: &str, size: Size, geometry: ConvGeometry) -> Vec<Check> {
    let mut checks = Vec::new();
    let named = |way: &str| format!("conv {way} {name} {size:?}");
    checks.extend(for_types(&named("forward"), 2., move |device, dtype| {
        forward(device, dtype, size, geometry)
    }));
    checks.extend(for_types(&named("input gradient"), 2., move |device, dtype| {
        input_gradient(device, dtype, size, geometry)
    }));
    checks.extend(for_types(&named("weight gradient"), 1., move |device, dtype| {
        weight_gradient(device, dtype, size, geometry)
    }));
    checks
}

fn output(size: Size, geometry: ConvGeometry) -> (usize, usize) {
    geometry.output(size[1], size[2]).unwrap_or((0, 0))
}

/// Shapes of input, weight and output.
fn shapes(size: Size, geometry: ConvGeometry) -> [[usize; 4]; 3] {
    let [batch, h, w, ci, co] = size;
    let (oh, ow) = output(size, geometry);
    let (kh, kw) = geometry.kernel;
    [[batch, h, w, ci], [co, kh, kw, ci], [batch, oh, ow, co]]
}

fn forward(device: Device, dtype: DType, size: Size, geometry: ConvGeometry) -> Result<f32> {
    let [x_shape, w_shape, y_shape] = shapes(size, geometry);
    let [batch, .., co] = size;
    let rows = y_shape[0] * y_shape[1] * y_shape[2];
    let pair = |shape: &[usize], seed| random_on_both(device, shape, seed, dtype);
    let (x, w) = (pair(&x_shape, 1)?, pair(&w_shape, 2)?);
    let (left, right) = (pair(&[rows, 2], 3)?, pair(&[co, 2], 4)?);
    let added = [pair(&[co], 5)?, pair(&[batch, co], 6)?, pair(&y_shape, 7)?];
    let at = |device: Device, [x, w, left, right]: [&Tensor; 4], added: [Option<&Tensor>; 3]| {
        let low_rank = Some(LowRank { left, right, trans_right: true });
        let [bias, per_image, residual] = added;
        let all = Conv { x, w, geometry, low_rank, bias, per_image, residual };
        let plain = Conv { low_rank: None, ..all };
        let bare = Conv { bias: None, per_image: None, residual: None, ..plain };
        let conv = |conv: &Conv| device.backend().conv2d(conv);
        Ok::<_, crate::EngineError>([conv(&all)?, conv(&plain)?, conv(&bare)?])
    };
    let there = [&x.0, &w.0, &left.0, &right.0];
    let got = at(device, there, added.each_ref().map(|(there, _)| Some(there)))?;
    let host = [&x.1, &w.1, &left.1, &right.1];
    let want = at(Device::Cpu, host, added.each_ref().map(|(_, host)| Some(host)))?;
    let [first, second, third] = &got;
    worst_error([(first, &want[0]), (second, &want[1]), (third, &want[2])])
}

fn input_gradient(device: Device, dtype: DType, size: Size, geometry: ConvGeometry) -> Result<f32> {
    let [x_shape, w_shape, y_shape] = shapes(size, geometry);
    let (dy, dy_host) = random_on_both(device, &y_shape, 1, dtype)?;
    let (w, w_host) = random_on_both(device, &w_shape, 2, dtype)?;
    let (onto, onto_host) = random_on_both(device, &x_shape, 3, dtype)?;
    let input = (size[1], size[2]);
    let at = |device: Device, dy: &Tensor, w: &Tensor, onto| {
        device.backend().conv2d_backward_input(dy, w, geometry, input, onto)
    };
    let plain =
        relative_error(&at(device, &dy, &w, None)?, &at(Device::Cpu, &dy_host, &w_host, None)?)?;
    // Once in place, once beside an owner that must not notice.
    let want = at(Device::Cpu, &dy_host, &w_host, Some(onto_host.clone()))?;
    let shared = relative_error(&at(device, &dy, &w, Some(onto.clone()))?, &want)?;
    let untouched = relative_error(&onto, &onto_host)?;
    let alone = relative_error(&at(device, &dy, &w, Some(onto))?, &want)?;
    Ok(plain.max(shared).max(untouched).max(alone))
}

fn weight_gradient(
    device: Device,
    dtype: DType,
    size: Size,
    geometry: ConvGeometry,
) -> Result<f32> {
    let [x_shape, _, y_shape] = shapes(size, geometry);
    let (x, x_host) = random_on_both(device, &x_shape, 1, dtype)?;
    let (dy, dy_host) = random_on_both(device, &y_shape, 2, dtype)?;
    let at = |device: Device, x: &Tensor, dy: &Tensor| {
        device.backend().conv2d_backward_weight(x, dy, geometry)
    };
    relative_error(&at(device, &x, &dy)?, &at(Device::Cpu, &x_host, &dy_host)?)
}
