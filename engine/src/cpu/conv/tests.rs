//! Convolutions and their gradients against naive sums in f64, at every level.

use super::super::gemm::tests::{assert_close, numbers, random};
use super::*;
use crate::Device;
use crate::backend::LowRank;

const F: DType = DType::F32;
const H: DType = DType::BF16;

/// Batch, height, width, input and output channels.
type Shape = (usize, usize, usize, usize, usize);

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_vec_f32().unwrap().into_iter().map(f64::from).collect()
}

/// Calls `each(output pixel, tap, input pixel)` for every pixel under every tap.
fn visit(s: &Sizes, mut each: impl FnMut(usize, usize, usize)) {
    let g = s.geometry;
    let (kh, kw) = g.kernel;
    for o in 0..s.batch * s.oh * s.ow {
        let (b, oy, ox) = (o / (s.oh * s.ow), o / s.ow % s.oh, o % s.ow);
        for tap in 0..kh * kw {
            let y = (oy * g.stride + tap / kw).wrapping_sub(g.pad_before);
            let x = (ox * g.stride + tap % kw).wrapping_sub(g.pad_before);
            if y < s.h && x < s.w {
                each(o, tap, (b * s.h + y) * s.w + x);
            }
        }
    }
}

struct Naive {
    forward: Vec<f64>,
    input: Vec<f64>,
    weight: Vec<f64>,
}

fn naive(s: &Sizes, x: &Tensor, w: &Tensor, dy: &Tensor) -> Naive {
    let (x, w, dy) = (f64s(x), f64s(w), f64s(dy));
    let mut forward = vec![0.; dy.len()];
    let mut input = vec![0.; x.len()];
    let mut weight = vec![0.; w.len()];
    visit(s, |o, tap, i| {
        for co in 0..s.co {
            for ci in 0..s.ci {
                let at = (co * s.taps() + tap) * s.ci + ci;
                forward[o * s.co + co] += x[i * s.ci + ci] * w[at];
                input[i * s.ci + ci] += dy[o * s.co + co] * w[at];
                weight[at] += dy[o * s.co + co] * x[i * s.ci + ci];
            }
        }
    });
    Naive { forward, input, weight }
}

fn check_window(shape: Shape, g: ConvGeometry, dtype: DType) {
    let (batch, h, w, ci, co) = shape;
    let s = Sizes::new("test", &[batch, h, w, ci], &[co, g.kernel.0, g.kernel.1, ci], g).unwrap();
    let x = random(1, &[batch, h, w, ci], dtype);
    let weight = random(2, &[co, g.kernel.0, g.kernel.1, ci], dtype);
    let dy = random(3, &[batch, s.oh, s.ow, co], dtype);
    let want = naive(&s, &x, &weight, &dy);
    let onto = random(4, &[batch, h, w, ci], dtype);
    let sum: Vec<f64> = f64s(&onto).iter().zip(&want.input).map(|(a, b)| a + b).collect();
    for level in Level::available() {
        let what = format!("{level:?} {shape:?} {g:?} {dtype:?}");
        let plain = Conv {
            x: &x,
            w: &weight,
            geometry: g,
            low_rank: None,
            bias: None,
            per_image: None,
            residual: None,
        };
        let k = s.taps() * ci.max(co);
        let y = conv2d_at(level, &plain).unwrap();
        assert_eq!(y.shape(), [batch, s.oh, s.ow, co]);
        assert_close(&y, &want.forward, k, &format!("forward {what}"));
        let dx = backward_input_at(level, &dy, &weight, g, (h, w), None).unwrap();
        assert_eq!(dx.shape(), [batch, h, w, ci]);
        assert_close(&dx, &want.input, k, &format!("input {what}"));
        // Shared: a new tensor; unique: in place.
        let kept = backward_input_at(level, &dy, &weight, g, (h, w), Some(onto.clone())).unwrap();
        assert_close(&kept, &sum, k, &format!("onto {what}"));
        let own = random(4, &[batch, h, w, ci], dtype);
        let own = backward_input_at(level, &dy, &weight, g, (h, w), Some(own)).unwrap();
        assert_close(&own, &sum, k, &format!("onto its own {what}"));
        let dw = backward_weight_at(level, &x, &dy, g).unwrap();
        assert_eq!((dw.shape(), dw.dtype()), (weight.shape(), F));
        assert_close(&dw, &want.weight, batch * h * w, &format!("weight {what}"));
    }
}

fn window(kernel: (usize, usize), stride: usize, pad: (usize, usize)) -> ConvGeometry {
    ConvGeometry { kernel, stride, pad_before: pad.0, pad_after: pad.1 }
}

#[test]
fn windows_strides_and_paddings() {
    let windows = [
        window((3, 3), 1, (1, 1)),
        window((3, 3), 2, (1, 1)),
        window((3, 3), 2, (0, 1)),
        window((3, 3), 1, (0, 0)),
        window((1, 1), 1, (0, 0)),
        window((1, 1), 2, (0, 0)),
        window((1, 1), 1, (1, 0)),
        window((2, 3), 1, (1, 0)),
        window((5, 1), 3, (2, 3)),
        window((2, 2), 3, (0, 0)),
    ];
    let shapes =
        [(2, 9, 7, 8, 40), (1, 6, 8, 4, 33), (2, 5, 5, 3, 5), (1, 8, 8, 33, 4), (1, 7, 6, 1, 1)];
    for g in windows {
        for shape in shapes {
            for dtype in [F, H] {
                check_window(shape, g, dtype);
            }
        }
    }
}

#[test]
fn channels_of_several_passes_and_tasks() {
    check_window((1, 6, 6, 130, 70), ConvGeometry::square(3, 1, 1), F);
    check_window((1, 6, 6, 136, 70), ConvGeometry::square(3, 2, 1), H);
    check_window((2, 16, 20, 48, 4), ConvGeometry::square(3, 1, 1), F);
    check_window((2, 16, 20, 48, 16), ConvGeometry::square(3, 1, 1), H);
    check_window((1, 36, 33, 8, 36), ConvGeometry::square(3, 1, 1), F);
}

#[test]
fn everything_added_to_a_convolution() {
    let (batch, h, w, ci, co, r) = (2, 6, 5, 12, 37, 4);
    let g = ConvGeometry::square(3, 1, 1);
    let s = Sizes::new("test", &[batch, h, w, ci], &[co, 3, 3, ci], g).unwrap();
    for dtype in [F, H] {
        let (x, weight) = (random(1, &[batch, h, w, ci], dtype), random(2, &[co, 3, 3, ci], dtype));
        let (left, right) = (random(3, &[batch, h, w, r], dtype), random(4, &[co, r], dtype));
        let (bias, shift) = (random(5, &[co], F), random(6, &[batch, co], dtype));
        let residual = random(7, &[batch, h, w, co], dtype);
        let mut want = naive(&s, &x, &weight, &residual).forward;
        let values = [&left, &right, &bias, &shift, &residual].map(f64s);
        for (e, want) in want.iter_mut().enumerate() {
            let (pixel, c) = (e / co, e % co);
            let low = (0..r).map(|i| values[0][pixel * r + i] * values[1][c * r + i]).sum::<f64>();
            *want += low + values[2][c] + values[3][pixel / (h * w) * co + c] + values[4][e];
        }
        let p = Conv {
            x: &x,
            w: &weight,
            geometry: g,
            low_rank: Some(LowRank { left: &left, right: &right, trans_right: true }),
            bias: Some(&bias),
            per_image: Some(&shift),
            residual: Some(&residual),
        };
        for level in Level::available() {
            let got = conv2d_at(level, &p).unwrap();
            assert_close(&got, &want, 9 * ci + r, &format!("{level:?} {dtype:?}"));
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let g = ConvGeometry::square(3, 1, 1);
    let x = random(1, &[1, 24, 24, 96], F);
    let (weight, narrow) = (random(2, &[64, 3, 3, 96], F), random(3, &[4, 3, 3, 96], F));
    let (dy, dh) = (random(4, &[1, 24, 24, 64], F), random(5, &[1, 24, 24, 4], F));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let plain = |w| Conv {
                x: &x,
                w,
                geometry: g,
                low_rank: None,
                bias: None,
                per_image: None,
                residual: None,
            };
            [
                conv2d(&plain(&weight)).unwrap(),
                conv2d(&plain(&narrow)).unwrap(),
                conv2d_backward_input(&dy, &weight, g, (24, 24), None).unwrap(),
                conv2d_backward_weight(&x, &dh, g).unwrap(),
            ]
            .map(|t| t.to_vec_f32().unwrap())
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(4));
}

#[test]
fn agrees_with_candle() {
    let (h, w, ci, co) = (10, 12, 24, 40);
    let (x, k) = (numbers(1, h * w * ci), numbers(2, co * 9 * ci));
    let theirs = |stride| -> candle_core::Result<Vec<f32>> {
        let cpu = &candle_core::Device::Cpu;
        let x = candle_core::Tensor::from_vec(x.clone(), (1, h, w, ci), cpu)?;
        let k = candle_core::Tensor::from_vec(k.clone(), (co, 3, 3, ci), cpu)?;
        let (x, k) = (x.permute((0, 3, 1, 2))?, k.permute((0, 3, 1, 2))?);
        let y = x.contiguous()?.conv2d(&k.contiguous()?, 1, stride, 1, 1)?;
        y.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1()
    };
    let x_ours = Tensor::from_f32(Device::Cpu, &[1, h, w, ci], &x, F).unwrap();
    let k_ours = Tensor::from_f32(Device::Cpu, &[co, 3, 3, ci], &k, F).unwrap();
    for stride in [1, 2] {
        let p = Conv {
            x: &x_ours,
            w: &k_ours,
            geometry: ConvGeometry::square(3, stride, 1),
            low_rank: None,
            bias: None,
            per_image: None,
            residual: None,
        };
        let want: Vec<f64> = theirs(stride).unwrap().into_iter().map(f64::from).collect();
        assert_close(&conv2d(&p).unwrap(), &want, 9 * ci, "candle");
    }
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let (x, w) = (random(1, &[1, 4, 4, 5], F), random(2, &[6, 3, 3, 7], F));
    let g = ConvGeometry::square(3, 1, 1);
    let p = Conv {
        x: &x,
        w: &w,
        geometry: g,
        low_rank: None,
        bias: None,
        per_image: None,
        residual: None,
    };
    let error = conv2d(&p).unwrap_err().to_string();
    assert!(error.contains("[1, 4, 4, 5]") && error.contains("[6, 3, 3, 7]"), "{error}");
    assert!(conv2d_backward_input(&x, &w, g, (4, 4), None).is_err());
    assert!(conv2d_backward_weight(&x, &random(3, &[1, 9, 4, 2], F), g).is_err());
    let small = random(4, &[1, 1, 1, 5], F);
    let g = ConvGeometry::square(3, 1, 0);
    assert!(conv2d_backward_weight(&small, &random(3, &[1, 1, 1, 2], F), g).is_err());
}
