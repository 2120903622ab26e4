//! Casts, sums, products and activations, in small and odd shapes and in views that begin anywhere.

use super::{Check, for_types, noise, on_both, random, relative_error, relative_error_of, rounded};
use crate::{Activation, DType, Device, Result, Tensor};

/// Rows of one element, tails, rows that are whole chunks of no type, of some and of all.
const SHAPES: [&[usize]; 5] = [&[1, 1], &[2, 5, 3], &[3, 77, 40], &[3, 1, 12], &[1, 31, 32]];
/// A feature map of the U-Net.
const BIG: &[usize] = &[4, 64, 64, 320];
/// Elements before a view: with 3, no access may be wide; with 8, some may.
const SHIFTS: [usize; 3] = [0, 3, 8];

/// All checks of this kind.
pub fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for shape in SHAPES {
        for shift in SHIFTS {
            checks.extend(of_shape(shape, shift));
        }
        checks.extend(to_eight_bits(shape));
    }
    checks.extend(of_shape(BIG, 0).into_iter().chain(to_eight_bits(BIG)).map(Check::big));
    checks.extend(casts());
    checks.extend(many_rows().into_iter().chain(emptiness()));
    checks
}

/// Random numbers on both sides, behind `shift` others.
fn operand(
    device: Device,
    shape: &[usize],
    (seed, shift): (u32, usize),
    dtype: DType,
) -> Result<(Tensor, Tensor)> {
    let len: usize = shape.iter().product();
    let (there, here) = on_both(device, &random(&[shift + len], seed)?, dtype)?;
    Ok((there.view(shift, shape)?, here.view(shift, shape)?))
}

fn of_shape(shape: &'static [usize], shift: usize) -> Vec<Check> {
    let name = |operation: &str| format!("pointwise {operation} {shape:?}+{shift}");
    let mut checks = Vec::new();
    for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
        let label = name(&format!("{kind:?}"));
        checks.extend(for_types(&label, 1., move |device, dtype| {
            activation(device, dtype, kind, (shape, shift))
        }));
    }
    checks.extend(for_types(&name("geglu"), 1., move |device, dtype| {
        geglu(device, dtype, (shape, shift))
    }));
    checks.extend(for_types(&name("add"), 1., move |device, dtype| {
        sums(device, dtype, (shape, shift))
    }));
    checks.extend(for_types(&name("scale"), 1., move |device, dtype| {
        scalings(device, dtype, (shape, shift))
    }));
    checks.extend(for_types(&name("sum_rows"), 1., move |device, dtype| {
        let (x, reference) = operand(device, shape, (1, shift), dtype)?;
        relative_error(
            &device.backend().sum_rows(&x)?,
            &Device::Cpu.backend().sum_rows(&reference)?,
        )
    }));
    checks
}

fn activation(
    device: Device,
    dtype: DType,
    kind: Activation,
    (shape, shift): (&[usize], usize),
) -> Result<f32> {
    let (card, cpu) = (device.backend(), Device::Cpu.backend());
    let (x, x_cpu) = operand(device, shape, (1, shift), dtype)?;
    let (dy, dy_cpu) = operand(device, shape, (2, shift), dtype)?;
    let forward = relative_error(&card.activation(kind, &x)?, &cpu.activation(kind, &x_cpu)?)?;
    let want = cpu.activation_backward(kind, dy_cpu.clone(), &x_cpu)?;
    let shared = card.activation_backward(kind, dy.clone(), &x)?;
    let kept = relative_error(&dy, &dy_cpu)?;
    // Nothing else holds this one: it may become the result.
    let alone = Tensor::from_f32(device, shape, &dy_cpu.to_vec_f32()?, dtype)?;
    let alone = card.activation_backward(kind, alone, &x)?;
    let backward = relative_error(&shared, &want)?.max(relative_error(&alone, &want)?);
    Ok(forward.max(backward).max(kept))
}

fn geglu(device: Device, dtype: DType, (shape, shift): (&[usize], usize)) -> Result<f32> {
    let (card, cpu) = (device.backend(), Device::Cpu.backend());
    let mut double = shape.to_vec();
    if let Some(last) = double.last_mut() {
        *last *= 2;
    }
    let (x, x_cpu) = operand(device, &double, (1, shift), dtype)?;
    let (dy, dy_cpu) = operand(device, shape, (2, shift), dtype)?;
    let forward = relative_error(&card.geglu(&x)?, &cpu.geglu(&x_cpu)?)?;
    let want = cpu.geglu_backward(&dy_cpu, &x_cpu)?;
    Ok(forward.max(relative_error(&card.geglu_backward(&dy, &x)?, &want)?))
}

fn sums(device: Device, dtype: DType, (shape, shift): (&[usize], usize)) -> Result<f32> {
    let card = device.backend();
    let (a, a_cpu) = operand(device, shape, (1, shift), dtype)?;
    let (b, b_cpu) = operand(device, shape, (2, shift), dtype)?;
    let want = Device::Cpu.backend().add(&a_cpu, &b_cpu)?;
    let alone = Tensor::from_f32(device, shape, &a_cpu.to_vec_f32()?, dtype)?;
    let alone = card.accumulate(alone, &b)?;
    let shared = card.accumulate(a.clone(), &b)?;
    let kept = relative_error(&a, &a_cpu)?;
    let sums = [card.add(&a, &b)?, alone, shared];
    sums.iter().try_fold(kept, |worst, sum| Ok(worst.max(relative_error(sum, &want)?)))
}

fn scalings(device: Device, dtype: DType, (shape, shift): (&[usize], usize)) -> Result<f32> {
    let (card, cpu) = (device.backend(), Device::Cpu.backend());
    let (x, x_cpu) = operand(device, shape, (1, shift), dtype)?;
    let whole = relative_error(&card.scale(&x, -1.5)?, &cpu.scale(&x_cpu, -1.5)?)?;
    let (factors, factors_cpu) = operand(device, &[x.rows()], (2, shift), DType::F32)?;
    let want = cpu.scale_rows(&x_cpu, &factors_cpu)?;
    Ok(whole.max(relative_error(&card.scale_rows(&x, &factors)?, &want)?))
}

/// Sums over so many rows that they are cut into parts.
fn many_rows() -> Vec<Check> {
    let shapes: [&[usize]; 3] = [&[1, 40, 41, 24], &[2, 300, 7], &[3, 1000, 1]];
    let checks = shapes.into_iter().flat_map(|shape| {
        for_types(&format!("pointwise sum_rows {shape:?}"), 1., move |device, dtype| {
            let (x, reference) = operand(device, shape, (1, 0), dtype)?;
            let got = device.backend().sum_rows(&x)?;
            let again = device.backend().sum_rows(&x)?;
            let apart = relative_error_of(&got.to_vec_f32()?, &again.to_vec_f32()?);
            let same = if apart == 0. { 0. } else { f32::INFINITY };
            Ok(relative_error(&got, &Device::Cpu.backend().sum_rows(&reference)?)?.max(same))
        })
    });
    checks.collect()
}

/// Tensors without elements.
fn emptiness() -> Vec<Check> {
    for_types("pointwise nothing", 1., |device, dtype| {
        let card = device.backend();
        let empty = Tensor::zeros(device, &[2, 0, 6], dtype)?;
        let results = [card.add(&empty, &empty)?, card.activation(Activation::Gelu, &empty)?];
        let count: usize = results.iter().map(Tensor::len).sum();
        let sums = card.sum_rows(&empty)?.to_vec_f32()?;
        let wrong = count > 0 || sums != [0.; 12];
        Ok(if wrong { f32::INFINITY } else { 0. })
    })
}

/// From every type of 16 bits or more to every other, to the bit; infinity and NaN included.
fn casts() -> Vec<Check> {
    const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
    let pairs = TYPES.into_iter().flat_map(|from| TYPES.into_iter().map(move |to| (from, to)));
    let checks = pairs.flat_map(|(from, to)| {
        [1, 3, 40, 77 * 3 + 1].map(|len| {
            let name = format!("pointwise cast [{len}] {} {}", from.suffix(), to.suffix());
            Check::new(name, 0., move |device| cast(device, len, from, to))
        })
    });
    checks.collect()
}

fn cast(device: Device, len: usize, from: DType, to: DType) -> Result<f32> {
    let mut data = noise(len + 5, 7);
    data[0] = 1e-6;
    data[1] = -70_000.;
    data[2] = f32::INFINITY;
    data[3] = f32::NAN;
    data[4] = 3e-41;
    let data: Vec<f32> = data.into_iter().map(|x| rounded(x, from)).collect();
    let want: Vec<f32> = data.iter().map(|x| rounded(*x, to)).collect();
    let x = Tensor::from_f32(device, &[len + 5], &data, from)?;
    let whole = differing(&device.backend().cast(&x, to)?.to_vec_f32()?, &want);
    let part = device.backend().cast(&x.view(5, &[len])?, to)?;
    Ok(whole + differing(&part.to_vec_f32()?, &want[5..]))
}

/// How many numbers differ; NaN equals NaN.
fn differing(got: &[f32], want: &[f32]) -> f32 {
    let same = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
    let equal = got.iter().zip(want).filter(|pair| same(*pair)).count();
    (got.len().max(want.len()) - equal) as f32
}

/// To 8 bits and back, as the host does it: to the bit, with rows of unlike size.
fn to_eight_bits(shape: &'static [usize]) -> Vec<Check> {
    let name = format!("pointwise cast {shape:?} f8");
    for_types(&name, 0., move |device, dtype| {
        let card = device.backend();
        let len: usize = shape.iter().product();
        let width = len / shape[0];
        let of_row = |at: usize| 0.02 * 8_f32.powi(-((at / width % 5) as i32));
        let numbers = noise(len + 1, 3).into_iter().enumerate();
        let mut data: Vec<f32> = numbers.map(|(at, x)| rounded(x * of_row(at), dtype)).collect();
        // Far below the smallest number of the same row in 8 bits.
        data[len / 2] = rounded(1e-9, dtype);
        let whole = Tensor::from_f32(device, &[len + 1], &data, dtype)?;
        let mut wrong = 0.;
        for shift in [0, 1] {
            let x = whole.view(shift, shape)?;
            let want =
                Tensor::from_f32(device, shape, &x.to_vec_f32()?, DType::F8)?.to_vec_f32()?;
            let stored = card.cast(&x, DType::F8)?;
            wrong += differing(&stored.to_vec_f32()?, &want);
            for to in [DType::F32, DType::BF16, DType::F16] {
                let want: Vec<f32> = want.iter().map(|x| rounded(*x, to)).collect();
                wrong += differing(&card.cast(&stored, to)?.to_vec_f32()?, &want);
                let part = card.cast(&stored.view(len / 3, &[len - len / 3])?, to)?;
                wrong += differing(&part.to_vec_f32()?, &want[len / 3..]);
            }
        }
        Ok(wrong)
    })
}
