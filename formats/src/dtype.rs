//! Number types of stored tensors and the conversions between them.
//!
//! Conversions to a narrower float round to nearest, ties to even; integers become floats exactly
//! where a float can hold them. Bytes are little endian and need no alignment.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::FormatError;

/// The number type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each name is the type")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
    F8E4M3,
    F8E5M2,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool | Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// True for the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// The name in a safetensors header.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
        }
    }

    /// The type of a safetensors header's name, `None` for one this crate does not know.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        const ALL: [Dtype; 12] = [
            Dtype::F64,
            Dtype::F32,
            Dtype::F16,
            Dtype::BF16,
            Dtype::I64,
            Dtype::I32,
            Dtype::I16,
            Dtype::I8,
            Dtype::U8,
            Dtype::Bool,
            Dtype::F8E4M3,
            Dtype::F8E5M2,
        ];
        ALL.into_iter().find(|dtype| dtype.safetensors_name() == name)
    }

    /// Place in the order in which the safetensors library lays tensors out (highest first):
    /// <https://github.com/huggingface/safetensors>, `Dtype`'s declaration.
    pub(crate) const fn layout_order(self) -> u8 {
        match self {
            Self::Bool => 0,
            Self::U8 => 1,
            Self::I8 => 2,
            Self::F8E5M2 => 3,
            Self::F8E4M3 => 4,
            Self::I16 => 5,
            Self::F16 => 6,
            Self::BF16 => 7,
            Self::I32 => 8,
            Self::F32 => 9,
            Self::F64 => 10,
            Self::I64 => 11,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.safetensors_name())
    }
}

/// The precision in which floats are written (`save_precision`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavePrecision {
    /// 32-bit floats.
    Float,
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
}

impl SavePrecision {
    /// The stored type.
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::Float => Dtype::F32,
            Self::Fp16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// The elements of `bytes` as f32, appended to `out` in order.
///
/// `bytes.len()` must be a multiple of the element size; a rest is ignored.
pub fn extend_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    fn each<const N: usize>(bytes: &[u8], out: &mut Vec<f32>, convert: impl Fn([u8; N]) -> f32) {
        out.extend(bytes.as_chunks::<N>().0.iter().map(|chunk| convert(*chunk)));
    }
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => extend_half(bytes, out, |bits, target| {
            bits.reinterpret_cast::<f16>().convert_to_f32_slice(target);
        }),
        Dtype::BF16 => extend_half(bytes, out, |bits, target| {
            bits.reinterpret_cast::<bf16>().convert_to_f32_slice(target);
        }),
        Dtype::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        Dtype::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        Dtype::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        Dtype::I8 => each(bytes, out, |b: [u8; 1]| f32::from(b[0] as i8)),
        Dtype::U8 => each(bytes, out, |b: [u8; 1]| f32::from(b[0])),
        Dtype::Bool => each(bytes, out, |b: [u8; 1]| f32::from(u8::from(b[0] != 0))),
        Dtype::F8E4M3 => each(bytes, out, |b: [u8; 1]| f8e4m3_to_f32(b[0])),
        Dtype::F8E5M2 => each(bytes, out, |b: [u8; 1]| {
            // E5M2 is the upper byte of an IEEE half.
            f16::from_bits(u16::from(b[0]) << 8).to_f32()
        }),
    }
}

/// Converts 16-bit floats in blocks, so that the vectorised conversion of `half` sees aligned
/// input whatever the alignment of the file.
fn extend_half(bytes: &[u8], out: &mut Vec<f32>, convert: impl Fn(&[u16], &mut [f32])) {
    let mut bits = [0_u16; BLOCK];
    out.reserve(bytes.len() / 2);
    for block in bytes.as_chunks::<2>().0.chunks(BLOCK) {
        for (target, pair) in bits.iter_mut().zip(block) {
            *target = u16::from_le_bytes(*pair);
        }
        let start = out.len();
        out.resize(start + block.len(), 0.0);
        convert(&bits[..block.len()], &mut out[start..]);
    }
}

/// `values` as little-endian bytes of `dtype`, rounded to nearest, ties to even.
///
/// # Errors
/// [`FormatError::WrongDtype`] unless `dtype` is F64, F32, F16 or BF16.
pub fn bytes_from_f32(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, FormatError> {
    if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(FormatError::WrongDtype { dtype, wanted: "a type that 32-bit floats save as" });
    }
    let mut out = vec![0; values.len() * dtype.size()];
    match dtype {
        Dtype::F64 => {
            for (bytes, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = f64::from(*value).to_le_bytes();
            }
        }
        Dtype::F16 => narrow(values, &mut out, |bits, block| {
            bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(block);
        }),
        Dtype::BF16 => narrow(values, &mut out, |bits, block| {
            bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(block);
        }),
        _ => {
            for (bytes, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = value.to_le_bytes();
            }
        }
    }
    Ok(out)
}

const BLOCK: usize = 4096;

/// The way back of [`extend_half`].
fn narrow(values: &[f32], out: &mut [u8], convert: impl Fn(&mut [u16], &[f32])) {
    let mut bits = [0_u16; BLOCK];
    for (target, block) in out.chunks_mut(2 * BLOCK).zip(values.chunks(BLOCK)) {
        convert(&mut bits[..block.len()], block);
        for (pair, bits) in target.as_chunks_mut().0.iter_mut().zip(&bits) {
            *pair = bits.to_le_bytes();
        }
    }
}

/// 8-bit float with 4 exponent bits (bias 7), 3 mantissa bits, no infinity (OCP E4M3FN).
fn f8e4m3_to_f32(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((bits >> 3) & 0xf);
    let mantissa = f32::from(bits & 7);
    sign * match (exponent, bits & 7) {
        (0, _) => mantissa * 2_f32.powi(-9),
        (15, 7) => f32::NAN,
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_nearest_even() {
        let cases = [
            (1.0_f32 + 2_f32.powi(-11), 0x3c00_u16),
            (1.0 + 3.0 * 2_f32.powi(-11), 0x3c02),
            (65520.0, 0x7c00),
            (-0.0, 0x8000),
            (2_f32.powi(-25), 0x0000),
            (1.5 * 2_f32.powi(-25), 0x0001),
        ];
        for (value, bits) in cases {
            assert_eq!(
                bytes_from_f32(&[value], Dtype::F16).unwrap(),
                bits.to_le_bytes(),
                "{value}"
            );
        }
        let bf = |v: f32| bytes_from_f32(&[v], Dtype::BF16).unwrap();
        assert_eq!(bf(f32::from_bits(0x3f80_8000)), 0x3f80_u16.to_le_bytes());
        assert_eq!(bf(f32::from_bits(0x3f81_8000)), 0x3f82_u16.to_le_bytes());
        assert_eq!(bf(f32::from_bits(0x3f80_8001)), 0x3f81_u16.to_le_bytes());
    }

    #[test]
    fn every_half_survives_the_way_to_f32_and_back() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut values = Vec::new();
            extend_f32(dtype, &bytes, &mut values);
            let back = bytes_from_f32(&values, dtype).unwrap();
            for (at, (a, b)) in bytes.chunks(2).zip(back.chunks(2)).enumerate() {
                assert!(a == b || values[at].is_nan(), "{dtype} {at:#x}");
            }
        }
    }

    #[test]
    fn blocks_round_like_single_values() {
        // Bit patterns over the whole range of f32, in several blocks and a rest.
        let values: Vec<f32> =
            (0..20_001_u32).map(|i| f32::from_bits(i.wrapping_mul(214_741))).collect();
        let f16_bits = bytes_from_f32(&values, Dtype::F16).unwrap();
        let bf16_bits = bytes_from_f32(&values, Dtype::BF16).unwrap();
        for (at, value) in values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
            let pair = at * 2..at * 2 + 2;
            assert_eq!(f16_bits[pair.clone()], f16::from_f32(*value).to_le_bytes(), "{value}");
            assert_eq!(bf16_bits[pair], bf16::from_f32(*value).to_le_bytes(), "{value}");
        }
    }

    #[test]
    fn unaligned_bytes_convert_like_aligned_ones() {
        let values: Vec<f32> = (0..9000).map(|i| i as f32 * 0.25 - 1000.0).collect();
        let mut bytes = vec![0_u8];
        bytes.extend(bytes_from_f32(&values, Dtype::F16).unwrap());
        let mut read = Vec::new();
        extend_f32(Dtype::F16, &bytes[1..], &mut read);
        let expected: Vec<f32> = values.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        assert_eq!(read, expected);
    }

    #[test]
    fn eight_bit_floats_have_their_known_values() {
        let read = |dtype, bits: u8| {
            let mut out = Vec::new();
            extend_f32(dtype, &[bits], &mut out);
            out[0]
        };
        assert_eq!(read(Dtype::F8E4M3, 0x38), 1.0);
        assert_eq!(read(Dtype::F8E4M3, 0x7e), 448.0);
        assert_eq!(read(Dtype::F8E4M3, 0x01), 2_f32.powi(-9));
        assert!(read(Dtype::F8E4M3, 0xff).is_nan());
        assert_eq!(read(Dtype::F8E5M2, 0x3c), 1.0);
        assert_eq!(read(Dtype::F8E5M2, 0xfb), -57344.0);
    }

    #[test]
    fn integers_and_booleans_become_floats() {
        let mut out = Vec::new();
        extend_f32(Dtype::I64, &(-5_i64).to_le_bytes(), &mut out);
        extend_f32(Dtype::U8, &[200], &mut out);
        extend_f32(Dtype::I8, &[200], &mut out);
        extend_f32(Dtype::Bool, &[1], &mut out);
        assert_eq!(out, [-5.0, 200.0, -56.0, 1.0]);
        assert!(bytes_from_f32(&[1.0], Dtype::I8).is_err());
    }
}
