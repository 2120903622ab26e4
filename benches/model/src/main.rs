//! Writes a Stable Diffusion 1.x model with random weights, for benchmarks and for the quickstart.

use std::path::PathBuf;

use anyhow::Result;
use bench_model::layout::{Preset, model_tensors};
use bench_model::write::write_model;
use clap::Parser;

/// Writes a model of the Stable Diffusion 1.x single-file layout with random float16 weights
#[derive(Parser)]
struct Args {
    /// File to write, for example `sd15-random.safetensors` (2.1 GB, with --tiny 8 MB)
    output: PathBuf,
    /// The quickstart's small model instead of the full-size one
    #[arg(long)]
    tiny: bool,
    /// Another seed gives other weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let preset = if args.tiny { Preset::TINY } else { Preset::FULL };
    let tensors = model_tensors(&preset);
    let size = write_model(&args.output, &tensors, args.seed)?;
    eprintln!("{} tensors, {:.1} MB: {}", tensors.len(), size as f64 / 1e6, args.output.display());
    Ok(())
}
