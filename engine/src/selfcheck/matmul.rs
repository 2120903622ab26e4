//! Matrix products with all that is added to them, and the working copy of trainable values.

use super::{Check, for_types, random, random_on_both, relative_error, worst_error};
use crate::backend::{Gemm, LowRank};
use crate::{DType, Device, ParamId, ParamStore, Result, Tensor};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for (m, n, k) in [(1, 1, 1), (5, 3, 7), (77, 40, 33), (48, 64, 96)] {
        for (trans_a, trans_b) in [(false, false), (false, true), (true, false)] {
            let name = format!("gemm {m}x{n}x{k} {trans_a} {trans_b}");
            let run = move |device, dtype| product(device, dtype, (m, n, k), (trans_a, trans_b));
            checks.extend(for_types(&name, 1., run));
        }
        checks.extend(for_types(&format!("gemm with additions {m}x{n}x{k}"), 2., {
            move |device, dtype| with_additions(device, dtype, (m, n, k))
        }));
    }
    checks.extend(for_types("working copy", 1., working_copy));
    for (m, n, k) in [(4096, 320, 1280), (4096, 320, 16), (1024, 5120, 640), (2, 1280, 320)] {
        let run = move |device, dtype| with_additions(device, dtype, (m, n, k));
        let big = for_types(&format!("gemm with additions {m}x{n}x{k}"), 2., run);
        checks.extend(big.into_iter().map(Check::big));
    }
    checks
}

fn product(
    device: Device,
    dtype: DType,
    (m, n, k): (usize, usize, usize),
    (trans_a, trans_b): (bool, bool),
) -> Result<f32> {
    let shape = |rows, columns, turned| if turned { [columns, rows] } else { [rows, columns] };
    let (a, a_host) = random_on_both(device, &shape(m, k, trans_a), 1, dtype)?;
    let (b, b_host) = random_on_both(device, &shape(k, n, trans_b), 2, dtype)?;
    let at = |device: Device, a: &Tensor, b: &Tensor, out| {
        device.backend().gemm(&Gemm { out, alpha: 0.5, ..Gemm::new(a, trans_a, b, trans_b) })
    };
    let want = at(Device::Cpu, &a_host, &b_host, DType::F32)?;
    let error = relative_error(&at(device, &a, &b, dtype)?, &want)?;
    // A sum that stays in f32, as the gradients of an adapter do.
    Ok(error.max(relative_error(&at(device, &a, &b, DType::F32)?, &want)?))
}

fn with_additions(device: Device, dtype: DType, (m, n, k): (usize, usize, usize)) -> Result<f32> {
    let rank = 3;
    let pair = |shape: [usize; 2], seed| random_on_both(device, &shape, seed, dtype);
    let tensors = [
        pair([m, k], 1)?,
        pair([n, k], 2)?,
        pair([m, rank], 3)?,
        pair([n, rank], 4)?,
        pair([m, n], 5)?,
    ];
    let (bias, bias_host) = random_on_both(device, &[n], 6, dtype)?;
    let at = |device: Device, [a, b, left, right, residual]: [&Tensor; 5], bias: &Tensor| {
        device.backend().gemm(&Gemm {
            low_rank: Some(LowRank { left, right, trans_right: true }),
            bias: Some(bias),
            residual: Some(residual),
            ..Gemm::new(a, false, b, true)
        })
    };
    let got = at(device, tensors.each_ref().map(|(there, _)| there), &bias)?;
    let want = at(Device::Cpu, tensors.each_ref().map(|(_, host)| host), &bias_host)?;
    relative_error(&got, &want)
}

/// The copy follows the values, other parameters are left to themselves.
fn working_copy(device: Device, dtype: DType) -> Result<f32> {
    let tensors: Vec<(Vec<usize>, Vec<f32>)> = [vec![3, 5], vec![7], vec![16, 40]]
        .into_iter()
        .enumerate()
        .map(|(seed, shape)| Ok((shape.clone(), random(&shape, seed as u32)?.to_vec_f32()?)))
        .collect::<Result<_>>()?;
    let mut store = ParamStore::new(device, &tensors)?;
    store.keep_working(dtype, &[(ParamId(0), 1.), (ParamId(2), 0.25)])?;
    let zeros: Vec<f32> = store.flat().to_vec_f32()?.iter().map(|_| 0.).collect();
    let cleared = store.with_values(&zeros)?;
    let mut error = cleared.scaled(ParamId(2), 0.25, dtype)?.to_vec_f32()?[0].abs();
    store.refresh()?;
    for (id, factor) in [(0, 1.), (1, 1.), (1, 2.), (2, 0.25)] {
        let got = store.scaled(ParamId(id), factor, dtype)?;
        let (shape, values) = &tensors[id];
        let values: Vec<f32> = values.iter().map(|x| x * factor).collect();
        let want = Tensor::from_f32(Device::Cpu, shape, &values, DType::F32)?;
        error = error.max(worst_error([(&got, &want)])?);
    }
    Ok(error)
}
