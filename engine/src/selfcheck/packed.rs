//! Layers whose frozen weights are kept in 8 bits with a scale for each output channel.

use super::{Check, for_types, noise, random_on_both, relative_error, worst_error};
use crate::backend::{Conv, ConvGeometry, Gemm};
use crate::{DType, Device, Result, Tensor};

/// Largest error of a row relative to its largest number: half a step of E4M3, 1/16 of a number, and
/// a little where a row is rounded to 16 bits first.
const ROW_ERROR: f32 = 0.066;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for (m, n, k) in [(5, 3, 7), (77, 40, 33), (48, 64, 96)] {
        let run = move |device, dtype| linear(device, dtype, (m, n, k));
        checks.extend(for_types(&format!("8-bit weights gemm {m}x{n}x{k}"), 1., run));
    }
    for size in [[2, 5, 7, 8, 16], [1, 4, 6, 3, 5]] {
        let run = move |device, dtype| convolution(device, dtype, size);
        checks.extend(for_types(&format!("8-bit weights conv {size:?}"), 2., run));
    }
    for shape in [[6, 31], [40, 320]] {
        let name = format!("8-bit weights rows {shape:?}");
        checks.push(Check::new(name, ROW_ERROR, move |device| each_row(device, shape)));
    }
    let (big, dims) = ("8-bit weights gemm 4096x640x2560", (4096, 640, 2560));
    let run = move |device, dtype| linear(device, dtype, dims);
    checks.extend(for_types(big, 1., run).into_iter().map(Check::big));
    checks
}

/// Numbers whose rows differ in size by three orders of magnitude.
fn uneven(shape: &[usize], seed: u32) -> Vec<f32> {
    let len: usize = shape.iter().product();
    let width = len / shape[0];
    let of_row = |at: usize| 0.1 * 6_f32.powi(-((at / width % 5) as i32));
    noise(len, seed).into_iter().enumerate().map(|(at, x)| x * of_row(at)).collect()
}

/// Weights in 8 bits on the device, and the numbers that they mean on the CPU.
fn weights(device: Device, shape: &[usize], seed: u32) -> Result<(Tensor, Tensor)> {
    let packed = Tensor::from_f32(device, shape, &uneven(shape, seed), DType::F8)?;
    let meant = Tensor::from_f32(Device::Cpu, shape, &packed.to_vec_f32()?, DType::F32)?;
    Ok((packed, meant))
}

/// A linear layer's product and that of its input's gradient.
fn linear(device: Device, dtype: DType, (m, n, k): (usize, usize, usize)) -> Result<f32> {
    let (w, w_host) = weights(device, &[n, k], 1)?;
    let (x, x_host) = random_on_both(device, &[m, k], 2, dtype)?;
    let (dy, dy_host) = random_on_both(device, &[m, n], 3, dtype)?;
    let at = |device: Device, x: &Tensor, dy: &Tensor, w: &Tensor| {
        let product = |a, turned| device.backend().gemm(&Gemm::new(a, false, w, turned));
        Ok::<_, crate::EngineError>((product(x, true)?, product(dy, false)?))
    };
    let (y, dx) = at(device, &x, &dy, &w)?;
    let (want_y, want_dx) = at(Device::Cpu, &x_host, &dy_host, &w_host)?;
    worst_error([(&y, &want_y), (&dx, &want_dx)])
}

/// A convolution and its input's gradient.
fn convolution(device: Device, dtype: DType, [batch, h, w, ci, co]: [usize; 5]) -> Result<f32> {
    let geometry = ConvGeometry::square(3, 1, 1);
    let (kernel, kernel_host) = weights(device, &[co, 3, 3, ci], 1)?;
    let (x, x_host) = random_on_both(device, &[batch, h, w, ci], 2, dtype)?;
    let (dy, dy_host) = random_on_both(device, &[batch, h, w, co], 3, dtype)?;
    let at = |device: Device, x: &Tensor, dy: &Tensor, w: &Tensor| {
        let (low_rank, bias, per_image, residual) = (None, None, None, None);
        let conv = Conv { x, w, geometry, low_rank, bias, per_image, residual };
        let y = device.backend().conv2d(&conv)?;
        let input = (x.dim(1), x.dim(2));
        let dx = device.backend().conv2d_backward_input(dy, w, geometry, input, None)?;
        Ok::<_, crate::EngineError>((y, dx))
    };
    let (y, dx) = at(device, &x, &dy, &kernel)?;
    let (want_y, want_dx) = at(Device::Cpu, &x_host, &dy_host, &kernel_host)?;
    worst_error([(&y, &want_y), (&dx, &want_dx)])
}

/// The worst error of a row, relative to that row's largest number: with one scale for all, small
/// rows would be lost. Packed by the host and by the device, to the same bits.
fn each_row(device: Device, shape: [usize; 2]) -> Result<f32> {
    let data = uneven(&shape, 4);
    let packed = Tensor::from_f32(device, &shape, &data, DType::F8)?;
    let there = Tensor::from_f32(device, &shape, &data, DType::F32)?.to_dtype(DType::F8)?;
    let got = packed.to_vec_f32()?;
    let rows = data.chunks(shape[1]).zip(got.chunks(shape[1]));
    let worst = rows.map(|(want, got)| super::relative_error_of(got, want)).fold(0., f32::max);
    Ok(if relative_error(&packed, &there)? == 0. { worst } else { f32::INFINITY })
}
