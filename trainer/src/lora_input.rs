//! LoRA files that a run starts from, of any naming, under the names that it trains.

use std::path::Path;

use anyhow::Result;
use formats::Family;
use formats::adapter::AdapterFile;
use formats::lora_file::{self, LoraFile};
use models::ModelError;

/// Reads a LoRA for a base model of a family: diffusers' and PEFT's names, and diffusers' names of
/// SDXL's layers, become sd-scripts'. A file in sd-scripts' names is taken as it is.
///
/// # Errors
/// What cannot be read; a file of another family.
pub fn read_lora(path: &Path, family: Family) -> Result<LoraFile> {
    // What is no adapter to that reader is told by what it lacks, when it is loaded.
    let Ok(adapter) = AdapterFile::open(path) else { return Ok(lora_file::read(path)?) };
    if let Some(other) = adapter.family.filter(|other| *other != family) {
        let (lora, model) = (other.title(), family.title());
        return Err(ModelError::LoraFamily { path: path.to_path_buf(), lora, model }.into());
    }
    if adapter.is_kohya() {
        return Ok(lora_file::read(path)?);
    }
    let (tensors, metadata) = (adapter.kohya_tensors()?, adapter.metadata.clone());
    Ok(LoraFile { path: path.to_path_buf(), tensors, metadata })
}
