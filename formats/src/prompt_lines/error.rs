//! What is wrong with a prompt or its file, and where.

use std::fmt;
use std::path::{Path, PathBuf};

/// A line or an entry that cannot be meant; `Display` gives file, line, reason and advice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptLineError {
    /// The file, if the prompt came from one.
    pub file: Option<PathBuf>,
    /// Line from 1; 0 if unknown.
    pub line: usize,
    /// What is wrong, in one sentence with the value at its end.
    pub reason: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl PromptLineError {
    /// `reason` without its value, which is added at its end.
    pub fn new(line: usize, reason: &str, value: &str, hint: String) -> Self {
        Self { file: None, line, reason: format!("{reason}: `{value}`"), hint }
    }

    /// The error with the file it stands in.
    #[must_use]
    pub fn in_file(mut self, file: &Path) -> Self {
        self.file.get_or_insert_with(|| file.to_path_buf());
        self
    }

    pub(super) fn unknown(line: usize, name: &str, hint: String) -> Self {
        let written = if name.is_empty() { "--".to_owned() } else { format!("--{name}") };
        Self::new(line, "unknown option of a prompt", &written, hint)
    }
}

impl fmt::Display for PromptLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), 0) => write!(f, "{}: ", file.display())?,
            (Some(file), line) => write!(f, "{}:{line}: ", file.display())?,
            (None, 0) => {}
            (None, line) => write!(f, "line {line} of the prompts: ")?,
        }
        f.write_str(&self.reason)?;
        if !self.hint.is_empty() {
            write!(f, "\nhint: {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for PromptLineError {}
