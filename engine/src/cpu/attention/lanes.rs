//! The vectors that a register tile of an attention is made of, one type per instruction set.

/// How a tile is held in registers.
pub(super) trait Lane {
    /// A vector.
    type V: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of a tile of two vectors per row.
    const ROWS: usize;
    /// # Safety
    /// The processor has the instructions of this type; so for all functions here.
    unsafe fn splat(x: f32) -> Self::V;
    /// # Safety
    /// [`Lane::LANES`] elements can be read at `p`.
    unsafe fn load(p: *const f32) -> Self::V;
    /// # Safety
    /// [`Lane::LANES`] elements can be written at `p`.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a·b + c`.
    ///
    /// # Safety
    /// As for [`Lane::splat`].
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::Lane;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    pub(crate) struct Zmm;

    impl Lane for Zmm {
        type V = __m512;
        const LANES: usize = 16;
        const ROWS: usize = 14;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: the caller has AVX-512 and sixteen readable elements at `p`.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: the caller has AVX-512 and sixteen writable elements at `p`.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
    }

    /// Sixteen pairs of bf16, sums in f32.
    pub(crate) struct ZmmPairs;

    impl Lane for ZmmPairs {
        type V = __m512;
        const LANES: usize = 16;
        const ROWS: usize = 14;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: the caller has AVX-512 and sixteen readable elements at `p`.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: the caller has AVX-512 and sixteen writable elements at `p`.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the caller has AVX512-BF16; both types are 64 plain bytes.
            unsafe {
                let (a, b) = (transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b));
                _mm512_dpbf16_ps(c, a, b)
            }
        }
    }

    /// Eight pairs of bf16, sums in f32.
    pub(crate) struct YmmPairs;

    impl Lane for YmmPairs {
        type V = __m256;
        const LANES: usize = 8;
        const ROWS: usize = 14;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: the caller has AVX2 and eight readable elements at `p`.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: the caller has AVX2 and eight writable elements at `p`.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: the caller has AVX512-BF16 and VL; both types are 32 plain bytes.
            unsafe {
                let (a, b) = (transmute::<__m256, __m256bh>(a), transmute::<__m256, __m256bh>(b));
                _mm256_dpbf16_ps(c, a, b)
            }
        }
    }

    pub(crate) struct Ymm;

    impl Lane for Ymm {
        type V = __m256;
        const LANES: usize = 8;
        const ROWS: usize = 6;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: the caller has AVX2 and eight readable elements at `p`.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: the caller has AVX2 and eight writable elements at `p`.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: the caller has FMA.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
    }
}

/// Four lanes that the compiler maps to whatever the build targets.
pub(super) struct Plain;

impl Lane for Plain {
    type V = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 6;
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: the caller has four readable elements at `p`.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller has four writable elements at `p`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}
