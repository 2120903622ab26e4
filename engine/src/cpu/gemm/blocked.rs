//! The packed product: blocks of the output as tasks, each packing its own operands.
//!
//! A task owns up to 1024 rows by 1280 columns and all of k, so threads share nothing and k is never
//! split between them: results do not depend on the number of threads. Within a task, k goes in
//! passes of at most [`PASS`] words; a panel of `a` (up to 28 KB) stays in the first-level cache while
//! slivers of `b` (up to 512 KB at a time) stream from the second; sums of earlier passes wait
//! in tiles. A panel is packed just before its first use, while the one after it is on its way. Packing costs about half a cycle per element against n/16 or m/16 cycles of arithmetic.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::finish::{Finish, Tile};
use super::operand::{Data, Feed, Left, Right};
use super::pack::{Slivers, pack_left, pack_right, prefetch_left};
use crate::cpu::features::Level;
use crate::cpu::kernel_tile::{TileKernel, Word, tile_kernels, tile_shape};

/// Words of k in one pass at most.
const PASS: usize = 512;
/// Words of packed `b` that are used together: half of a 1 MiB second-level cache.
const RESIDENT: usize = 128 << 10;
/// Rows and columns of a task at most.
const TASK: (usize, usize) = (1024, 1280);
/// Multiply-adds below which a second thread does not pay.
const SMALL: usize = 1 << 18;

/// `a[m,k] · b[k,n]`, with where their elements lie.
#[derive(Clone, Copy)]
pub(in super::super) struct Pair<'a> {
    pub a: (Data<'a>, &'a Left),
    pub b: (Data<'a>, &'a Right),
    pub k: usize,
}

impl<'a> Pair<'a> {
    fn word(&self, level: Level) -> Word {
        let both = self.a.0.is_bf16() && self.b.0.is_bf16();
        if both && level == Level::Avx512Bf16 { Word::Pair } else { Word::Single }
    }
}

/// A product and all that ends it.
pub(in super::super) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub main: Pair<'a>,
    /// Added after `alpha`.
    pub low_rank: Option<Pair<'a>>,
    pub finish: Finish<'a>,
}

/// 64 bytes, the alignment of packed operands.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

// SAFETY: plain integers, any bits are valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above, and 64 bytes without padding.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    /// Packed operands and waiting sums of this thread's tasks: at most about 8 MB.
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with `words` words of scratch.
pub(super) fn with_scratch<R>(words: usize, work: impl FnOnce(&mut [u32]) -> R) -> R {
    let mut lines = SCRATCH.take();
    if lines.len() * 16 < words {
        lines.resize(words.div_ceil(16), Line([0; 16]));
    }
    let result = work(&mut bytemuck::cast_slice_mut(&mut lines)[..words]);
    SCRATCH.set(lines);
    result
}

/// Cuts `0..len` into `parts` pieces whose sizes differ by at most one `unit`.
fn piece(len: usize, unit: usize, parts: usize, index: usize) -> Range<usize> {
    let units = len.div_ceil(unit);
    let cut = |i: usize| (units * i / parts * unit).min(len);
    cut(index)..cut(index + 1)
}

/// How many pieces rows and columns are cut into for `threads` threads.
fn grid(m: usize, n: usize, k: usize, threads: usize, shape: (usize, usize)) -> (usize, usize) {
    let limits = (m.div_ceil(shape.0), n.div_ceil(shape.1));
    let (mut down, mut across) = (m.div_ceil(TASK.0), n.div_ceil(TASK.1));
    if m * n * k.max(1) < SMALL {
        return (down, across);
    }
    loop {
        let tasks = down * across;
        let even = tasks >= threads && (tasks % threads == 0 || tasks >= 4 * threads);
        // The larger side is cut: the other operand is then packed once more.
        let rows_are_longer = m / down >= n / across;
        match () {
            () if even => return (down, across),
            () if rows_are_longer && down < limits.0 => down += 1,
            () if across < limits.1 => across += 1,
            () if down < limits.0 => down += 1,
            () => return (down, across),
        }
    }
}

/// Computes a product at `level`.
///
/// # Safety
/// `p.finish.output` holds all that `p.finish.place` gives for `m` rows of `n`, and no one else uses
/// it meanwhile.
pub(in super::super) unsafe fn run(level: Level, p: &Product) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    let shape = tile_shape(level);
    let (down, across) = grid(p.m, p.n, p.main.k, rayon::current_num_threads(), shape);
    let task = |index: usize| {
        let rows = piece(p.m, shape.0, down, index / across);
        let columns = piece(p.n, shape.1, across, index % across);
        if !rows.is_empty() && !columns.is_empty() {
            Task::new(level, p, rows, columns).run();
        }
    };
    if down * across == 1 {
        task(0);
    } else {
        (0..down * across).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// One packed operand pair of a task: word type, kernels, and words of k.
struct Packing<'a> {
    pair: Pair<'a>,
    word: Word,
    kernels: &'static [TileKernel],
    /// Words of k in a pass, a multiple of 4.
    pass: usize,
    passes: usize,
}

impl<'a> Packing<'a> {
    fn new(level: Level, pair: Pair<'a>, limit: usize) -> Self {
        let word = pair.word(level);
        let words = pair.k.div_ceil(if word == Word::Pair { 2 } else { 1 });
        let passes = words.div_ceil(limit).max(1);
        let pass = words.div_ceil(passes).next_multiple_of(4);
        // Rounding up may have made the last pass empty.
        let passes = words.div_ceil(pass.max(1)).max(1);
        Self { pair, word, kernels: tile_kernels(level, word), pass, passes }
    }

    /// Elements of k in pass `index`, and their padded words.
    fn part(&self, index: usize) -> (Range<usize>, usize) {
        let per = if self.word == Word::Pair { 2 } else { 1 };
        let from = (index * self.pass * per).min(self.pair.k);
        let to = self.pair.k.min((index + 1) * self.pass * per);
        (from..to, (to - from).div_ceil(per).next_multiple_of(4))
    }

    fn pack_rows(&self, rows: Range<usize>, k: Range<usize>, panel: &mut [u32]) {
        pack_left(Feed::new(self.pair.a.0, self.word), self.pair.a.1, rows, k, panel);
    }

    fn prefetch_rows(&self, rows: Range<usize>, k: Range<usize>, part: (usize, usize)) {
        prefetch_left(Feed::new(self.pair.a.0, self.word), self.pair.a.1, rows, k, part);
    }

    fn pack_columns(&self, place: &Slivers, packed: &mut [u32]) {
        pack_right(Feed::new(self.pair.b.0, self.word), self.pair.b.1, place, packed);
    }
}

/// Rows cut into panels of nearly equal height.
struct Panels {
    range: Range<usize>,
    count: usize,
}

impl Panels {
    fn rows(&self, index: usize) -> Range<usize> {
        let cut = |i: usize| self.range.start + self.range.len() * i / self.count;
        cut(index)..cut(index + 1)
    }
}

struct Task<'a> {
    p: &'a Product<'a>,
    panels: Panels,
    columns: Range<usize>,
    width: usize,
    main: Packing<'a>,
    low_rank: Option<Packing<'a>>,
}

/// Scratch of a task, cut up.
struct Parts<'s> {
    a: &'s mut [u32],
    b: &'s mut [u32],
    low_a: &'s mut [u32],
    low_b: &'s mut [u32],
    tiles: &'s mut [f32],
}

impl<'a> Task<'a> {
    fn new(level: Level, p: &'a Product<'a>, rows: Range<usize>, columns: Range<usize>) -> Self {
        let (tallest, width) = tile_shape(level);
        let panels = Panels { count: rows.len().div_ceil(tallest), range: rows };
        let main = Packing::new(level, p.main, PASS);
        // The whole rank in one pass: it is small, and read while the tile is still at hand.
        let low_rank = p.low_rank.map(|pair| Packing::new(level, pair, usize::MAX));
        Self { p, panels, columns, width, main, low_rank }
    }

    fn slivers(&self) -> usize {
        self.columns.len().div_ceil(self.width)
    }

    /// Slivers that are packed and used together.
    fn group(&self) -> usize {
        let resident = if self.panels.count > 8 { RESIDENT } else { RESIDENT * 4 };
        (resident / (self.main.pass.max(1) * self.width)).clamp(1, self.slivers())
    }

    fn columns_of(&self, sliver: usize) -> Range<usize> {
        let from = self.columns.start + sliver * self.width;
        from..self.columns.end.min(from + self.width)
    }

    /// Whether packed panels are used again, by another group of slivers.
    fn keeps_panels(&self) -> bool {
        self.group() < self.slivers()
    }

    fn run(&self) {
        let rows = self.panels.range.len();
        let padded = self.slivers() * self.width;
        let low = self.low_rank.as_ref().map_or(0, |low| low.part(0).1);
        let waiting = if self.main.passes > 1 { rows * padded } else { 16 * self.width };
        let sizes = [
            if self.keeps_panels() { rows } else { rows.min(16) } * self.main.pass,
            self.group() * self.width * self.main.pass,
            rows * low,
            padded * low,
            waiting,
        ]
        .map(|words| words.next_multiple_of(16));
        with_scratch(sizes.iter().sum(), |scratch| {
            let (a, rest) = scratch.split_at_mut(sizes[0]);
            let (b, rest) = rest.split_at_mut(sizes[1]);
            let (low_a, rest) = rest.split_at_mut(sizes[2]);
            let (low_b, tiles) = rest.split_at_mut(sizes[3]);
            let tiles = bytemuck::cast_slice_mut(tiles);
            self.passes(&mut Parts { a, b, low_a, low_b, tiles });
        });
    }

    fn passes(&self, parts: &mut Parts) {
        if let Some(low) = &self.low_rank {
            let (k, words) = low.part(0);
            for panel in 0..self.panels.count {
                let rows = self.panels.rows(panel);
                let from = (rows.start - self.panels.range.start) * words;
                let panel = &mut parts.low_a[from..from + rows.len() * words];
                low.pack_rows(rows, k.clone(), panel);
            }
            let (columns, width) = (self.columns.clone(), self.width);
            let size = self.slivers() * width * words;
            if size > 0 {
                let place = Slivers { columns, k, width, words };
                low.pack_columns(&place, &mut parts.low_b[..size]);
            }
        }
        for pass in 0..self.main.passes {
            let (k, words) = self.main.part(pass);
            for first in (0..self.slivers()).step_by(self.group()) {
                let slivers = first..self.slivers().min(first + self.group());
                let from = self.columns.start + first * self.width;
                let to = self.columns.end.min(from + slivers.len() * self.width);
                if words > 0 {
                    let (columns, width) = (from..to, self.width);
                    let place = Slivers { columns, k: k.clone(), width, words };
                    self.main.pack_columns(&place, &mut parts.b[..slivers.len() * width * words]);
                }
                self.multiply(parts, pass, slivers);
            }
        }
    }

    /// All panels by a group of packed slivers; the first group packs the panels.
    fn multiply(&self, parts: &mut Parts, pass: usize, slivers: Range<usize>) {
        let (k, words) = self.main.part(pass);
        let single = self.main.passes == 1;
        let last = pass + 1 == self.main.passes;
        let beta = if pass == 0 { 0. } else { 1. };
        for panel in 0..self.panels.count {
            let rows = self.panels.rows(panel);
            let (height, above) = (rows.len(), rows.start - self.panels.range.start);
            let from = if self.keeps_panels() { above * words } else { 0 };
            let a = &mut parts.a[from..from + height * words];
            if slivers.start == 0 {
                self.main.pack_rows(rows.clone(), k.clone(), a);
            }
            let next = (panel + 1 < self.panels.count && slivers.start == 0)
                .then(|| self.panels.rows(panel + 1));
            let kernel = self.main.kernels[height - 1];
            for sliver in slivers.clone() {
                if let Some(next) = &next {
                    let part = (sliver - slivers.start, slivers.len());
                    self.main.prefetch_rows(next.clone(), k.clone(), part);
                }
                let b = (sliver - slivers.start) * self.width * words;
                let b = &parts.b[b..][..self.width * words];
                let at = if single {
                    0
                } else {
                    (above * self.slivers() + sliver * height) * self.width
                };
                let tile = &mut parts.tiles[at..][..height * self.width];
                if last {
                    self.p.finish.prefetch(rows.clone(), self.columns_of(sliver));
                }
                // SAFETY: the level was detected; the slices have just these lengths, and every
                // piece of scratch starts at a multiple of 64 bytes.
                unsafe { kernel(a.as_ptr(), b.as_ptr(), words / 4, tile.as_mut_ptr(), beta) };
                if last {
                    let low = (&*parts.low_a, &*parts.low_b);
                    self.finish(tile, rows.clone(), sliver, low);
                }
            }
        }
    }

    fn finish(&self, tile: &mut [f32], rows: Range<usize>, sliver: usize, low: (&[u32], &[u32])) {
        let mut alpha = self.p.finish.alpha;
        if let Some(packing) = &self.low_rank {
            let words = packing.part(0).1;
            let a = &low.0[(rows.start - self.panels.range.start) * words..][..rows.len() * words];
            let b = &low.1[sliver * self.width * words..][..self.width * words];
            let kernel = packing.kernels[rows.len() - 1];
            // SAFETY: as for the main product; `beta` of zero would forget a tile times zero.
            unsafe { kernel(a.as_ptr(), b.as_ptr(), words / 4, tile.as_mut_ptr(), alpha) };
            alpha = 1.;
        }
        let columns = self.columns_of(sliver);
        let tile = Tile { sums: tile, pitch: self.width, rows, columns };
        // SAFETY: who calls `run` promises the output; tiles do not overlap.
        unsafe { self.p.finish.tile(tile, alpha) };
    }
}
