//! Composed adapters: Hadamard and Kronecker products, Tucker cores, trained magnitudes.

use std::rc::Rc;

use engine::{
    Adapter, ComposedAdapter, Conv2d, ConvGeometry, DType, Device, Drawn, Draws, Dropouts, Factor,
    Linear, Magnitude, ParamId, ParamStore, Tape, Tensor, Update, Value,
};

use crate::layers::conv;
use crate::trial::*;

const SCALE: f32 = 0.75;
const MULTIPLIER: f32 = 0.5;

fn composed(update: Update, rows: Option<usize>) -> Option<Adapter> {
    let magnitude = rows.map(|id| Magnitude { rows: ParamId(id), multiplier: MULTIPLIER });
    let dropouts = Dropouts::default();
    Some(Adapter::Composed(ComposedAdapter {
        update,
        scale: SCALE,
        magnitude,
        dropouts,
        module: 0,
    }))
}

fn product(left: usize, right: usize) -> Factor {
    Factor::Product { left: ParamId(left), right: ParamId(right) }
}

/// `a[m,k]·b[k,n]`.
fn matmul(a: &[f64], b: &[f64], inner: usize) -> Vec<f64> {
    let n = b.len() / inner;
    let row = |a: &[f64]| -> Vec<f64> {
        (0..n).map(|j| a.iter().enumerate().map(|(k, a)| a * b[k * n + j]).sum()).collect()
    };
    a.chunks(inner).flat_map(row).collect()
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// `[a,b]` with `b` columns by `[c,window,d]`.
fn kron(first: &[f64], b: usize, second: &[f64], window: usize, d: usize) -> Vec<f64> {
    let (a, c) = (first.len() / b, second.len() / (window * d));
    let mut out = Vec::with_capacity(first.len() * second.len());
    for (i, p, w) in (0..a * c * window).map(|n| (n / window / c, n / window % c, n % window)) {
        for (j, q) in (0..b * d).map(|n| (n / d, n % d)) {
            out.push(first[i * b + j] * second[(p * window + w) * d + q]);
        }
    }
    out
}

/// `Σ left(i,row)·core[i,w,j]·right[j,column]`; `left` is `[r,rows]`, or `[rows,r]` with `by_rows`.
fn tucker(core: &[f64], left: &[f64], right: &[f64], rank: usize, by_rows: bool) -> Vec<f64> {
    let (rows, columns) = (left.len() / rank, right.len() / rank);
    let window = core.len() / rank / rank;
    let mut out = Vec::with_capacity(rows * window * columns);
    for (p, w, q) in (0..rows * window * columns)
        .map(|n| (n / columns / window, n / columns % window, n % columns))
    {
        let mut total = 0.;
        for (i, j) in (0..rank * rank).map(|n| (n / rank, n % rank)) {
            let left = if by_rows { left[p * rank + i] } else { left[i * rows + p] };
            total += left * core[(i * window + w) * rank + j] * right[j * columns + q];
        }
        out.push(total);
    }
    out
}

fn added(frozen: &[f64], update: &[f64]) -> Vec<f64> {
    frozen.iter().zip(update).map(|(w, x)| w + x * f64::from(SCALE)).collect()
}

fn rescaled(sum: &[f64], magnitude: &[f64]) -> Vec<f64> {
    let length = sum.len() / magnitude.len();
    let row = |(row, m): (&[f64], &f64)| -> Vec<f64> {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        let factor = f64::from(MULTIPLIER) * (m / norm - 1.) + 1.;
        row.iter().map(|x| x * factor).collect()
    };
    sum.chunks(length).zip(magnitude).flat_map(row).collect()
}

#[test]
fn linear_layers_agree_with_differences() {
    let w = frozen(&[6, 4], 1);
    let wide_w = wide(&w);
    let layer = |adapter| Linear { weight: w.clone(), bias: None, adapter };
    let x = || param(&[2, 3, 4], 2);
    let hadamard = layer(composed(Update::Hadamard(product(1, 2), product(3, 4)), None));
    let hada = [param(&[6, 2], 3), param(&[2, 4], 4), param(&[6, 2], 5), param(&[2, 4], 6)];
    let hada_update = |p: &[Vec<f64>]| times(&matmul(&p[1], &p[2], 2), &matmul(&p[3], &p[4], 2));
    let params: Vec<Param> = [x()].into_iter().chain(hada.clone()).collect();
    check(
        "hadamard",
        &params,
        |tape, ids| hadamard.forward(tape, &tape.param(ids[0])?),
        |p| linear(&p[0], &added(&wide_w, &hada_update(p)), 4),
    );
    let params: Vec<Param> =
        params.into_iter().chain([param(&[6], 7), param(&[2, 3, 6], 8)]).collect();
    let lengths = layer(composed(Update::Hadamard(product(1, 2), product(3, 4)), Some(5)));
    check(
        "hadamard with magnitudes and residual",
        &params,
        |tape, ids| lengths.forward_add(tape, &tape.param(ids[0])?, &tape.param(ids[6])?),
        |p| {
            let weight = rescaled(&added(&wide_w, &hada_update(p)), &p[5]);
            sum(&linear(&p[0], &weight, 4), &p[6])
        },
    );
    let whole = layer(composed(
        Update::Kronecker(Factor::Whole(ParamId(1)), Factor::Whole(ParamId(2))),
        None,
    ));
    check(
        "kronecker of whole matrices",
        &[x(), param(&[2, 2], 3), param(&[3, 2], 4)],
        |tape, ids| whole.forward(tape, &tape.param(ids[0])?),
        |p| linear(&p[0], &added(&wide_w, &kron(&p[1], 2, &p[2], 1, 2)), 4),
    );
    let parts = layer(composed(Update::Kronecker(product(1, 2), product(3, 4)), Some(5)));
    check(
        "kronecker of products with magnitudes",
        &[
            x(),
            param(&[2, 1], 3),
            param(&[1, 2], 4),
            param(&[3, 1], 5),
            param(&[1, 2], 6),
            param(&[6], 7),
        ],
        |tape, ids| parts.forward(tape, &tape.param(ids[0])?),
        |p| {
            let (first, second) = (matmul(&p[1], &p[2], 1), matmul(&p[3], &p[4], 1));
            let weight = added(&wide_w, &kron(&first, 2, &second, 1, 2));
            linear(&p[0], &rescaled(&weight, &p[5]), 4)
        },
    );
    // The usual case: the input needs no gradient, only the adapter does.
    let dora = layer(composed(Update::Plain(product(0, 1)), Some(2)));
    let constant = frozen(&[5, 4], 9);
    check(
        "low rank with magnitudes over a constant",
        &[param(&[6, 2], 3), param(&[2, 4], 4), param(&[6], 5)],
        |tape, _| dora.forward(tape, &Value::constant(constant.clone())),
        |p| {
            let weight = added(&wide_w, &matmul(&p[0], &p[1], 2));
            linear(&wide(&constant), &rescaled(&weight, &p[2]), 4)
        },
    );
}

#[test]
fn convolutions_agree_with_differences() {
    let tucker_form = |core: usize, left_by_rows| Factor::Tucker {
        core: ParamId(core),
        left: ParamId(core + 1),
        right: ParamId(core + 2),
        left_by_rows,
    };
    for g in [
        ConvGeometry::square(3, 1, 1),
        ConvGeometry::square(3, 2, 1),
        ConvGeometry::square(1, 1, 0),
    ] {
        let (kh, kw) = g.kernel;
        let window = kh * kw;
        let w = frozen(&[6, kh, kw, 4], 1);
        let wide_w = wide(&w);
        let layer = |adapter| Conv2d { weight: w.clone(), bias: None, geometry: g, adapter };
        let sizes = [2, 4, 5, 4];
        let x = || param(&sizes, 2);
        let cores = || [param(&[2, kh, kw, 2], 3), param(&[2, 6], 4), param(&[2, 4], 5)];
        let apply = |p: &[Vec<f64>], weight: &[f64]| conv(&p[0], sizes, weight, 6, g);
        let kronecker =
            layer(composed(Update::Kronecker(Factor::Whole(ParamId(1)), product(2, 3)), Some(4)));
        check(
            &format!("{g:?} kronecker with magnitudes"),
            &[x(), param(&[2, 2], 3), param(&[3, 2], 4), param(&[2, kh, kw, 2], 5), param(&[6], 6)],
            |tape, ids| kronecker.forward(tape, &tape.param(ids[0])?),
            |p| {
                let second = matmul(&p[2], &p[3], 2);
                let weight = added(&wide_w, &kron(&p[1], 2, &second, window, 2));
                apply(p, &rescaled(&weight, &p[4]))
            },
        );
        let hadamard =
            layer(composed(Update::Hadamard(tucker_form(1, false), tucker_form(4, false)), None));
        let params: Vec<Param> = [x()]
            .into_iter()
            .chain(cores())
            .chain([param(&[2, kh, kw, 2], 6), param(&[2, 6], 7), param(&[2, 4], 8)])
            .collect();
        check(
            &format!("{g:?} hadamard of cores"),
            &params,
            |tape, ids| hadamard.forward(tape, &tape.param(ids[0])?),
            |p| {
                let first = tucker(&p[1], &p[2], &p[3], 2, false);
                let second = tucker(&p[4], &p[5], &p[6], 2, false);
                apply(p, &added(&wide_w, &times(&first, &second)))
            },
        );
        let low_rank = layer(composed(Update::Plain(tucker_form(1, true)), None));
        check(
            &format!("{g:?} low rank with a core"),
            &[x(), param(&[2, kh, kw, 2], 3), param(&[6, 2], 4), param(&[2, 4], 5)],
            |tape, ids| low_rank.forward(tape, &tape.param(ids[0])?),
            |p| apply(p, &added(&wide_w, &tucker(&p[1], &p[2], &p[3], 2, true))),
        );
    }
}

/// A layer of `dtype` with a Hadamard adapter and magnitudes, and its parameters.
fn wide_layer(dtype: DType, update: f32) -> (Linear, Vec<Param>) {
    let weight = noise(40 * 48, 1);
    let weight = Tensor::from_f32(Device::Cpu, &[40, 48], &weight, dtype).unwrap();
    let lengths: Vec<f32> = wide(&weight)
        .chunks(48)
        .map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt() as f32)
        .collect();
    let adapter = composed(Update::Hadamard(product(0, 1), product(2, 3)), Some(4));
    let second = noise(40 * 4, 4).iter().map(|x| x * update).collect();
    let params = vec![
        param(&[40, 4], 2),
        param(&[4, 48], 3),
        (vec![40, 4], second),
        param(&[4, 48], 5),
        (vec![40], lengths),
    ];
    (Linear { weight, bias: None, adapter }, params)
}

fn outcome(dtype: DType, update: f32, checkpointing: bool) -> Outcome {
    let (layer, params) = wide_layer(dtype, update);
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let x = Tensor::from_f32(Device::Cpu, &[64, 48], &noise(64 * 48, 6), dtype).unwrap();
    run(&store, checkpointing, |tape, _| {
        let layer = layer.clone();
        tape.segment(&[&Value::constant(x.clone())], move |tape, x| layer.forward(tape, &x[0]))
    })
    .unwrap()
}

#[test]
fn bf16_and_checkpointing_change_nothing_of_note() {
    let want = outcome(DType::F32, 0.25, false);
    assert_eq!(want, outcome(DType::F32, 0.25, true));
    let got = outcome(DType::BF16, 0.25, false);
    assert_eq!(got, outcome(DType::BF16, 0.25, true));
    for (index, (got, want)) in got.grads.iter().zip(&want.grads).enumerate() {
        let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
        assert_close(&format!("bf16, parameter {index}"), got, &want, 2e-2);
    }
}

#[test]
fn an_update_of_zero_leaves_a_bf16_layer_as_it_is() {
    let (layer, params) = wide_layer(DType::BF16, 0.);
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let x = Tensor::from_f32(Device::Cpu, &[7, 48], &noise(7 * 48, 6), DType::BF16).unwrap();
    let x = Value::constant(x);
    let plain = Linear { adapter: None, ..layer.clone() };
    let numbers = |layer: &Linear| {
        let tape = Tape::inference(Some(&store));
        layer.forward(&tape, &x).unwrap().tensor().to_vec_f32().unwrap()
    };
    assert_eq!(numbers(&layer), numbers(&plain));
}

#[test]
fn an_update_that_does_not_fit_the_weight_is_an_error() {
    let kronecker = Update::Kronecker(Factor::Whole(ParamId(0)), Factor::Whole(ParamId(1)));
    let updates =
        [Update::Plain(product(0, 1)), Update::Hadamard(product(0, 1), product(0, 1)), kronecker];
    let params = [param(&[5, 2], 1), param(&[2, 3], 2), param(&[7], 3)];
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let x = Value::constant(frozen(&[2, 4], 1));
    for update in updates {
        let adapter = composed(update, Some(2));
        let layer = Linear { weight: frozen(&[6, 4], 2), bias: None, adapter };
        assert!(layer.forward(&Tape::inference(Some(&store)), &x).is_err(), "{update:?}");
    }
    // The update fits, the magnitudes do not.
    let update = Update::Plain(Factor::Whole(ParamId(0)));
    let layer =
        Linear { weight: frozen(&[5, 2], 2), bias: None, adapter: composed(update, Some(2)) };
    let x = Value::constant(frozen(&[2, 2], 1));
    assert!(layer.forward(&Tape::inference(Some(&store)), &x).is_err());
}

/// One number for the module, one for each row.
struct Given {
    module: f32,
    rows: Vec<f32>,
}

impl Draws for Given {
    fn samples(&self) -> usize {
        1
    }

    fn uniform(&self, drawn: Drawn, _: u64, out: &mut [f32]) {
        match drawn {
            Drawn::Module => out.fill(self.module),
            _ => out.copy_from_slice(&self.rows),
        }
    }
}

#[test]
fn dropped_rows_and_modules_take_no_part() {
    let dropouts = Dropouts { rank: 0.5, module: 0.25, ..Dropouts::default() };
    let update = Update::Plain(product(1, 2));
    let adapter = ComposedAdapter { update, scale: SCALE, magnitude: None, dropouts, module: 3 };
    let w = frozen(&[3, 4], 1);
    let layer = Linear { weight: w.clone(), bias: None, adapter: Some(Adapter::Composed(adapter)) };
    let params = [param(&[5, 4], 2), param(&[3, 2], 3), param(&[2, 4], 4)];
    let through = |layer: &Linear, params: &[Param], module: Option<f32>| {
        let store = ParamStore::new(Device::Cpu, params).unwrap();
        let draws = module
            .map(|module| Rc::new(Given { module, rows: vec![0.9, 0.1, 0.6] }) as Rc<dyn Draws>);
        run_with_draws(&store, (false, draws), |tape, ids| {
            layer.forward(tape, &tape.param(ids[0])?)
        })
        .unwrap()
    };
    // The second row of the update is left out: as if `left` had zeros there.
    let got = through(&layer, &params, Some(0.5));
    let mut without = params.clone();
    without[1].1[2..4].fill(0.);
    let want = through(&layer, &without, None);
    assert_eq!(got.out, want.out);
    assert_eq!((&got.grads[0], &got.grads[2]), (&want.grads[0], &want.grads[2]));
    assert_eq!(got.grads[1][2..4], [0., 0.]);
    assert_eq!(
        (&got.grads[1][..2], &got.grads[1][4..]),
        (&want.grads[1][..2], &want.grads[1][4..])
    );
    assert_ne!(want.grads[1][2..4], [0., 0.]);
    // Without draws, in validation, nothing is left out.
    assert_ne!(through(&layer, &params, None).out, got.out);

    let skipped = through(&layer, &params, Some(0.2));
    let plain = Linear { weight: w, bias: None, adapter: None };
    assert_eq!(skipped.out, through(&plain, &params, None).out);
    assert!(skipped.grads[1].is_empty() && skipped.grads[2].is_empty());
}
