//! Activations against libm-free f64 formulas and against candle.

use candle_core::{Device as Cpu, Tensor as Candle, Var};
use engine::{Activation, DType, Tensor};

use crate::reference::*;

/// erf in f64 by its series (|x| below 6 here).
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    2. / std::f64::consts::PI.sqrt() * sum
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1. + erf(x / std::f64::consts::SQRT_2))
}

fn reference(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::Silu => x / (1. + (-x).exp()),
        Activation::Gelu => gelu(x),
        Activation::QuickGelu => x / (1. + (-1.702 * x).exp()),
    }
}

const KINDS: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::QuickGelu];

#[test]
fn activations_and_slopes_agree_with_f64() {
    for kind in KINDS {
        for (dtype, tolerance) in [(DType::F32, 3e-7), (DType::BF16, 5e-3)] {
            let (data, dy) = (noise(333, 1), noise(333, 2));
            let f = |x: &[f64]| x.iter().map(|x| reference(kind, *x)).collect::<Vec<_>>();
            let x = tensor(&[3, 111], &data, dtype);
            let y = backend().activation(kind, &x).unwrap();
            assert_close(&format!("{kind:?}"), &values(&y), &f(&wide(&data)), tolerance);
            let want: Vec<f64> = data
                .iter()
                .zip(&dy)
                .map(|(x, dy)| {
                    let (x, step) = (f64::from(*x), 1e-5);
                    f64::from(*dy) * (reference(kind, x + step) - reference(kind, x - step))
                        / (2. * step)
                })
                .collect();
            let held = tensor(&[3, 111], &dy, dtype);
            let shared = backend().activation_backward(kind, held.clone(), &x).unwrap();
            assert_close(&format!("{kind:?} slope"), &values(&shared), &want, 2. * tolerance);
            assert_eq!(values(&held), dy, "a shared gradient was overwritten");
            let owned = tensor(&[3, 111], &dy, dtype);
            assert_eq!(
                bits(&backend().activation_backward(kind, owned, &x).unwrap()),
                bits(&shared)
            );
        }
    }
}

#[test]
fn activations_agree_with_candle_and_its_gradients() {
    let (data, dy) = (noise(500, 3), noise(500, 4));
    let var = Var::from_vec(data.clone(), 500, &Cpu::Cpu).unwrap();
    for kind in [Activation::Silu, Activation::Gelu] {
        let y = match kind {
            Activation::Silu => var.silu().unwrap(),
            _ => var.gelu_erf().unwrap(),
        };
        let seed = Candle::from_vec(dy.clone(), 500, &Cpu::Cpu).unwrap();
        let grads = (&y * seed).unwrap().sum_all().unwrap().backward().unwrap();
        let want: Vec<f32> = grads.get(&var).unwrap().to_vec1().unwrap();
        let x = tensor(&[500], &data, DType::F32);
        let got = backend().activation(kind, &x).unwrap();
        assert_close("candle", &values(&got), &wide(&y.to_vec1().unwrap()), 1e-6);
        let got = backend().activation_backward(kind, tensor(&[500], &dy, DType::F32), &x).unwrap();
        assert_close("candle's gradient", &values(&got), &wide(&want), 1e-5);
    }
}

#[test]
fn geglu_agrees_with_f64() {
    for (dtype, tolerance) in [(DType::F32, 3e-7), (DType::BF16, 5e-3)] {
        let (rows, width) = (4, 19);
        let (data, dy) = (noise(rows * 2 * width, 1), noise(rows * width, 2));
        let f = |x: &[f64]| -> Vec<f64> {
            x.chunks(2 * width)
                .flat_map(|row| (0..width).map(|c| row[c] * gelu(row[width + c])))
                .collect()
        };
        let x = tensor(&[2, 2, 2 * width], &data, dtype);
        let y = backend().geglu(&x).unwrap();
        assert_eq!(y.shape(), [2, 2, width]);
        assert_close("geglu", &values(&y), &f(&wide(&data)), tolerance);
        let want = gradient(&f, &wide(&data), &wide(&dy));
        let dx = backend().geglu_backward(&tensor(y.shape(), &dy, dtype), &x).unwrap();
        assert_close("geglu gradient", &values(&dx), &want, 2. * tolerance);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_thread_independent("activations", || {
        let (x, dy) = (random(&[130, 514], 1), random(&[130, 514], 2));
        let half = random(&[130, 257], 3);
        let mut all: Vec<Tensor> =
            vec![backend().geglu(&x).unwrap(), backend().geglu_backward(&half, &x).unwrap()];
        for kind in KINDS {
            all.push(backend().activation(kind, &x).unwrap());
            all.push(backend().activation_backward(kind, dy.clone(), &x).unwrap());
        }
        all
    });
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let (x, y) = (random(&[2, 3], 1), random(&[2, 4], 2));
    assert!(backend().activation_backward(Activation::Silu, y, &x).is_err());
    assert!(backend().geglu(&x).is_err());
    assert!(backend().geglu_backward(&x, &random(&[2, 4], 1)).is_err());
}
