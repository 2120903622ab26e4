//! Speed of matrix products and convolutions at the sizes of SD1.5, beside candle and the peak.
//!
//! Prints GFLOP/s for each second of processor time, the share of what a loop of f32 multiply-adds
//! reaches on the same clock, and the wall time; the best of a few runs counts. Processor time keeps
//! other work on the machine out of the figures (but not out of the caches), and shows nothing of a
//! bad split over threads: for that, look at the wall time of an otherwise idle machine.
//! `RAYON_NUM_THREADS=1 cargo run --release -p engine --example matrix_speed [-- filter]`

use std::hint::black_box;
use std::time::Instant;

use engine::backend::{Backend, Conv, Gemm};
use engine::cpu::Cpu;
use engine::{ConvGeometry, DType, Result, Tensor};

const RUNS: usize = 5;

/// Seconds of all processors spent on this process, and of the wall.
#[derive(Clone, Copy)]
struct Seconds {
    processor: f64,
    wall: f64,
}

fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call only writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The least of each over a few runs.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<Seconds> {
    let mut least = Seconds { processor: f64::INFINITY, wall: f64::INFINITY };
    for _ in 0..RUNS {
        let (start, used) = (Instant::now(), processor_seconds());
        run()?;
        least.processor = least.processor.min(processor_seconds() - used);
        least.wall = least.wall.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_loop(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_set1_ps(1.); 12];
    let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, x, y);
        }
    }
    sums.iter().map(|s| _mm512_reduce_add_ps(*s)).sum()
}

/// GFLOP/s of f32 multiply-adds on one processor; 0 without AVX-512.
fn peak() -> Result<f64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        const ROUNDS: usize = 200_000;
        let seconds = best(|| {
            // SAFETY: the processor has AVX-512.
            black_box(unsafe { fma_loop(ROUNDS) });
            Ok(())
        })?;
        return Ok(ROUNDS as f64 * 12. * 32. / seconds.processor / 1e9);
    }
    Ok(0.)
}

fn tensor(shape: &[usize], dtype: DType) -> Result<Tensor> {
    let len = shape.iter().product::<usize>();
    let data: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500. - 1.).collect();
    Tensor::from_f32(engine::Device::Cpu, shape, &data, dtype)
}

/// A case: its name, its multiply-adds, ours in a type, and candle's.
struct Case<'a> {
    name: String,
    products: usize,
    ours: &'a dyn Fn(DType) -> Result<Seconds>,
    candle: Option<&'a dyn Fn() -> Result<Seconds>>,
}

fn report(filter: &str, case: Case) -> Result<()> {
    if !case.name.contains(filter) {
        return Ok(());
    }
    let speed = |seconds: Seconds| case.products as f64 * 2. / seconds.processor / 1e9;
    let mut line = format!("{:42}", case.name);
    for dtype in [DType::F32, DType::BF16] {
        let limit = peak()?;
        let seconds = (case.ours)(dtype)?;
        let share = speed(seconds) / limit * 100.;
        line += &format!(" {:7.1} {share:4.0}% {:8.3} ms", speed(seconds), seconds.wall * 1e3);
    }
    if let Some(candle) = case.candle {
        line += &format!(" {:7.1}", speed(candle()?));
    }
    #[expect(clippy::print_stdout, reason = "the table is this program's output")]
    {
        println!("{line}");
    }
    Ok(())
}

fn candle_linear(m: usize, n: usize, k: usize) -> Result<Seconds> {
    let cpu = &candle_core::Device::Cpu;
    let a = candle_core::Tensor::rand(-1f32, 1., (m, k), cpu)?;
    let b = candle_core::Tensor::rand(-1f32, 1., (n, k), cpu)?;
    best(|| {
        black_box(a.matmul(&b.t()?)?);
        Ok(())
    })
}

fn products(filter: &str) -> Result<()> {
    let sizes = [
        (4096, 320, 320),
        (4096, 2560, 320),
        (4096, 320, 1280),
        (1024, 640, 640),
        (1024, 5120, 640),
        (1024, 640, 2560),
        (256, 1280, 1280),
        (256, 10240, 1280),
        (256, 1280, 5120),
        (77, 320, 768),
        (77, 1280, 768),
        (77, 3072, 768),
    ];
    for (m, n, k) in sizes {
        for (what, trans) in [("x·Wᵀ", true), ("dy·W", false)] {
            let ours = |dtype| {
                let a = tensor(&[m, k], dtype)?;
                let b = tensor(&if trans { [n, k] } else { [k, n] }, dtype)?;
                best(|| Cpu.gemm(&Gemm::new(&a, false, &b, trans)).map(drop))
            };
            let candle = || candle_linear(m, n, k);
            let candle: Option<&dyn Fn() -> Result<Seconds>> =
                if trans { Some(&candle) } else { None };
            let name = format!("{what} [{m},{k}]x[{k},{n}]");
            report(filter, Case { name, products: m * n * k, ours: &ours, candle })?;
        }
    }
    for r in [4, 16, 32] {
        let (m, c) = (4096, 320);
        let shapes = [
            ("x·downᵀ", [m, c], false, [r, c], true),
            ("dy·up", [m, c], false, [c, r], false),
            ("dyᵀ·h", [m, c], true, [m, r], false),
            ("dhᵀ·x", [m, r], true, [m, c], false),
        ];
        for (what, a, trans_a, b, trans_b) in shapes {
            let ours = |dtype| {
                let (a, b) = (tensor(&a, dtype)?, tensor(&b, dtype)?);
                best(|| Cpu.gemm(&Gemm::new(&a, trans_a, &b, trans_b)).map(drop))
            };
            let name = format!("{what} rank {r} of [{m},{c}]");
            report(filter, Case { name, products: m * c * r, ours: &ours, candle: None })?;
        }
    }
    Ok(())
}

fn candle_conv(size: usize, ci: usize, co: usize, g: ConvGeometry) -> Result<Seconds> {
    let cpu = &candle_core::Device::Cpu;
    let x = candle_core::Tensor::rand(-1f32, 1., (1, ci, size, size), cpu)?;
    let w = candle_core::Tensor::rand(-1f32, 1., (co, ci, g.kernel.0, g.kernel.1), cpu)?;
    best(|| {
        black_box(x.conv2d(&w, g.pad_before, g.stride, 1, 1)?);
        Ok(())
    })
}

fn convolutions(filter: &str) -> Result<()> {
    let three = ConvGeometry::square(3, 1, 1);
    let shapes = [
        (64, 320, 320, three),
        (64, 960, 320, three),
        (64, 4, 320, three),
        (64, 320, 4, three),
        (64, 320, 320, ConvGeometry::square(3, 2, 1)),
        (64, 320, 320, ConvGeometry::square(1, 1, 0)),
        (32, 640, 640, three),
        (32, 1920, 640, three),
        (16, 1280, 1280, three),
        (16, 2560, 1280, three),
        (8, 1280, 1280, three),
        (8, 2560, 1280, three),
        (256, 256, 256, three),
    ];
    for (size, ci, co, g) in shapes {
        let taps = g.kernel.0 * g.kernel.1;
        let out = size / g.stride;
        let ways = [("conv", 0), ("conv input gradient", 1), ("conv weight gradient", 2)];
        for (what, way) in ways {
            let co = if way == 2 { 4 } else { co };
            let ours = |dtype| {
                let (x, w) =
                    (tensor(&[1, size, size, ci], dtype)?, [co, g.kernel.0, g.kernel.1, ci]);
                let (w, dy) = (tensor(&w, dtype)?, tensor(&[1, out, out, co], dtype)?);
                let (low_rank, bias, per_image, residual) = (None, None, None, None);
                let p = Conv { x: &x, w: &w, geometry: g, low_rank, bias, per_image, residual };
                best(|| match way {
                    0 => Cpu.conv2d(&p).map(drop),
                    1 => Cpu.conv2d_backward_input(&dy, &w, g, (size, size), None).map(drop),
                    _ => Cpu.conv2d_backward_weight(&x, &dy, g).map(drop),
                })
            };
            let candle = || candle_conv(size, ci, co, g);
            let candle: Option<&dyn Fn() -> Result<Seconds>> =
                if way == 0 { Some(&candle) } else { None };
            let side = g.kernel.0;
            let name = format!("{what} {side}x{side}/{} {ci}->{co} at {size}", g.stride);
            report(
                filter,
                Case { name, products: out * out * taps * ci * co, ours: &ours, candle },
            )?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    #[expect(clippy::print_stdout, reason = "the table is this program's output")]
    {
        let columns = ["f32 GFLOP/s, share of the f32 peak, wall", "bf16 the same", "candle f32"];
        println!("{} threads; {}", rayon::current_num_threads(), columns.join(" | "));
    }
    products(&filter)?;
    convolutions(&filter)
}
