//! How long a picture takes: the side of lorarun in `benches/generate`.
//!
//! ```text
//! cargo run --release -p models --example seconds_per_picture -- MODEL fp32|bf16 SIDE STEPS PICTURES
//! ```
//!
//! The first picture is not counted. Prints one JSON object; progress goes to stderr.

use std::error::Error;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::Instant;

use engine::DType;
use models::pipeline::{Pipeline, PipelineOptions, Request};
use models::sampler::{SamplerKind, SamplerOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, precision, side, steps, pictures] = arguments.as_slice() else {
        return Err("give a model, `fp32` or `bf16`, a side, steps and a number of pictures".into());
    };
    let (side, steps): (usize, usize) = (side.parse()?, steps.parse()?);
    let dtype = if precision == "bf16" { DType::BF16 } else { DType::F32 };
    let started = Instant::now();
    let pipeline = Pipeline::load(model, &PipelineOptions { dtype, ..PipelineOptions::default() })?;
    let load = started.elapsed().as_secs_f64();
    let mut seconds = Vec::new();
    for seed in 0..=pictures.parse()? {
        let request = Request {
            prompt: "a photo of a red house by the sea".into(),
            negative_prompt: "blurry".into(),
            width: side,
            height: side,
            seed,
            sampler: SamplerKind::Euler,
            options: SamplerOptions::new(steps),
            guidance_scale: 7.5,
            ..Request::default()
        };
        let started = Instant::now();
        let picture = pipeline.generate(&request, &mut |_| ControlFlow::Continue(()))?;
        let mean = picture.rgb.iter().sum::<f32>() / picture.rgb.len() as f32;
        let took = started.elapsed().as_secs_f64();
        eprintln!("picture {seed}: {took:.2} s, mean {mean:.4}");
        seconds.push(took);
    }
    let seconds = &seconds[1..];
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).ok_or("no picture was counted")?;
    let report = serde_json::json!({
        "engine": "lorarun",
        "load_s": load,
        "median_picture_s": median,
        "picture_s": seconds,
        "peak_rss_gib": peak_resident().unwrap_or(f64::NAN),
    });
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}

/// The largest resident set so far in GiB, where the system says so.
fn peak_resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes / f64::from(1 << 20))
}
