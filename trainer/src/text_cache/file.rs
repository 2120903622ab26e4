//! What the text encoders say of one image's caption, in a file beside the image.
//!
//! A safetensors file in the folder of the latent cache, `IMAGE_te_outputs.safetensors` (sd-scripts
//! writes `IMAGE_te_outputs.npz`). Tensors: `hidden_states` `[T,C]`, SDXL's two text encoders side by
//! side, and for SDXL `pooled` `[P]`, in the type of the arithmetic. Metadata: what it was made by, the
//! caption and its tokens' hash, and a CRC-32 of the tensors. Its name says nothing of these, so that a
//! file of something else is met and told, and none is left behind unseen.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use formats::safetensors_file::{SafetensorsFile, write_safetensors};
use formats::{OwnedTensor, TensorFile};
use sha2::{Digest, Sha256};

use super::settings::{Setting, differences, hex};
use crate::dataset::latent_cache::CACHE_FOLDER;
use crate::encoded::{Caption, Form};

const FORMAT: &str = "lorarun text encoder outputs 1";
const HIDDEN: &str = "hidden_states";
const POOLED: &str = "pooled";

/// What is there for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// What is needed.
    Fits,
    /// Nothing, or a file that is not whole: to be made.
    Nothing,
    /// A whole file of something else; says what differs.
    Other(String),
}

/// The file of an image.
pub fn path_of(image: &Path) -> PathBuf {
    let folder = image.parent().unwrap_or(Path::new("")).join(CACHE_FOLDER);
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push("_te_outputs.safetensors");
    folder.join(name)
}

fn tokens_hash(caption: &Caption) -> String {
    let mut hasher = Sha256::new();
    let tokens = &caption.tokens;
    for id in tokens.ids.iter().chain(tokens.ids_2.iter().flatten()) {
        hasher.update(id.to_le_bytes());
    }
    for weight in tokens.weights.iter().flatten() {
        hasher.update(weight.to_bits().to_le_bytes());
    }
    hex(hasher)
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(bytes))
}

/// Writes the bytes of a caption, complete or not at all.
///
/// # Errors
/// A full disk, a folder without write permission.
pub fn write(
    path: &Path,
    settings: &[Setting],
    caption: &Caption,
    (bytes, form): (&[u8], &Form),
) -> Result<()> {
    let (hidden, pooled) = bytes.split_at(form.tokens * form.width * form.dtype.size());
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, shape: Vec<usize>, data: &[u8]| {
        let tensor = OwnedTensor { dtype: form.dtype, shape, data: data.to_vec() };
        tensors.insert(name.to_owned(), tensor);
    };
    add(HIDDEN, vec![form.tokens, form.width], hidden);
    if let Some(width) = form.pooled {
        add(POOLED, vec![width], pooled);
    }
    let mut metadata: BTreeMap<String, String> = [
        ("format", FORMAT.to_owned()),
        ("caption", caption.text.clone()),
        ("tokens_sha256", tokens_hash(caption)),
        ("crc32", checksum(bytes)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    for Setting { name, value, .. } in settings {
        metadata.insert((*name).to_owned(), value.clone());
    }
    Ok(formats::atomic::write_atomic(path, |writer| {
        write_safetensors(writer, &tensors, Some(&metadata))
    })?)
}

/// The bytes of a caption.
///
/// # Errors
/// A sentence: missing, damaged, or of other shapes.
pub fn read(path: &Path, form: &Form) -> Result<Vec<u8>, String> {
    let file = SafetensorsFile::open(path).map_err(|error| error.to_string())?;
    read_opened(&file, form)
}

fn read_opened(file: &SafetensorsFile, form: &Form) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(form.bytes());
    let mut add = |name: &str, shape: &[usize]| -> Result<(), String> {
        let view = file.view(name).map_err(|error| error.to_string())?;
        if view.shape != shape || view.dtype != form.dtype {
            return Err(format!(
                "`{name}` has the shape {:?} of {}, not {shape:?} of {}",
                view.shape, view.dtype, form.dtype
            ));
        }
        bytes.extend_from_slice(&view.data);
        Ok(())
    };
    add(HIDDEN, &[form.tokens, form.width])?;
    if let Some(width) = form.pooled {
        add(POOLED, &[width])?;
    }
    match file.metadata().get("crc32") {
        Some(crc) if *crc == checksum(&bytes) => Ok(bytes),
        _ => Err("its checksum is wrong".to_owned()),
    }
}

/// Looks at what is in a file.
pub fn check(path: &Path, settings: &[Setting], caption: &Caption, form: &Form) -> Found {
    let Ok(file) = SafetensorsFile::open(path) else { return Found::Nothing };
    let value = |key: &str| file.metadata().get(key).map(String::as_str);
    if value("format") != Some(FORMAT) {
        return Found::Nothing;
    }
    let mut other = differences(settings, &value);
    // Other tokenizers give other tokens for the same caption.
    if value("caption") != Some(&caption.text) {
        other.push(format!(
            "it was made for the caption `{}`, which is now: `{}`",
            value("caption").unwrap_or_default(),
            caption.text
        ));
    } else if other.is_empty() && value("tokens_sha256") != Some(&tokens_hash(caption)) {
        other.push("it was made for other tokens of the same caption".to_owned());
    }
    match (other.is_empty(), read_opened(&file, form)) {
        (true, Ok(_)) => Found::Fits,
        (true, Err(_)) => Found::Nothing,
        (false, _) => Found::Other(other.join("; ")),
    }
}
