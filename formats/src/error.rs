//! Every way in which reading or writing a file fails, as one enum with the facts in its fields.
//!
//! Wording: a plain sentence that names the file, literals in backticks, the value last after a
//! colon, advice on its own `hint:` line.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of this crate; `Display` gives the whole message for a person.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused a read or a write.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write`, `rename`...
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// No space was left while writing; the partial file has been removed.
    #[error(
        "the disk is full, `{}` was not written: {source}\nhint: free some space and run again; \
         an earlier file of that name is untouched",
        path.display()
    )]
    DiskFull {
        /// The file that was to be written.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Neither a file, nor a folder, nor a hub id.
    #[error("model not found: `{given}`\nhint: {hint}")]
    NotFound {
        /// What the user gave.
        given: String,
        /// What would have been accepted.
        hint: String,
    },
    /// The bytes of a file break the rules of its format.
    #[error("`{}` is not a valid {format} file: {reason}", path.display())]
    Malformed {
        /// The damaged file.
        path: PathBuf,
        /// `safetensors`, `torch checkpoint`, `JSON`...
        format: &'static str,
        /// What is wrong, with the offending name and numbers; may end in a `hint:` line.
        reason: String,
    },
    /// A pickle asks for something that loading weights never needs.
    #[error(
        "`{}` was refused: its pickle asks for {what}, which could run code\nhint: nothing was \
         executed; get the model as `.safetensors`, or convert it where you trust it",
        path.display()
    )]
    ForbiddenPickle {
        /// The refused file.
        path: PathBuf,
        /// The global or opcode, in backticks.
        what: String,
    },
    /// A format or feature that this crate knows of but does not read.
    #[error("`{}` cannot be read: {reason}\nhint: {hint}", path.display())]
    Unsupported {
        /// The file concerned.
        path: PathBuf,
        /// What it is.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A tensor that should be there is not.
    #[error("tensor missing from `{}`: `{name}`", path.display())]
    MissingTensor {
        /// The file that was searched.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A tensor has another shape than its place demands.
    #[error("tensor `{name}` of `{}` should be {expected}, its shape is: {got:?}", path.display())]
    WrongShape {
        /// The file concerned.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
        /// The demand, in words.
        expected: String,
        /// The shape found.
        got: Vec<usize>,
    },
    /// A tensor's number type cannot be used as asked.
    #[error("a {dtype} tensor cannot be turned into {wanted}")]
    WrongDtype {
        /// The type found.
        dtype: crate::Dtype,
        /// What was wanted, in words.
        wanted: &'static str,
    },
    /// The user's `v2` contradicts the model.
    #[error(
        "`v2 = {v2}` contradicts the model `{}`, which is {found}: {because}\nhint: {fix}",
        path.display()
    )]
    FamilyMismatch {
        /// The model.
        path: PathBuf,
        /// The user's setting.
        v2: bool,
        /// What the model is, in words.
        found: &'static str,
        /// How that was seen.
        because: String,
        /// The change that resolves it.
        fix: &'static str,
    },
    /// A model of a family that is not supported.
    #[error("{family} is not supported yet, `{}` is such a model: {because}", path.display())]
    UnsupportedFamily {
        /// The model.
        path: PathBuf,
        /// `SDXL`, `SD3`...
        family: &'static str,
        /// How that was seen.
        because: String,
    },
    /// A file of a model folder is missing.
    #[error("`{}` lacks {what}\nhint: {hint}", path.display())]
    MissingFile {
        /// The model folder.
        path: PathBuf,
        /// What is missing, in words with names in backticks.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A key of a LoRA file breaks the naming or pairing rules.
    #[error("`{}` is not a LoRA this program can read, {reason}: `{key}`", path.display())]
    BadLora {
        /// The LoRA file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// The offending key.
        key: String,
    },
    /// A path to write whose ending names no container.
    #[error(
        "`{}` does not say how to write it\nhint: end the name in `.safetensors` or `.ckpt`",
        path.display()
    )]
    UnknownEnding {
        /// The path given.
        path: PathBuf,
    },
    /// The model hub did not give a model.
    #[error("cannot get the model `{id}` from the hub: {reason}\nhint: {hint}")]
    Hub {
        /// `org/name`.
        id: String,
        /// What went wrong.
        reason: String,
        /// What to do.
        hint: String,
    },
}

impl FormatError {
    /// An I/O failure of `action` on `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::DiskFull { path, source };
        }
        Self::Io { action, path, source }
    }

    pub(crate) fn malformed(path: &Path, format: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), format, reason: reason.into() }
    }
}
