//! What all files of tensors have in common, whatever their format.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::pickle::PickleFile;
use crate::safetensors_file::SafetensorsFile;
use crate::{Dtype, FormatError, TensorView};

/// A file (or a set of shards) of named tensors.
pub trait TensorFile: Send + Sync {
    /// Where it lies.
    fn path(&self) -> &Path;

    /// All names, sorted.
    fn names(&self) -> Vec<&str>;

    /// Type and shape of a tensor without touching its data.
    fn describe(&self, name: &str) -> Option<(Dtype, &[usize])>;

    /// A tensor, borrowed where the file stores it contiguously.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`], or [`FormatError::Malformed`] for damage that only reading
    /// shows.
    fn view(&self, name: &str) -> Result<TensorView<'_>, FormatError>;

    /// Key-value texts beside the tensors; empty where the format has none.
    fn metadata(&self) -> &BTreeMap<String, String>;

    /// Shape alone.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.describe(name).map(|(_, shape)| shape)
    }
}

/// Opens a safetensors file or a torch checkpoint, told apart by their first bytes.
///
/// # Errors
/// All reading errors of both formats.
pub fn open_tensor_file(path: &Path) -> Result<Arc<dyn TensorFile>, FormatError> {
    let map = crate::mmap::FileBytes::open(path)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let is_zip = map.bytes().starts_with(b"PK\x03\x04");
    let is_pickle_name = matches!(extension, "ckpt" | "pt" | "pth" | "bin");
    if is_zip || (is_pickle_name && !SafetensorsFile::looks_like(map.bytes())) {
        Ok(Arc::new(PickleFile::from_map(map)?))
    } else {
        Ok(Arc::new(SafetensorsFile::from_map(map)?))
    }
}

/// Words for the first bytes of a file that is no model at all, but often lies in its place.
pub(crate) fn describe_known_stranger(bytes: &[u8]) -> Option<String> {
    if bytes.is_empty() {
        Some("it is empty".to_owned())
    } else if bytes.starts_with(b"version https://git-lfs") {
        Some("it is a Git LFS pointer\nhint: fetch the file itself with `git lfs pull`".to_owned())
    } else if bytes.trim_ascii_start().starts_with(b"<") {
        let hint = "the download failed, get the file again (perhaps after signing in)";
        Some(format!("it is a web page\nhint: {hint}"))
    } else {
        None
    }
}
