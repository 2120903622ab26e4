//! Inputs, f64 gradients by differences, and comparisons.

use engine::backend::Backend;
use engine::{DType, Device, Tensor};

/// The kernels under test.
pub fn backend() -> &'static dyn Backend {
    Device::Cpu.backend()
}

/// Reproducible numbers, nearly normal, rounded to bf16 so that both types start from the same.
pub fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| half::bf16::from_f32(next() + next() + next()).to_f32()).collect()
}

pub fn tensor(shape: &[usize], data: &[f32], dtype: DType) -> Tensor {
    Tensor::from_f32(Device::Cpu, shape, data, dtype).unwrap()
}

/// An f32 tensor of noise.
pub fn random(shape: &[usize], seed: u32) -> Tensor {
    tensor(shape, &noise(shape.iter().product(), seed), DType::F32)
}

pub fn wide(data: &[f32]) -> Vec<f64> {
    data.iter().map(|x| f64::from(*x)).collect()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.to_vec_f32().unwrap()
}

/// The bits of the elements, to compare exactly.
pub fn bits(t: &Tensor) -> Vec<u32> {
    values(t).iter().map(|x| x.to_bits()).collect()
}

/// `Σ dy·∂f/∂x` by central differences in f64.
pub fn gradient(f: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], dy: &[f64]) -> Vec<f64> {
    let mut at = x.to_vec();
    let mut value = |i: usize, step: f64| {
        at[i] = x[i] + step;
        let sum: f64 = f(&at).iter().zip(dy).map(|(y, dy)| y * dy).sum();
        at[i] = x[i];
        sum
    };
    let step = 1e-5;
    (0..x.len()).map(|i| (value(i, step) - value(i, -step)) / (2. * step)).collect()
}

/// Fails unless `|got - want| <= tolerance·max|want|` everywhere.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs() / scale;
        assert!(error <= tolerance, "{what}: element {i} is {got}, not {want} (error {error:.2e})");
    }
}

/// Runs `f` on pools of 1, 2 and 4 threads and fails unless the results are the same bits.
#[track_caller]
pub fn assert_thread_independent(what: &str, f: impl Fn() -> Vec<Tensor> + Send + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| f().iter().map(bits).collect::<Vec<_>>())
    };
    let single = on(1);
    for threads in [2, 4] {
        assert!(on(threads) == single, "{what} differs between 1 and {threads} threads");
    }
}
