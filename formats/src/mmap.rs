//! A file mapped read-only into memory: the one `unsafe` of this crate.
//!
//! Pages are read from disk on first touch and dropped by the kernel at will, so a checkpoint of
//! several gigabytes costs address space, not memory. All processes that map a file share its pages.
//! They count as memory of each while they are mapped, so what was read is given back.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};

use crate::FormatError;

/// Bytes that Linux maps at a time (`fault_around_bytes`).
const FAULT_WINDOW: usize = 64 << 10;

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

    /// Takes the pages of `range` out of this process; they stay in the system's file cache, and come
    /// back when they are read again.
    pub fn release(&self, range: Range<usize>) {
        let Content::Mapped(map) = &self.content else { return };
        // The kernel maps pages in windows around the one that was touched.
        let start = range.start / FAULT_WINDOW * FAULT_WINDOW;
        let end = range.end.next_multiple_of(FAULT_WINDOW).min(map.len());
        if start >= end {
            return;
        }
        // SAFETY: the map is of a file, shared and read-only: a page that was taken out is read from
        // the same file again, so no byte of the slices that others may hold changes.
        let released =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        // Where the system refuses, the pages only count a while longer.
        let _ = released;
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_hold_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let bytes: Vec<u8> = (0..300_000_u32).map(|x| (x % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = FileBytes::open(&path).unwrap();
        assert!(file.bytes() == bytes);
        for range in [0..300_000, 70_000..70_001, 299_999..300_000, 5..5] {
            file.release(range);
            assert!(file.bytes() == bytes);
        }
        FileBytes::in_memory(&path, bytes.clone()).release(0..10);
    }
}
