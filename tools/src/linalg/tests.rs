//! Truncated decompositions beside full ones, for spectra of every kind.

use faer::Mat;

use super::decompositions::{qr, thin_svd};
use super::dense::product;
use super::gaussian::Gaussian;
use super::*;

/// `[rows, cols]` with the given singular values and random vectors, rounded to 32 bits.
fn with_spectrum(rows: usize, cols: usize, values: &[f64], seed: u64) -> Matrix {
    let mut gaussian = Gaussian::new(seed);
    let mut u = qr(gaussian.matrix(rows, values.len())).0;
    let v = qr(gaussian.matrix(cols, values.len())).0;
    for (col, value) in values.iter().enumerate() {
        for row in 0..rows {
            u[(row, col)] *= value;
        }
    }
    let whole = product(u.as_ref(), v.transpose());
    Matrix::from_faer(Mat::from_fn(rows, cols, |i, j| whole[(i, j)] as f32).as_ref())
}

fn wide(matrix: &Matrix) -> Mat<f64> {
    Mat::from_fn(matrix.rows, matrix.cols, |i, j| f64::from(matrix.row(i)[j]))
}

/// `|A - up * down|` and the least that is possible with `rank`, both Frobenius.
fn distances(matrix: &Matrix, svd: &Svd, rank: usize) -> (f64, f64) {
    let (up, down) = (svd.up(rank), svd.down(rank));
    let near = product(wide(&up).as_ref(), wide(&down).as_ref());
    let whole = wide(matrix);
    let distance = (&whole - &near).norm_l2();
    let (_, s, _) = thin_svd(whole.as_ref()).unwrap();
    let best = s[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
    (distance, best)
}

fn dense(matrix: &Matrix) -> Dense<'_> {
    Dense { rows: matrix.rows, cols: matrix.cols, values: &matrix.values }
}

/// 1.001 times the best, and what 32-bit factors round: both of them to 24 bits.
fn assert_best(what: &str, matrix: &Matrix, svd: &Svd, rank: usize) {
    let (distance, best) = distances(matrix, svd, rank);
    let norm = svd.energy.sqrt();
    assert!(
        distance <= 1.001 * best + 2.0 * ROUNDING * norm,
        "{what}, rank {rank}: {distance} beside {best}, norm {norm}"
    );
    for vectors in [&svd.u, &svd.v] {
        let square = product(vectors.transpose(), vectors.as_ref());
        let off = (&square - &Mat::<f64>::identity(square.nrows(), square.ncols())).norm_max();
        assert!(off < 1e-10, "{what}: not orthonormal by {off}");
    }
    assert!(svd.s.is_sorted_by(|a, b| a >= b), "{what}: {:?}", svd.s);
}

fn spectra(count: usize) -> Vec<(&'static str, Vec<f64>)> {
    let of = |f: &dyn Fn(usize) -> f64| (0..count).map(f).collect::<Vec<f64>>();
    vec![
        ("fast", of(&|i| 0.5_f64.powi(i as i32))),
        ("very fast", of(&|i| 0.05_f64.powi(i as i32))),
        ("slow", of(&|i| 1.0 / (1.0 + i as f64))),
        ("flat", of(&|i| 1.0 - 0.3 * i as f64 / count as f64)),
        ("all the same", of(&|_| 3.0)),
        ("rank 3", of(&|i| if i < 3 { 2.0 } else { 0.0 })),
        ("rank 1", of(&|i| if i < 1 { 1e-3 } else { 0.0 })),
        ("rank 30", of(&|i| if i < 30 { 1.0 + i as f64 } else { 0.0 })),
        ("cluster", of(&|i| [9.0, 4.0, 2.0, 1.001, 1.0, 0.999].get(i).copied().unwrap_or(0.01))),
        ("tie over a floor", of(&|i| if i < 12 { 1.0 } else { 1e-4 })),
        ("steps", of(&|i| 10_f64.powi(-((i / 6) as i32)))),
        ("signal over noise", of(&|i| if i < 4 { 1.0 } else { 2e-5 * (1.0 - 0.002 * i as f64) })),
        ("tiny", of(&|i| 1e-12 / (1.0 + i as f64))),
    ]
}

#[test]
fn dense_matrices_of_every_spectrum_are_cut_at_their_best() {
    for (rows, cols) in [(160, 220), (210, 150)] {
        for (at, (what, values)) in spectra(rows.min(cols)).into_iter().enumerate() {
            let matrix = with_spectrum(rows, cols, &values, at as u64);
            for rank in [1, 4, 16] {
                for method in [Method::Fast, Method::Exact] {
                    let svd = truncated(&dense(&matrix), rank, method, 7).unwrap();
                    assert_best(&format!("{what} {rows}x{cols} {method:?}"), &matrix, &svd, rank);
                }
            }
        }
    }
}

#[test]
fn noise_of_rounded_weights_is_cut_at_its_best() {
    // What fine-tunes stored in 16 bits differ by, and plain noise.
    let mut gaussian = Gaussian::new(3);
    let noise = gaussian.matrix(256, 384);
    let rounded = Mat::from_fn(256, 384, |i, j| (noise[(i, j)] * 64.0).round() as f32 / 4096.0);
    let plain = Mat::from_fn(256, 384, |i, j| noise[(i, j)] as f32);
    for (what, matrix) in [("rounded", rounded), ("plain", plain)] {
        let matrix = Matrix::from_faer(matrix.as_ref());
        for rank in [4, 16] {
            // The way with few vectors is the one that answers.
            let energy = dense(&matrix).energy();
            assert!(krylov::pays(256, rank));
            assert!(krylov::leading(&dense(&matrix), rank, energy, 1).unwrap().is_some());
            let svd = truncated(&dense(&matrix), rank, Method::Fast, 1).unwrap();
            assert_best(what, &matrix, &svd, rank);
        }
    }
}

#[test]
fn a_tail_that_residuals_cannot_resolve_falls_back_to_the_exact_way() {
    // More vectors than the limit lets a basis have where the spectrum is flat.
    let values: Vec<f64> = (0..256).map(|i| 1.0 - 1e-3 * i as f64).collect();
    let matrix = with_spectrum(256, 256, &values, 5);
    let rank = 24;
    assert!(krylov::pays(256, rank));
    let svd = truncated(&dense(&matrix), rank, Method::Fast, 1).unwrap();
    assert_best("hard", &matrix, &svd, rank);
}

#[test]
fn zeros_are_rank_zero_with_orthonormal_vectors() {
    let matrix = Matrix::zeros(140, 200);
    for method in [Method::Fast, Method::Exact] {
        let svd = truncated(&dense(&matrix), 4, method, 1).unwrap();
        assert_eq!((svd.s.as_slice(), svd.energy), ([0.0; 4].as_slice(), 0.0));
        assert_best("zero", &matrix, &svd, 4);
        assert!(svd.up(4).values.iter().all(|v| *v == 0.0));
    }
}

#[test]
fn the_same_matrix_gives_the_same_bits() {
    let matrix = with_spectrum(200, 130, &spectra(130)[2].1, 1);
    let cut = || truncated(&dense(&matrix), 8, Method::Fast, 9).unwrap();
    assert_eq!(cut().up(8), cut().up(8));
}

#[test]
fn singular_values_are_those_of_a_full_decomposition() {
    let matrix = with_spectrum(90, 60, &spectra(60)[2].1, 1);
    let (_, expected, _) = thin_svd(wide(&matrix).as_ref()).unwrap();
    let values = singular_values(&dense(&matrix)).unwrap();
    assert_eq!(values.len(), 60);
    for (value, expected) in values.iter().zip(&expected) {
        assert!((value - expected).abs() < 1e-7, "{value} {expected}");
    }
}

#[test]
fn sums_of_products_are_decomposed_through_their_factors() {
    // (rows, cols, ranks): together below, equal to and above the smaller side.
    for (rows, cols, ranks) in
        [(40, 70, vec![4, 8]), (70, 40, vec![3]), (12, 30, vec![6, 6]), (30, 12, vec![10, 9])]
    {
        let parts: Vec<(Matrix, Matrix)> = ranks
            .iter()
            .enumerate()
            .map(|(at, rank)| {
                let values: Vec<f64> = (0..*rank).map(|i| 1.0 / (1.0 + i as f64)).collect();
                let seed = 10 * at as u64;
                (with_spectrum(rows, *rank, &values, seed), with_spectrum(*rank, cols, &values, 1))
            })
            .collect();
        let product_of =
            |at: usize| Product { up: &parts[at].0, down: &parts[at].1, factor: [0.7, -0.3][at] };
        let products: Vec<Product<'_>> = (0..parts.len()).map(product_of).collect();
        let mut sum = Mat::<f64>::zeros(rows, cols);
        for Product { up, down, factor } in &products {
            let part = product(wide(up).as_ref(), wide(down).as_ref());
            sum += faer::Scale(*factor) * &part;
        }
        let whole = Matrix::from_faer(Mat::from_fn(rows, cols, |i, j| sum[(i, j)] as f32).as_ref());
        let (_, expected, _) = thin_svd(sum.as_ref()).unwrap();
        let svd = of_low_rank_sum(&products).unwrap();
        let count = ranks.iter().sum::<usize>().min(rows).min(cols);
        assert_eq!(svd.s.len(), count);
        for (value, expected) in svd.s.iter().zip(&expected) {
            assert!((value - expected).abs() < 1e-13, "{value} {expected}");
        }
        for rank in [1, 2, count] {
            assert_best("sum", &whole, &svd, rank);
        }
        let padded = svd.padded(rows.min(cols));
        assert_eq!(padded.u.ncols(), rows.min(cols));
        assert_best("padded", &whole, &padded, rows.min(cols));
    }
}
