//! Times attention and its gradients on the first card, in bf16: microseconds and TFLOP/s.
//!
//! `cargo run --release -p engine --example attention_speed`. Products of the definition are counted,
//! two forward and five backward, not those that are done again. Needs a card.

use std::time::Instant;

use engine::backend::{AttentionKind, AttentionSaved};
use engine::cuda::driver::Stream;
use engine::{DType, Device, EngineError, Result, Tensor};

const RUNS: u32 = 50;

/// Batch, heads, queries, keys and elements of a head: what SD1.5 and SD2 do at 512 and 768.
const SHAPES: [[usize; 5]; 9] = [
    [1, 8, 4096, 4096, 40],
    [8, 8, 4096, 4096, 40],
    [1, 8, 4096, 77, 40],
    [8, 8, 4096, 77, 40],
    [1, 8, 1024, 1024, 80],
    [8, 8, 1024, 1024, 80],
    [8, 8, 256, 256, 160],
    [4, 5, 9216, 9216, 64],
    [1, 1, 4096, 4096, 512],
];

/// Seconds of one of many calls.
fn seconds(device: Device, run: impl Fn() -> Result<()>) -> Result<f64> {
    let card = device.card().ok_or_else(|| EngineError::Unsupported("not a card".into()))?;
    let wait = || card.driver().synchronize(Stream::Compute);
    run()?;
    wait()?;
    let start = Instant::now();
    for _ in 0..RUNS {
        run()?;
    }
    wait()?;
    Ok(start.elapsed().as_secs_f64() / f64::from(RUNS))
}

fn tokens(device: Device, shape: &[usize], seed: usize) -> Result<Tensor> {
    let number = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504. - 1.;
    let data: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_f32(device, shape, &data, DType::BF16)
}

#[expect(clippy::print_stdout, reason = "the table is the output of this program")]
fn main() -> Result<()> {
    let device = engine::cuda::nvidia::open(0, None)?;
    let backend = device.backend();
    println!("batch heads queries  keys  dim   forward us TFLOP/s   backward us TFLOP/s");
    for [batch, heads, queries, keys, dim] in SHAPES {
        let (of_q, of_k) = ([batch, queries, heads * dim], [batch, keys, heads * dim]);
        let (q, dy) = (tokens(device, &of_q, 1)?, tokens(device, &of_q, 2)?);
        let (k, v) = (tokens(device, &of_k, 3)?, tokens(device, &of_k, 4)?);
        let kind = AttentionKind { heads, scale: (dim as f32).sqrt().recip(), causal: false };
        let made = backend.attention(&q, &k, &v, kind)?;
        let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &made.out, lse: &made.lse };
        let forward = seconds(device, || backend.attention(&q, &k, &v, kind).map(drop))?;
        let backward = seconds(device, || backend.attention_backward(&dy, &saved, kind).map(drop))?;
        let product = 2e-12 * (batch * heads * queries * keys * dim) as f64;
        println!(
            "{batch:5} {heads:5} {queries:7} {keys:5} {dim:4} {:12.1} {:7.1} {:13.1} {:7.1}",
            1e6 * forward,
            2. * product / forward,
            1e6 * backward,
            5. * product / backward
        );
    }
    Ok(())
}
