//! A sum of low-rank products, decomposed through its factors.
//!
//! With the left factors side by side and the right ones on top of each other the sum is one
//! product `L R`. `L = Q_l T_l`, `R^T = Q_r T_r`, and the singular values of the sum are those of
//! the small `T_l T_r^T`. All in 64 bits: exact to the rounding of the factors.

use faer::{Mat, MatRef};

use super::Svd;
use super::decompositions::{qr, thin_svd};
use super::dense::product;
use crate::matrix::Matrix;

/// One product `factor * up * down`: `up` is `[out, r]`, `down` is `[r, in]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product<'a> {
    /// Left factor.
    pub up: &'a Matrix,
    /// Right factor.
    pub down: &'a Matrix,
    /// What the product is multiplied by.
    pub factor: f64,
}

/// The whole decomposition of the sum of `products`: as many values as the ranks together, or the
/// smaller side where that is less.
///
/// # Errors
/// When faer's SVD of the small core does not converge.
///
/// # Panics
/// When the shapes differ or nothing is given.
pub(crate) fn of_low_rank_sum(products: &[Product<'_>]) -> anyhow::Result<Svd> {
    let (rows, cols) = (products[0].up.rows, products[0].down.cols);
    let rank = products.iter().map(|product| product.down.rows).sum();
    let (mut left, mut right) = (Mat::zeros(rows, rank), Mat::zeros(cols, rank));
    let mut start = 0;
    for Product { up, down, factor } in products {
        // Both factors of one size, so that neither loses digits to the other.
        let width = down.rows;
        place(left.as_mut().subcols_mut(start, width), up.as_faer(), *factor);
        place(right.as_mut().subcols_mut(start, width), down.as_faer().transpose(), 1.0);
        start += width;
    }
    let ((q_left, t_left), (q_right, t_right)) = (qr(left), qr(right));
    let core = product(t_left.as_ref(), t_right.transpose());
    let (u, s, v) = thin_svd(core.as_ref())?;
    let energy = s.iter().map(|value| value * value).sum();
    let u = product(q_left.as_ref(), u.as_ref());
    let v = product(q_right.as_ref(), v.as_ref());
    Ok(Svd { u, s, v, energy })
}

fn place(mut target: faer::MatMut<'_, f64>, source: MatRef<'_, f32>, factor: f64) {
    for col in 0..source.ncols() {
        for row in 0..source.nrows() {
            target[(row, col)] = f64::from(source[(row, col)]) * factor;
        }
    }
}
