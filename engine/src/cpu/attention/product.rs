//! Small matrix products for the tiles of an attention, in registers.
//!
//! Vectors run along the columns of `b`, elements of `a` are broadcast. Tiles are a few KiB and stay
//! in the nearest caches, so nothing is packed here. With AVX512-BF16 an element of `a` and `b` is
//! the bits of two bf16 numbers that follow each other in the direction of the sum.

#[cfg(target_arch = "x86_64")]
use super::lanes::x86;
use super::lanes::{Lane, Plain};
use crate::DType;
use crate::cpu::simd::Simd;

/// Queries of a tile: the columns of every score tile.
pub(super) const TILE: usize = 64;

/// What an element of `a` and `b` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    /// One f32.
    Single(Simd),
    /// Two bf16; sums are f32.
    Pairs,
}

impl Arithmetic {
    /// Pairs for bf16 where the processor multiplies them, otherwise f32.
    pub(super) fn of(dtype: DType) -> Self {
        if dtype == DType::BF16 && pairs_detected() {
            Arithmetic::Pairs
        } else {
            Arithmetic::Single(Simd::detected())
        }
    }

    /// Steps of a sum that one element holds.
    pub(super) fn depth(self) -> usize {
        match self {
            Arithmetic::Single(_) => 1,
            Arithmetic::Pairs => 2,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn pairs_detected() -> bool {
    Simd::detected() == Simd::Avx512 && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn pairs_detected() -> bool {
    false
}

/// `c[r][n] (+)= Σ a(r,s) · b[s][n]` over `steps`; rows of `c` lie `c_row` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows of `c`.
    pub rows: usize,
    /// Columns of `c` and `b`; a multiple of 16, or of 8 in [`product_rows`].
    pub columns: usize,
    /// Elements in the sum.
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

/// A lane type and the one of half its width for the last eight columns.
trait Kernel {
    type Full: Lane;
    type Half: Lane;
}

#[cfg(target_arch = "x86_64")]
struct Avx512;
#[cfg(target_arch = "x86_64")]
impl Kernel for Avx512 {
    type Full = x86::Zmm;
    type Half = x86::Ymm;
}

#[cfg(target_arch = "x86_64")]
struct Avx512Pairs;
#[cfg(target_arch = "x86_64")]
impl Kernel for Avx512Pairs {
    type Full = x86::ZmmPairs;
    type Half = x86::YmmPairs;
}

#[cfg(target_arch = "x86_64")]
struct Avx2;
#[cfg(target_arch = "x86_64")]
impl Kernel for Avx2 {
    type Full = x86::Ymm;
    type Half = Plain;
}

struct Portable;
impl Kernel for Portable {
    type Full = Plain;
    type Half = Plain;
}

/// `MR` rows of `NV` vectors and `NH` half vectors.
///
/// # Safety
/// The caller has the instructions of `K`, and `a`, `b`, `c` cover the tile as `p` describes it.
#[inline(always)]
unsafe fn tile<K: Kernel, const A_ROW: usize, const MR: usize, const NV: usize, const NH: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    let (full, half) = (K::Full::LANES, K::Half::LANES);
    // SAFETY: every offset stays in the ranges that the caller vouches for.
    unsafe {
        let mut sums = [[K::Full::splat(0.); NV]; MR];
        let mut tails = [[K::Half::splat(0.); NH]; MR];
        if p.accumulate {
            for i in 0..MR {
                for (j, sum) in sums[i].iter_mut().enumerate() {
                    *sum = K::Full::load(c.add(i * p.c_row + j * full));
                }
                for (j, sum) in tails[i].iter_mut().enumerate() {
                    *sum = K::Half::load(c.add(i * p.c_row + NV * full + j * half));
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..p.steps {
            let mut columns = [K::Full::splat(0.); NV];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = K::Full::load(b.add(j * full));
            }
            let mut rest = [K::Half::splat(0.); NH];
            for (j, column) in rest.iter_mut().enumerate() {
                *column = K::Half::load(b.add(NV * full + j * half));
            }
            for i in 0..MR {
                let x = *a.add(i * A_ROW);
                for (sum, column) in sums[i].iter_mut().zip(columns) {
                    *sum = K::Full::fma(K::Full::splat(x), column, *sum);
                }
                for (sum, column) in tails[i].iter_mut().zip(rest) {
                    *sum = K::Half::fma(K::Half::splat(x), column, *sum);
                }
            }
            a = a.wrapping_add(p.a_step);
            b = b.wrapping_add(p.b_step);
        }
        for i in 0..MR {
            for (j, sum) in sums[i].iter().enumerate() {
                K::Full::store(c.add(i * p.c_row + j * full), *sum);
            }
            for (j, sum) in tails[i].iter().enumerate() {
                K::Half::store(c.add(i * p.c_row + NV * full + j * half), *sum);
            }
        }
    }
}

/// All rows of `NV` vectors and `NH` half vectors, in panels as high as the registers allow.
///
/// Only some heights are compiled, and for the rarer shapes fewer: each costs build time, and the
/// heads in use end on an even number of rows.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn panels<K: Kernel, const A_ROW: usize, const NV: usize, const NH: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    let most = if NV + NH > 2 { 2 * K::Full::ROWS / 3 } else { K::Full::ROWS };
    let mut row = 0;
    while row < p.rows {
        let fits = most.min(p.rows - row);
        macro_rules! highest {
            ($($n:literal)*) => {
                $(if fits >= $n {
                    // SAFETY: `row + n` rows lie inside the matrices.
                    unsafe {
                        let (a, c) = (a.add(row * A_ROW), c.add(row * p.c_row));
                        tile::<K, A_ROW, $n, NV, NH>(p, a, b, c);
                    }
                    $n
                } else)* {
                    1
                }
            };
        }
        row += if K::Full::ROWS <= 6 {
            highest!(6 4 2 1)
        } else if A_ROW == 1 && NV == 2 {
            highest!(14 12 10 8 6 4 2 1)
        } else {
            highest!(8 4 2 1)
        };
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn whole<K: Kernel, const A_ROW: usize>(
    p: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    let lanes = K::Full::LANES;
    let mut column = 0;
    while column < p.columns {
        let rest = p.columns - column;
        let (vectors, odd) = (rest / lanes, !rest.is_multiple_of(lanes));
        // SAFETY: at least the columns that are taken are left.
        let taken = unsafe {
            let (b, c) = (b.add(column), c.add(column));
            match (vectors, odd) {
                // Score tiles are a multiple of sixteen wide and need none of the others.
                (1, false) => {
                    panels::<K, A_ROW, 1, 0>(p, a, b, c);
                    lanes
                }
                (0, _) if A_ROW > 1 => {
                    panels::<K, A_ROW, 0, 1>(p, a, b, c);
                    rest
                }
                (1, true) if A_ROW > 1 => {
                    panels::<K, A_ROW, 1, 1>(p, a, b, c);
                    rest
                }
                (2, true) if A_ROW > 1 => {
                    panels::<K, A_ROW, 2, 1>(p, a, b, c);
                    rest
                }
                (3 | 5, false) if A_ROW > 1 => {
                    panels::<K, A_ROW, 3, 0>(p, a, b, c);
                    3 * lanes
                }
                _ => {
                    panels::<K, A_ROW, 2, 0>(p, a, b, c);
                    2 * lanes
                }
            }
        };
        column += taken;
    }
}

macro_rules! entry {
    ($name:ident, $kernel:ty, $($feature:literal)?) => {
        /// # Safety
        /// As for [`tile`].
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name<const A_ROW: usize>(p: &Product, a: *const f32, b: *const f32, c: *mut f32) {
            // SAFETY: passed on to the caller.
            unsafe { whole::<$kernel, A_ROW>(p, a, b, c) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
entry!(avx512, Avx512, "avx512f,avx512vl,avx2,fma");
#[cfg(target_arch = "x86_64")]
entry!(pairs, Avx512Pairs, "avx512f,avx512vl,avx512bf16,avx2,fma");
#[cfg(target_arch = "x86_64")]
entry!(avx2, Avx2, "avx2,fma");
entry!(plain, Portable,);

fn checked<const A_ROW: usize>(
    arithmetic: Arithmetic,
    p: &Product,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    if p.rows == 0 || p.steps == 0 {
        return;
    }
    assert!(p.columns.is_multiple_of(if A_ROW > 1 { 8 } else { 16 }));
    assert!(a.len() > (p.rows - 1) * A_ROW + (p.steps - 1) * p.a_step);
    assert!(b.len() >= (p.steps - 1) * p.b_step + p.columns);
    assert!(c.len() >= (p.rows - 1) * p.c_row + p.columns);
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    match arithmetic {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions were detected, the bounds are asserted above.
        Arithmetic::Pairs => unsafe { pairs::<A_ROW>(p, a, b, c) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions were detected, the bounds are asserted above.
        Arithmetic::Single(Simd::Avx512) => unsafe { avx512::<A_ROW>(p, a, b, c) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions were detected, the bounds are asserted above.
        Arithmetic::Single(Simd::Avx2) => unsafe { avx2::<A_ROW>(p, a, b, c) },
        // SAFETY: the bounds are asserted above.
        _ => unsafe { plain::<A_ROW>(p, a, b, c) },
    }
}

/// `a(r,s) = a[s·a_step + r]`.
pub(super) fn product_columns(
    arithmetic: Arithmetic,
    p: &Product,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    checked::<1>(arithmetic, p, a, b, c);
}

/// `a(r,s) = a[r·TILE/depth + s]`; `a_step` is 1.
pub(super) fn product_rows(
    arithmetic: Arithmetic,
    p: &Product,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    let p = Product { a_step: 1, ..*p };
    match arithmetic {
        Arithmetic::Single(_) => checked::<TILE>(arithmetic, &p, a, b, c),
        Arithmetic::Pairs => checked::<{ TILE / 2 }>(arithmetic, &p, a, b, c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(i: usize) -> f32 {
        ((i * 7919 + 13) % 101) as f32 / 50. - 1.
    }

    const SIZES: [(usize, usize, usize); 6] =
        [(1, 16, 1), (15, 40, 40), (56, 64, 5), (29, 80, 33), (9, 8, 64), (31, 24, 7)];

    #[test]
    fn every_instruction_set_computes_the_same_product() {
        let best = Simd::detected();
        let sets = [Simd::Avx512, Simd::Avx2, Simd::Portable];
        let from = sets.iter().position(|s| *s == best).unwrap();
        for (rows, columns, steps) in SIZES {
            let a: Vec<f32> = (0..rows.max(steps) * TILE).map(noise).collect();
            let b: Vec<f32> = (0..steps * columns).map(|i| noise(i + 5)).collect();
            let want = |at: &dyn Fn(usize) -> usize, n: usize| -> f64 {
                (0..steps).map(|s| f64::from(a[at(s)]) * f64::from(b[s * columns + n])).sum()
            };
            for simd in &sets[from..] {
                let simd = Arithmetic::Single(*simd);
                let shape = Product {
                    rows,
                    columns,
                    steps,
                    a_step: TILE,
                    b_step: columns,
                    c_row: columns,
                    accumulate: true,
                };
                let mut sums = vec![0.5; rows * columns];
                product_rows(simd, &shape, &a, &b, &mut sums);
                for (i, x) in sums.iter().enumerate() {
                    let want = want(&|s| i / columns * TILE + s, i % columns);
                    assert!((f64::from(*x) - 0.5 - want).abs() < 1e-5);
                }
                if columns % 16 == 0 {
                    let overwrite = Product { accumulate: false, ..shape };
                    product_columns(simd, &overwrite, &a, &b, &mut sums);
                    for (i, x) in sums.iter().enumerate() {
                        let want = want(&|s| s * TILE + i / columns, i % columns);
                        assert!((f64::from(*x) - want).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_add_both_of_their_products() {
        if Arithmetic::of(DType::BF16) != Arithmetic::Pairs {
            return;
        }
        let pair = |i: usize| {
            let bits = |i| u32::from(half::bf16::from_f32(noise(i)).to_bits());
            f32::from_bits(bits(2 * i) | bits(2 * i + 1) << 16)
        };
        let number = |i: usize| f64::from(half::bf16::from_f32(noise(i)).to_f32());
        for (rows, columns, steps) in SIZES {
            let steps = steps.min(TILE / 2);
            let a: Vec<f32> = (0..rows * TILE / 2).map(pair).collect();
            let b: Vec<f32> = (0..steps * columns).map(pair).collect();
            let shape = Product {
                rows,
                columns,
                steps,
                a_step: 1,
                b_step: columns,
                c_row: columns,
                accumulate: false,
            };
            let mut sums = vec![0.; rows * columns];
            product_rows(Arithmetic::Pairs, &shape, &a, &b, &mut sums);
            for (i, x) in sums.iter().enumerate() {
                let (row, column) = (i / columns * TILE / 2, i % columns);
                let want: f64 = (0..2 * steps)
                    .map(|s| {
                        let at = 2 * ((s / 2) * columns + column) + s % 2;
                        number(2 * row + s) * number(at)
                    })
                    .sum();
                assert!((f64::from(*x) - want).abs() < 1e-5);
            }
        }
    }
}
