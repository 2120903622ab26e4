//! Writes a Stable Diffusion 1.x model with random weights, for benchmarks.

use std::path::PathBuf;

use anyhow::Result;
use bench_model::layout::{Preset, model_tensors};
use bench_model::write::write_model;
use clap::Parser;

/// Writes a model of the Stable Diffusion 1.x single-file layout with random float16 weights
#[derive(Parser)]
struct Args {
    /// File to write, for example `sd15-random.safetensors` (2.1 GB)
    output: PathBuf,
    /// Another seed gives other weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let tensors = model_tensors(&Preset::FULL);
    let size = write_model(&args.output, &tensors, args.seed)?;
    eprintln!("{} tensors, {:.1} MB: {}", tensors.len(), size as f64 / 1e6, args.output.display());
    Ok(())
}
