//! Products and convolutions of the emulated vendor libraries, against sums by formula.

use engine::DType;
use engine::cuda::driver::{Convolution, Direction, Driver, Matmul, Matrix};

use crate::trial::{download_f32, driver, numbers, upload_f32};

#[test]
fn products_take_transposed_operands_and_what_is_added() {
    let driver = driver();
    let (m, n, k) = (5, 7, 9);
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let (c, bias) = (numbers(m * n, 3), numbers(n, 4));
    let matrix = |data: &[f32], transposed| Matrix {
        address: upload_f32(driver, data),
        dtype: DType::F32,
        transposed,
    };
    for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
        let d = upload_f32(driver, &c);
        let bias_at = upload_f32(driver, &bias);
        let (a_at, b_at) = (matrix(&a, ta), matrix(&b, tb));
        let (alpha, c_at, bias_at) = (0.5, Some(d), Some(bias_at));
        let dtype = DType::F32;
        driver
            .matmul(&Matmul {
                m,
                n,
                k,
                a: a_at,
                b: b_at,
                alpha,
                c: c_at,
                bias: bias_at,
                d,
                d_dtype: dtype,
            })
            .unwrap();
        let mut want = Vec::new();
        for (row, column) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let a = |i: usize| if ta { a[i * m + row] } else { a[row * k + i] };
            let b = |i: usize| if tb { b[column * k + i] } else { b[i * n + column] };
            let sum: f32 = (0..k).map(|i| a(i) * b(i)).sum();
            want.push(0.5 * sum + c[row * n + column] + bias[column]);
        }
        assert_eq!(download_f32(driver, d, m * n), want, "{ta} {tb}");
    }
}

#[test]
fn products_refuse_what_a_card_does_not_take() {
    let driver = driver();
    let x = Matrix { address: upload_f32(driver, &[1.; 16]), dtype: DType::F32, transposed: false };
    let d = driver.allocate(64).unwrap();
    let good = Matmul {
        m: 4,
        n: 4,
        k: 4,
        a: x,
        b: x,
        alpha: 1.,
        c: None,
        bias: None,
        d,
        d_dtype: DType::F32,
    };
    driver.matmul(&good).unwrap();
    for bad in [
        Matmul { m: 5, ..good },
        Matmul { k: 0, ..good },
        Matmul { d: x.address, ..good },
        Matmul { d_dtype: DType::BF16, ..good },
        Matmul { bias: Some(d + 60), ..good },
        Matmul { b: Matrix { dtype: DType::BF16, ..x }, ..good },
    ] {
        assert!(driver.matmul(&bad).is_err(), "{bad:?}");
    }
}

/// `[B,OH,OW,Co]` by the definition.
fn convolved(p: &Convolution, x: &[f32], w: &[f32]) -> Vec<f32> {
    let ([_, height, width, ci], [_, oh, ow, co]) = (p.input, p.output);
    let mut y = vec![0.; p.output.iter().product()];
    for (at, y) in y.iter_mut().enumerate() {
        let (b, row, column, o) = (at / (oh * ow * co), at / (ow * co) % oh, at / co % ow, at % co);
        for (i, j) in (0..p.kernel.0).flat_map(|i| (0..p.kernel.1).map(move |j| (i, j))) {
            let (r, c) = (row * p.stride + i, column * p.stride + j);
            let (Some(r), Some(c)) = (r.checked_sub(p.pad_before), c.checked_sub(p.pad_before))
            else {
                continue;
            };
            if r < height && c < width {
                for channel in 0..ci {
                    *y += x[((b * height + r) * width + c) * ci + channel]
                        * w[((o * p.kernel.0 + i) * p.kernel.1 + j) * ci + channel];
                }
            }
        }
    }
    y
}

fn convolution(driver: &dyn Driver, stride: usize) -> (Convolution, Vec<f32>, Vec<f32>) {
    let (input, output) = ([2, 5, 4, 3], [2, 4 / stride + 1, 3 / stride + 1, 2]);
    let (x, w) = (numbers(120, 1), numbers(2 * 9 * 3, 2));
    let y = driver.allocate(4 * output.iter().product::<usize>()).unwrap();
    let (kernel, pad_before, pad_after) = ((3, 3), 1, 1);
    let direction = Direction::Forward;
    let (x_at, w_at) = (upload_f32(driver, &x), upload_f32(driver, &w));
    let p = Convolution {
        direction,
        x: x_at,
        w: w_at,
        y,
        dtype: DType::F32,
        input,
        output,
        kernel,
        stride,
        pad_before,
        pad_after,
    };
    (p, x, w)
}

#[test]
fn convolutions_go_both_ways() {
    let driver = driver();
    for stride in [1, 2] {
        let (p, x, w) = convolution(driver, stride);
        assert!(driver.convolve(&p).unwrap());
        let y = convolved(&p, &x, &w);
        assert_eq!(download_f32(driver, p.y, y.len()), y);
        // <y, conv(e)> is the gradient of each element e of the input.
        for accumulate in [false, true] {
            let direction = Direction::BackwardInput { accumulate };
            let into = upload_f32(driver, &x);
            assert!(driver.convolve(&Convolution { direction, x: into, ..p }).unwrap());
            let got = download_f32(driver, into, x.len());
            for i in 0..x.len() {
                let unit: Vec<f32> = (0..x.len()).map(|j| f32::from(u8::from(i == j))).collect();
                let sum: f32 = convolved(&p, &unit, &w).iter().zip(&y).map(|(a, b)| a * b).sum();
                let want = if accumulate { sum + x[i] } else { sum };
                assert!((got[i] - want).abs() < 1e-2, "{stride} {i}: {} {want}", got[i]);
            }
        }
    }
}

#[test]
fn what_the_library_lacks_is_left_to_the_caller() {
    let driver = driver();
    let (p, ..) = convolution(driver, 1);
    assert!(!driver.convolve(&Convolution { pad_before: 0, pad_after: 2, ..p }).unwrap());
    let bare = emulator::open_without_convolution(1 << 20).unwrap().card().unwrap().driver();
    assert!(!bare.convolve(&p).unwrap());
    assert!(driver.convolve(&Convolution { output: [2, 9, 4, 2], ..p }).is_err());
    assert!(driver.convolve(&Convolution { w: p.y + 200, ..p }).is_err());
}
