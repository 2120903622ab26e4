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

    /// Says that the data of `name` was read: its pages need not stay in this process.
    fn release(&self, name: &str);

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
    } else if bytes.trim_ascii_start().starts_with(b"<")
        && !bytes[..bytes.len().min(8)].contains(&0)
    {
        // The length of a safetensors header can read ` <` too, and ends in zeros.
        let hint = "the download failed, get the file again (perhaps after signing in)";
        Some(format!("it is a web page\nhint: {hint}"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::OwnedTensor;
    use crate::lora_file::{SaveAs, write};

    #[test]
    fn a_header_whose_length_begins_like_a_web_page_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors =
            BTreeMap::from([("a".to_owned(), OwnedTensor::scalar(1.0, Dtype::F32).unwrap())]);
        let length = |filler: usize| {
            let metadata = BTreeMap::from([("filler".to_owned(), "x".repeat(filler))]);
            write(&path, &tensors, &metadata, SaveAs::Safetensors).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
        };
        // ` <` as a number of two bytes.
        let wanted = usize::from(u16::from_le_bytes(*b" <"));
        assert_eq!(length(wanted - length(0)), wanted);
        assert!(open_tensor_file(&path).is_ok());
    }
}
