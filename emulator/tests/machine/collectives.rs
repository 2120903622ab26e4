//! What lanes and threads do together, against the documented layouts and plain sums.

use engine::cuda::driver::Arg;
use half::{bf16, f16};

use crate::trial::{download, download_f32, driver, launch, numbers, upload, upload_f32};

/// `[16,8]` of `1 + a[16,16]·b`, b being `[8,16]` transposed or `[16,8]`.
fn product(a: &[f32], b: &[f32], transposed: bool) -> Vec<f32> {
    let mut out = Vec::new();
    for row in 0..16 {
        for column in 0..8 {
            let b = |k: usize| if transposed { b[k * 8 + column] } else { b[column * 16 + k] };
            out.push(1. + (0..16).map(|k| a[row * 16 + k] * b(k)).sum::<f32>());
        }
    }
    out
}

#[test]
fn matrices_of_a_warp_are_multiplied() {
    let driver = driver();
    let (a, b) = (numbers(256, 1), numbers(128, 2));
    let d = driver.allocate(4 * 128).unwrap();
    let bf16s = |x: &[f32]| -> Vec<u8> {
        x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
    };
    let f16s =
        |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect() };
    for transposed in [false, true] {
        for (kernel, a_bytes, b_bytes) in
            [("product_bf16", bf16s(&a), bf16s(&b)), ("product_f16", f16s(&a), f16s(&b))]
        {
            let args = [
                Arg::Address(d),
                Arg::Address(upload(driver, &a_bytes)),
                Arg::Address(upload(driver, &b_bytes)),
                Arg::I32(transposed.into()),
            ];
            launch(driver, kernel, (1, 32), &args).unwrap();
            // The numbers have few bits: products and their sums are exact.
            let want = product(&a, &b, transposed);
            assert_eq!(download_f32(driver, d, 128), want, "{kernel} {transposed}");
        }
    }
}

/// PTX ISA, `ldmatrix`: lane i gets elements 2(i mod 4) and the next of row i/4 of each matrix; with
/// `.trans` the matrices are read transposed.
#[test]
fn matrices_are_loaded_in_the_documented_layout() {
    let driver = driver();
    let elements: Vec<u16> = (0..256).collect();
    let bytes: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
    let (source, out) = (upload(driver, &bytes), driver.allocate(4 * 128).unwrap());
    for transposed in [false, true] {
        let args = [Arg::Address(out), Arg::Address(source), Arg::I32(transposed.into())];
        launch(driver, "registers_u32", (1, 32), &args).unwrap();
        let got = download(driver, out, 4 * 128);
        for lane in 0..32 {
            for matrix in 0..4 {
                for half in 0..2 {
                    let (row, column) = (lane / 4, 2 * (lane % 4) + half);
                    let (row, column) = if transposed { (column, row) } else { (row, column) };
                    let at = 4 * (4 * lane + matrix) + 2 * half;
                    let element = u16::from_le_bytes([got[at], got[at + 1]]);
                    let want = u16::try_from(64 * matrix + 8 * row + column).unwrap();
                    assert_eq!(element, want, "lane {lane}, matrix {matrix}, {transposed}");
                }
            }
        }
    }
}

#[test]
fn blocks_of_every_size_reduce() {
    let driver = driver();
    for threads in [32, 96, 256, 1024] {
        let x = numbers(3 * threads, 5);
        let (sums, maxima) =
            (driver.allocate(12 * threads).unwrap(), driver.allocate(12 * threads));
        let maxima = maxima.unwrap();
        let args = [sums, maxima, upload_f32(driver, &x)].map(Arg::Address);
        launch(driver, "reduce_f32", (3, u32::try_from(threads).unwrap()), &args).unwrap();
        for (block, x) in x.chunks(threads).enumerate() {
            let of_block = |all: u64| {
                download_f32(driver, all, 3 * threads)[block * threads..][..threads].to_vec()
            };
            assert_eq!(of_block(sums), vec![x.iter().sum::<f32>(); threads]);
            assert_eq!(of_block(maxima), vec![x.iter().fold(-9_f32, |m, x| m.max(*x)); threads]);
        }
    }
}

#[test]
fn conversions_are_those_of_the_host() {
    let driver = driver();
    // All magnitudes that f32 has, ties among them, and what is not finite.
    let mut x: Vec<f32> = (0..=0xffff_u32)
        .map(|i| f32::from_bits(i << 16 | (i.wrapping_mul(40503) & 1) << 15))
        .collect();
    x.extend((0..4096_u16).map(|i| f16::from_bits(i).to_f32() * 1.5 + 2_f32.powi(-25)));
    x.extend((0..4096_u16).map(|i| f32::from(i) / 8. + 1. / 16.));
    let out = driver.allocate(12 * x.len()).unwrap();
    let count = i32::try_from(x.len()).unwrap();
    let args = [Arg::Address(out), Arg::Address(upload_f32(driver, &x)), Arg::I32(count)];
    launch(driver, "convert_f32", (count.cast_unsigned().div_ceil(256), 256), &args).unwrap();
    let got = download_f32(driver, out, 3 * x.len());
    let device = emulator::open(1 << 20).unwrap();
    for (x, got) in x.iter().zip(got.chunks(3)) {
        let eight = engine::Tensor::from_f32(device, &[2], &[*x, 448.], engine::DType::F8).unwrap();
        let eight = if x.is_finite() && x.abs() <= 448. {
            eight.to_vec_f32().unwrap()[0]
        } else if x.is_nan() {
            f32::NAN
        } else {
            448_f32.copysign(*x)
        };
        let want = [bf16::from_f32(*x).to_f32(), f16::from_f32(*x).to_f32(), eight];
        for (got, want) in got.iter().zip(want) {
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{x:e}: {got:e} instead of {want:e}");
        }
    }
}
