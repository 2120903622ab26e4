//! A file mapped read-only into memory: the one `unsafe` of this crate.
//!
//! Pages are read from disk on first touch and dropped by the kernel at will, so a checkpoint of
//! several gigabytes costs address space, not memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::FormatError;

/// The bytes of a file, mapped or in memory, and its path.
#[derive(Debug)]
pub struct FileBytes {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped(Mmap),
    InMemory(Vec<u8>),
}

impl FileBytes {
    /// Maps `path`; an empty file gives empty bytes.
    ///
    /// # Errors
    /// [`FormatError::Io`] when it cannot be opened or mapped or is a folder.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        let length = file.metadata().map_err(|e| FormatError::io("read", path, e))?.len();
        if length == 0 {
            // A zero-length map is an error of the operating system.
            return Ok(Self::in_memory(path, Vec::new()));
        }
        // SAFETY: the map is read-only and private to this value. What the language cannot rule
        // out is another process changing or shortening the file while we read it; model files
        // are replaced by rename (this crate itself never writes in place), and bytes are only
        // ever read as plain numbers, never as types with invalid values.
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|e| FormatError::io("map", path, e))?;
        Ok(Self { path: path.to_path_buf(), content: Content::Mapped(map) })
    }

    /// Bytes that are in memory already; `path` is what errors name.
    pub fn in_memory(path: &Path, bytes: Vec<u8>) -> Self {
        Self { path: path.to_path_buf(), content: Content::InMemory(bytes) }
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(map) => map,
            Content::InMemory(bytes) => bytes,
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
