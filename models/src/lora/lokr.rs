//! LoKr: the Kronecker product of a small matrix and a larger one, either of which may be a low-rank
//! product itself (LyCORIS, arXiv:2309.14859).

use engine::{Factor, Update};

use super::composed::{Parts, Sizes, kaiming};
use super::{Init, TensorPlan};

/// How the sizes of a layer are split between the two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Size of the small matrix where it divides that of the layer, otherwise its largest; negative:
    /// both matrices are as alike as the sizes allow.
    pub factor: i64,
    /// The small matrix is a product, too, where that has fewer numbers.
    pub decompose_both: bool,
    /// Neither matrix is a product, whatever the rank.
    pub full_matrix: bool,
    /// The outputs are split the other way round.
    pub unbalanced: bool,
}

impl Default for Split {
    fn default() -> Self {
        Self { factor: -1, decompose_both: false, full_matrix: false, unbalanced: false }
    }
}

/// Splits `size` into two factors, the smaller first.
fn factorize(size: usize, factor: i64) -> (usize, usize) {
    let wanted = usize::try_from(factor).unwrap_or(size);
    if wanted > 0 && factor > 0 && size.is_multiple_of(wanted) {
        let other = size / wanted;
        return (wanted.min(other), wanted.max(other));
    }
    let fits = |n: &usize| n * n <= size && size.is_multiple_of(*n);
    let small = (1..=wanted.min(size)).take_while(|n| n * n <= size).filter(fits).last();
    let small = small.unwrap_or(1);
    (small, size / small)
}

/// `[rows, columns]` of the small matrix and of the larger one.
fn shapes(sizes: Sizes, split: Split) -> ([usize; 2], [usize; 2]) {
    let (mut small_out, mut large_out) = factorize(sizes.out, split.factor);
    if split.unbalanced {
        std::mem::swap(&mut small_out, &mut large_out);
    }
    let (small_in, large_in) = factorize(sizes.input, split.factor);
    ([small_out, small_in], [large_out, large_in])
}

/// Whether a matrix of this shape is worth being a product of rank `dim`.
fn is_product(shape: [usize; 2], dim: usize) -> bool {
    2 * dim < shape[0].max(shape[1])
}

fn are_products(sizes: Sizes, dim: usize, split: Split) -> (bool, bool) {
    let (small, large) = shapes(sizes, split);
    let may = !split.full_matrix;
    (may && split.decompose_both && is_product(small, dim), may && is_product(large, dim))
}

/// Whether neither matrix is a product; then nothing has the rank, and nothing is scaled by it.
pub(super) fn is_whole(sizes: Sizes, dim: usize, split: Split) -> bool {
    are_products(sizes, dim, split) == (false, false)
}

/// The tensors in LyCORIS' order; the larger matrix starts as zeros, so that the update is zero.
pub(super) fn list(
    parts: &mut Parts,
    sizes: Sizes,
    dim: usize,
    tucker: bool,
    split: Split,
) -> Update {
    let (small, large) = shapes(sizes, split);
    let (small_product, large_product) = are_products(sizes, dim, split);
    let first = if small_product {
        let left = parts.matrix("lokr_w1_a", [small[0], dim], kaiming(dim));
        let right = parts.matrix("lokr_w1_b", [dim, small[1]], kaiming(small[1]));
        Factor::Product { left, right }
    } else {
        Factor::Whole(parts.matrix("lokr_w1", small, kaiming(small[1])))
    };
    let second = if !large_product {
        let (height, width) = sizes.kernel;
        let engine = vec![large[0], height, width, large[1]];
        let file = sizes.file_shape(large[0], large[1]);
        Factor::Whole(parts.add(TensorPlan::whole("lokr_w2", engine, file, Init::Zeros)))
    } else if tucker {
        let core = parts.core("lokr_t2", dim, sizes, kaiming(dim * sizes.window()));
        let left = parts.matrix("lokr_w2_a", [dim, large[0]], kaiming(large[0]));
        let right = parts.matrix("lokr_w2_b", [dim, large[1]], Init::Zeros);
        Factor::Tucker { core, left, right, left_by_rows: false }
    } else {
        let left = parts.matrix("lokr_w2_a", [large[0], dim], kaiming(dim));
        let right = parts.flattened("lokr_w2_b", (dim, large[1]), sizes.window(), Init::Zeros);
        Factor::Product { left, right }
    };
    Update::Kronecker(first, second)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `lycoris.functional.factorization` of LyCORIS 4.1.3.
    #[test]
    fn sizes_are_split_as_by_lycoris() {
        let cases = [
            (127, -1, (1, 127)),
            (128, -1, (8, 16)),
            (128, 4, (4, 32)),
            (250, -1, (10, 25)),
            (250, 4, (2, 125)),
            (250, 8, (5, 50)),
            (320, -1, (16, 20)),
            (320, 64, (5, 64)),
            (320, 60, (16, 20)),
            (360, 16, (15, 24)),
            (512, 2, (2, 256)),
            (768, -1, (24, 32)),
            (1024, -1, (32, 32)),
            (1280, 16, (16, 80)),
            (1280, 0, (1, 1280)),
            (4, 100, (2, 2)),
        ];
        for (size, factor, want) in cases {
            assert_eq!(factorize(size, factor), want, "{size} by {factor}");
        }
    }

    #[test]
    fn products_are_made_where_they_save_numbers() {
        let sizes = Sizes { out: 320, input: 768, kernel: (1, 1), conv: false };
        let split = Split::default();
        assert_eq!(shapes(sizes, split), ([16, 24], [20, 32]));
        assert_eq!(are_products(sizes, 15, split), (false, true));
        assert!(is_whole(sizes, 16, split));
        let both = Split { decompose_both: true, ..split };
        assert_eq!(are_products(sizes, 11, both), (true, true));
        assert_eq!(are_products(sizes, 12, both), (false, true));
        assert!(is_whole(sizes, 4, Split { full_matrix: true, ..both }));
        let turned = Split { unbalanced: true, ..split };
        assert_eq!(shapes(sizes, turned), ([20, 24], [16, 32]));
    }
}
