//! Times how long a base model takes to load beside reading its files, first from the disk, then from
//! the system's file cache; and what loading takes in memory beyond the weights.

#![expect(clippy::print_stdout, reason = "the result is data")]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use engine::{DType, Device};
use formats::{OpenOptions, open_base_model};
use trainer::base::Base;
use trainer::memory::{peak_resident, resident};

/// Reads and loads a base model
#[derive(Parser)]
struct Args {
    /// A model file, or a folder in diffusers' layout
    model: PathBuf,
    /// Load the weights as float32 instead of bfloat16
    #[arg(long)]
    f32: bool,
}

/// The files of tensors of a model.
fn files(path: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        let name = path.to_string_lossy();
        if [".safetensors", ".ckpt", ".bin"].iter().any(|end| name.ends_with(end)) {
            found.push(path.to_owned());
        }
        return Ok(());
    }
    for entry in path.read_dir().with_context(|| format!("list {}", path.display()))? {
        files(&entry?.path(), found)?;
    }
    Ok(())
}

/// Asks the system to forget what it has of the files.
fn forget(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let file = File::open(path)?;
        // SAFETY: the descriptor is open; the call only advises the system's file cache.
        let refused =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        anyhow::ensure!(refused == 0, "the system does not forget: {}", path.display());
    }
    Ok(())
}

/// Seconds to read the files once, and their bytes.
fn read(files: &[PathBuf]) -> Result<(f64, usize)> {
    let started = Instant::now();
    let (mut buffer, mut bytes) = (vec![0; 4 << 20], 0);
    for path in files {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => bytes += count,
            }
        }
    }
    Ok((started.elapsed().as_secs_f64(), bytes))
}

/// Seconds to load the U-Net, both text encoders and the VAE, all together in memory.
fn load(path: &Path, dtype: DType) -> Result<f64> {
    let started = Instant::now();
    let name = path.to_str().context("the path is no text")?;
    let mut base = Base::from_files(open_base_model(name, &OpenOptions::default())?, dtype)?;
    (base.device, base.vae_dtype) = (Device::Cpu, dtype);
    let models = (base.load_unet()?, base.load_text_encoder()?, base.load_vae()?);
    let seconds = started.elapsed().as_secs_f64();
    drop(models);
    Ok(seconds)
}

fn main() -> Result<()> {
    let args = Args::parse();
    engine::return_freed_buffers();
    let dtype = if args.f32 { DType::F32 } else { DType::BF16 };
    let mut found = Vec::new();
    files(&args.model, &mut found)?;
    let before = resident().unwrap_or(0);
    forget(&found)?;
    let (cold_read, bytes) = read(&found)?;
    let (warm_read, _) = read(&found)?;
    forget(&found)?;
    let cold_load = load(&args.model, dtype)?;
    engine::release_pool();
    let warm_load = load(&args.model, dtype)?;
    let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
    let peak = peak_resident().unwrap_or(0).saturating_sub(before);
    println!(
        "{}",
        serde_json::json!({
            "file_gib": gib(bytes),
            "from_disk": {"read_s": cold_read, "load_s": cold_load, "ratio": cold_load / cold_read},
            "from_cache": {"read_s": warm_read, "load_s": warm_load, "ratio": warm_load / warm_read},
            "peak_gib": gib(peak),
            "weights_gib": gib(engine::pool_stats().peak),
            "peak_over_weights": peak as f64 / engine::pool_stats().peak as f64,
        })
    );
    Ok(())
}
