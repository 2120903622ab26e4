//! AdamW against 20 steps of PyTorch's, recorded by `tests/data/make_adamw.py`.

use std::path::Path;

use engine::backend::AdamWStep;
use engine::{DType, Device, Tensor};

use crate::reference::*;

fn replay(name: &str, p: &AdamWStep) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/adamw.safetensors");
    let data = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
    let rows = |part: &str| data[&format!("{name}.{part}")].to_vec2::<f32>().unwrap();
    let start = data[&format!("{name}.start")].to_vec1::<f32>().unwrap();
    let mut param = tensor(&[100], &start, DType::F32);
    let zero = || Tensor::zeros(Device::Cpu, &[100], DType::F32).unwrap();
    let (mut m, mut v) = (zero(), zero());
    for (step, (grad, want)) in rows("grads").iter().zip(rows("params")).enumerate() {
        // In two calls, as a group of parameters with another rate would be.
        for range in [0..37, 37..100] {
            let p = AdamWStep { range, step: step as u32 + 1, ..p.clone() };
            let grad = tensor(&[100], grad, DType::F32);
            backend().adamw(&p, &mut param, &grad, (&mut m, &mut v)).unwrap();
        }
        for (i, (got, want)) in values(&param).iter().zip(&want).enumerate() {
            let error = (got - want).abs() / want.abs().max(1e-2);
            assert!(error <= 1e-6, "{name} step {step} element {i}: {got}, not {want}");
        }
    }
}

fn defaults() -> AdamWStep {
    AdamWStep {
        range: 0..100,
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
    }
}

#[test]
fn twenty_steps_agree_with_pytorch() {
    replay("default", &defaults());
    let strong =
        AdamWStep { lr: 1e-2, beta1: 0.8, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, ..defaults() };
    replay("strong", &strong);
}

#[test]
fn a_range_leaves_the_rest_alone() {
    let (mut param, mut m, mut v) =
        (random(&[10], 1), random(&[10], 2), tensor(&[10], &[0.5; 10], DType::F32));
    let before = [values(&param), values(&m), values(&v)];
    let p = AdamWStep { range: 3..5, ..defaults() };
    backend()
        .adamw(&p, &mut param, &tensor(&[10], &[1.; 10], DType::F32), (&mut m, &mut v))
        .unwrap();
    for (before, after) in before.iter().zip([values(&param), values(&m), values(&v)]) {
        for i in 0..10 {
            assert_eq!(before[i] != after[i], (3..5).contains(&i), "element {i}");
        }
    }
}

#[test]
fn lengths_and_ranges_are_checked() {
    let (mut param, mut m, mut v) = (random(&[4], 1), random(&[4], 1), random(&[4], 1));
    let (short, grad) = (random(&[3], 2), random(&[4], 2));
    let p = AdamWStep { range: 0..4, ..defaults() };
    assert!(backend().adamw(&p, &mut param, &short, (&mut m, &mut v)).is_err());
    let p = AdamWStep { range: 0..5, ..p };
    assert!(backend().adamw(&p, &mut param, &grad, (&mut m, &mut v)).is_err());
    let p = AdamWStep { range: 0..4, step: 0, ..p };
    assert!(backend().adamw(&p, &mut param, &grad, (&mut m, &mut v)).is_err());
}
