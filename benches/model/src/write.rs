//! Writes a model as float16 safetensors, one tensor at a time: memory does not grow with the model.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use half::f16;
use serde_json::{Map, Value, json};

use crate::layout::{Fill, TensorSpec};
use crate::random::Stream;

/// Values converted before they are handed to the file.
const CHUNK: usize = 1 << 16;

/// Writes `tensors` (sorted by name) to `path` through a temporary file beside it; returns the file's size in bytes.
pub fn write_model(path: &Path, tensors: &[TensorSpec], seed: u64) -> Result<u64> {
    let temporary = temporary_path(path);
    let written = write_file(&temporary, tensors, seed)
        .and_then(|size| fs::rename(&temporary, path).map(|()| size).map_err(Into::into));
    if written.is_err() {
        // The first error is the one to report; the file may not even exist.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write the model: {}", path.display()))
}

fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

fn write_file(path: &Path, tensors: &[TensorSpec], seed: u64) -> Result<u64> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let header = header(tensors);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut size = 8 + header.len() as u64;
    let mut bytes = Vec::with_capacity(CHUNK * 2);
    for tensor in tensors {
        let mut stream = Stream::new(seed, &tensor.name);
        let mut left = tensor.len();
        while left > 0 {
            let count = left.min(CHUNK);
            bytes.clear();
            for _ in 0..count {
                let value = match tensor.fill {
                    Fill::Zero => 0.0,
                    Fill::One => 1.0,
                    Fill::Random { deviation } => stream.near_normal() * deviation,
                };
                bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes());
            }
            file.write_all(&bytes)?;
            left -= count;
        }
        size += tensor.len() as u64 * 2;
    }
    file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    Ok(size)
}

/// The JSON header, padded with spaces to a multiple of eight bytes.
fn header(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.len() * 2;
        let entry = json!({ "dtype": "F16", "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut bytes = Value::Object(entries).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Preset, model_tensors};

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_leaves_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let write = |seed| {
            let path = folder.path().join("model.safetensors");
            let size = write_model(&path, &model_tensors(&Preset::TINY), seed).unwrap();
            let bytes = fs::read(&path).unwrap();
            assert_eq!(bytes.len() as u64, size);
            bytes
        };
        let first = write(0);
        assert!(write(0) == first, "the second file differs");
        assert!(write(1) != first, "the seed changes nothing");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
    }

    #[test]
    fn an_impossible_folder_is_named() {
        let error = write_model(Path::new("/nonexistent/m.safetensors"), &[], 0).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/m.safetensors"), "{error:#}");
    }

    #[test]
    fn the_header_is_aligned_and_covers_the_data() {
        let tensors = model_tensors(&Preset::TINY);
        let bytes = header(&tensors);
        assert_eq!(bytes.len() % 8, 0);
        let parsed: Value = serde_json::from_slice(&bytes).unwrap();
        let ends = tensors.iter().map(|t| parsed[&t.name]["data_offsets"][1].as_u64().unwrap());
        assert_eq!(ends.max().unwrap(), tensors.iter().map(|t| t.len() as u64 * 2).sum::<u64>());
    }
}
