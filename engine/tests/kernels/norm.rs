//! Group and layer normalisation against f64 two-pass formulas and their differences.

use engine::backend::GroupNormShape;
use engine::{DType, Device, Tensor};

use crate::reference::*;

fn silu(x: f64) -> f64 {
    x / (1. + (-x).exp())
}

/// `[batch, area, width]` in f64.
fn group_norm(
    x: &[f64],
    sizes: [usize; 3],
    affine: (&[f64], &[f64]),
    s: GroupNormShape,
) -> Vec<f64> {
    let [batch, area, width] = sizes;
    let per_group = width / s.groups;
    let mut out = vec![0.; x.len()];
    for b in 0..batch {
        for g in 0..s.groups {
            let at: Vec<usize> = (0..area)
                .flat_map(|r| (0..per_group).map(move |c| (r, c)))
                .map(|(r, c)| (b * area + r) * width + g * per_group + c)
                .collect();
            let mean = at.iter().map(|i| x[*i]).sum::<f64>() / at.len() as f64;
            let variance = at.iter().map(|i| (x[*i] - mean).powi(2)).sum::<f64>() / at.len() as f64;
            for i in at {
                let z = (x[i] - mean) / (variance + f64::from(s.eps)).sqrt() * affine.0[i % width]
                    + affine.1[i % width];
                out[i] = if s.silu { silu(z) } else { z };
            }
        }
    }
    out
}

fn affine(width: usize) -> (Vec<f32>, Vec<f32>) {
    (noise(width, 21).iter().map(|x| 1. + x / 4.).collect(), noise(width, 22))
}

fn check_group(
    sizes: [usize; 3],
    groups: usize,
    silu: bool,
    shift: f32,
    dtype: DType,
    tolerance: f64,
) {
    let [batch, area, width] = sizes;
    let shape = GroupNormShape { groups, eps: 1e-5, silu };
    let data: Vec<f32> = noise(batch * area * width, 1).iter().map(|x| x + shift).collect();
    let dy = noise(data.len(), 2);
    let (gamma, beta) = affine(width);
    let f = |x: &[f64]| group_norm(x, sizes, (&wide(&gamma), &wide(&beta)), shape);
    let (g, b) = (tensor(&[width], &gamma, DType::F32), tensor(&[width], &beta, DType::F32));
    let x = tensor(&[batch, area, 1, width], &data, dtype);
    let (y, stats) = backend().group_norm(&x, &g, &b, shape).unwrap();
    assert_eq!(stats.shape(), [batch, groups, 2]);
    let name = format!("{sizes:?}, {groups} groups, SiLU {silu}, {dtype:?}");
    assert_close(&name, &values(&y), &f(&wide(&data)), tolerance);
    let want = gradient(&f, &wide(&data), &wide(&dy));
    let dy = tensor(x.shape(), &dy, dtype);
    let held = dy.clone();
    let shared = backend().group_norm_backward(dy, &x, &stats, (&g, &b), shape).unwrap();
    assert_close(&format!("{name} gradient"), &values(&shared), &want, 10. * tolerance);
    assert_eq!(values(&held), noise(data.len(), 2), "a shared gradient was overwritten");
    let owned = Tensor::from_f32(Device::Cpu, x.shape(), &values(&held), dtype).unwrap();
    let inplace = backend().group_norm_backward(owned, &x, &stats, (&g, &b), shape).unwrap();
    assert_eq!(bits(&inplace), bits(&shared));
}

#[test]
fn group_norm_agrees_with_f64() {
    for silu in [false, true] {
        check_group([2, 6, 8], 4, silu, 0., DType::F32, 2e-6);
        check_group([1, 5, 6], 6, silu, 0., DType::F32, 2e-6);
        check_group([1, 70, 10], 2, silu, 0.5, DType::F32, 2e-6);
        check_group([2, 6, 8], 2, silu, 0., DType::BF16, 1e-2);
    }
}

#[test]
fn group_norm_survives_a_large_mean() {
    let sizes = [1, 4096, 64];
    let shape = GroupNormShape { groups: 32, eps: 1e-5, silu: false };
    let data: Vec<f32> = noise(4096 * 64, 1).iter().map(|x| x + 1000.).collect();
    let (gamma, beta) = affine(64);
    let want = group_norm(&wide(&data), sizes, (&wide(&gamma), &wide(&beta)), shape);
    let (g, b) = (tensor(&[64], &gamma, DType::F32), tensor(&[64], &beta, DType::F32));
    let (y, _) = backend().group_norm(&tensor(&sizes, &data, DType::F32), &g, &b, shape).unwrap();
    // The mean itself rounds to 1000·2^-24 = 6e-5.
    assert_close("mean 1000", &values(&y), &want, 4e-5);
}

#[test]
fn layer_norm_agrees_with_f64() {
    for (width, dtype, tolerance) in [
        (4, DType::F32, 2e-6),
        (37, DType::F32, 2e-6),
        (64, DType::F32, 2e-6),
        (40, DType::BF16, 1e-2),
    ] {
        let rows = 5;
        let (data, dy) = (noise(rows * width, 1), noise(rows * width, 2));
        let (gamma, beta) = affine(width);
        let shape = GroupNormShape { groups: 1, eps: 1e-5, silu: false };
        let f = |x: &[f64]| group_norm(x, [rows, 1, width], (&wide(&gamma), &wide(&beta)), shape);
        let (g, b) = (tensor(&[width], &gamma, DType::F32), tensor(&[width], &beta, DType::F32));
        let x = tensor(&[rows, width], &data, dtype);
        let (y, stats) = backend().layer_norm(&x, &g, &b, 1e-5).unwrap();
        assert_close("layer norm", &values(&y), &f(&wide(&data)), tolerance);
        let want = gradient(&f, &wide(&data), &wide(&dy));
        let dy = tensor(x.shape(), &dy, dtype);
        let dx = backend().layer_norm_backward(dy, &x, &stats, &g).unwrap();
        assert_close("layer norm gradient", &values(&dx), &want, 10. * tolerance);
    }
}

#[test]
fn forward_agrees_with_candle() {
    let (x, g, b) = (random(&[2, 5, 7, 32], 1), random(&[32], 2), random(&[32], 3));
    let shape = GroupNormShape { groups: 8, eps: 1e-5, silu: false };
    let (y, _) = backend().group_norm(&x, &g, &b, shape).unwrap();
    let cpu = candle_core::Device::Cpu;
    let of = |t: &Tensor| candle_core::Tensor::from_vec(values(t), t.shape(), &cpu).unwrap();
    let norm = candle_nn::GroupNorm::new(of(&g), of(&b), 32, 8, 1e-5).unwrap();
    let nchw = of(&x).permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
    let want = candle_nn::Module::forward(&norm, &nchw).unwrap();
    let want = want.permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap();
    assert_close("candle", &values(&y), &wide(&want.to_vec1().unwrap()), 1e-5);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_thread_independent("norms", || {
        let (x, dy) = (random(&[2, 33, 31, 320], 1), random(&[2, 33, 31, 320], 2));
        let (g, b) = (random(&[320], 3), random(&[320], 4));
        let shape = GroupNormShape { groups: 32, eps: 1e-5, silu: true };
        let (y, stats) = backend().group_norm(&x, &g, &b, shape).unwrap();
        let dx = backend().group_norm_backward(dy.clone(), &x, &stats, (&g, &b), shape).unwrap();
        let (z, rows) = backend().layer_norm(&x, &g, &b, 1e-5).unwrap();
        let dz = backend().layer_norm_backward(dy, &x, &rows, &g).unwrap();
        vec![y, stats, dx, z, rows, dz]
    });
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let (x, g) = (random(&[1, 4, 6], 1), random(&[6], 2));
    let shape = GroupNormShape { groups: 4, eps: 1e-5, silu: false };
    assert!(backend().group_norm(&x, &g, &g, shape).is_err());
    let shape = GroupNormShape { groups: 3, ..shape };
    assert!(backend().group_norm(&x, &random(&[5], 1), &g, shape).is_err());
    assert!(backend().group_norm(&random(&[6], 1), &g, &g, shape).is_err());
    assert!(backend().layer_norm(&x, &random(&[5], 1), &g, 1e-5).is_err());
}
