//! Inner kernels of the packed matrix product: one tile of `R` rows by a fixed width.
//!
//! `tile = a·b + beta·tile`. Both operands are packed in 32-bit words, a word being one f32 or two
//! neighbouring (in k) bf16: `a` as `[k/4][R][4]`, so that packing copies 16-byte pieces and needs no
//! transposition, `b` as `[k][width]`. k counts words and is a multiple of 4. Each output element is
//! one chain of additions in the order of k whatever `R` is, so a result does not depend on how
//! rows are grouped. 14x32 keeps 28 of the 32 AVX-512 registers as sums.

use super::features::Level;

/// What a word of the packed operands holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// One f32.
    Single,
    /// Two bf16, the earlier k in the low half.
    Pair,
}

/// Arguments: packed `a`, packed `b`, groups of 4 words of k, the tile `[R][width]`, `beta`.
///
/// # Safety
/// The processor has the kernel's level, `a` holds `4·groups·R` words, `b` `4·groups·width` words
/// (aligned to 64 bytes), the tile `R·width` elements (aligned to 64 bytes).
pub(super) type TileKernel = unsafe fn(*const u32, *const u32, usize, *mut f32, f32);

/// Rows of the tallest tile and width of all tiles of a level.
pub(super) fn tile_shape(level: Level) -> (usize, usize) {
    match level {
        Level::Portable => (4, 8),
        Level::Avx2 => (6, 16),
        Level::Avx512 | Level::Avx512Bf16 => (14, 32),
    }
}

macro_rules! by_rows {
    ($kernel:path; $($rows:literal)*) => {{
        use $kernel as kernel;
        [$(kernel::<$rows> as TileKernel),*]
    }};
}

static PORTABLE: [TileKernel; 4] = by_rows!(self::portable; 1 2 3 4);
#[cfg(target_arch = "x86_64")]
static AVX2: [TileKernel; 6] = by_rows!(self::x86::avx2; 1 2 3 4 5 6);
#[cfg(target_arch = "x86_64")]
static AVX512: [TileKernel; 14] = by_rows!(self::x86::avx512; 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
#[cfg(target_arch = "x86_64")]
static AVX512_PAIR: [TileKernel; 14] =
    by_rows!(self::x86::avx512_pair; 1 2 3 4 5 6 7 8 9 10 11 12 13 14);

/// The kernels of a level for 1, 2, .. rows. `Word::Pair` exists at [`Level::Avx512Bf16`] alone.
pub(super) fn tile_kernels(level: Level, word: Word) -> &'static [TileKernel] {
    #[cfg(target_arch = "x86_64")]
    match (level, word) {
        (Level::Avx512Bf16, Word::Pair) => return &AVX512_PAIR,
        (Level::Avx512Bf16 | Level::Avx512, _) => return &AVX512,
        (Level::Avx2, _) => return &AVX2,
        (Level::Portable, _) => {}
    }
    let _ = (level, word);
    &PORTABLE
}

/// # Safety
/// See [`TileKernel`].
unsafe fn portable<const R: usize>(
    a: *const u32,
    b: *const u32,
    groups: usize,
    tile: *mut f32,
    beta: f32,
) {
    const WIDTH: usize = 8;
    // SAFETY: the caller promises these lengths.
    let (a, b, tile) = unsafe {
        (
            std::slice::from_raw_parts(a.cast::<f32>(), groups * 4 * R),
            std::slice::from_raw_parts(b.cast::<f32>(), groups * 4 * WIDTH),
            std::slice::from_raw_parts_mut(tile, R * WIDTH),
        )
    };
    let mut sums = [[0f32; WIDTH]; R];
    for (a, b) in a.chunks_exact(4 * R).zip(b.chunks_exact(4 * WIDTH)) {
        for (step, b) in b.chunks_exact(WIDTH).enumerate() {
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = a[row * 4 + step];
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += x * b;
                }
            }
        }
    }
    for (tile, sums) in tile.chunks_exact_mut(WIDTH).zip(&sums) {
        for (t, sum) in tile.iter_mut().zip(sums) {
            *t = if beta == 0. { *sum } else { sum + beta * *t };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// # Safety
    /// See [`super::TileKernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const R: usize>(
        a: *const u32,
        b: *const u32,
        groups: usize,
        tile: *mut f32,
        beta: f32,
    ) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        // SAFETY: every address lies inside the lengths that the caller promises.
        unsafe {
            for _ in 0..groups {
                for step in 0..4 {
                    let left = _mm256_loadu_ps(b.add(step * 16));
                    let right = _mm256_loadu_ps(b.add(step * 16 + 8));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_ps(*a.add(row * 4 + step));
                        sums[0] = _mm256_fmadd_ps(x, left, sums[0]);
                        sums[1] = _mm256_fmadd_ps(x, right, sums[1]);
                    }
                }
                a = a.add(4 * R);
                b = b.add(4 * 16);
            }
            let beta_all = _mm256_set1_ps(beta);
            for (row, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    let at = tile.add(row * 16 + half * 8);
                    let sum = if beta == 0. {
                        *sum
                    } else {
                        _mm256_fmadd_ps(beta_all, _mm256_loadu_ps(at), *sum)
                    };
                    _mm256_storeu_ps(at, sum);
                }
            }
        }
    }

    /// # Safety
    /// `tile` holds `R·32` elements; AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store<const R: usize>(sums: &[[__m512; 2]; R], tile: *mut f32, beta: f32) {
        let beta_all = _mm512_set1_ps(beta);
        for (row, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                // SAFETY: `row < R` and `half < 2`.
                unsafe {
                    let at = tile.add(row * 32 + half * 16);
                    let sum = if beta == 0. {
                        *sum
                    } else {
                        _mm512_fmadd_ps(beta_all, _mm512_loadu_ps(at), *sum)
                    };
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
    }

    /// # Safety
    /// See [`super::TileKernel`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const R: usize>(
        a: *const u32,
        b: *const u32,
        groups: usize,
        tile: *mut f32,
        beta: f32,
    ) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: every address lies inside the lengths that the caller promises.
        unsafe {
            for _ in 0..groups {
                for step in 0..4 {
                    let left = _mm512_loadu_ps(b.add(step * 32));
                    let right = _mm512_loadu_ps(b.add(step * 32 + 16));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_ps(*a.add(row * 4 + step));
                        sums[0] = _mm512_fmadd_ps(x, left, sums[0]);
                        sums[1] = _mm512_fmadd_ps(x, right, sums[1]);
                    }
                }
                a = a.add(4 * R);
                b = b.add(4 * 32);
            }
            store(&sums, tile, beta);
        }
    }

    /// # Safety
    /// See [`super::TileKernel`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512_pair<const R: usize>(
        mut a: *const u32,
        mut b: *const u32,
        groups: usize,
        tile: *mut f32,
        beta: f32,
    ) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: every address lies inside the lengths that the caller promises; the casts keep
        // all 512 bits, which both types define.
        unsafe {
            for _ in 0..groups {
                for step in 0..4 {
                    let load = |at| -> __m512bh {
                        std::mem::transmute(_mm512_loadu_si512(b.add(at).cast()))
                    };
                    let (left, right) = (load(step * 32), load(step * 32 + 16));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32((*a.add(row * 4 + step)).cast_signed());
                        let x: __m512bh = std::mem::transmute(x);
                        sums[0] = _mm512_dpbf16_ps(sums[0], x, left);
                        sums[1] = _mm512_dpbf16_ps(sums[1], x, right);
                    }
                }
                a = a.add(4 * R);
                b = b.add(4 * 32);
            }
            store(&sums, tile, beta);
        }
    }
}
