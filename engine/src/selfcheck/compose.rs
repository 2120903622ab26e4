//! Products that make the weights of composed adapters, and the way back; f32 alone.

use super::{Check, random, relative_error, worst_error};
use crate::{DType, Device, Result, Tensor};

const TOLERANCE: f32 = 1e-4;

/// All checks of this kind.
pub fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for len in [1, 3, 40, 1027] {
        checks.push(multiplying(len));
    }
    // Sums in one part and in several, of both gradients.
    for (first, second) in [
        ([1, 1], [1, 1, 1]),
        ([3, 2], [5, 9, 3]),
        ([4, 4], [40, 1, 40]),
        ([2, 3], [77, 9, 40]),
        ([40, 33], [3, 1, 7]),
    ] {
        checks.push(kronecker(first, second));
    }
    for shape in [&[1, 1][..], &[3, 77], &[40, 3, 3, 5], &[7, 1024]] {
        checks.push(rescaling(shape));
    }
    checks.push(multiplying(1280 * 1280).big());
    checks.push(kronecker([8, 8], [160, 9, 160]).big());
    checks.push(kronecker([32, 32], [40, 1, 40]).big());
    checks.push(rescaling(&[1280, 3, 3, 1280]).big());
    checks
}

/// Random f32 on both sides behind `shift` others, so that no address is one for wide accesses.
fn operand(device: Device, shape: &[usize], seed: u32, shift: usize) -> Result<(Tensor, Tensor)> {
    let len: usize = shape.iter().product();
    let here = random(&[shift + len], seed)?;
    let there = Tensor::from_f32(device, here.shape(), &here.to_vec_f32()?, DType::F32)?;
    Ok((there.view(shift, shape)?, here.view(shift, shape)?))
}

fn multiplying(len: usize) -> Check {
    Check::new(format!("compose multiply [{len}] f32"), 0., move |device| {
        let mut worst = 0_f32;
        for shift in [0, 1] {
            let (a, a_cpu) = operand(device, &[len], 1, shift)?;
            let (b, b_cpu) = operand(device, &[len], 2, 0)?;
            let want = Device::Cpu.backend().multiply(&a_cpu, &b_cpu)?;
            worst = worst.max(relative_error(&device.backend().multiply(&a, &b)?, &want)?);
        }
        Ok(worst)
    })
}

fn kronecker(first: [usize; 2], second: [usize; 3]) -> Check {
    let name = format!("compose kronecker {first:?}x{second:?} f32");
    Check::new(name, TOLERANCE, move |device| {
        let (card, cpu) = (device.backend(), Device::Cpu.backend());
        let (a, a_cpu) = operand(device, &first, 1, 1)?;
        let (b, b_cpu) = operand(device, &second, 2, 2)?;
        let (product, want) = (card.kronecker(&a, &b)?, cpu.kronecker(&a_cpu, &b_cpu)?);
        let (dy, dy_cpu) = operand(device, want.shape(), 3, 0)?;
        let got = card.kronecker_backward(&dy, &a, &b)?;
        let gradients = cpu.kronecker_backward(&dy_cpu, &a_cpu, &b_cpu)?;
        worst_error([(&product, &want), (&got.0, &gradients.0), (&got.1, &gradients.1)])
    })
}

fn rescaling(shape: &'static [usize]) -> Check {
    Check::new(format!("compose rescale_rows {shape:?} f32"), TOLERANCE, move |device| {
        let (card, cpu) = (device.backend(), Device::Cpu.backend());
        let mut worst = 0_f32;
        for (shift, multiplier) in [(0, 1.), (1, 0.7)] {
            let (v, v_cpu) = operand(device, shape, 1, shift)?;
            let (m, m_cpu) = operand(device, &[shape[0], 1], 2, shift)?;
            let (dy, dy_cpu) = operand(device, shape, 3, 0)?;
            let got = card.rescale_rows(&v, &m, multiplier)?;
            let want = cpu.rescale_rows(&v_cpu, &m_cpu, multiplier)?;
            let back = card.rescale_rows_backward(&dy, &v, &got.1, &m, multiplier)?;
            let back_cpu =
                cpu.rescale_rows_backward(&dy_cpu, &v_cpu, &want.1, &m_cpu, multiplier)?;
            let pairs = [(&got.0, &want.0), (&got.1, &want.1)];
            worst = worst.max(worst_error(pairs)?);
            worst = worst.max(worst_error([(&back.0, &back_cpu.0), (&back.1, &back_cpu.1)])?);
        }
        Ok(worst)
    })
}
