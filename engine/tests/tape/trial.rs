//! Runs a small network on the tape and, in f64, by formula.

use std::rc::Rc;

use engine::{
    Adapter, Checkpointing, DType, Device, Draws, Dropouts, ElementLoss, LossSpec, LowRankAdapter,
    ParamId, ParamStore, Result, Tape, Tensor, Value,
};

/// A named parameter's shape and numbers.
pub type Param = (Vec<usize>, Vec<f32>);

/// Reproducible numbers, nearly normal, representable in bf16.
pub fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| half::bf16::from_f32(next() + next() + next()).to_f32()).collect()
}

pub fn param(shape: &[usize], seed: u32) -> Param {
    (shape.to_vec(), noise(shape.iter().product(), seed))
}

pub fn frozen(shape: &[usize], seed: u32) -> Tensor {
    let data = noise(shape.iter().product(), seed);
    Tensor::from_f32(Device::Cpu, shape, &data, DType::F32).unwrap()
}

pub fn low_rank(down: usize, up: usize, scale: f32) -> Adapter {
    let (down, up) = (ParamId(down), ParamId(up));
    Adapter::LowRank(LowRankAdapter { down, up, scale, dropouts: Dropouts::default(), module: 0 })
}

pub fn wide(t: &Tensor) -> Vec<f64> {
    t.to_vec_f32().unwrap().into_iter().map(f64::from).collect()
}

/// What one forward and backward gave.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub out: Vec<f32>,
    pub loss: f32,
    /// Of each parameter, empty where none came.
    pub grads: Vec<Vec<f32>>,
    /// The parameters in the order in which their gradients were final.
    pub order: Vec<usize>,
}

fn target(len: usize) -> Vec<f32> {
    noise(len, 999)
}

/// Squared error of `net` against fixed numbers, and the gradient of every parameter.
pub fn run<'m>(
    store: &'m ParamStore,
    checkpointing: impl Into<Checkpointing>,
    net: impl FnOnce(&Tape<'m>, Vec<ParamId>) -> Result<Value>,
) -> Result<Outcome> {
    run_with_draws(store, (checkpointing, None), net)
}

/// [`run`] as a training pass whose adapters draw what they leave out.
pub fn run_with_draws<'m>(
    store: &'m ParamStore,
    (checkpointing, draws): (impl Into<Checkpointing>, Option<Rc<dyn Draws>>),
    net: impl FnOnce(&Tape<'m>, Vec<ParamId>) -> Result<Value>,
) -> Result<Outcome> {
    let tape = Tape::new(store, checkpointing).with_draws(draws);
    let out = net(&tape, (0..store.count()).map(ParamId).collect())?;
    let batch = out.shape()[0];
    let numbers = out.tensor().to_vec_f32()?;
    let aim = Tensor::from_f32(Device::Cpu, out.shape(), &target(numbers.len()), DType::F32)?;
    let (delta, weight) = (vec![1.; batch], vec![1. / batch as f32; batch]);
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &delta, &weight)?;
    let loss = tape.loss(&out, &aim, &spec)?;
    drop(out);
    let mut outcome = Outcome {
        out: numbers,
        loss: loss.tensor().to_vec_f32()?.iter().sum(),
        grads: vec![vec![]; store.count()],
        order: vec![],
    };
    tape.backward(&loss, &mut |id, grad| {
        assert_eq!(grad.shape(), store.shape(id), "shape of a gradient");
        assert_eq!(grad.dtype(), DType::F32);
        outcome.order.push(id.0);
        outcome.grads[id.0] = grad.to_vec_f32()?;
        Ok(())
    })?;
    Ok(outcome)
}

/// Squared error against the same fixed numbers, in f64.
pub fn loss(out: &[f64]) -> f64 {
    let aim = target(out.len());
    out.iter().zip(aim).map(|(y, t)| (y - f64::from(t)).powi(2)).sum::<f64>() / out.len() as f64
}

/// Fails unless the largest difference is below `tolerance` times the largest wanted number.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs() / scale;
        assert!(error <= tolerance, "{what}: element {i} is {got}, not {want} (error {error:.2e})");
    }
}

/// Runs `net` on the tape and compares its output and all gradients with `formula` in f64.
#[track_caller]
pub fn check(
    name: &str,
    params: &[Param],
    net: impl for<'m> FnOnce(&Tape<'m>, Vec<ParamId>) -> Result<Value>,
    formula: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let store = ParamStore::new(Device::Cpu, params).unwrap();
    let got = run(&store, false, net).unwrap();
    let mut at: Vec<Vec<f64>> =
        params.iter().map(|(_, data)| data.iter().map(|x| f64::from(*x)).collect()).collect();
    assert_close(name, &got.out, &formula(&at), 1e-5);
    for index in 0..at.len() {
        let mut want = Vec::with_capacity(at[index].len());
        for i in 0..at[index].len() {
            let (before, step) = (at[index][i], 1e-5);
            at[index][i] = before + step;
            let above = loss(&formula(&at));
            at[index][i] = before - step;
            let below = loss(&formula(&at));
            at[index][i] = before;
            want.push((above - below) / (2. * step));
        }
        assert_close(&format!("{name}, parameter {index}"), &got.grads[index], &want, 2e-5);
    }
}

/// `x·wᵀ`, `w` is `[out,in]`.
pub fn linear(x: &[f64], w: &[f64], inner: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(inner).flat_map(|x| w.chunks(inner).map(move |w| dot(x, w))).collect()
}

pub fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
