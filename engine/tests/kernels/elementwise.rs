//! Casts, sums and scalings against plain loops.

use engine::DType;

use crate::reference::*;

#[test]
fn casts_round_to_nearest_even_and_widen_exactly() {
    let data: Vec<f32> = (0..40_000).map(|i| (i as f32 - 20_000.) * 0.001_7).collect();
    let narrow = backend().cast(&tensor(&[200, 200], &data, DType::F32), DType::BF16).unwrap();
    assert_eq!(narrow.dtype(), DType::BF16);
    let want: Vec<f32> = data.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
    assert_eq!(values(&narrow), want);
    let back = backend().cast(&narrow, DType::F32).unwrap();
    assert_eq!((back.dtype(), values(&back)), (DType::F32, want));
}

#[test]
fn sums_agree_in_both_types() {
    for dtype in [DType::F32, DType::BF16] {
        let (x, y) = (noise(20_000, 1), noise(20_000, 2));
        let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let (a, b) = (tensor(&[100, 200], &x, dtype), tensor(&[100, 200], &y, dtype));
        let want = values(&tensor(&[100, 200], &want, dtype));
        assert_eq!(values(&backend().add(&a, &b).unwrap()), want);
        assert_eq!(values(&backend().accumulate(a.clone(), &b).unwrap()), want);
        assert_eq!(values(&a), x, "a shared sum was changed in place");
        assert_eq!(values(&backend().accumulate(a, &b).unwrap()), want);
    }
}

#[test]
fn scalings_multiply_all_or_rows() {
    let x = random(&[3, 2, 5], 1);
    let want: Vec<f32> = values(&x).iter().map(|x| x * -1.5).collect();
    assert_eq!(values(&backend().scale(&x, -1.5).unwrap()), want);
    let factors = [1., 2., 3., 4., 5., 6.];
    let want: Vec<f32> = values(&x).iter().enumerate().map(|(i, x)| x * factors[i / 5]).collect();
    assert_eq!(
        values(&backend().scale_rows(&x, &tensor(&[6], &factors, DType::F32)).unwrap()),
        want
    );
    let few = tensor(&[5], &factors[1..], DType::F32);
    assert!(backend().scale_rows(&x, &few).is_err());
}

#[test]
fn rows_are_summed_per_image() {
    for dtype in [DType::F32, DType::BF16] {
        let data = noise(3 * 40 * 41 * 33, 5);
        let x = tensor(&[3, 40, 41, 33], &data, dtype);
        let mut want = vec![0f64; 3 * 33];
        for (i, x) in data.iter().enumerate() {
            want[i / (40 * 41 * 33) * 33 + i % 33] += f64::from(*x);
        }
        let got = backend().sum_rows(&x).unwrap();
        assert_eq!((got.shape(), got.dtype()), ([3, 33].as_slice(), dtype));
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 4e-3 };
        assert_close("sum_rows", &values(&got), &want, tolerance);
    }
    assert!(backend().sum_rows(&random(&[4], 1)).is_err());
}

#[test]
fn shapes_and_types_must_match() {
    let (a, b) = (random(&[2, 3], 1), random(&[3, 2], 1));
    assert!(backend().add(&a, &b).is_err());
    assert!(backend().accumulate(a.clone(), &b).is_err());
    assert!(backend().add(&a, &tensor(&[2, 3], &[0.; 6], DType::BF16)).is_err());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_thread_independent("sums", || {
        let (a, b) = (random(&[2, 70, 333], 1), random(&[2, 70, 333], 2));
        vec![
            backend().sum_rows(&a).unwrap(),
            backend().add(&a, &b).unwrap(),
            backend().cast(&a, DType::BF16).unwrap(),
        ]
    });
}
