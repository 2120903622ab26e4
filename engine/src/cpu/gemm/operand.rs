//! Where the elements of a product lie: matrices, patches of feature maps, convolution weights.

use half::bf16;

use super::super::kernel_tile::Word;
use crate::tensor::Elements;
use crate::{DType, Result, Tensor};

/// Keeps a tensor readable while its elements are borrowed.
pub(in super::super) enum Guard<'a> {
    F32(Elements<'a, f32>),
    BF16(Elements<'a, bf16>),
}

impl<'a> Guard<'a> {
    pub(in super::super) fn new(t: &'a Tensor, op: &'static str) -> Result<Self> {
        Ok(match t.dtype() {
            DType::F32 => Guard::F32(t.elements(op)?),
            _ => Guard::BF16(t.elements(op)?),
        })
    }

    pub(in super::super) fn data(&self) -> Data<'_> {
        match self {
            Guard::F32(data) => Data::F32(data),
            Guard::BF16(data) => Data::BF16(data),
        }
    }
}

/// Elements of one of the two types.
#[derive(Clone, Copy)]
pub(in super::super) enum Data<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
}

impl Data<'_> {
    pub(in super::super) fn is_bf16(self) -> bool {
        matches!(self, Data::BF16(_))
    }
}

/// How elements become packed words.
#[derive(Clone, Copy)]
pub(super) enum Feed<'a> {
    /// f32 as it is.
    Single(&'a [f32]),
    /// bf16 widened to f32.
    Widened(&'a [bf16]),
    /// bf16 two to a word.
    Pair(&'a [bf16]),
}

impl<'a> Feed<'a> {
    /// `Word::Pair` is asked for only where both operands are bf16; f32 stays single.
    pub(super) fn new(data: Data<'a>, word: Word) -> Self {
        match (data, word) {
            (Data::F32(data), _) => Feed::Single(data),
            (Data::BF16(data), Word::Single) => Feed::Widened(data),
            (Data::BF16(data), Word::Pair) => Feed::Pair(data),
        }
    }
}

/// Places of the left operand `[m,k]`.
#[derive(Clone, Debug)]
pub(in super::super) enum Left {
    /// Row `i` starts at `i·stride`, k runs on.
    Rows { stride: usize },
    /// Column `k` starts at `k·stride`, rows run on.
    Columns { stride: usize },
    /// Row `i` is a window of a feature map.
    Patches(Patches),
    /// Row `(tap,channel)`, column a pixel of the map: the gradient that the tap brought there.
    Spread(Spread),
}

/// Windows of a map `[B,h,w,c]`; k runs over `(tap, channel)`.
#[derive(Clone, Debug)]
pub(in super::super) struct Patches {
    pub h: usize,
    pub w: usize,
    pub c: usize,
    /// Windows per image, down and across.
    pub grid: (usize, usize),
    /// Pixels from window to window.
    pub stride: usize,
    /// Offset of each tap from `stride · window`.
    pub taps: Vec<(isize, isize)>,
}

/// The output gradient `[B,oh,ow,c]` of a convolution, seen from the input pixels.
#[derive(Clone, Debug)]
pub(in super::super) struct Spread {
    pub h: usize,
    pub w: usize,
    pub oh: usize,
    pub ow: usize,
    pub c: usize,
    pub stride: usize,
    /// Offset of each tap: output pixel `o` reads input pixel `stride·o + tap`.
    pub taps: Vec<(isize, isize)>,
}

impl Spread {
    /// The output pixel in its image that reads input pixel `(y,x)` under `tap`.
    pub(super) fn output(&self, (y, x): (usize, usize), tap: (isize, isize)) -> Option<usize> {
        let one = |at: usize, tap: isize, limit: usize| {
            let shifted = at.checked_add_signed(-tap)?;
            let o = shifted / self.stride;
            (shifted % self.stride == 0 && o < limit).then_some(o)
        };
        Some(one(y, tap.0, self.oh)? * self.ow + one(x, tap.1, self.ow)?)
    }
}

/// Places of the right operand `[k,n]`.
#[derive(Clone, Debug)]
pub(in super::super) enum Right {
    /// Row `k` starts at `taps[k / inner] + (k % inner)·stride`, columns run on.
    Rows { inner: usize, taps: Vec<usize>, stride: usize },
    /// Column `j` starts at `j·stride`, k runs on.
    Columns { stride: usize },
}

impl Right {
    /// A row-major `[k,n]` matrix.
    pub(in super::super) fn plain(k: usize, n: usize) -> Self {
        Right::Rows { inner: k.max(1), taps: vec![0], stride: n }
    }
}
