//! Numbers on their way between host and card: rounding and its inverse.

use half::{bf16, f16};

use crate::{DType, EngineError, Result};

/// Largest magnitude of E4M3.
const F8_MAX: f32 = 448.;

/// What numbers stored as `dtype` must be multiplied by when read: a power of two that brings the
/// largest magnitude to the upper end of 8 bits, 1 for wider types.
pub(crate) fn scale_for(data: &[f32], dtype: DType) -> f32 {
    if dtype != DType::F8 {
        return 1.;
    }
    let largest = data.iter().fold(0_f32, |max, x| max.max(x.abs()));
    if largest > 0. && largest.is_finite() { (largest / F8_MAX).log2().ceil().exp2() } else { 1. }
}

/// `data / scale`, rounded to `dtype`.
pub(crate) fn bytes_of(data: &[f32], dtype: DType, scale: f32) -> Result<Vec<u8>> {
    Ok(match dtype {
        DType::F32 => bytemuck::cast_slice(data).to_vec(),
        DType::BF16 => data.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        DType::F16 => data.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DType::F8 => data.iter().map(|x| to_f8(x / scale)).collect(),
        DType::U32 => {
            let got = "f32 values".to_owned();
            return Err(EngineError::DType { op: "upload", expected: "row numbers", got });
        }
    })
}

/// The numbers in `bytes`, times `scale`.
pub(crate) fn values_of(bytes: &[u8], dtype: DType, scale: f32) -> Result<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    let words = || bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
    Ok(match dtype {
        DType::F32 => words().map(f32::from_le_bytes).collect(),
        DType::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        DType::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        DType::F8 => bytes.iter().map(|byte| from_f8(*byte) * scale).collect(),
        DType::U32 => words().map(|word| u32::from_le_bytes(word) as f32).collect(),
    })
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
    // Steps of the binade that the magnitude lies in; below 2^-6 they no longer shrink.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = ((exponent - 3) as f32).exp2();
    let steps = (magnitude / step).round_ties_even() as i32;
    // 8 steps to a binade; carries go into the exponent by themselves.
    sign | ((exponent + 6) * 8 + steps) as u8
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

    #[test]
    fn the_scale_uses_the_range() {
        let data = [0.01, -0.03, 0.002];
        let scale = scale_for(&data, DType::F8);
        let bytes = bytes_of(&data, DType::F8, scale).unwrap();
        let back = values_of(&bytes, DType::F8, scale).unwrap();
        for (x, y) in data.iter().zip(back) {
            assert!((x - y).abs() <= x.abs() / 16., "{x} {y}");
        }
    }
}
