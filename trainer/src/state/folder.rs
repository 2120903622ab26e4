//! A state's folder on disk: written whole, read only if whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use formats::FormatError;
use formats::atomic_folder::write_folder_atomic_if;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::facts::{Facts, VERSION};

/// The file that is written last.
pub const MANIFEST: &str = "state.json";

/// Files of a state by name.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Size and checksum of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileFacts {
    bytes: u64,
    sha256: String,
}

/// What the checksum of `state.json` covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Body {
    format: String,
    facts: Facts,
    files: BTreeMap<String, FileFacts>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    state: Body,
    /// Of the compact JSON of `state`.
    sha256: String,
}

/// Marks our folders.
const FORMAT: &str = "lorarun state";

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn checksum(body: &Body) -> Result<String> {
    Ok(digest(&serde_json::to_vec(body)?))
}

/// Writes the state's folder; an earlier one of the name is replaced in one step. `permit` is asked
/// just before that.
pub fn write(
    path: &Path,
    facts: &Facts,
    files: &Files,
    permit: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let described = |(name, bytes): (&String, &Vec<u8>)| {
        (name.clone(), FileFacts { bytes: bytes.len() as u64, sha256: digest(bytes) })
    };
    let files_facts = files.iter().map(described).collect();
    let body = Body { format: FORMAT.to_owned(), facts: facts.clone(), files: files_facts };
    let sha256 = checksum(&body)?;
    let manifest = serde_json::to_vec_pretty(&Manifest { state: body, sha256 })?;
    let fill = |folder: &Path| -> Result<()> {
        let put = |name: &str, bytes: &[u8]| {
            let file = folder.join(name);
            std::fs::write(&file, bytes).map_err(|error| FormatError::io("write", path, error))
        };
        for (name, bytes) in files {
            put(name, bytes)?;
        }
        Ok(put(MANIFEST, &manifest)?)
    };
    write_folder_atomic_if(path, fill, permit)
}

/// A state whose `state.json` is whole.
#[derive(Clone, Debug)]
pub struct StateFolder {
    /// Where it lies.
    pub path: PathBuf,
    /// What it says.
    pub facts: Facts,
    files: BTreeMap<String, FileFacts>,
}

impl StateFolder {
    /// Reads `state.json`. The error says what makes the state unusable.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        let text = std::fs::read(&file).with_context(|| {
            format!("cannot read `{MANIFEST}` of the state: {}", path.display())
        })?;
        let torn = |what: &str| {
            anyhow::anyhow!("the state is damaged, `{MANIFEST}` {what}: {}", path.display())
        };
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|_| torn("is cut short or not JSON"))?;
        let state = &value["state"];
        if state["format"] != FORMAT {
            return Err(torn("is not one of lorarun"));
        }
        let version = state["facts"]["version"].as_u64().unwrap_or(0);
        if version != u64::from(VERSION) {
            bail!(
                "the state was written by another version of lorarun ({}), its layout is number \
                 {version}, this program reads number {VERSION}: {}",
                state["facts"]["written_by"].as_str().unwrap_or("unknown"),
                path.display()
            );
        }
        let manifest: Manifest =
            serde_json::from_value(value).map_err(|_| torn("lacks what it must say"))?;
        if checksum(&manifest.state)? != manifest.sha256 {
            return Err(torn("does not have the checksum it names"));
        }
        let Body { facts, files, .. } = manifest.state;
        Ok(Self { path: path.to_owned(), facts, files })
    }

    /// All files, each checked against its checksum.
    pub fn read(&self) -> Result<Files> {
        let mut files = Files::new();
        for (name, expected) in &self.files {
            let whole = self.path.join(name);
            let fault = match std::fs::read(&whole) {
                Err(error) => format!("cannot be read: {error}"),
                Ok(bytes) if bytes.len() as u64 != expected.bytes => {
                    format!("has {} bytes of {}", bytes.len(), expected.bytes)
                }
                Ok(bytes) if digest(&bytes) != expected.sha256 => {
                    "does not have the checksum it was written with".to_owned()
                }
                Ok(bytes) => {
                    files.insert(name.clone(), bytes);
                    continue;
                }
            };
            bail!("the state is damaged, `{name}` {fault}: {}", self.path.display());
        }
        Ok(files)
    }
}
