//! The end of a tile: everything added to a product, its rounding and its place in the output.
//!
//! The output is touched once, straight from the cache where the tile was summed.

use std::ops::Range;

use half::bf16;

use super::operand::Data;
use crate::cpu::simd::{Scalar, vectorized};

/// Which output row a product row is.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Place {
    /// The same.
    Same,
    /// Windows `[rows,cols]` of an image are every `step`-th pixel of `[h,w]`, from `first`.
    Every { grid: (usize, usize), image: (usize, usize), step: usize, first: (usize, usize) },
    /// Rows `(tap,channel)` lie as `(channel,tap)`.
    Swapped { taps: usize, channels: usize },
}

impl Place {
    #[inline]
    fn row(self, i: usize) -> usize {
        match self {
            Place::Same => i,
            Place::Every { grid, image, step, first } => {
                let (b, y, x) = (i / (grid.0 * grid.1), i / grid.1 % grid.0, i % grid.1);
                (b * image.0 + y * step + first.0) * image.1 + x * step + first.1
            }
            Place::Swapped { taps, channels } => i % channels * taps + i / channels,
        }
    }
}

/// Memory of the output, written by tiles that do not overlap.
#[derive(Clone, Copy)]
pub(in super::super) enum Output {
    F32(*mut f32),
    BF16(*mut bf16),
}

// SAFETY: each output element belongs to one tile and each tile to one task.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// What is added and where it goes.
pub(in super::super) struct Finish<'a> {
    pub alpha: f32,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// `[images,n]` and the rows of an image.
    pub per_image: Option<(&'a [f32], usize)>,
    /// `[m,n]` at the places of the output.
    pub residual: Option<Data<'a>>,
    /// Add to what the output holds.
    pub accumulate: bool,
    pub output: Output,
    pub n: usize,
    pub place: Place,
}

/// A block of the product, summed in `sums` with `pitch` elements per row.
pub(super) struct Tile<'a> {
    pub sums: &'a mut [f32],
    pub pitch: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

impl Finish<'_> {
    /// Ends a tile: `alpha · sums` and the rest of it.
    ///
    /// # Safety
    /// The output holds every row that `place` gives, and nothing else touches the tile's elements.
    pub(super) unsafe fn tile(&self, tile: Tile, alpha: f32) {
        match self.output {
            Output::F32(out) => finish(self, tile, alpha, out),
            Output::BF16(out) => finish(self, tile, alpha, out),
        }
    }
}

impl Finish<'_> {
    /// Starts to bring the output's part of a tile near, before its sums are ready: a product of
    /// short k writes as much as it computes.
    pub(super) fn prefetch(&self, rows: Range<usize>, columns: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        for row in rows {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.place.row(row) * self.n;
            let (base, size) = match self.output {
                Output::F32(out) => (out.cast_const().cast::<i8>(), 4),
                Output::BF16(out) => (out.cast_const().cast::<i8>(), 2),
            };
            for offset in ((at + columns.start) * size..(at + columns.end) * size).step_by(64) {
                // SAFETY: every x86-64 processor has the instruction, and it reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(base.wrapping_add(offset)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, columns);
    }
}

vectorized! {
    fn finish<T: Scalar>(f: &Finish, tile: Tile, alpha: f32, out: *mut T) {
        let Tile { sums, pitch, rows, columns } = tile;
        for (sums, row) in sums.chunks_exact_mut(pitch).zip(rows) {
            let sums = &mut sums[..columns.len()];
            let at = f.place.row(row) * f.n + columns.start;
            if alpha != 1. {
                sums.iter_mut().for_each(|s| *s *= alpha);
            }
            if let Some(bias) = f.bias {
                add(sums, &bias[columns.clone()]);
            }
            if let Some((shift, pixels)) = f.per_image {
                add(sums, &shift[row / pixels * f.n + columns.start..][..columns.len()]);
            }
            match f.residual {
                Some(Data::F32(data)) => add(sums, &data[at..at + columns.len()]),
                Some(Data::BF16(data)) => add(sums, &data[at..at + columns.len()]),
                None => {}
            }
            // SAFETY: who calls `Finish::tile` promises that these elements are the tile's alone.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(at), columns.len()) };
            if f.accumulate {
                add(sums, out);
            }
            out.iter_mut().zip(sums).for_each(|(o, s)| *o = T::from_f32(*s));
        }
    }
}

#[inline(always)]
fn add<T: Scalar>(sums: &mut [f32], with: &[T]) {
    sums.iter_mut().zip(with).for_each(|(s, x)| *s += x.to_f32());
}
