//! Small matrix products for the tiles of an attention, in registers.
//!
//! Vectors run along the columns of `b`, elements of `a` are broadcast. Tiles are a few KiB and stay
//! in the nearest caches, so nothing is packed here.

use super::super::simd::Simd;

/// Queries of a tile: the columns of every score tile.
pub(super) const TILE: usize = 64;

/// `c[r][n] (+)= Σ a(r,s) · b[s][n]` over `steps`; rows of `c` lie `c_row` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows of `c`.
    pub rows: usize,
    /// Columns of `c` and `b`; a multiple of 16.
    pub columns: usize,
    /// Length of the sum.
    pub steps: usize,
    /// Distance of `a(r,s)` and `a(r,s+1)`.
    pub a_step: usize,
    /// Distance of the rows of `b`.
    pub b_step: usize,
    /// Distance of the rows of `c`.
    pub c_row: usize,
    /// Add to `c` instead of overwriting it.
    pub accumulate: bool,
}

/// One lane type: how a tile is held in registers.
trait Lane {
    type V: Copy;
    const LANES: usize;
    /// Rows of a tile of two vectors per row.
    const ROWS: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

#[cfg(target_arch = "x86_64")]
mod lanes {
    use super::Lane;
    use std::arch::x86_64::*;

    pub(super) struct Zmm;

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

    pub(super) struct Ymm;

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
struct Plain;

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

/// `MR` rows of `NV` vectors.
///
/// # Safety
/// The caller has the instructions of `L`, and `a`, `b`, `c` cover the tile as `p` describes it.
#[inline(always)]
unsafe fn tile<L: Lane, const A_ROW: usize, const MR: usize, const NV: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    // SAFETY: every offset stays in the ranges that the caller vouches for.
    unsafe {
        let mut sums = [[L::splat(0.); NV]; MR];
        if p.accumulate {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = L::load(c.add(i * p.c_row + j * L::LANES));
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..p.steps {
            let mut columns = [L::splat(0.); NV];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = L::load(b.add(j * L::LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let x = L::splat(*a.add(i * A_ROW));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = L::fma(x, column, *sum);
                }
            }
            a = a.wrapping_add(p.a_step);
            b = b.wrapping_add(p.b_step);
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                L::store(c.add(i * p.c_row + j * L::LANES), *sum);
            }
        }
    }
}

/// All rows of `NV` vectors, in panels of nearly equal height.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn panels<L: Lane, const A_ROW: usize, const NV: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    // Three vectors per row leave registers for fewer rows.
    let most = if NV > 2 { (2 * L::ROWS / NV).min(8) } else { L::ROWS };
    let mut row = 0;
    while row < p.rows {
        let rest = p.rows - row;
        let rows = rest.div_ceil(rest.div_ceil(most));
        macro_rules! by_rows {
            ($($n:literal)*) => {
                match rows {
                    // SAFETY: `row + rows` rows lie inside the matrices.
                    $($n => unsafe {
                        tile::<L, A_ROW, $n, NV>(p, a.add(row * A_ROW), b, c.add(row * p.c_row));
                    })*
                    _ => {}
                }
            };
        }
        if NV > 2 {
            by_rows!(1 2 3 4 5 6 7 8);
        } else if L::ROWS > 6 {
            by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        } else {
            by_rows!(1 2 3 4 5 6);
        }
        row += rows;
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn whole<L: Lane, const A_ROW: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    let mut column = 0;
    while column < p.columns {
        let vectors = (p.columns - column) / L::LANES;
        let taken = match vectors {
            1 => 1,
            3 | 5 => 3,
            _ => 2,
        };
        // SAFETY: `taken` vectors of columns are left.
        unsafe {
            let (b, c) = (b.add(column), c.add(column));
            match taken {
                1 => panels::<L, A_ROW, 1>(p, a, b, c),
                2 => panels::<L, A_ROW, 2>(p, a, b, c),
                _ => panels::<L, A_ROW, 3>(p, a, b, c),
            }
        }
        column += taken * L::LANES;
    }
}

macro_rules! entry {
    ($name:ident, $lane:ty, $($feature:literal)?) => {
        /// # Safety
        /// As for [`tile`].
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name<const A_ROW: usize>(p: &Product, a: *const f32, b: *const f32, c: *mut f32) {
            // SAFETY: passed on to the caller.
            unsafe { whole::<$lane, A_ROW>(p, a, b, c) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
entry!(avx512, lanes::Zmm, "avx512f");
#[cfg(target_arch = "x86_64")]
entry!(avx2, lanes::Ymm, "avx2,fma");
entry!(plain, Plain,);

fn checked<const A_ROW: usize>(simd: Simd, p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    if p.rows == 0 || p.steps == 0 {
        return;
    }
    assert!(p.columns.is_multiple_of(16));
    assert!(a.len() > (p.rows - 1) * A_ROW + (p.steps - 1) * p.a_step);
    assert!(b.len() >= (p.steps - 1) * p.b_step + p.columns);
    assert!(c.len() >= (p.rows - 1) * p.c_row + p.columns);
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    match simd {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `simd` was detected, the bounds are asserted above.
        Simd::Avx512 => unsafe { avx512::<A_ROW>(p, a, b, c) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `simd` was detected, the bounds are asserted above.
        Simd::Avx2 => unsafe { avx2::<A_ROW>(p, a, b, c) },
        // SAFETY: the bounds are asserted above.
        _ => unsafe { plain::<A_ROW>(p, a, b, c) },
    }
}

/// `a(r,s) = a[s·a_step + r]`.
pub(super) fn product_columns(simd: Simd, p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    checked::<1>(simd, p, a, b, c);
}

/// `a(r,s) = a[r·TILE + s]`; `a_step` is 1.
pub(super) fn product_rows(simd: Simd, p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    checked::<TILE>(simd, &Product { a_step: 1, ..*p }, a, b, c);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_computes_the_same_product() {
        let noise = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50. - 1.;
        let best = Simd::detected();
        let sets = [Simd::Avx512, Simd::Avx2, Simd::Portable];
        let from = sets.iter().position(|s| *s == best).unwrap();
        for (rows, columns, steps) in [(1, 16, 1), (15, 48, 40), (56, 64, 5), (29, 80, 33)] {
            let a: Vec<f32> = (0..rows.max(steps) * TILE).map(noise).collect();
            let b: Vec<f32> = (0..steps * columns).map(|i| noise(i + 5)).collect();
            for simd in &sets[from..] {
                let shape = Product {
                    rows,
                    columns,
                    steps,
                    a_step: TILE,
                    b_step: columns,
                    c_row: columns,
                    accumulate: true,
                };
                let (mut by_column, mut by_row) =
                    (vec![0.5; rows * columns], vec![0f32; rows * columns]);
                product_columns(*simd, &shape, &a, &b, &mut by_column);
                let overwrite = Product { accumulate: false, ..shape };
                product_rows(*simd, &overwrite, &a, &b, &mut by_row);
                for (i, (x, y)) in by_column.iter().zip(&by_row).enumerate() {
                    let (r, n) = (i / columns, i % columns);
                    let sum = |at: &dyn Fn(usize) -> usize| -> f64 {
                        (0..steps)
                            .map(|s| f64::from(a[at(s)]) * f64::from(b[s * columns + n]))
                            .sum()
                    };
                    assert!((f64::from(*x) - 0.5 - sum(&|s| s * TILE + r)).abs() < 1e-5);
                    assert!((f64::from(*y) - sum(&|s| r * TILE + s)).abs() < 1e-5);
                }
            }
        }
    }
}
