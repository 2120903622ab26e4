//! Packing: operands of any layout and type into the words that the tile kernels read.
//!
//! `a` panels are `[k/4][rows][4]` words, `b` slivers `[k][width]` words. A word is one f32 (bf16 is
//! widened here) or two bf16 neighbours in k. What lies beyond the matrix is zero.

use std::ops::Range;

use half::bf16;

use super::operand::{Feed, Left, Patches, Right, Spread};
use crate::cpu::kernel_transpose::transpose_words;
use crate::cpu::simd::{Scalar, vectorized};

/// How one element becomes part of a word.
trait Convert: Default {
    type From: Scalar + bytemuck::Pod;
    type To: Scalar + bytemuck::Pod;
    /// Elements of a word.
    const PER_WORD: usize;
    fn convert(x: Self::From) -> Self::To;

    /// Converts four words' elements.
    ///
    /// # Safety
    /// `from` and `to` hold that many.
    #[inline(always)]
    unsafe fn group(from: *const Self::From, to: *mut Self::To) {
        // A plain loop over slices becomes a call of `memmove` for every 16 bytes.
        if size_of::<Self::From>() == size_of::<Self::To>() {
            // SAFETY: both are plain numbers of one size, and 16 bytes of them exist.
            unsafe {
                to.cast::<[u8; 16]>().write_unaligned(from.cast::<[u8; 16]>().read_unaligned())
            }
        } else {
            for i in 0..4 * Self::PER_WORD {
                // SAFETY: the caller promises this many.
                unsafe { to.add(i).write(Self::convert(from.add(i).read())) }
            }
        }
    }
}

#[derive(Default)]
struct Single;
#[derive(Default)]
struct Widened;
#[derive(Default)]
struct Pair;

impl Convert for Single {
    type From = f32;
    type To = f32;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn convert(x: f32) -> f32 {
        x
    }
}

impl Convert for Widened {
    type From = bf16;
    type To = f32;
    const PER_WORD: usize = 1;
    #[inline(always)]
    fn convert(x: bf16) -> f32 {
        Scalar::to_f32(x)
    }
}

impl Convert for Pair {
    type From = bf16;
    type To = bf16;
    const PER_WORD: usize = 2;
    #[inline(always)]
    fn convert(x: bf16) -> bf16 {
        x
    }
}

/// Asks for the part `share` of `of` of the cache lines that packing a panel will read, where they
/// are long stretches.
pub(super) fn prefetch_left(
    feed: Feed,
    left: &Left,
    rows: Range<usize>,
    k: Range<usize>,
    (share, of): (usize, usize),
) {
    match feed {
        Feed::Single(data) => prefetch(data, left, rows, k, (share, of)),
        Feed::Widened(data) | Feed::Pair(data) => prefetch(data, left, rows, k, (share, of)),
    }
}

fn prefetch<T>(
    data: &[T],
    left: &Left,
    rows: Range<usize>,
    k: Range<usize>,
    (share, of): (usize, usize),
) {
    let (from, to) = (rows.len() * share / of, rows.len() * (share + 1) / of);
    let rows = rows.start + from..rows.start + to;
    match left {
        // Whole rows are one stretch of memory, which the processor foresees by itself.
        Left::Rows { stride } if *stride != k.len() => {
            for row in rows {
                ask_for(&data[row * stride + k.start..row * stride + k.end]);
            }
        }
        Left::Patches(p) => {
            for row in rows {
                p.runs(row, k.clone(), |_, len, from| {
                    if let Some(from) = from {
                        ask_for(&data[from..from + len]);
                    }
                });
            }
        }
        _ => {}
    }
}

/// Starts to bring `data` into the second-level cache.
#[inline(always)]
fn ask_for<T>(data: &[T]) {
    for line in data.chunks(64 / size_of::<T>()) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has the instruction; the address is in `data`.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// One panel of the left operand: `rows` of the matrix, `k` elements from `k.start` (a multiple of
/// a 4-word group), into `panel`, whose length gives the padded k.
pub(super) fn pack_left(
    feed: Feed,
    left: &Left,
    rows: Range<usize>,
    k: Range<usize>,
    panel: &mut [u32],
) {
    match feed {
        Feed::Single(data) => left_as::<Single>(data, left, rows, k, panel),
        Feed::Widened(data) => left_as::<Widened>(data, left, rows, k, panel),
        Feed::Pair(data) => left_as::<Pair>(data, left, rows, k, panel),
    }
}

/// A packed panel under way.
struct Panel<'a, C: Convert> {
    words: &'a mut [C::To],
    rows: usize,
}

impl<C: Convert> Panel<'_, C> {
    /// Elements of a group of one row: 16 bytes.
    const GROUP: usize = 4 * C::PER_WORD;

    #[inline(always)]
    fn set(&mut self, row: usize, k: usize, value: C::To) {
        let at = k / Self::GROUP * (self.rows * Self::GROUP) + row * Self::GROUP + k % Self::GROUP;
        self.words[at] = value;
    }

    /// Writes a run of one row; `None` is zeros.
    #[inline(always)]
    fn run(&mut self, row: usize, k: usize, len: usize, source: Option<&[C::From]>) {
        let group = Self::GROUP;
        if !(k.is_multiple_of(group) && len.is_multiple_of(group)) {
            for i in 0..len {
                self.set(row, k + i, source.map_or(C::To::default(), |s| C::convert(s[i])));
            }
            return;
        }
        let (pitch, groups) = (self.rows * group, len / group);
        let at = k / group * pitch + row * group;
        assert!(groups == 0 || at + (groups - 1) * pitch + group <= self.words.len());
        assert!(source.is_none_or(|source| source.len() >= len));
        for i in 0..groups {
            // SAFETY: the last group's end was just compared with both lengths.
            unsafe {
                let to = self.words.as_mut_ptr().add(at + i * pitch);
                match source {
                    Some(source) => C::group(source.as_ptr().add(i * group), to),
                    None => to.cast::<[u8; 16]>().write_unaligned([0; 16]),
                }
            }
        }
    }
}

fn left_as<C: Convert>(
    data: &[C::From],
    left: &Left,
    rows: Range<usize>,
    k: Range<usize>,
    panel: &mut [u32],
) {
    let mut panel = Panel::<C> { words: bytemuck::cast_slice_mut(panel), rows: rows.len() };
    let padded = panel.words.len() / rows.len().max(1);
    if padded > k.len() {
        // Only the last group is shared with padding.
        let from = k.len() / Panel::<C>::GROUP * Panel::<C>::GROUP * rows.len();
        panel.words[from..].fill(C::To::default());
    }
    match left {
        Left::Rows { stride } => {
            for (r, row) in rows.enumerate() {
                let from = row * stride;
                panel.run(r, 0, k.len(), Some(&data[from + k.start..from + k.end]));
            }
        }
        Left::Columns { stride } => {
            for (at, k) in k.enumerate() {
                let column = &data[k * stride + rows.start..k * stride + rows.end];
                for (r, x) in column.iter().enumerate() {
                    panel.set(r, at, C::convert(*x));
                }
            }
        }
        Left::Patches(p) => patches(&mut panel, data, p, rows, k),
        Left::Spread(p) => spread(&mut panel, data, p, rows, k),
    }
}

fn patches<C: Convert>(
    panel: &mut Panel<C>,
    data: &[C::From],
    p: &Patches,
    rows: Range<usize>,
    k: Range<usize>,
) {
    for (r, row) in rows.enumerate() {
        p.runs(row, k.clone(), |at, len, from| {
            panel.run(r, at, len, from.map(|from| &data[from..from + len]));
        });
    }
}

impl Patches {
    /// Calls `each(offset in k, elements, first element in the map unless outside)` for the stretches
    /// of a row.
    #[inline(always)]
    fn runs(&self, row: usize, k: Range<usize>, mut each: impl FnMut(usize, usize, Option<usize>)) {
        let (down, across) = self.grid;
        let (image, y, x) = (row / (down * across), row / across % down, row % across);
        let mut at = k.start;
        while at < k.end {
            let (tap, channel) = (at / self.c, at % self.c);
            let len = (self.c - channel).min(k.end - at);
            let pixel = self.source(image, (y, x), tap);
            each(at - k.start, len, pixel.map(|pixel| pixel * self.c + channel));
            at += len;
        }
    }

    /// The pixel (counted over the batch) under `tap` of window `(y,x)`, if inside the map.
    #[inline]
    pub(super) fn source(&self, image: usize, (y, x): (usize, usize), tap: usize) -> Option<usize> {
        let (dy, dx) = self.taps[tap];
        let y = (y * self.stride).checked_add_signed(dy)?;
        let x = (x * self.stride).checked_add_signed(dx)?;
        (y < self.h && x < self.w).then(|| (image * self.h + y) * self.w + x)
    }
}

fn spread<C: Convert>(
    panel: &mut Panel<C>,
    data: &[C::From],
    p: &Spread,
    rows: Range<usize>,
    k: Range<usize>,
) {
    for (at, pixel) in k.enumerate() {
        let (image, y, x) = (pixel / (p.h * p.w), pixel / p.w % p.h, pixel % p.w);
        let mut row = rows.start;
        while row < rows.end {
            let (tap, channel) = (row / p.c, row % p.c);
            let len = (p.c - channel).min(rows.end - row);
            let first = row - rows.start;
            match p.output((y, x), p.taps[tap]) {
                Some(output) => {
                    let from = (image * p.oh * p.ow + output) * p.c + channel;
                    for (i, x) in data[from..from + len].iter().enumerate() {
                        panel.set(first + i, at, C::convert(*x));
                    }
                }
                None => (0..len).for_each(|i| panel.set(first + i, at, C::To::default())),
            }
            row += len;
        }
    }
}

/// Where packed slivers go: `columns` of the right operand, elements `k` from a multiple of a 4-word
/// group, slivers of `width` columns and `words` padded words of k.
#[derive(Clone, Debug)]
pub(super) struct Slivers {
    pub columns: Range<usize>,
    pub k: Range<usize>,
    pub width: usize,
    pub words: usize,
}

/// Slivers of the right operand into `packed`.
pub(super) fn pack_right(feed: Feed, right: &Right, place: &Slivers, packed: &mut [u32]) {
    match feed {
        Feed::Single(data) => right_as::<Single>(data, right, place, packed),
        Feed::Widened(data) => right_as::<Widened>(data, right, place, packed),
        Feed::Pair(data) => right_as::<Pair>(data, right, place, packed),
    }
}

fn right_as<C: Convert>(data: &[C::From], right: &Right, place: &Slivers, packed: &mut [u32]) {
    let size = place.width * place.words;
    let full = place.k.len() / C::PER_WORD;
    for (s, sliver) in packed.chunks_exact_mut(size).enumerate() {
        sliver[full * place.width..].fill(0);
        if (s + 1) * place.width > place.columns.len() {
            sliver.fill(0);
        }
    }
    match right {
        Right::Rows { .. } => rows_as(C::default(), data, right, place, packed),
        Right::Columns { stride } => {
            for (s, sliver) in packed.chunks_exact_mut(size).enumerate() {
                let from = place.columns.start + s * place.width;
                let to = place.columns.end.min(from + place.width);
                columns_as::<C>(data, *stride, from..to, place, sliver);
            }
        }
    }
}

vectorized! {
    fn rows_as<C: Convert>(
        _how: C,
        data: &[C::From],
        right: &Right,
        place: &Slivers,
        packed: &mut [u32],
    ) {
        /// Rows of k that are read before the next sliver, to stay within a page or two.
        const BLOCK: usize = 8;
        let Right::Rows { inner, taps, stride } = right else { return };
        let per = C::PER_WORD;
        let pitch = place.width * per;
        let packed: &mut [C::To] = bytemuck::cast_slice_mut(packed);
        let mut block = 0;
        while block < place.k.len() {
            let end = place.k.len().min(block + BLOCK * per);
            for at in end..place.k.len().min(end + BLOCK * per) {
                // Rows of a convolution's weight lie pages apart: no processor foresees them.
                let k = place.k.start + at;
                let from = taps[k / inner] + k % inner * stride + place.columns.start;
                ask_for(&data[from..from + place.columns.len()]);
            }
            for (s, sliver) in packed.chunks_exact_mut(pitch * place.words).enumerate() {
                let first = place.columns.start + s * place.width;
                let count = place.columns.end.min(first + place.width) - first;
                for word in block / per..end.div_ceil(per) {
                    let row = |at: usize| {
                        let k = place.k.start + at;
                        let from = taps[k / inner] + k % inner * stride + first;
                        &data[from..from + count]
                    };
                    let to = &mut sliver[word * pitch..(word + 1) * pitch];
                    let low = row(word * per);
                    if per == 1 {
                        to.iter_mut().zip(low).for_each(|(to, x)| *to = C::convert(*x));
                    } else if word * per + 1 < place.k.len() {
                        let both = low.iter().zip(row(word * per + 1));
                        for (to, (x, y)) in to.chunks_exact_mut(2).zip(both) {
                            to[0] = C::convert(*x);
                            to[1] = C::convert(*y);
                        }
                    } else {
                        // The other half is the padding of an odd k, already zero.
                        to.chunks_exact_mut(2).zip(low).for_each(|(to, x)| to[0] = C::convert(*x));
                    }
                }
            }
            block = end;
        }
    }
}

/// One sliver of a right operand whose k runs on: blocks of 16 by 16 words are transposed.
fn columns_as<C: Convert>(
    data: &[C::From],
    stride: usize,
    columns: Range<usize>,
    place: &Slivers,
    sliver: &mut [u32],
) {
    let per = C::PER_WORD;
    let words = place.k.len() / per;
    let (block_columns, block_words) = (columns.len() / 16 * 16, words / 16 * 16);
    for half in (0..block_columns).step_by(16) {
        for word in (0..block_words).step_by(16) {
            let from = (columns.start + half) * stride + place.k.start + word * per;
            let to = &mut sliver[word * place.width + half..];
            if size_of::<C::From>() == size_of::<C::To>() {
                transpose_words(&data[from..], stride, to, place.width);
            } else {
                let mut wide = [C::To::default(); 256];
                for (row, to) in wide.chunks_exact_mut(16).enumerate() {
                    let source = &data[from + row * stride..][..16];
                    to.iter_mut().zip(source).for_each(|(to, x)| *to = C::convert(*x));
                }
                transpose_words(&wide, 16, to, place.width);
            }
        }
    }
    let sliver: &mut [C::To] = bytemuck::cast_slice_mut(sliver);
    for (j, column) in columns.enumerate() {
        let done = if j < block_columns { block_words * per } else { 0 };
        let from = column * stride + place.k.start;
        for at in done..place.k.len() {
            let to = (at / per * place.width + j) * per + at % per;
            sliver[to] = C::convert(data[from + at]);
        }
    }
}
