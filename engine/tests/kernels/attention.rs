//! Attention against a plain f64 softmax over all keys.

use engine::DType;
use engine::backend::{AttentionKind, AttentionSaved};

use crate::reference::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
    causal: bool,
}

impl Case {
    const fn new(sizes: [usize; 5], causal: bool) -> Self {
        let [batch, queries, keys, heads, dim] = sizes;
        Self { batch, queries, keys, heads, dim, causal }
    }

    fn kind(self) -> AttentionKind {
        let scale = 1. / (self.dim as f32).sqrt();
        AttentionKind { heads: self.heads, scale, causal: self.causal }
    }

    fn shapes(self) -> [[usize; 3]; 2] {
        let width = self.heads * self.dim;
        [[self.batch, self.queries, width], [self.batch, self.keys, width]]
    }

    fn inputs(self) -> [Vec<f32>; 4] {
        let [q, k] = self.shapes().map(|shape| shape.iter().product::<usize>());
        [noise(q, 1), noise(k, 2), noise(k, 3), noise(q, 4)]
    }
}

struct Results {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn reference(c: Case, [q, k, v, dy]: &[Vec<f32>; 4]) -> Results {
    let width = c.heads * c.dim;
    let scale = f64::from(c.kind().scale);
    let (nq, nk) = (c.batch * c.queries * width, c.batch * c.keys * width);
    let mut r = Results {
        out: vec![0.; nq],
        lse: vec![],
        dq: vec![0.; nq],
        dk: vec![0.; nk],
        dv: vec![0.; nk],
    };
    for (b, h, i) in (0..c.batch)
        .flat_map(|b| (0..c.heads).map(move |h| (b, h)))
        .flat_map(|(b, h)| (0..c.queries).map(move |i| (b, h, i)))
    {
        let at_q = (b * c.queries + i) * width + h * c.dim;
        let at_k = |j: usize| (b * c.keys + j) * width + h * c.dim;
        let dot = |x: &[f32], xi: usize, y: &[f32], yi: usize| -> f64 {
            (0..c.dim).map(|d| f64::from(x[xi + d]) * f64::from(y[yi + d])).sum()
        };
        let seen = if c.causal { c.keys.min(i + 1) } else { c.keys };
        let scores: Vec<f64> = (0..seen).map(|j| scale * dot(q, at_q, k, at_k(j))).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = most + scores.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
        r.lse.push(lse);
        let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
        let dp: Vec<f64> = (0..seen).map(|j| dot(dy, at_q, v, at_k(j))).collect();
        let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for j in 0..seen {
            let ds = scale * p[j] * (dp[j] - delta);
            for d in 0..c.dim {
                r.out[at_q + d] += p[j] * f64::from(v[at_k(j) + d]);
                r.dv[at_k(j) + d] += p[j] * f64::from(dy[at_q + d]);
                r.dq[at_q + d] += ds * f64::from(k[at_k(j) + d]);
                r.dk[at_k(j) + d] += ds * f64::from(q[at_q + d]);
            }
        }
    }
    r
}

const CASES: [Case; 12] = [
    Case::new([1, 64, 64, 2, 40], false),
    Case::new([2, 200, 77, 2, 40], false),
    Case::new([1, 77, 77, 3, 64], true),
    Case::new([1, 150, 231, 1, 80], false),
    Case::new([1, 130, 130, 1, 160], true),
    Case::new([2, 1, 1, 1, 4], false),
    Case::new([1, 17, 300, 4, 8], false),
    Case::new([1, 300, 17, 4, 4], true),
    Case::new([1, 65, 113, 2, 20], false),
    Case::new([1, 5, 240, 1, 3], true),
    Case::new([1, 96, 96, 1, 512], false),
    Case::new([3, 33, 112, 5, 16], false),
];

fn check(c: Case, dtype: DType, forward: f64, backward: f64) {
    let inputs = c.inputs();
    let want = reference(c, &inputs);
    let [q_shape, k_shape] = c.shapes();
    let [q, k, v, dy] = [q_shape, k_shape, k_shape, q_shape]
        .into_iter()
        .zip(&inputs)
        .map(|(shape, data)| tensor(&shape, data, dtype))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let got = backend().attention(&q, &k, &v, c.kind()).unwrap();
    assert_eq!(got.out.dtype(), dtype);
    assert_close(&format!("{c:?} out"), &values(&got.out), &want.out, forward);
    assert_close(&format!("{c:?} lse"), &values(&got.lse), &want.lse, 1e-5);
    let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &got.out, lse: &got.lse };
    let (dq, dk, dv) = backend().attention_backward(&dy, &saved, c.kind()).unwrap();
    for (name, got, want) in [("dq", dq, want.dq), ("dk", dk, want.dk), ("dv", dv, want.dv)] {
        // With one key the gradients of the scores vanish: compare with the size of the inputs.
        let scale = want.iter().fold(0f64, |m, x| m.max(x.abs()));
        if scale < 1e-12 {
            assert!(values(&got).iter().all(|x| x.abs() < 1e-2), "{c:?} {name}");
        } else {
            assert_close(&format!("{c:?} {name} {dtype:?}"), &values(&got), &want, backward);
        }
    }
}

#[test]
fn single_precision_agrees_with_f64() {
    CASES.into_iter().for_each(|case| check(case, DType::F32, 2e-6, 1e-5));
}

#[test]
fn bf16_agrees_within_its_rounding() {
    CASES.into_iter().for_each(|case| check(case, DType::BF16, 1e-2, 3e-2));
}

#[test]
fn the_reference_itself_agrees_with_differences() {
    let case = Case::new([1, 4, 5, 1, 3], false);
    let inputs = case.inputs();
    let want = reference(case, &inputs);
    let f = |k: &[f64]| {
        let mut moved = inputs.clone();
        moved[1] = k.iter().map(|x| *x as f32).collect();
        reference(case, &moved).out
    };
    // The reference takes f32 inputs, so steps are large and the agreement is coarse.
    let (k, dy) = (wide(&inputs[1]), wide(&inputs[3]));
    for (i, want) in want.dk.iter().enumerate() {
        let mut sides = [1e-2, -1e-2].map(|step| {
            let mut at = k.clone();
            at[i] += step;
            f(&at).iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>()
        });
        sides[0] = (sides[0] - sides[1]) / 2e-2;
        assert!((sides[0] - want).abs() < 1e-3, "{i}: {} {want}", sides[0]);
    }
}

#[test]
fn scores_far_apart_do_not_overflow() {
    let q = tensor(&[1, 2, 4], &[60., 0., 0., 0., -60., 0., 0., 0.], DType::F32);
    let k = tensor(&[1, 2, 4], &[60., 0., 0., 0., -60., 0., 0., 0.], DType::F32);
    let v = tensor(&[1, 2, 4], &[1., 2., 3., 4., 5., 6., 7., 8.], DType::F32);
    let kind = AttentionKind { heads: 1, scale: 1., causal: false };
    let got = backend().attention(&q, &k, &v, kind).unwrap();
    assert_close("out", &values(&got.out), &wide(&values(&v)), 1e-6);
    assert_close("lse", &values(&got.lse), &[3600., 3600.], 1e-6);
}

#[test]
fn not_a_number_is_not_hidden() {
    let q = tensor(&[1, 1, 4], &[f32::NAN, 0., 0., 0.], DType::F32);
    let k = random(&[1, 3, 4], 1);
    let kind = AttentionKind { heads: 1, scale: 1., causal: false };
    assert!(values(&backend().attention(&q, &k, &k, kind).unwrap().out)[0].is_nan());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let case = Case::new([2, 200, 333, 2, 40], false);
    let [q_shape, k_shape] = case.shapes();
    assert_thread_independent("attention", || {
        let (q, k, v) = (random(&q_shape, 1), random(&k_shape, 2), random(&k_shape, 3));
        let r = backend().attention(&q, &k, &v, case.kind()).unwrap();
        let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &r.out, lse: &r.lse };
        let dy = random(&q_shape, 4);
        let (dq, dk, dv) = backend().attention_backward(&dy, &saved, case.kind()).unwrap();
        vec![r.out, r.lse, dq, dk, dv]
    });
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let kind = AttentionKind { heads: 3, scale: 1., causal: false };
    let q = random(&[1, 4, 8], 1);
    assert!(backend().attention(&q, &q, &q, kind).is_err());
    let kind = AttentionKind { heads: 2, ..kind };
    let k = random(&[2, 4, 8], 1);
    assert!(backend().attention(&q, &k, &k, kind).is_err());
    assert!(backend().attention(&q, &q, &random(&[1, 5, 8], 1), kind).is_err());
}
