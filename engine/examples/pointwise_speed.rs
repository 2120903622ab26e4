//! Times attention, normalisations and activations beside candle's, in milliseconds.
//!
//! `cargo run --release -p engine --example pointwise_speed [threads]`. Each figure is the least of
//! several runs, because the least is what other work on the machine disturbs the least; attention on
//! one thread under Linux is given as mean processor time.

use std::time::Instant;

use candle_core::{Device as CandleDevice, Tensor as CandleTensor, Var};
use engine::backend::{AttentionKind, AttentionSaved, GroupNormShape};
use engine::{Activation, DType, Device, Result, Tensor};

/// Milliseconds of one call on the clock.
fn time(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64() * 1e3
}

/// Least time of `runs` calls.
fn least(runs: usize, mut run: impl FnMut()) -> f64 {
    (0..runs).map(|_| time(&mut run)).fold(f64::INFINITY, f64::min)
}

/// Mean processor time of `runs` calls where this thread works alone, otherwise their least time.
fn mean(runs: usize, mut run: impl FnMut()) -> f64 {
    let alone = rayon::current_num_threads() == 1;
    let busy = || -> Option<f64> {
        let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        line.split(' ').next()?.parse().ok()
    };
    let before = busy().filter(|_| alone);
    let least = least(runs, &mut run);
    before.zip(busy()).map_or(least, |(before, after)| (after - before) / 1e6 / runs as f64)
}

fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| next() + next()).collect()
}

fn tensor(shape: &[usize], seed: u32, dtype: DType) -> Tensor {
    let data = noise(shape.iter().product(), seed);
    Tensor::from_f32(Device::Cpu, shape, &data, dtype).expect("the shape fits the data")
}

fn attention(shape: (usize, usize, usize, usize), dtype: DType, runs: usize) -> (f64, f64) {
    let (queries, keys, heads, dim) = shape;
    let backend = Device::Cpu.backend();
    let kind = AttentionKind { heads, scale: 1. / (dim as f32).sqrt(), causal: false };
    let q = tensor(&[1, queries, heads * dim], 1, dtype);
    let k = tensor(&[1, keys, heads * dim], 2, dtype);
    let v = tensor(&[1, keys, heads * dim], 3, dtype);
    let dy = tensor(&[1, queries, heads * dim], 4, dtype);
    let forward = || backend.attention(&q, &k, &v, kind).expect("shapes fit");
    let result = forward();
    let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &result.out, lse: &result.lse };
    let there = mean(runs, || drop(forward()));
    let back = mean(runs, || {
        drop(backend.attention_backward(&dy, &saved, kind).expect("shapes fit"));
    });
    (there, back)
}

fn candle_attention(
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
) -> candle_core::Result<f64> {
    let var = |tokens: usize, seed| {
        let data = noise(tokens * heads * dim, seed);
        Var::from_tensor(&CandleTensor::from_vec(
            data,
            (1, heads, tokens, dim),
            &CandleDevice::Cpu,
        )?)
    };
    let (q, k, v) = (var(queries, 1)?, var(keys, 2)?, var(keys, 3)?);
    let mut failure = None;
    let time = least(1, || {
        let run = || -> candle_core::Result<()> {
            let scores = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?;
            let out = candle_nn::ops::softmax(&scores, candle_core::D::Minus1)?.matmul(&v)?;
            out.sum_all()?.backward().map(drop)
        };
        failure = run().err();
    });
    failure.map_or(Ok(time), Err)
}

fn norms(dtype: DType) -> Result<[f64; 3]> {
    let backend = Device::Cpu.backend();
    let x = tensor(&[1, 64, 64, 320], 1, dtype);
    let (gamma, beta) = (tensor(&[320], 2, DType::F32), tensor(&[320], 3, DType::F32));
    let dy = noise(x.len(), 4);
    let mut times = [0.; 3];
    for (silu, slot) in [(false, 0), (true, 1)] {
        let shape = GroupNormShape { groups: 32, eps: 1e-5, silu };
        let (_, stats) = backend.group_norm(&x, &gamma, &beta, shape)?;
        let there = least(30, || drop(backend.group_norm(&x, &gamma, &beta, shape)));
        let back =
            (0..30)
                .map(|_| {
                    let dy = Tensor::from_f32(Device::Cpu, x.shape(), &dy, dtype);
                    let affine = (&gamma, &beta);
                    time(|| {
                        drop(dy.and_then(|dy| {
                            backend.group_norm_backward(dy, &x, &stats, affine, shape)
                        }));
                    })
                })
                .fold(f64::INFINITY, f64::min);
        times[slot] = there + back;
    }
    let (_, stats) = backend.layer_norm(&x, &gamma, &beta, 1e-5)?;
    times[2] = least(30, || {
        drop(backend.layer_norm(&x, &gamma, &beta, 1e-5));
        drop(backend.layer_norm_backward(x.clone(), &x, &stats, &gamma));
    });
    Ok(times)
}

fn activations(dtype: DType) -> Result<[f64; 3]> {
    let backend = Device::Cpu.backend();
    let (x, wide) = (tensor(&[4096, 1280], 1, dtype), tensor(&[4096, 2560], 1, dtype));
    let dy = noise(x.len(), 2);
    let mut times = [0.; 3];
    for (slot, kind) in [Activation::Gelu, Activation::Silu].into_iter().enumerate() {
        let there = least(20, || drop(backend.activation(kind, &x)));
        let mut back = f64::INFINITY;
        for _ in 0..20 {
            let dy = Tensor::from_f32(Device::Cpu, x.shape(), &dy, dtype)?;
            back = back.min(time(|| drop(backend.activation_backward(kind, dy, &x))));
        }
        times[slot] = there + back;
    }
    times[2] = least(20, || {
        drop(backend.geglu(&wide));
        drop(backend.geglu_backward(&x, &wide));
    });
    Ok(times)
}

fn candle_pointwise() -> candle_core::Result<(f64, f64)> {
    let cpu = CandleDevice::Cpu;
    let x = Var::from_tensor(&CandleTensor::from_vec(noise(4096 * 1280, 1), (4096, 1280), &cpu)?)?;
    let mut results = Vec::new();
    let gelu = time(|| results.push(x.gelu_erf().and_then(|y| y.sum_all()?.backward())));
    let x = CandleTensor::from_vec(noise(64 * 64 * 320, 1), (1, 320, 64, 64), &cpu)?;
    let x = Var::from_tensor(&x)?;
    let (gamma, beta) = (
        CandleTensor::ones(320, candle_core::DType::F32, &cpu)?,
        CandleTensor::zeros(320, candle_core::DType::F32, &cpu)?,
    );
    let norm = candle_nn::GroupNorm::new(gamma, beta, 320, 32, 1e-5)?;
    let norm = time(|| {
        results.push(candle_nn::Module::forward(&norm, &x).and_then(|y| y.sum_all()?.backward()));
    });
    results.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
    Ok((gelu, norm))
}

#[expect(clippy::print_stdout, reason = "the table is the output of this program")]
fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(0), |n| n.parse())?;
    rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global()?;
    println!("threads: {}", rayon::current_num_threads());
    let shapes = [
        (4096, 4096, 8, 40),
        (1024, 1024, 8, 80),
        (256, 256, 8, 160),
        (4096, 77, 8, 40),
        (1024, 77, 8, 80),
        (4096, 4096, 5, 64),
        (77, 77, 12, 64),
        (4096, 4096, 1, 512),
    ];
    for shape in shapes {
        let runs = if shape.1 > 1024 { 2 } else { 20 };
        for dtype in [DType::F32, DType::BF16] {
            let (there, back) = attention(shape, dtype, runs);
            println!("attention {shape:?} {dtype:?}: forward {there:.1}, backward {back:.1}");
        }
    }
    for dtype in [DType::F32, DType::BF16] {
        let [plain, silu, layer] = norms(dtype)?;
        println!(
            "{dtype:?} [1,64,64,320] forward+backward: group norm {plain:.2}, with SiLU {silu:.2}, layer norm {layer:.2}"
        );
        let [gelu, silu, geglu] = activations(dtype)?;
        println!(
            "{dtype:?} [4096,1280] forward+backward: GELU {gelu:.2}, SiLU {silu:.2}, GEGLU {geglu:.2}"
        );
    }
    let (gelu, norm) = candle_pointwise()?;
    println!("candle f32 forward+backward: GELU {gelu:.0}, group norm {norm:.0}");
    println!(
        "candle f32 attention (1024, 1024, 8, 80): {:.0}",
        candle_attention(1024, 1024, 8, 80)?
    );
    println!(
        "candle f32 attention (4096, 4096, 8, 40): {:.0}",
        candle_attention(4096, 4096, 8, 40)?
    );
    Ok(())
}
