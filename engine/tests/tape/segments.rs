//! Checkpointed segments, the order of gradients, precision and threads of a whole network.

use std::rc::Rc;

use engine::{
    Activation, AttentionShape, Checkpointing, Conv2d, ConvGeometry, DType, Device, ElementLoss,
    EngineError, GroupNorm, Linear, LossSpec, ParamId, ParamStore, Result, Tape, Tensor, Value,
};

use crate::trial::*;

const WIDTH: usize = 16;

/// A frozen network of blocks with adapters, each block a segment.
struct Net {
    norm: GroupNorm,
    conv: Conv2d,
    linears: Vec<Linear>,
    dtype: DType,
}

impl Net {
    fn new(dtype: DType) -> Self {
        let small = |shape: &[usize], seed| {
            let data: Vec<f32> =
                noise(shape.iter().product(), seed).iter().map(|x| x * 0.0625).collect();
            Tensor::from_f32(Device::Cpu, shape, &data, dtype).unwrap()
        };
        let adapter = |i: usize| Some(low_rank(2 * i, 2 * i + 1, 0.5));
        let linear = |i: usize| Linear {
            weight: small(&[WIDTH, WIDTH], 10 + i as u32),
            bias: Some(frozen(&[WIDTH], 20 + i as u32)),
            adapter: adapter(i),
        };
        Self {
            norm: GroupNorm {
                gamma: frozen(&[WIDTH], 1),
                beta: frozen(&[WIDTH], 2),
                groups: 4,
                eps: 1e-5,
            },
            conv: Conv2d {
                weight: small(&[WIDTH, 3, 3, WIDTH], 3),
                bias: None,
                geometry: ConvGeometry::square(3, 1, 1),
                adapter: adapter(0),
            },
            linears: (1..5).map(linear).collect(),
            dtype,
        }
    }

    fn params() -> Vec<Param> {
        let mut all = vec![param(&[4, 3, 3, WIDTH], 50), param(&[WIDTH, 4], 51)];
        for i in 1..5 {
            all.extend([param(&[4, WIDTH], 50 + 2 * i), param(&[WIDTH, 4], 51 + 2 * i)]);
        }
        // Small, so that the softmax is not saturated and rounding is not amplified.
        all.iter_mut().flat_map(|(_, data)| data).for_each(|x| *x *= 0.125);
        all
    }

    /// `x` `[B,H,W,C]` through two segments; what the first makes is used inside the second,
    /// outside of it, and twice inside.
    fn forward<'m>(&'m self, tape: &Tape<'m>) -> Result<Value> {
        let x = frozen(&[2, 4, 5, WIDTH], 7).to_dtype(self.dtype)?;
        let first = tape.segment(&[&Value::constant(x)], move |tape, x| {
            let normed = self.norm.forward_silu(tape, &x[0])?;
            self.conv.forward_add(tape, &normed, &x[0])
        })?;
        let tokens = tape.reshape(&first, &[2, 20, WIDTH])?;
        let second = tape.segment(&[&tokens], move |tape, x| self.attend(tape, &x[0]))?;
        let mixed = tape.add(&second, &tokens)?;
        let third = tape.segment(&[&mixed, &tokens], move |tape, x| {
            let y = tape.add(&x[0], &x[1])?;
            let y = tape.activation(Activation::Gelu, &y)?;
            tape.add(&self.linears[3].forward(tape, &y)?, &x[0])
        })?;
        tape.cast(&tape.add(&third, &tokens)?, DType::F32)
    }

    fn attend<'m>(&'m self, tape: &Tape<'m>, x: &Value) -> Result<Value> {
        let q = self.linears[0].forward(tape, x)?;
        let k = self.linears[1].forward(tape, x)?;
        let v = self.linears[2].forward(tape, x)?;
        let y = tape.attention(&q, &k, &v, AttentionShape { heads: 2, causal: false })?;
        tape.add(&y, x)
    }

    fn outcome(&self, checkpointing: impl Into<Checkpointing>) -> Outcome {
        let store = ParamStore::new(Device::Cpu, &Self::params()).unwrap();
        run(&store, checkpointing, |tape, _| self.forward(tape)).unwrap()
    }
}

#[test]
fn checkpointing_changes_no_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let net = Net::new(dtype);
        let (kept, replayed) = (net.outcome(false), net.outcome(true));
        assert!(kept.grads.iter().all(|grad| grad.iter().any(|x| *x != 0.)));
        assert_eq!(kept, replayed);
        for segments in [vec![], vec![1], vec![0, 2], vec![2, 7]] {
            let chosen = Checkpointing::Chosen(Rc::new(segments.iter().copied().collect()));
            assert_eq!(kept, net.outcome(chosen), "{segments:?}");
        }
    }
}

#[test]
fn every_parameter_is_ready_exactly_once_in_a_fixed_order() {
    let net = Net::new(DType::F32);
    let first = net.outcome(false);
    let mut seen = first.order.clone();
    seen.sort_unstable();
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    for checkpointing in [false, true] {
        assert_eq!(net.outcome(checkpointing).order, first.order);
    }
    // The last layer's gradient is final first: communication can start early.
    assert_eq!(first.order[..2], [9, 8]);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let net = Net::new(DType::F32);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| net.outcome(true))
    };
    let single = on(1);
    assert_eq!(single, on(2));
    assert_eq!(single, on(4));
}

#[test]
fn bf16_stays_near_f32() {
    let (exact, rounded) =
        (Net::new(DType::F32).outcome(true), Net::new(DType::BF16).outcome(true));
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let pairs = exact.grads.iter().zip(&rounded.grads).chain([(&exact.out, &rounded.out)]);
    for (index, (exact, rounded)) in pairs.enumerate() {
        let difference: Vec<f32> = exact.iter().zip(rounded).map(|(a, b)| a - b).collect();
        let error = norm(&difference) / norm(exact);
        assert!(error < 0.03, "tensor {index}: {error}");
        assert!(error > 0., "tensor {index} was not computed in bf16");
    }
    assert!((exact.loss / rounded.loss - 1.).abs() < 0.02);
}

#[test]
fn a_parameter_used_by_two_layers_is_ready_after_both() {
    let layer = |seed| Linear {
        weight: frozen(&[6, 6], seed),
        bias: None,
        adapter: Some(low_rank(1, 2, 1.)),
    };
    let (first, second) = (layer(1), layer(2));
    let params = [param(&[2, 6], 3), param(&[2, 6], 4), param(&[6, 2], 5)];
    let weights = [wide(&first.weight), wide(&second.weight)];
    let formula = |p: &[Vec<f64>]| {
        let step =
            |x: &[f64], w: &[f64]| sum(&linear(x, w, 6), &linear(&linear(x, &p[1], 6), &p[2], 2));
        step(&step(&p[0], &weights[0]), &weights[1])
    };
    check(
        "shared adapter",
        &params,
        |tape, ids| second.forward(tape, &first.forward(tape, &tape.param(ids[0])?)?),
        formula,
    );
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let net = |checkpointing| {
        let (first, second) = (&first, &second);
        run(&store, checkpointing, move |tape, ids| {
            let x = tape.param(ids[0])?;
            let y = tape.segment(&[&x], move |tape, x| first.forward(tape, &x[0]))?;
            tape.segment(&[&y], move |tape, y| second.forward(tape, &y[0]))
        })
        .unwrap()
    };
    assert_eq!(net(false), net(true));
    let mut order = net(true).order;
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2]);
}

#[test]
fn a_branch_that_leads_nowhere_gives_no_gradient_and_keeps_nothing_back() {
    let params = [param(&[2, 3], 1), param(&[2, 3], 2)];
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let got = run(&store, false, |tape, ids| {
        let x = tape.param(ids[0])?;
        // Both parameters enter results that the loss does not see.
        tape.add(&tape.param(ids[0])?, &tape.param(ids[1])?)?;
        tape.scale(&x, 3.)
    })
    .unwrap();
    assert_eq!(got.order, [0]);
    let alone = run(&store, false, |tape, ids| tape.scale(&tape.param(ids[0])?, 3.)).unwrap();
    assert_eq!(got.grads, alone.grads);
}

#[test]
fn a_failing_segment_and_a_failing_receiver_are_reported() {
    let params = [param(&[2, 3], 1)];
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let failing = run(&store, true, |tape, ids| {
        let x = tape.param(ids[0])?;
        tape.segment(&[&x], |tape, x| tape.reshape(&x[0], &[7]))
    });
    assert!(failing.is_err());
    let tape = Tape::new(&store, false);
    let x = tape.param(ParamId(0)).unwrap();
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &[1.; 2], &[1.; 2]).unwrap();
    let total = tape.loss(&x, &frozen(&[2, 3], 2), &spec).unwrap();
    let stop = |_, _| Err(EngineError::Unsupported("stop".into()));
    assert_eq!(tape.backward(&total, &mut { stop }).unwrap_err().to_string(), "stop");
}

#[test]
fn inference_keeps_no_gradient() {
    let net = Net::new(DType::F32);
    let store = ParamStore::new(Device::Cpu, &Net::params()).unwrap();
    let out = net.forward(&Tape::inference(Some(&store))).unwrap();
    assert!(!out.is_tracked());
    assert_eq!(out.tensor().to_vec_f32().unwrap(), net.outcome(false).out);
}
