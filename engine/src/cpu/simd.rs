//! Which vector instructions this machine has, and kernels compiled once for each.
//!
//! Kernels are written as plain loops; [`vectorized!`] instantiates them for AVX-512, for AVX2 and
//! for the portable baseline and picks one at run time. The choice never depends on the data or on
//! the number of threads.

use std::sync::OnceLock;

use half::bf16;

use crate::tensor::Element;

/// Instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Simd {
    /// 512-bit vectors with fused multiply-add.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// Whatever the build targets.
    Portable,
}

impl Simd {
    /// The best set of this machine, detected once.
    pub(super) fn detected() -> Self {
        static DETECTED: OnceLock<Simd> = OnceLock::new();
        *DETECTED.get_or_init(Self::detect)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx512, avx2) {
            (true, true) => Simd::Avx512,
            (false, true) => Simd::Avx2,
            _ => Simd::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Simd::Portable
    }
}

/// Defines functions whose body is compiled for every [`Simd`] and chosen at run time.
///
/// What the body calls must be `#[inline(always)]` to be compiled along with it.
macro_rules! vectorized {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$g:ident : $bound:path>)? ($($arg:ident : $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        $vis fn $name $(<$g: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$g: $bound>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$g: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$g: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            match $crate::cpu::simd::Simd::detected() {
                // SAFETY: every feature of the attribute was detected on this machine.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Simd::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: every feature of the attribute was detected on this machine.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Simd::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    )*};
}
pub(super) use vectorized;

/// An element type that kernels read as and round from f32.
pub(super) trait Scalar: Element {
    /// Exact.
    fn to_f32(self) -> f32;
    /// To the nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Scalar for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Scalar for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        // Without branches, so that loops over it become vector code.
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
}

/// Runs an expression with a type name bound to the element type that a [`crate::DType`] means.
macro_rules! with_scalar {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            // Other types have no elements on the host: reading them is the error.
            _ => {
                type $t = half::bf16;
                $body
            }
        }
    };
}
pub(super) use with_scalar;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_agrees_with_half_on_every_upper_word() {
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (ours, theirs) = (<bf16 as Scalar>::from_f32(x), bf16::from_f32(x));
                assert!(ours.to_bits() == theirs.to_bits() || x.is_nan() && ours.is_nan());
                assert!(x.is_nan() || Scalar::to_f32(ours) == theirs.to_f32());
            }
        }
    }
}
