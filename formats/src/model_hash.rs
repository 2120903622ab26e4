//! The hashes by which WebUI and sd-scripts recognise model files.
//!
//! A hash of a 4 GB checkpoint takes seconds, so these are computed only when asked for.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::FormatError;

/// A model file or folder as metadata names it.
#[derive(Clone, Debug)]
pub struct ModelIdentity {
    /// File name, folder name or hub id: `ss_sd_model_name`, `ss_vae_name`.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
}

impl ModelIdentity {
    pub(crate) fn of_path(path: &Path) -> Self {
        // `.` and `..` have no name of their own.
        let named = path.file_name().map(ToOwned::to_owned).or_else(|| {
            path.canonicalize().ok().and_then(|full| full.file_name().map(ToOwned::to_owned))
        });
        let name = named.as_deref().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self { name, path: path.to_path_buf() }
    }

    /// `ss_sd_model_hash`, `ss_vae_hash`: 8 hex digits; `None` for a folder, which has no hash.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn legacy_hash(&self) -> Result<Option<String>, FormatError> {
        self.path.is_file().then(|| legacy_hash(&self.path)).transpose()
    }

    /// `ss_new_sd_model_hash`, `ss_new_vae_hash`: sha256 of the whole file; `None` for a folder.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn sha256(&self) -> Result<Option<String>, FormatError> {
        self.path.is_file().then(|| file_sha256(&self.path)).transpose()
    }
}

/// Where the legacy hash reads, and how much.
pub(crate) const LEGACY_OFFSET: u64 = 0x10_0000;
pub(crate) const LEGACY_LENGTH: u64 = 0x1_0000;

/// First 8 hex digits of the sha256 of 64 KiB at offset 0x100000 (fewer at the file's end).
///
/// # Errors
/// [`FormatError::Io`].
pub fn legacy_hash(path: &Path) -> Result<String, FormatError> {
    let mut file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(LEGACY_OFFSET))
        .and_then(|_| file.take(LEGACY_LENGTH).read_to_end(&mut bytes))
        .map_err(|e| FormatError::io("read", path, e))?;
    let mut hash = hex(&Sha256::digest(&bytes));
    hash.truncate(8);
    Ok(hash)
}

/// Sha256 of a whole file in hex.
///
/// # Errors
/// [`FormatError::Io`].
pub fn file_sha256(path: &Path) -> Result<String, FormatError> {
    let mut file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    loop {
        let count = file.read(&mut buffer).map_err(|e| FormatError::io("read", path, e))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// Sha256 in hex of what follows the header of a safetensors file, so that other metadata leave it as
/// it is; of the whole file for other formats. What WebUI and `sshs_model_hash` know LoRAs by.
///
/// # Errors
/// [`FormatError::Io`].
pub fn content_sha256(path: &Path) -> Result<String, FormatError> {
    let fail = |error| FormatError::io("read", path, error);
    if path.extension().is_none_or(|ending| ending != "safetensors") {
        return file_sha256(path);
    }
    let mut file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let mut length = [0_u8; 8];
    file.read_exact(&mut length).map_err(fail)?;
    let start = u64::from_le_bytes(length).saturating_add(8);
    file.seek(SeekFrom::Start(start)).map_err(fail)?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut Hashing(&mut hasher)).map_err(fail)?;
    Ok(hex(&hasher.finalize()))
}

/// Hashes what is written.
struct Hashing<'a>(&'a mut Sha256);

impl std::io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_a_short_and_a_long_file() {
        let folder = tempfile::tempdir().unwrap();
        let short = folder.path().join("short.safetensors");
        std::fs::write(&short, b"abc").unwrap();
        // The legacy window of a short file is empty.
        assert_eq!(legacy_hash(&short).unwrap(), "e3b0c442");
        assert_eq!(
            file_sha256(&short).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let long = folder.path().join("long.safetensors");
        let mut bytes = vec![1_u8; 0x10_0000];
        bytes.extend(vec![0_u8; 0x1_0000]);
        bytes.extend(vec![2_u8; 100]);
        std::fs::write(&long, bytes).unwrap();
        // sha256 of 65536 zero bytes.
        assert_eq!(legacy_hash(&long).unwrap(), "de2f2560");
    }

    #[test]
    fn the_content_of_a_lora_has_the_hash_in_its_metadata() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/formats");
        let path = data.join("sd_scripts_resized.safetensors");
        let file = crate::open_tensor_file(&path).unwrap();
        assert_eq!(content_sha256(&path).unwrap(), file.metadata()["sshs_model_hash"]);
    }

    #[test]
    fn a_folder_has_a_name_and_no_hash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("my-model");
        std::fs::create_dir(&path).unwrap();
        let identity = ModelIdentity::of_path(&path);
        assert_eq!(identity.name, "my-model");
        assert_eq!(identity.legacy_hash().unwrap(), None);
        assert_eq!(identity.sha256().unwrap(), None);
    }
}
