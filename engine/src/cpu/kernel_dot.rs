//! Inner products of a few rows with a few columns, both running along k: for outputs too narrow
//! for a tile (LoRA ranks, four latent channels). AVX-512 only; other machines use tiles.

use half::bf16;

use super::features::Level;

/// A stretch of k that is contiguous in the rows and in the columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<T> {
    /// Where each row's stretch starts.
    pub rows: [*const T; 4],
    /// Where the stretch starts in the columns.
    pub k: usize,
    /// Elements.
    pub len: usize,
}

/// Arguments: stretches, first column, elements from column to column, sums `[row][column]`.
///
/// # Safety
/// The processor has the kernel's level; rows and columns hold all that the runs name.
pub(super) type DotKernel<T> = unsafe fn(&[Run<T>], *const T, usize, &mut [[f32; 4]; 4]);

/// Element types that have these kernels.
pub(super) trait Dot: Sized + 'static {
    /// The kernel for `rows` and `columns`, 1 to 4 of each; `None` below its level.
    fn kernel(level: Level, rows: usize, columns: usize) -> Option<DotKernel<Self>>;
}

#[cfg(target_arch = "x86_64")]
macro_rules! kernels {
    ($kernel:path) => {{
        use $kernel as k;
        [
            [k::<1, 1>, k::<1, 2>, k::<1, 3>, k::<1, 4>],
            [k::<2, 1>, k::<2, 2>, k::<2, 3>, k::<2, 4>],
            [k::<3, 1>, k::<3, 2>, k::<3, 3>, k::<3, 4>],
            [k::<4, 1>, k::<4, 2>, k::<4, 3>, k::<4, 4>],
        ]
    }};
}

impl Dot for f32 {
    fn kernel(level: Level, rows: usize, columns: usize) -> Option<DotKernel<f32>> {
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Avx512 {
            static TABLE: [[DotKernel<f32>; 4]; 4] = kernels!(x86::single);
            return Some(TABLE[rows - 1][columns - 1]);
        }
        let _ = (level, rows, columns);
        None
    }
}

impl Dot for bf16 {
    fn kernel(level: Level, rows: usize, columns: usize) -> Option<DotKernel<bf16>> {
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Avx512Bf16 {
            static TABLE: [[DotKernel<bf16>; 4]; 4] = kernels!(x86::pair);
            return Some(TABLE[rows - 1][columns - 1]);
        }
        let _ = (level, rows, columns);
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::Run;

    /// The sum of each of up to 4 vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn sums_of<const C: usize>(v: &[__m512; C]) -> [f32; 4] {
        let at = |c: usize| if c < C { v[c] } else { _mm512_setzero_ps() };
        let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (left, right) =
            (_mm512_castps_pd(pair(at(0), at(1))), _mm512_castps_pd(pair(at(2), at(3))));
        // Every 128-bit lane now sums to the four results in order.
        let lanes = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)),
        );
        let half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
        let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let mut out = [0f32; 4];
        // SAFETY: four elements are written to an array of four.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), quarter) };
        out
    }

    /// # Safety
    /// See [`super::DotKernel`].
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) unsafe fn single<const R: usize, const C: usize>(
        runs: &[Run<f32>],
        columns: *const f32,
        stride: usize,
        out: &mut [[f32; 4]; 4],
    ) {
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        for run in runs {
            let mut k = 0;
            while k < run.len {
                let left = run.len - k;
                let mask = if left < 16 { (1u16 << left) - 1 } else { u16::MAX };
                let mut b = [_mm512_setzero_ps(); C];
                for (c, b) in b.iter_mut().enumerate() {
                    // SAFETY: the mask keeps within the run, which the caller promises to exist.
                    *b =
                        unsafe { _mm512_maskz_loadu_ps(mask, columns.add(c * stride + run.k + k)) };
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: as above.
                    let a = unsafe { _mm512_maskz_loadu_ps(mask, run.rows[r].add(k)) };
                    for (sum, b) in sums.iter_mut().zip(&b) {
                        *sum = _mm512_fmadd_ps(a, *b, *sum);
                    }
                }
                k += 16;
            }
        }
        for (out, sums) in out.iter_mut().zip(&sums) {
            *out = sums_of(sums);
        }
    }

    /// # Safety
    /// See [`super::DotKernel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn pair<const R: usize, const C: usize>(
        runs: &[Run<bf16>],
        columns: *const bf16,
        stride: usize,
        out: &mut [[f32; 4]; 4],
    ) {
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        for run in runs {
            let mut k = 0;
            while k < run.len {
                let left = run.len - k;
                let mask = if left < 32 { (1u32 << left) - 1 } else { u32::MAX };
                let load = |at: *const bf16| -> __m512bh {
                    // SAFETY: the mask keeps within the run, which the caller promises to exist;
                    // the cast keeps all 512 bits.
                    unsafe { std::mem::transmute(_mm512_maskz_loadu_epi16(mask, at.cast())) }
                };
                let mut b = [load(columns); C];
                for (c, b) in b.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *b = load(unsafe { columns.add(c * stride + run.k + k) });
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: as above.
                    let a = load(unsafe { run.rows[r].add(k) });
                    for (sum, b) in sums.iter_mut().zip(&b) {
                        *sum = _mm512_dpbf16_ps(*sum, a, *b);
                    }
                }
                k += 32;
            }
        }
        for (out, sums) in out.iter_mut().zip(&sums) {
            *out = sums_of(sums);
        }
    }
}
