//! The losses against f64 formulas and their differences.

use engine::{DType, ElementLoss, LossSpec};

use crate::reference::*;

fn element(kind: ElementLoss, d: f64, c: f64) -> f64 {
    let root = (d * d + c * c).sqrt();
    match kind {
        ElementLoss::L2 => d * d,
        ElementLoss::L1 => d.abs(),
        ElementLoss::Huber => 2. * c * (root - c),
        ElementLoss::SmoothL1 => 2. * (root - c),
    }
}

#[test]
fn losses_and_gradients_agree_with_f64() {
    let spec = |element| LossSpec {
        element,
        delta: vec![0.1, 1., 0.5],
        weight: vec![0.25, 2., 1. / 3.],
        mask: None,
    };
    for kind in [ElementLoss::L2, ElementLoss::L1, ElementLoss::Huber, ElementLoss::SmoothL1] {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 5e-3)] {
            let spec = spec(kind);
            let (pred, target) = (noise(3 * 40, 1), noise(3 * 40, 2));
            let f = |pred: &[f64]| -> Vec<f64> {
                (0..3)
                    .map(|b| {
                        let sum: f64 = (b * 40..b * 40 + 40)
                            .map(|i| {
                                let d = pred[i] - f64::from(target[i]);
                                element(kind, d, f64::from(spec.delta[b]))
                            })
                            .sum();
                        f64::from(spec.weight[b]) * sum / 40.
                    })
                    .collect()
            };
            let p = tensor(&[3, 2, 20], &pred, dtype);
            let t = tensor(&[3, 2, 20], &target, DType::F32);
            let (each, grad) = backend().loss(&p, &t, &spec).unwrap();
            assert_eq!((each.dtype(), grad.dtype()), (DType::F32, dtype));
            assert_close(&format!("{kind:?}"), &values(&each), &f(&wide(&pred)), 1e-5);
            let want = gradient(&f, &wide(&pred), &[1., 1., 1.]);
            assert_close(&format!("{kind:?} gradient"), &values(&grad), &want, tolerance);
        }
    }
}

#[test]
fn the_gradient_of_an_absolute_difference_is_zero_at_zero() {
    let spec = LossSpec { element: ElementLoss::L1, delta: vec![1.], weight: vec![1.], mask: None };
    let (p, t) =
        (tensor(&[1, 3], &[1., 2., 3.], DType::F32), tensor(&[1, 3], &[1., 3., 2.], DType::F32));
    let (each, grad) = backend().loss(&p, &t, &spec).unwrap();
    assert_close("loss", &values(&each), &[2. / 3.], 1e-7);
    assert_close("gradient", &values(&grad), &[0., -1. / 3., 1. / 3.], 1e-7);
}

#[test]
fn a_mask_multiplies_each_elements_loss() {
    let (pred, target, mask) = (noise(2 * 30_000, 1), noise(2 * 30_000, 2), noise(2 * 30_000, 3));
    let shape = [2, 30_000];
    let masked = LossSpec {
        element: ElementLoss::L2,
        delta: vec![1.; 2],
        weight: vec![1., 0.5],
        mask: Some(tensor(&shape, &mask, DType::F32)),
    };
    let (p, t) = (tensor(&shape, &pred, DType::F32), tensor(&shape, &target, DType::F32));
    let (each, grad) = backend().loss(&p, &t, &masked).unwrap();
    let (mut want, mut slopes) = ([0f64; 2], vec![]);
    for (i, mask) in wide(&mask).iter().enumerate() {
        let (d, weight) =
            (f64::from(pred[i]) - f64::from(target[i]), 1. - 0.5 * (i / 30_000) as f64);
        want[i / 30_000] += weight * mask * d * d / 30_000.;
        slopes.push(weight * mask * 2. * d / 30_000.);
    }
    assert_close("masked loss", &values(&each), &want, 1e-5);
    assert_close("masked gradient", &values(&grad), &slopes, 1e-6);
    let wrong = LossSpec { mask: Some(random(&[2, 4], 1)), ..masked };
    assert!(backend().loss(&p, &t, &wrong).is_err());
}

#[test]
fn lists_of_another_length_are_errors() {
    let spec =
        LossSpec { element: ElementLoss::L2, delta: vec![1.], weight: vec![1., 1.], mask: None };
    let x = random(&[2, 3], 1);
    assert!(backend().loss(&x, &x, &spec).is_err());
    let spec = LossSpec { delta: vec![1., 1.], ..spec };
    assert!(backend().loss(&x, &random(&[3, 2], 1), &spec).is_err());
    assert!(backend().loss(&x, &x, &spec).is_ok());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let spec = LossSpec {
        element: ElementLoss::Huber,
        delta: vec![0.1; 2],
        weight: vec![0.5; 2],
        mask: None,
    };
    assert_thread_independent("loss", || {
        let (p, t) = (random(&[2, 64, 64, 5], 1), random(&[2, 64, 64, 5], 2));
        let (each, grad) = backend().loss(&p, &t, &spec).unwrap();
        vec![each, grad]
    });
}
