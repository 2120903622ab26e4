//! Every other operation of the tape against differences in f64.

use engine::{Activation, AttentionShape, DType, Device, GroupNorm, LayerNorm, Tensor, Value};

use crate::trial::*;

fn silu(x: f64) -> f64 {
    x / (1. + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    let z = x / std::f64::consts::SQRT_2;
    let (mut term, mut total) = (z, z);
    for n in 1..150 {
        term *= -z * z / f64::from(n);
        total += term / f64::from(2 * n + 1);
    }
    0.5 * x * (1. + 2. / std::f64::consts::PI.sqrt() * total)
}

/// Normalises the sets of indices that `group` maps to the same number.
fn normalise(x: &[f64], groups: usize, group: impl Fn(usize) -> usize, eps: f64) -> Vec<f64> {
    let mut sums = vec![(0., 0.); groups];
    for (i, x) in x.iter().enumerate() {
        let sum = &mut sums[group(i)];
        *sum = (sum.0 + x, sum.1 + 1.);
    }
    let means: Vec<f64> = sums.iter().map(|(s, n)| s / n).collect();
    let mut squares = vec![0.; groups];
    for (i, x) in x.iter().enumerate() {
        squares[group(i)] += (x - means[group(i)]).powi(2) / sums[group(i)].1;
    }
    x.iter()
        .enumerate()
        .map(|(i, x)| (x - means[group(i)]) / (squares[group(i)] + eps).sqrt())
        .collect()
}

#[test]
fn activations_and_gates() {
    for (kind, f) in [
        (Activation::Silu, silu as fn(f64) -> f64),
        (Activation::Gelu, gelu),
        (Activation::QuickGelu, |x| x / (1. + (-1.702 * x).exp())),
    ] {
        check(
            &format!("{kind:?}"),
            &[param(&[3, 7], 1)],
            |tape, ids| tape.activation(kind, &tape.param(ids[0])?),
            |p| p[0].iter().map(|x| f(*x)).collect(),
        );
    }
    check(
        "geglu",
        &[param(&[3, 8], 1)],
        |tape, ids| tape.geglu(&tape.param(ids[0])?),
        |p| p[0].chunks(8).flat_map(|x| (0..4).map(|i| x[i] * gelu(x[i + 4]))).collect(),
    );
}

#[test]
fn sums_scalings_and_shapes() {
    check(
        "add, scale, reshape",
        &[param(&[3, 4], 1), param(&[2, 6], 2)],
        |tape, ids| {
            let b = tape.reshape(&tape.param(ids[1])?, &[3, 4])?;
            tape.add(&tape.scale(&tape.param(ids[0])?, -0.5)?, &b)
        },
        |p| p[0].iter().zip(&p[1]).map(|(a, b)| b - 0.5 * a).collect(),
    );
    check(
        "concat_last",
        &[param(&[2, 3], 1), param(&[2, 2], 2)],
        |tape, ids| tape.concat_last(&tape.param(ids[0])?, &tape.param(ids[1])?),
        |p| p[0].chunks(3).zip(p[1].chunks(2)).flat_map(|(a, b)| [a, b].concat()).collect(),
    );
    check(
        "upsample2x",
        &[param(&[1, 2, 3, 2], 1)],
        |tape, ids| tape.upsample2x(&tape.param(ids[0])?),
        |p| {
            let at = |y: usize, x: usize, c: usize| p[0][(y / 2 * 3 + x / 2) * 2 + c];
            (0..48).map(|i| at(i / 12, i / 2 % 6, i % 2)).collect()
        },
    );
    check(
        "gather_rows",
        &[param(&[2, 3, 4], 1)],
        |tape, ids| tape.gather_rows(&tape.param(ids[0])?, &[5, 0, 3]),
        |p| [5, 0, 3].iter().flat_map(|r| p[0][r * 4..][..4].to_vec()).collect(),
    );
    let factors = Tensor::from_f32(Device::Cpu, &[3], &[2., -1., 0.5], DType::F32).unwrap();
    check(
        "scale_rows",
        &[param(&[3, 4], 1)],
        |tape, ids| tape.scale_rows(&tape.param(ids[0])?, &factors),
        |p| p[0].iter().enumerate().map(|(i, x)| x * [2., -1., 0.5][i / 4]).collect(),
    );
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    check(
        "x + silu(x), with x = 2p",
        &[param(&[2, 5], 1)],
        |tape, ids| {
            let x = tape.scale(&tape.param(ids[0])?, 2.)?;
            tape.add(&x, &tape.activation(Activation::Silu, &x)?)
        },
        |p| p[0].iter().map(|x| 2. * x + silu(2. * x)).collect(),
    );
}

#[test]
fn normalisations() {
    let (gamma, beta) = (frozen(&[6], 2), frozen(&[6], 3));
    let (g, b) = (wide(&gamma), wide(&beta));
    let norm = GroupNorm { gamma: gamma.clone(), beta: beta.clone(), groups: 3, eps: 1e-5 };
    let affine = |x: Vec<f64>| -> Vec<f64> {
        x.iter().enumerate().map(|(i, x)| x * g[i % 6] + b[i % 6]).collect()
    };
    let group = |x: &[f64]| affine(normalise(x, 6, |i| i / 24 * 3 + i % 6 / 2, 1e-5));
    check(
        "group norm",
        &[param(&[2, 2, 2, 6], 1)],
        |tape, ids| norm.forward(tape, &tape.param(ids[0])?),
        |p| group(&p[0]),
    );
    check(
        "group norm with SiLU",
        &[param(&[2, 2, 2, 6], 1)],
        |tape, ids| norm.forward_silu(tape, &tape.param(ids[0])?),
        |p| group(&p[0]).into_iter().map(silu).collect(),
    );
    let layer = LayerNorm { gamma, beta, eps: 1e-5 };
    check(
        "layer norm",
        &[param(&[4, 6], 1)],
        |tape, ids| layer.forward(tape, &tape.param(ids[0])?),
        |p| affine(normalise(&p[0], 4, |i| i / 6, 1e-5)),
    );
}

fn attention(p: &[Vec<f64>], keys: usize, causal: bool) -> Vec<f64> {
    let (q, k, v) = (&p[0], &p[1], &p[2]);
    let queries = q.len() / 6;
    let mut out = vec![0.; q.len()];
    for (i, h) in (0..queries).flat_map(|i| (0..2).map(move |h| (i, h))) {
        let seen = if causal { i + 1 } else { keys };
        let dot =
            |j: usize| -> f64 { (0..3).map(|d| q[i * 6 + h * 3 + d] * k[j * 6 + h * 3 + d]).sum() };
        let weights: Vec<f64> = (0..seen).map(|j| (dot(j) / 3f64.sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..3 {
            out[i * 6 + h * 3 + d] =
                weights.iter().enumerate().map(|(j, w)| w / total * v[j * 6 + h * 3 + d]).sum();
        }
    }
    out
}

#[test]
fn attentions() {
    for (keys, causal) in [(5, false), (4, true)] {
        check(
            &format!("attention, causal {causal}"),
            &[param(&[1, 4, 6], 1), param(&[1, keys, 6], 2), param(&[1, keys, 6], 3)],
            |tape, ids| {
                let [q, k, v] = [tape.param(ids[0])?, tape.param(ids[1])?, tape.param(ids[2])?];
                tape.attention(&q, &k, &v, AttentionShape { heads: 2, causal })
            },
            |p| attention(p, keys, causal),
        );
    }
}

#[test]
fn a_cast_rounds_forward_and_passes_gradients_back() {
    // The inputs are representable in bf16, so only the gradient is rounded.
    let params = [param(&[2, 8], 1)];
    let store = engine::ParamStore::new(engine::Device::Cpu, &params).unwrap();
    let got = run(&store, false, |tape, ids| tape.cast(&tape.param(ids[0])?, DType::BF16)).unwrap();
    let plain = run(&store, false, |tape, ids| tape.scale(&tape.param(ids[0])?, 1.)).unwrap();
    assert_eq!(got.out, plain.out);
    let want: Vec<f64> = plain.grads[0].iter().map(|x| f64::from(*x)).collect();
    assert_close("cast", &got.grads[0], &want, 4e-3);
}

#[test]
fn misuse_is_an_error() {
    let params = [param(&[4, 2], 1)];
    let store = engine::ParamStore::new(engine::Device::Cpu, &params).unwrap();
    let twice = run(&store, false, |tape, ids| tape.gather_rows(&tape.param(ids[0])?, &[1, 1]));
    assert!(twice.unwrap_err().to_string().contains("twice"));
    let outside = run(&store, false, |tape, ids| tape.gather_rows(&tape.param(ids[0])?, &[4]));
    assert!(outside.unwrap_err().to_string().contains("row 4 of 4"));
    let constant = run(&store, false, |_, _| Ok(Value::constant(frozen(&[4, 2], 1))));
    assert!(constant.unwrap_err().to_string().contains("does not depend"));
}
