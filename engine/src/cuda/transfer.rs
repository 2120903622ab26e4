//! Numbers on their way between host and card: rounding and its inverse.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::{DType, EngineError, Result};

/// Largest magnitude of E4M3.
const F8_MAX: f32 = 448.;
/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 16;

/// Scales of a tensor of `shape` that is kept in 8 bits: one for each index of the outermost axis,
/// which is a layer's output channel; one alone for a vector.
pub(crate) fn scale_count(shape: &[usize]) -> usize {
    let rows = if shape.len() < 2 { 1 } else { shape[0] };
    if shape.contains(&0) { 0 } else { rows }
}

/// Where the scales of `len` numbers in 8 bits begin, behind the numbers.
pub(super) fn scales_offset(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// What a row in 8 bits is multiplied by when read: the least power of two that brings its largest
/// magnitude within E4M3. A power of two, so that what is widened to bf16 is exact; a finer scale
/// would gain nothing, as E4M3 has the same relative steps over 15 binades. 1 for zeros.
fn scale_for(row: &[f32]) -> f32 {
    let largest = row.iter().fold(0_f32, |max, x| max.max(x.abs()));
    if largest == 0. || largest.is_infinite() {
        return 1.;
    }
    // 448 is 1.75 x 2^8.
    let bits = largest.to_bits();
    let above = u32::from(bits & 0x7f_ffff > 0x60_0000);
    f32::from_bits(((bits >> 23) + above).saturating_sub(8).max(1) << 23)
}

/// `data` in 8 bits, in rows of as many numbers as `shape` says, and behind them the rows' scales.
pub(crate) fn packed_bytes(data: &[f32], shape: &[usize]) -> Vec<u8> {
    let rows = scale_count(shape);
    let at = scales_offset(data.len());
    let mut bytes = vec![0; at + rows * size_of::<f32>()];
    let Some(width) = data.len().checked_div(rows).filter(|width| *width > 0) else {
        return bytes;
    };
    let (codes, scales) = bytes.split_at_mut(at);
    let rows = codes[..data.len()].par_chunks_mut(width).zip(scales.par_chunks_mut(4));
    rows.zip(data.par_chunks(width)).for_each(|((codes, place), row)| {
        let scale = scale_for(row);
        place.copy_from_slice(&scale.to_le_bytes());
        codes.iter_mut().zip(row).for_each(|(code, x)| *code = to_f8(x / scale));
    });
    bytes
}

/// `data`, rounded to `dtype`, which has no scales.
pub(crate) fn bytes_of(data: &[f32], dtype: DType) -> Result<Vec<u8>> {
    fn halves(data: &[f32], round: impl Fn(f32) -> [u8; 2] + Sync) -> Vec<u8> {
        let mut bytes = vec![0; data.len() * 2];
        bytes.par_chunks_mut(2 * CHUNK).zip(data.par_chunks(CHUNK)).for_each(|(to, from)| {
            to.chunks_exact_mut(2).zip(from).for_each(|(to, x)| to.copy_from_slice(&round(*x)));
        });
        bytes
    }
    Ok(match dtype {
        DType::F32 => bytemuck::cast_slice(data).to_vec(),
        DType::BF16 => halves(data, |x| bf16::from_f32(x).to_le_bytes()),
        DType::F16 => halves(data, |x| f16::from_f32(x).to_le_bytes()),
        DType::F8 | DType::U32 => {
            let got = format!("{dtype:?}");
            return Err(EngineError::DType { op: "upload", expected: "f32, bf16 or f16", got });
        }
    })
}

/// The numbers in `bytes`; of 8 bits, before they are multiplied by their rows' scales.
pub(crate) fn values_of(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    let words = || bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
    match dtype {
        DType::F32 => words().map(f32::from_le_bytes).collect(),
        DType::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        DType::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        DType::F8 => bytes.iter().map(|byte| from_f8(*byte)).collect(),
        DType::U32 => words().map(|word| u32::from_le_bytes(word) as f32).collect(),
    }
}

/// The nearest E4M3, ties to even; beyond the largest, the largest; NaN stays NaN.
fn to_f8(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if x.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= F8_MAX {
        return sign | 0x7e;
    }
    // 8 steps to a binade, which no longer shrink below 2^-6; a carry goes into the exponent.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = magnitude * f32::from_bits(((130 - exponent) as u32) << 23);
    // At this magnitude a float has no fraction: the sum is rounded to a whole number.
    let whole = (steps + 8_388_608.).to_bits() & 0x7f_ffff;
    sign | ((exponent + 6) * 8 + whole as i32) as u8
}

/// The number that an E4M3 byte means.
fn from_f8(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * (-9_f32).exp2(),
        _ => (8. + fraction) * ((exponent - 10) as f32).exp2(),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_the_nearest_to_its_own_number() {
        for byte in 0..=255_u8 {
            let value = from_f8(byte);
            if !value.is_nan() {
                assert_eq!(to_f8(value), byte, "{value}");
            }
        }
        assert_eq!(from_f8(0x7e), 448.);
        assert_eq!(from_f8(1), 2_f32.powi(-9));
    }

    #[test]
    fn rounding_is_to_the_nearest_and_to_even() {
        for (x, want) in [(1.06, 1.), (1.07, 1.125), (1.0625, 1.), (1.1875, 1.25), (1e9, 448.)] {
            assert_eq!(from_f8(to_f8(x)), want, "{x}");
            assert_eq!(from_f8(to_f8(-x)), -want, "-{x}");
        }
        assert_eq!(from_f8(to_f8(0.0009)), 0.);
        assert!(from_f8(to_f8(f32::NAN)).is_nan());
    }

    fn there_and_back(data: &[f32], shape: &[usize]) -> Vec<f32> {
        let bytes = packed_bytes(data, shape);
        let codes = values_of(&bytes[..data.len()], DType::F8);
        let scales = values_of(&bytes[scales_offset(data.len())..], DType::F32);
        let width = data.len() / scales.len();
        codes.iter().enumerate().map(|(i, code)| code * scales[i / width]).collect()
    }

    #[test]
    fn the_scale_is_the_least_that_reaches_the_largest() {
        for (largest, want) in [
            (448., 1.),
            (449., 2.),
            (224., 0.5),
            (1., 2_f32.powi(-8)),
            (0., 1.),
            (f32::INFINITY, 1.),
            (3e-40, f32::MIN_POSITIVE),
        ] {
            assert_eq!(scale_for(&[0., -largest, f32::NAN]), want, "{largest}");
        }
        assert_eq!(packed_bytes(&[], &[0, 4]), [0_u8; 0]);
    }

    /// Rows that differ by what trained layers' do and more: with one scale for all, the numbers of
    /// small rows fall below its smallest steps.
    #[test]
    fn a_scale_for_each_row_keeps_uneven_rows() {
        let (rows, width) = (8, 64);
        let of_row = |row: i32| 0.3 * 4_f32.powi(-2 * row);
        let noise = crate::selfcheck::noise(rows * width, 5);
        let data: Vec<f32> =
            noise.iter().enumerate().map(|(i, x)| x * of_row((i / width) as i32)).collect();
        let error = |row: usize, back: &[f32]| {
            let range = row * width..(row + 1) * width;
            let square = |x: &f32| f64::from(*x) * f64::from(*x);
            let apart = |(x, y): (&f32, &f32)| square(&(x - y));
            let apart: f64 = data[range.clone()].iter().zip(&back[range.clone()]).map(apart).sum();
            (apart / data[range].iter().map(square).sum::<f64>()).sqrt()
        };
        let each = there_and_back(&data, &[rows, width]);
        let one = there_and_back(&data, &[rows * width]);
        let errors: Vec<(f64, f64)> =
            (0..rows).map(|row| (error(row, &each), error(row, &one))).collect();
        println!("relative errors of rows, with a scale each and with one: {errors:.4?}");
        assert!(errors.iter().all(|(each, _)| *each < 0.035), "{errors:?}");
        assert!(errors.iter().all(|(each, one)| each <= one), "{errors:?}");
        assert!(errors[4].1 > 2. * errors[4].0 && errors[7].1 > 0.9, "{errors:?}");
    }
}
