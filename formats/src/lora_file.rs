//! LoRA files in sd-scripts' layout: read losslessly, written byte-deterministically.
//!
//! Written files have sorted keys and sorted metadata and carry the hashes that WebUI looks for,
//! computed as sd-scripts does.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::atomic::write_atomic_if;
use crate::lora_modules::{LoraModule, group_modules};
use crate::model_hash::{LEGACY_LENGTH, LEGACY_OFFSET, hex};
use crate::pickle::write_pickle;
use crate::safetensors_file::{filled_specs, header_bytes, write_safetensors};
use crate::tensor_file::open_tensor_file;
use crate::{FormatError, OwnedTensor, SavePrecision};

pub use crate::container::SaveAs;

/// The tensors of a LoRA by their file keys.
pub type Tensors = BTreeMap<String, OwnedTensor>;

/// The texts of a LoRA's header; every value is a text, JSON within texts.
pub type Metadata = BTreeMap<String, String>;

/// A LoRA file in memory.
#[derive(Clone, Debug)]
pub struct LoraFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// Every tensor as stored.
    pub tensors: Tensors,
    /// Every text; empty for `.ckpt` and `.pt`, which hold none.
    pub metadata: Metadata,
}

impl LoraFile {
    /// The tensors grouped into modules, sorted by module name.
    ///
    /// # Errors
    /// [`FormatError::BadLora`] naming the key that breaks the rules.
    pub fn modules(&self) -> Result<Vec<LoraModule<'_>>, FormatError> {
        group_modules(&self.tensors, &self.path)
    }
}

/// Reads a LoRA from `.safetensors`, `.ckpt` or `.pt`.
///
/// # Errors
/// All reading errors; the contents are checked by [`LoraFile::modules`].
pub fn read(path: &Path) -> Result<LoraFile, FormatError> {
    let file = open_tensor_file(path)?;
    let mut tensors = Tensors::new();
    for name in file.names() {
        tensors.insert(name.to_owned(), file.view(name)?.to_owned_tensor());
    }
    Ok(LoraFile { path: path.to_path_buf(), tensors, metadata: file.metadata().clone() })
}

/// Writes a LoRA atomically. A safetensors file gets `sshs_model_hash` and `sshs_legacy_hash`
/// beside `metadata`; a pickle holds the tensors alone.
///
/// # Errors
/// [`FormatError::DiskFull`] or [`FormatError::Io`].
pub fn write(
    path: &Path,
    tensors: &Tensors,
    metadata: &Metadata,
    save_as: SaveAs,
) -> Result<(), FormatError> {
    write_if(path, (tensors, metadata), save_as, || Ok(()))
}

/// [`write()`] for who may lose the right to the name while it writes: `permit` is asked when the
/// whole file is on the disk, just before it gets its name.
///
/// # Errors
/// As [`write()`], and those of `permit`.
pub fn write_if<E: From<FormatError>>(
    path: &Path,
    (tensors, metadata): (&Tensors, &Metadata),
    save_as: SaveAs,
    permit: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    match save_as {
        SaveAs::Pickle => write_atomic_if(path, |writer| write_pickle(writer, tensors), permit),
        SaveAs::Safetensors => {
            let (model_hash, legacy_hash) =
                sshs_hashes(tensors, metadata).map_err(|e| FormatError::io("write", path, e))?;
            let mut metadata = metadata.clone();
            metadata.insert("sshs_model_hash".to_owned(), model_hash);
            metadata.insert("sshs_legacy_hash".to_owned(), legacy_hash);
            let fill = |writer: &mut dyn Write| write_safetensors(writer, tensors, Some(&metadata));
            write_atomic_if(path, fill, permit)
        }
    }
}

/// The tensors in the precision of `save_precision`, alphas too, as sd-scripts casts them.
///
/// # Errors
/// None for the three precisions; the signature is that of [`OwnedTensor::cast`].
pub fn cast(tensors: &Tensors, precision: SavePrecision) -> Result<Tensors, FormatError> {
    let cast = |(name, tensor): (&String, &OwnedTensor)| {
        Ok((name.clone(), tensor.cast(precision.dtype())?))
    };
    tensors.iter().map(cast).collect()
}

/// (`sshs_model_hash`, `sshs_legacy_hash`): the sha256 of all bytes after the header, and the
/// first 8 digits of that of 64 KiB at offset 0x100000, of a serialisation whose metadata is the
/// `ss_` part alone.
///
/// # Errors
/// When a tensor's data does not fill its shape.
pub fn sshs_hashes(tensors: &Tensors, metadata: &Metadata) -> io::Result<(String, String)> {
    let training: Metadata = metadata
        .iter()
        .filter(|(key, _)| key.starts_with("ss_"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let specs = filled_specs(tensors)?;
    let header = header_bytes(&specs, Some(&training))?;
    let mut whole = Sha256::new();
    let mut window = Sha256::new();
    let window_range = LEGACY_OFFSET..LEGACY_OFFSET + LEGACY_LENGTH;
    let mut position = 0_u64;
    let mut see = |bytes: &[u8]| {
        // The part of these bytes that lies in the window.
        let clamp = |at: u64| at.saturating_sub(position).min(bytes.len() as u64) as usize;
        window.update(&bytes[clamp(window_range.start)..clamp(window_range.end)]);
        position += bytes.len() as u64;
    };
    see(&(header.len() as u64).to_le_bytes());
    see(&header);
    for spec in &specs {
        let data = &tensors[&spec.name].data;
        whole.update(data);
        see(data);
    }
    let mut legacy = hex(&window.finalize());
    legacy.truncate(8);
    Ok((hex(&whole.finalize()), legacy))
}
