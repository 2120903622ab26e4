//! Linear layers and convolutions with and without adapters.

use candle_core::{Device as Cpu, Tensor as Candle, Var};
use engine::{
    Adapter, Conv2d, ConvGeometry, Device, Linear, ParamStore, Result, Tape, Tensor, Value,
};

use crate::trial::*;

const SCALE: f32 = 0.75;

fn adapter(down: usize, up: usize) -> Adapter {
    low_rank(down, up, SCALE)
}

#[test]
fn linear_layers_agree_with_differences() {
    let (w, b) = (frozen(&[6, 5], 1), frozen(&[6], 2));
    let (wide_w, wide_b) = (wide(&w), wide(&b));
    let biased = |y: Vec<f64>| -> Vec<f64> {
        y.iter().enumerate().map(|(i, y)| y + wide_b[i % 6]).collect()
    };
    let plain = Linear { weight: w.clone(), bias: Some(b.clone()), adapter: None };
    check(
        "frozen linear",
        &[param(&[2, 3, 5], 3)],
        |tape, ids| plain.forward(tape, &tape.param(ids[0])?),
        |p| biased(linear(&p[0], &wide_w, 5)),
    );
    let adapted = Linear { adapter: Some(adapter(1, 2)), ..plain };
    check(
        "linear with adapter and residual",
        &[param(&[2, 3, 5], 3), param(&[2, 5], 4), param(&[6, 2], 5), param(&[2, 3, 6], 6)],
        |tape, ids| {
            let (x, residual) = (tape.param(ids[0])?, tape.param(ids[3])?);
            adapted.forward_add(tape, &x, &residual)
        },
        |p| {
            let low = linear(&linear(&p[0], &p[1], 5), &p[2], 2);
            let low: Vec<f64> = low.iter().map(|x| x * f64::from(SCALE)).collect();
            sum(&sum(&biased(linear(&p[0], &wide_w, 5)), &low), &p[3])
        },
    );
    // The usual case: the input needs no gradient, only the adapter does.
    let x = frozen(&[3, 5], 7);
    let first = Linear { weight: w, bias: None, adapter: Some(adapter(0, 1)) };
    check(
        "linear over a constant",
        &[param(&[2, 5], 4), param(&[6, 2], 5)],
        |tape, _| first.forward(tape, &Value::constant(x.clone())),
        |p| {
            let low = linear(&linear(&wide(&x), &p[0], 5), &p[1], 2);
            let low: Vec<f64> = low.iter().map(|x| x * f64::from(SCALE)).collect();
            sum(&linear(&wide(&x), &wide_w, 5), &low)
        },
    );
}

/// NHWC convolution by formula; `x` is `[b,h,w,c]`, `w` is `[co,kh,kw,c]`.
pub fn conv(x: &[f64], sizes: [usize; 4], w: &[f64], outputs: usize, g: ConvGeometry) -> Vec<f64> {
    let [batch, height, width, c] = sizes;
    let (kh, kw) = g.kernel;
    let (oh, ow) = g.output(height, width).unwrap();
    let mut out = Vec::with_capacity(batch * oh * ow * outputs);
    for index in 0..batch * oh * ow * outputs {
        let (o, px, py, b) = (
            index % outputs,
            index / outputs % ow,
            index / outputs / ow % oh,
            index / outputs / ow / oh,
        );
        let mut total = 0.;
        for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
            let (y, x_at) = (py * g.stride + ky, px * g.stride + kx);
            let (Some(y), Some(x_at)) =
                (y.checked_sub(g.pad_before), x_at.checked_sub(g.pad_before))
            else {
                continue;
            };
            if y < height && x_at < width {
                for ci in 0..c {
                    total += x[((b * height + y) * width + x_at) * c + ci]
                        * w[((o * kh + ky) * kw + kx) * c + ci];
                }
            }
        }
        out.push(total);
    }
    out
}

fn geometries() -> [ConvGeometry; 4] {
    let downsample = ConvGeometry { kernel: (3, 3), stride: 2, pad_before: 0, pad_after: 1 };
    [
        ConvGeometry::square(3, 1, 1),
        ConvGeometry::square(3, 2, 1),
        downsample,
        ConvGeometry::square(1, 1, 0),
    ]
}

#[test]
fn convolutions_agree_with_differences() {
    for g in geometries() {
        let (kh, kw) = g.kernel;
        let (oh, ow) = g.output(4, 6).unwrap();
        let sizes = [2, 4, 6, 3];
        let (w, b) = (frozen(&[5, kh, kw, 3], 1), frozen(&[5], 2));
        let (wide_w, wide_b) = (wide(&w), wide(&b));
        let plain = Conv2d { weight: w, bias: Some(b), geometry: g, adapter: None };
        let name = format!("{g:?}");
        let base = |x: &[f64]| -> Vec<f64> {
            let y = conv(x, sizes, &wide_w, 5, g);
            y.iter().enumerate().map(|(i, y)| y + wide_b[i % 5]).collect()
        };
        check(
            &format!("{name} frozen, shifted per image"),
            &[param(&[2, 4, 6, 3], 3), param(&[2, 5], 4)],
            |tape, ids| plain.forward_shifted(tape, &tape.param(ids[0])?, &tape.param(ids[1])?),
            |p| {
                let area = oh * ow * 5;
                let y = base(&p[0]);
                y.iter().enumerate().map(|(i, y)| y + p[1][i / area * 5 + i % 5]).collect()
            },
        );
        let adapted = Conv2d { adapter: Some(adapter(1, 2)), ..plain.clone() };
        check(
            &format!("{name} with adapter and residual"),
            &[
                param(&[2, 4, 6, 3], 3),
                param(&[2, kh, kw, 3], 5),
                param(&[5, 2], 6),
                param(&[2, oh, ow, 5], 7),
            ],
            |tape, ids| adapted.forward_add(tape, &tape.param(ids[0])?, &tape.param(ids[3])?),
            |p| {
                let low = linear(&conv(&p[0], sizes, &p[1], 2, g), &p[2], 2);
                let low: Vec<f64> = low.iter().map(|x| x * f64::from(SCALE)).collect();
                sum(&sum(&base(&p[0]), &low), &p[3])
            },
        );
    }
}

fn candle(t: &[f32], shape: &[usize]) -> Candle {
    Candle::from_vec(t.to_vec(), shape, &Cpu::Cpu).unwrap()
}

fn flat(t: &Candle) -> Vec<f64> {
    let data: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
    data.into_iter().map(f64::from).collect()
}

/// Candle's gradient of the same squared error.
fn candle_loss(out: &Candle) -> candle_core::Result<Candle> {
    let aim = candle(&noise(out.elem_count(), 999), out.dims());
    (out - aim)?.sqr()?.mean_all()
}

#[test]
fn a_linear_layer_agrees_with_candles_autograd() {
    let params = [param(&[7, 24], 1), param(&[4, 24], 2), param(&[40, 4], 3)];
    let weight = frozen(&[40, 24], 4);
    let layer = Linear { weight: weight.clone(), bias: None, adapter: Some(adapter(1, 2)) };
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let got = run(&store, false, |tape, ids| layer.forward(tape, &tape.param(ids[0])?)).unwrap();

    let var = |i: usize| Var::from_tensor(&candle(&params[i].1, &params[i].0)).unwrap();
    let (x, down, up) = (var(0), var(1), var(2));
    let w = candle(&weight.to_vec_f32().unwrap(), &[40, 24]);
    let grads = || -> candle_core::Result<_> {
        let low = x.matmul(&down.t()?)?.matmul(&up.t()?)?;
        candle_loss(&(x.matmul(&w.t()?)? + (low * f64::from(SCALE))?)?)?.backward()
    };
    let grads = grads().unwrap();
    for (index, var) in [&x, &down, &up].into_iter().enumerate() {
        let want = flat(grads.get(var).unwrap());
        assert_close(&format!("parameter {index}"), &got.grads[index], &want, 1e-5);
    }
}

#[test]
fn a_convolution_agrees_with_candles_autograd() {
    let params = [param(&[2, 8, 8, 16], 1), param(&[4, 3, 3, 16], 2), param(&[24, 4], 3)];
    let weight = frozen(&[24, 3, 3, 16], 4);
    let geometry = ConvGeometry::square(3, 1, 1);
    let layer =
        Conv2d { weight: weight.clone(), bias: None, geometry, adapter: Some(adapter(1, 2)) };
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let got = run(&store, false, |tape, ids| layer.forward(tape, &tape.param(ids[0])?)).unwrap();

    let var = |i: usize| Var::from_tensor(&candle(&params[i].1, &params[i].0)).unwrap();
    let (x, down, up) = (var(0), var(1), var(2));
    let grads = || -> candle_core::Result<_> {
        let nchw = |t: &Candle| t.permute((0, 3, 1, 2))?.contiguous();
        let w = nchw(&candle(&weight.to_vec_f32().unwrap(), &[24, 3, 3, 16]))?;
        let base = nchw(&x)?.conv2d(&w, 1, 1, 1, 1)?.permute((0, 2, 3, 1))?;
        let hidden = nchw(&x)?.conv2d(&nchw(&down)?, 1, 1, 1, 1)?.permute((0, 2, 3, 1))?;
        let low = hidden.contiguous()?.reshape((128, 4))?.matmul(&up.t()?)?;
        let low = low.reshape((2, 8, 8, 24))?;
        candle_loss(&(base + (low * f64::from(SCALE))?)?.contiguous()?)?.backward()
    };
    let grads = grads().unwrap();
    for (index, var) in [&x, &down, &up].into_iter().enumerate() {
        let want = flat(grads.get(var).unwrap());
        assert_close(&format!("parameter {index}"), &got.grads[index], &want, 1e-5);
    }
}

#[test]
fn a_wrong_input_is_an_error() {
    let layer = Linear { weight: frozen(&[6, 5], 1), bias: None, adapter: None };
    let tape = Tape::inference(None);
    let run = |x: Tensor| -> Result<Value> { layer.forward(&tape, &Value::constant(x)) };
    assert!(run(frozen(&[2, 4], 1)).is_err());
    assert!(run(frozen(&[2, 5], 1)).is_ok());
    let conv = Conv2d {
        weight: frozen(&[2, 3, 3, 4], 1),
        bias: None,
        geometry: ConvGeometry::square(3, 1, 0),
        adapter: None,
    };
    assert!(conv.forward(&tape, &Value::constant(frozen(&[1, 2, 2, 4], 1))).is_err());
    assert!(conv.forward(&tape, &Value::constant(frozen(&[1, 4, 4, 3], 1))).is_err());
}
