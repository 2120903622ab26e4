//! What the processor can do, found once at run time; the build itself stays portable.

use std::sync::OnceLock;

use super::simd::Simd;

/// Instruction sets that the matrix kernels are written for, each including the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Whatever the compiler makes of plain Rust.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors (F, BW, DQ, VL).
    Avx512,
    /// Products of bf16 pairs summed in f32.
    Avx512Bf16,
}

impl Level {
    /// The best level of this machine.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// Every level that this machine can run.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let all = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];
        all.into_iter().filter(|level| *level <= Level::best()).collect()
    }
}

fn detect() -> Level {
    match Simd::detected() {
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 if is_x86_feature_detected!("avx512bf16") => Level::Avx512Bf16,
        Simd::Avx512 => Level::Avx512,
        Simd::Avx2 => Level::Avx2,
        Simd::Portable => Level::Portable,
    }
}
