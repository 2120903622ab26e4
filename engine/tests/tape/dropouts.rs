//! What adapters leave out in training, against what PyTorch makes of the same masks.

use std::rc::Rc;

use engine::{
    Adapter, Drawn, Draws, Dropouts, Linear, LowRankAdapter, NestedAdapter, ParamId, ParamStore,
    Result, Tape, Value,
};

use crate::trial::*;

/// Given numbers in place of random ones.
struct Given {
    samples: usize,
    module: f32,
    block: f32,
    rank: Vec<f32>,
    element: Vec<f32>,
}

impl Draws for Given {
    fn samples(&self) -> usize {
        self.samples
    }

    fn uniform(&self, drawn: Drawn, module: u64, out: &mut [f32]) {
        assert_eq!(module, 7);
        let from = match drawn {
            Drawn::Module => std::slice::from_ref(&self.module),
            Drawn::Block => std::slice::from_ref(&self.block),
            Drawn::Rank { sample } => &self.rank[sample * out.len()..],
            Drawn::Element { sample } => &self.element[sample * out.len()..],
        };
        out.copy_from_slice(&from[..out.len()]);
    }
}

fn given(module: f32, block: f32) -> Given {
    // Two samples of three tokens and two ranks.
    let element = vec![0.1, 0.9, 0.3, 0.2, 0.5, 0.05, 0.6, 0.7, 0.24, 0.8, 0.26, 0.4];
    Given { samples: 2, module, block, rank: vec![0.2, 0.7, 0.9, 0.4], element }
}

const SCALE: f32 = 0.75;

fn layer(dropouts: Dropouts) -> Linear {
    let adapter =
        LowRankAdapter { down: ParamId(0), up: ParamId(1), scale: SCALE, dropouts, module: 7 };
    Linear { weight: frozen(&[6, 5], 1), bias: None, adapter: Some(Adapter::LowRank(adapter)) }
}

fn params() -> [Param; 3] {
    [param(&[2, 5], 4), param(&[6, 2], 5), param(&[2, 3, 5], 3)]
}

/// Output and gradients of a layer over the last parameter.
fn through(layer: &Linear, params: &[Param], draws: Option<Given>, twice: bool) -> Outcome {
    let store = ParamStore::new(engine::Device::Cpu, params).unwrap();
    let draws = draws.map(|draws| Rc::new(draws) as Rc<dyn Draws>);
    let layer = layer.clone();
    fn net<'m>(layer: Linear, tape: &Tape<'m>, x: ParamId) -> Result<Value> {
        let x = tape.param(x)?;
        tape.segment(&[&x], move |tape, inputs| layer.forward(tape, &inputs[0]))
    }
    let last = ParamId(params.len() - 1);
    run_with_draws(&store, (twice, draws), |tape, _| net(layer, tape, last)).unwrap()
}

/// The same by formula with the factors of the hidden values, gradients by differences.
fn expect(got: &Outcome, params: &[Param], mask: &[f64]) {
    let weight = wide(&frozen(&[6, 5], 1));
    let formula = |p: &[Vec<f64>]| {
        let hidden: Vec<f64> =
            linear(&p[2], &p[0], 5).iter().zip(mask).map(|(h, m)| h * m).collect();
        let low: Vec<f64> =
            linear(&hidden, &p[1], 2).iter().map(|x| x * f64::from(SCALE)).collect();
        sum(&linear(&p[2], &weight, 5), &low)
    };
    let mut at: Vec<Vec<f64>> =
        params.iter().map(|(_, data)| data.iter().map(|x| f64::from(*x)).collect()).collect();
    assert_close("output", &got.out, &formula(&at), 1e-5);
    for index in 0..at.len() {
        let want: Vec<f64> = (0..at[index].len())
            .map(|i| {
                let (before, step) = (at[index][i], 1e-5);
                let mut side = |value: f64| {
                    at[index][i] = value;
                    loss(&formula(&at))
                };
                let slope = (side(before + step) - side(before - step)) / (2. * step);
                at[index][i] = before;
                slope
            })
            .collect();
        assert_close(&format!("parameter {index}"), &got.grads[index], &want, 2e-5);
    }
}

#[test]
fn dropped_elements_and_ranks_pass_nothing_on() {
    let none = Dropouts::default();
    let params = params();
    // `dropout(p)` keeps what is drawn from p on and divides by 1 - p.
    let element = layer(Dropouts { element: 0.25, ..none });
    let keep = |draw: &f32| if *draw < 0.25 { 0. } else { 1. / 0.75 };
    let of_element: Vec<f64> = given(0., 0.).element.iter().map(keep).collect();
    let got = through(&element, &params, Some(given(0., 0.)), false);
    expect(&got, &params, &of_element);

    // A rank's mask is the same for all tokens of a sample: `rand > p`.
    let rank = layer(Dropouts { rank: 0.5, ..none });
    let of_rank = [[0., 2.], [0., 2.], [0., 2.], [2., 0.], [2., 0.], [2., 0.]].concat();
    let got = through(&rank, &params, Some(given(0., 0.)), false);
    expect(&got, &params, &of_rank);

    let both = layer(Dropouts { element: 0.25, rank: 0.5, module: 0.5 });
    let mask: Vec<f64> = of_element.iter().zip(&of_rank).map(|(a, b)| a * b).collect();
    let got = through(&both, &params, Some(given(0.5, 0.)), false);
    expect(&got, &params, &mask);
    // Run again in the backward pass, it draws the same.
    assert_eq!(through(&both, &params, Some(given(0.5, 0.)), true), got);
    // Without draws nothing is dropped.
    expect(&through(&both, &params, None, false), &params, &[1.; 12]);
}

#[test]
fn a_module_left_out_gets_no_gradient() {
    let params = params();
    let layer = layer(Dropouts { module: 0.5, ..Dropouts::default() });
    for twice in [false, true] {
        let got = through(&layer, &params, Some(given(0.49, 0.)), twice);
        assert!(got.grads[0].is_empty() && got.grads[1].is_empty());
        let plain = Linear { adapter: None, ..layer.clone() };
        assert_eq!(got.out, through(&plain, &params, None, twice).out);
        assert_eq!(got.order, [2]);
    }
}

/// Six ranks in three blocks: `down` as rows, `up` transposed.
#[test]
fn a_nested_adapter_trains_the_drawn_block_alone() {
    let (down, up) = (param(&[6, 5], 4), param(&[6, 6], 5));
    let blocks = |(_, data): &Param, width: usize| -> Vec<Param> {
        data.chunks(2 * width).map(|part| (vec![2, width], part.to_vec())).collect()
    };
    let x = param(&[2, 3, 5], 3);
    let params = [blocks(&down, 5), blocks(&up, 6), vec![x.clone()]].concat();
    let (down_id, up_id) = (ParamId(0), ParamId(3));
    let adapter = NestedAdapter { down: down_id, up: up_id, blocks: 3, scale: SCALE, module: 7 };
    let weight = frozen(&[6, 5], 1);
    let nested = Linear { weight, bias: None, adapter: Some(Adapter::Nested(adapter)) };
    // The ordinary update of all ranks at the strength of the drawn block.
    let turned: Vec<f32> = (0..36).map(|i| up.1[i % 6 * 6 + i / 6]).collect();
    let whole = [down, (vec![6, 6], turned), x];
    let ordinary = |scale: f32| {
        let dropouts = Dropouts::default();
        let adapter =
            LowRankAdapter { down: ParamId(0), up: ParamId(1), scale, dropouts, module: 7 };
        let layer = Linear { adapter: Some(Adapter::LowRank(adapter)), ..nested.clone() };
        through(&layer, &whole, None, false)
    };
    for (draw, block) in [(0., 0), (0.34, 1), (0.99, 2)] {
        let got = through(&nested, &params, Some(given(0., draw)), false);
        let want = ordinary(SCALE * (3_f32 / (block + 1) as f32).sqrt());
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        assert_close("output", &got.out, &wide(&want.out), 1e-6);
        assert_close("input", &got.grads[6], &wide(&want.grads[2]), 1e-6);
        for other in 0..3 {
            let rows = 2 * other * 5..2 * (other + 1) * 5;
            let columns: Vec<f64> =
                (0..12).map(|i| f64::from(want.grads[1][i % 6 * 6 + 2 * other + i / 6])).collect();
            if other == block {
                assert_close("down", &got.grads[other], &wide(&want.grads[0][rows]), 1e-6);
                assert_close("up", &got.grads[3 + other], &columns, 1e-6);
            } else {
                assert!(got.grads[other].is_empty() && got.grads[3 + other].is_empty());
            }
        }
        assert_eq!(through(&nested, &params, Some(given(0., draw)), true), got);
    }
    // Outside of training it is the ordinary update.
    let got = through(&nested, &params, None, false);
    assert_eq!(got.out, ordinary(SCALE).out);
}
