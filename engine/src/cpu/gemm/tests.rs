//! Products against a naive sum in f64: every level, layout, type and option.
//!
//! Tolerances: f32 sums of k terms of size about 1 err by at most some `k·2⁻²⁴` (in practice the
//! root of that); bf16 operands are exact in the reference too, so only a bf16 *result* adds its half
//! unit in the last place, `2⁻⁸` of its size, and the bf16 units flush tiny products to zero.

use super::*;
use crate::Device;
use crate::shapes::matrix;

/// Numbers in [-1, 1], the same for the same seed.
pub(in crate::cpu) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A tensor of such numbers.
pub(in crate::cpu) fn random(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let data = numbers(seed, shape.iter().product());
    Tensor::from_f32(Device::Cpu, shape, &data, dtype).unwrap()
}

/// Compares with the reference; `k` is the length of the sums.
pub(in crate::cpu) fn assert_close(got: &Tensor, want: &[f64], k: usize, what: &str) {
    let got_values = got.to_vec_f32().unwrap();
    assert_eq!(got_values.len(), want.len(), "{what}");
    let half_unit = if got.dtype() == DType::BF16 { 1. / 256. } else { 0. };
    for (i, (g, w)) in got_values.iter().zip(want).enumerate() {
        let tolerance = 1e-6 * (4. + k as f64).sqrt() * 4. + half_unit * 1.01 * w.abs();
        assert!((f64::from(*g) - w).abs() <= tolerance, "{what}: element {i} is {g}, not {w}");
    }
}

fn value(t: &Tensor, trans: bool) -> (Vec<f64>, usize) {
    let (rows, cols) = matrix(t, trans);
    let data = t.to_vec_f32().unwrap();
    let at =
        |i: usize, j: usize| f64::from(if trans { data[j * rows + i] } else { data[i * cols + j] });
    ((0..rows * cols).map(|e| at(e / cols.max(1), e % cols.max(1))).collect(), cols)
}

fn product(a: (&Tensor, bool), b: (&Tensor, bool), alpha: f64, out: &mut [f64]) {
    let ((a, k), (b, n)) = (value(a.0, a.1), value(b.0, b.1));
    for (e, out) in out.iter_mut().enumerate() {
        let (i, j) = (e / n, e % n);
        *out += alpha * (0..k).map(|k_| a[i * k + k_] * b[k_ * n + j]).sum::<f64>();
    }
}

fn naive(p: &Gemm, m: usize, n: usize) -> Vec<f64> {
    let mut out = vec![0f64; m * n];
    product((p.a, p.trans_a), (p.b, p.trans_b), f64::from(p.alpha), &mut out);
    if let Some(low) = &p.low_rank {
        product((low.left, false), (low.right, low.trans_right), 1., &mut out);
    }
    for (t, size) in [(p.bias, n), (p.residual, m * n)] {
        if let Some(t) = t {
            let data = t.to_vec_f32().unwrap();
            out.iter_mut().enumerate().for_each(|(e, o)| *o += f64::from(data[e % size]));
        }
    }
    out
}

fn shaped(rows: usize, cols: usize, trans: bool) -> [usize; 2] {
    if trans { [cols, rows] } else { [rows, cols] }
}

/// Every layout of one size at every level, in the given types.
fn check_size((m, n, k): (usize, usize, usize), types: (DType, DType, DType)) {
    for case in 0..4 {
        let (trans_a, trans_b) = (case & 1 > 0, case & 2 > 0);
        let a = random(1, &shaped(m, k, trans_a), types.0);
        let b = random(2, &shaped(k, n, trans_b), types.1);
        let p = Gemm { out: types.2, ..Gemm::new(&a, trans_a, &b, trans_b) };
        let want = naive(&p, m, n);
        for level in Level::available() {
            let got = gemm_at(level, &p).unwrap();
            assert_eq!(got.shape(), [m, n]);
            let what = format!("{level:?} {m}x{n}x{k} transposed {trans_a} {trans_b} {types:?}");
            assert_close(&got, &want, k, &what);
        }
    }
}

const F: DType = DType::F32;
const H: DType = DType::BF16;

#[test]
fn all_layouts_types_and_levels_at_odd_sizes() {
    let sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (14, 32, 4),
        (15, 33, 17),
        (64, 64, 64),
        (77, 100, 31),
        (5, 130, 403),
        (130, 5, 403),
        (29, 97, 1000),
        (2, 24, 48),
        (61, 25, 15),
        (4, 320, 190),
        (320, 4, 190),
    ];
    for size in sizes {
        for types in [(F, F, F), (H, H, H), (H, H, F), (H, F, F), (F, H, F)] {
            check_size(size, types);
        }
    }
}

#[test]
fn sizes_of_several_tasks_and_passes() {
    check_size((1030, 70, 40), (F, F, F));
    check_size((33, 1400, 800), (F, F, F));
    check_size((33, 1400, 1601), (H, H, H));
    check_size((200, 300, 777), (H, H, F));
}

#[test]
fn empty_products() {
    let a = random(1, &[3, 0], F);
    let b = random(2, &[0, 4], F);
    assert_eq!(gemm(&Gemm::new(&a, false, &b, false)).unwrap().to_vec_f32().unwrap(), [0.; 12]);
    let none = random(1, &[0, 5], F);
    let b = random(2, &[5, 4], F);
    assert_eq!(gemm(&Gemm::new(&none, false, &b, false)).unwrap().shape(), [0, 4]);
}

#[test]
fn every_option_together_and_alone() {
    for (m, n, k, r) in [(40, 70, 90, 4), (17, 33, 800, 7), (130, 20, 64, 32), (50, 64, 1, 1)] {
        for (x, out) in [(F, F), (H, H), (H, F)] {
            let (a, b) = (random(1, &[m, k], x), random(2, &[n, k], x));
            let (left, right) = (random(3, &[m, r], x), random(4, &[n, r], x));
            let turned = random(4, &[r, n], x);
            let (bias, residual) = (random(5, &[n], F), random(6, &[m, n], x));
            for case in 0..32 {
                let has = |bit: usize| case & (1 << bit) > 0;
                let low = LowRank { left: &left, right: &right, trans_right: true };
                let other = LowRank { left: &left, right: &turned, trans_right: false };
                let p = Gemm {
                    alpha: if has(0) { -0.75 } else { 1. },
                    low_rank: has(1).then_some(if has(4) { low } else { other }),
                    bias: has(2).then_some(&bias),
                    residual: has(3).then_some(&residual),
                    out,
                    ..Gemm::new(&a, false, &b, true)
                };
                let want = naive(&p, m, n);
                for level in Level::available() {
                    let what = format!("{level:?} {m}x{n}x{k} rank {r} {x:?} case {case}");
                    assert_close(&gemm_at(level, &p).unwrap(), &want, k + r, &what);
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let shapes = [(300, 200, 900), (1000, 96, 320), (64, 1300, 500), (400, 4, 320), (4, 320, 4000)];
    for (m, n, k) in shapes {
        for dtype in [F, H] {
            let (a, b) = (random(1, &[m, k], dtype), random(2, &[n, k], dtype));
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let p = Gemm::new(&a, false, &b, true);
                pool.install(|| gemm(&p).unwrap().to_vec_f32().unwrap())
            };
            let one = run(1);
            assert!(one == run(2) && one == run(4) && one == run(7), "{m}x{n}x{k} {dtype:?}");
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let (a, b) = (random(1, &[100, 500], F), random(2, &[64, 500], F));
    let whole = gemm(&Gemm::new(&a, false, &b, true)).unwrap().to_vec_f32().unwrap();
    let few = a.view(30 * 500, &[7, 500]).unwrap();
    let part = gemm(&Gemm::new(&few, false, &b, true)).unwrap().to_vec_f32().unwrap();
    assert!(part == whole[30 * 64..37 * 64]);
}

#[test]
fn agrees_with_candle() {
    let (m, n, k) = (123, 217, 345);
    let (x, y) = (numbers(1, m * k), numbers(2, k * n));
    let cpu = &candle_core::Device::Cpu;
    let theirs = candle_core::Tensor::from_vec(x.clone(), (m, k), cpu)
        .and_then(|x| x.matmul(&candle_core::Tensor::from_vec(y.clone(), (k, n), cpu)?))
        .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
        .unwrap();
    let a = Tensor::from_f32(Device::Cpu, &[m, k], &x, F).unwrap();
    let b = Tensor::from_f32(Device::Cpu, &[k, n], &y, F).unwrap();
    let want: Vec<f64> = theirs.into_iter().map(f64::from).collect();
    assert_close(&gemm(&Gemm::new(&a, false, &b, false)).unwrap(), &want, k, "candle");
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let (a, b) = (random(1, &[4, 5], F), random(2, &[6, 7], F));
    let error = gemm(&Gemm::new(&a, false, &b, false)).unwrap_err().to_string();
    assert!(error.contains("[4, 5]") && error.contains("[6, 7]"), "{error}");
    let b = random(2, &[5, 7], F);
    let bias = random(3, &[6], F);
    let p = Gemm { bias: Some(&bias), ..Gemm::new(&a, false, &b, false) };
    assert!(gemm(&p).unwrap_err().to_string().contains("bias is [6]"));
    let (left, right) = (random(4, &[4, 2], F), random(5, &[3, 7], F));
    let low = LowRank { left: &left, right: &right, trans_right: false };
    let p = Gemm { low_rank: Some(low), ..Gemm::new(&a, false, &b, false) };
    assert!(gemm(&p).unwrap_err().to_string().contains("low-rank left [4, 2]"));
}
