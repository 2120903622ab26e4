//! The small reference that the program carries: unpacked into a temporary folder and run from there.

use std::path::Path;

use anyhow::{Context, Result};
use engine::Device;

use super::{Report, run};

macro_rules! files {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../data/selftest/", $path)))),+]
    };
}

/// Made by `tests/data/reference_scripts/make_embedded.py`.
const FILES: &[(&str, &[u8])] = files![
    "base.safetensors",
    "inputs.safetensors",
    "c3lier/after5.safetensors",
    "c3lier/cases.json",
    "c3lier/init.safetensors",
    "c3lier/ref.safetensors",
    "c3lier/ref_variant_grads.safetensors",
    "model/model_index.json",
    "model/scheduler/scheduler_config.json",
    "model/text_encoder/config.json",
    "model/text_encoder/model.safetensors",
    "model/unet/config.json",
    "model/unet/diffusion_pytorch_model.safetensors",
    "model/vae/config.json",
    "model/vae/diffusion_pytorch_model.safetensors",
];

/// Runs the embedded reference.
pub fn run_embedded(device: Device, checkpointing: bool) -> Result<Report> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    for (name, bytes) in FILES {
        write(&folder.path().join(name), bytes)?;
    }
    run(&folder.path().join("c3lier"), folder.path(), device, checkpointing)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let fail = || format!("cannot unpack the reference: {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(fail)?;
    }
    std::fs::write(path, bytes).with_context(fail)
}
