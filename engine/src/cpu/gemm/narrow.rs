//! Products with few columns: rows are read once, straight from memory, and nothing is packed.
//!
//! A tile of 32 columns would spend 8 times the arithmetic on a rank of 4; these products should
//! run at the speed of reading `a`.

use std::ops::Range;

use rayon::prelude::*;

use super::blocked::{Product, with_scratch};
use super::finish::{Finish, Tile};
use super::operand::{Data, Left, Patches, Right};
use crate::cpu::features::Level;
use crate::cpu::kernel_dot::{Dot, Run};

/// Wider outputs waste less than a quarter of a 32-column tile.
const WIDEST: usize = 24;
/// Shorter rows do not fill a vector.
const SHORTEST: usize = 16;
/// Rows of a task.
const ROWS: usize = 64;

/// Computes the product if it is one of these; says whether it did.
///
/// # Safety
/// As for the blocked product.
pub(super) unsafe fn run(level: Level, p: &Product) -> bool {
    let windows = matches!(p.main.a.1, Left::Rows { .. } | Left::Patches(_));
    if p.n > WIDEST || p.main.k < SHORTEST || p.low_rank.is_some() || !windows {
        return false;
    }
    match (p.main.a.0, p.main.b.0) {
        (Data::F32(a), Data::F32(b)) => typed(level, p, a, b),
        (Data::BF16(a), Data::BF16(b)) => typed(level, p, a, b),
        _ => false,
    }
}

/// Operands of one type, columns along k.
struct Narrow<'a, T> {
    level: Level,
    a: &'a [T],
    left: &'a Left,
    columns: &'a [T],
    stride: usize,
    n: usize,
    k: usize,
    finish: &'a Finish<'a>,
}

fn typed<T: Dot + Copy + Default + Sync>(level: Level, p: &Product, a: &[T], b: &[T]) -> bool {
    if T::kernel(level, 1, 1).is_none() {
        return false;
    }
    let k = p.main.k;
    let mut turned = Vec::new();
    let (columns, stride) = match p.main.b.1 {
        Right::Columns { stride } => (b, *stride),
        Right::Rows { inner, taps, stride } => {
            turned.resize(k * p.n, T::default());
            for i in 0..k {
                let from = taps[i / inner] + i % inner * stride;
                for (j, x) in b[from..from + p.n].iter().enumerate() {
                    turned[j * k + i] = *x;
                }
            }
            (&turned[..], k)
        }
    };
    let narrow =
        Narrow { level, a, left: p.main.a.1, columns, stride, n: p.n, k, finish: &p.finish };
    let tasks = p.m.div_ceil(ROWS);
    let task = |i: usize| narrow.rows(i * ROWS..p.m.min((i + 1) * ROWS));
    if tasks == 1 {
        task(0)
    } else {
        (0..tasks).into_par_iter().for_each(task)
    }
    true
}

impl<T: Dot + Copy + Default> Narrow<'_, T> {
    fn rows(&self, rows: Range<usize>) {
        let channels = match self.left {
            Left::Patches(p) => p.c,
            _ => 0,
        };
        let zeros = vec![T::default(); channels];
        let mut runs = Vec::new();
        with_scratch(4 * 32, |scratch| {
            let sums: &mut [f32] = bytemuck::cast_slice_mut(scratch);
            for first in rows.clone().step_by(4) {
                let block = first..rows.end.min(first + 4);
                self.collect(block.clone(), &zeros, &mut runs);
                self.multiply(block, &runs, sums);
            }
        });
    }

    /// The stretches of up to 4 rows.
    fn collect(&self, rows: Range<usize>, zeros: &[T], runs: &mut Vec<Run<T>>) {
        runs.clear();
        match self.left {
            Left::Rows { stride } => {
                let start = |i: usize| self.a[i * stride..i * stride + self.k].as_ptr();
                let mut pointers = [start(rows.start); 4];
                rows.enumerate().for_each(|(r, row)| pointers[r] = start(row));
                runs.push(Run { rows: pointers, k: 0, len: self.k });
            }
            Left::Patches(p) => {
                for tap in 0..p.taps.len() {
                    let mut pointers = [zeros.as_ptr(); 4];
                    for (r, row) in rows.clone().enumerate() {
                        if let Some(pixel) = window(p, row, tap) {
                            pointers[r] = self.a[pixel * p.c..(pixel + 1) * p.c].as_ptr();
                        }
                    }
                    runs.push(Run { rows: pointers, k: tap * p.c, len: p.c });
                }
            }
            Left::Columns { .. } | Left::Spread(_) => {}
        }
    }

    fn multiply(&self, rows: Range<usize>, runs: &[Run<T>], sums: &mut [f32]) {
        for column in (0..self.n).step_by(4) {
            let count = (self.n - column).min(4);
            let mut out = [[0f32; 4]; 4];
            // The last column's end must lie inside too.
            let end = (column + count - 1) * self.stride + self.k;
            let from = &self.columns[column * self.stride..end];
            if let Some(kernel) = T::kernel(self.level, rows.len(), count) {
                // SAFETY: the level exists here; every run was cut from a slice that holds it.
                unsafe { kernel(runs, from.as_ptr(), self.stride, &mut out) };
            }
            for (sums, out) in sums.chunks_exact_mut(32).zip(&out) {
                sums[column..column + count].copy_from_slice(&out[..count]);
            }
        }
        let tile = Tile { sums, pitch: 32, rows, columns: 0..self.n };
        // SAFETY: who calls `run` promises the output; rows belong to one task.
        unsafe { self.finish.tile(tile, self.finish.alpha) };
    }
}

fn window(p: &Patches, row: usize, tap: usize) -> Option<usize> {
    let (down, across) = p.grid;
    p.source(row / (down * across), (row / across % down, row % across), tap)
}
