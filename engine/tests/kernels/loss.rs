//! The losses against f64 formulas and their differences.

use engine::{DType, Device, ElementLoss, LossSpec};

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

fn spec(element: ElementLoss, delta: &[f32], weight: &[f32]) -> LossSpec {
    LossSpec::new(Device::Cpu, element, delta, weight).unwrap()
}

#[test]
fn losses_and_gradients_agree_with_f64() {
    let (deltas, weights) = ([0.1, 1., 0.5], [0.25, 2., 1. / 3.]);
    for kind in [ElementLoss::L2, ElementLoss::L1, ElementLoss::Huber, ElementLoss::SmoothL1] {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 5e-3)] {
            let spec = spec(kind, &deltas, &weights);
            let (pred, target) = (noise(3 * 40, 1), noise(3 * 40, 2));
            let f = |pred: &[f64]| -> Vec<f64> {
                (0..3)
                    .map(|b| {
                        let sum: f64 = (b * 40..b * 40 + 40)
                            .map(|i| {
                                let d = pred[i] - f64::from(target[i]);
                                element(kind, d, f64::from(deltas[b]))
                            })
                            .sum();
                        f64::from(weights[b]) * sum / 40.
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
    let spec = spec(ElementLoss::L1, &[1.], &[1.]);
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
        mask: Some(tensor(&shape, &mask, DType::F32)),
        ..spec(ElementLoss::L2, &[1.; 2], &[1., 0.5])
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
fn the_gradient_has_a_weight_of_its_own() {
    let (p, t) = (random(&[2, 3, 5], 1), random(&[2, 3, 5], 2));
    let plain = spec(ElementLoss::L2, &[1.; 2], &[0.5, 2.]);
    let scaled = tensor(&[2], &[256., 1024.], DType::F32);
    let spec = LossSpec { gradient_weight: scaled, ..plain.clone() };
    let (each, grad) = backend().loss(&p, &t, &plain).unwrap();
    let (same, larger) = backend().loss(&p, &t, &spec).unwrap();
    assert_eq!(values(&same), values(&each));
    let want: Vec<f32> = values(&grad).iter().map(|x| x * 512.).collect();
    assert_eq!(values(&larger), want);
}

#[test]
fn lists_of_another_length_are_errors() {
    let wrong = spec(ElementLoss::L2, &[1.], &[1., 1.]);
    let x = random(&[2, 3], 1);
    assert!(backend().loss(&x, &x, &wrong).is_err());
    let spec = spec(ElementLoss::L2, &[1., 1.], &[1., 1.]);
    assert!(backend().loss(&x, &random(&[3, 2], 1), &spec).is_err());
    assert!(backend().loss(&x, &x, &spec).is_ok());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let spec = spec(ElementLoss::Huber, &[0.1; 2], &[0.5; 2]);
    assert_thread_independent("loss", || {
        let (p, t) = (random(&[2, 64, 64, 5], 1), random(&[2, 64, 64, 5], 2));
        let (each, grad) = backend().loss(&p, &t, &spec).unwrap();
        vec![each, grad]
    });
}
