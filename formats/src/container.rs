//! Which container a path asks for.

use std::path::Path;

use crate::FormatError;

/// The container to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveAs {
    /// `.safetensors`, with metadata and hashes.
    Safetensors,
    /// `.ckpt` or `.pt`: a torch zip, tensors only, as sd-scripts writes it.
    Pickle,
}

impl SaveAs {
    /// The container that the ending of `path` names.
    ///
    /// # Errors
    /// [`FormatError::UnknownEnding`] for other endings than `.safetensors`, `.ckpt`, `.pt`, `.pth`
    /// and `.bin`.
    pub fn of_path(path: &Path) -> Result<Self, FormatError> {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        match extension.as_deref() {
            Some("safetensors") => Ok(Self::Safetensors),
            Some("ckpt" | "pt" | "pth" | "bin") => Ok(Self::Pickle),
            _ => Err(FormatError::UnknownEnding { path: path.to_path_buf() }),
        }
    }
}
