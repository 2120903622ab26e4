//! A text file that grows by lines and can be cut back to where a run goes on.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file of lines, open at its end.
#[derive(Debug)]
pub struct LineFile {
    file: File,
    path: PathBuf,
    len: u64,
}

impl LineFile {
    /// Opens or makes a file and keeps its lines up to the first that is torn or for which `is_kept`
    /// does not say `Some(true)`.
    pub fn open(path: &Path, is_kept: &dyn Fn(&str) -> Option<bool>) -> Result<Self> {
        let context = || format!("cannot open the log file: {}", path.display());
        let mut kept = 0;
        if path.exists() {
            let bytes = std::fs::read(path).with_context(context)?;
            for line in bytes.split_inclusive(|byte| *byte == b'\n') {
                let text = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
                if text.and_then(is_kept) != Some(true) {
                    break;
                }
                kept += line.len() as u64;
            }
        }
        let file = File::options().append(true).create(true).open(path).with_context(context)?;
        file.set_len(kept).with_context(context)?;
        Ok(Self { file, path: path.to_owned(), len: kept })
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a line, or several with line breaks between them.
    pub fn add(&mut self, line: &str) -> Result<()> {
        let text = format!("{line}\n");
        self.len += text.len() as u64;
        self.file
            .write_all(text.as_bytes())
            .with_context(|| format!("cannot write the log file: {}", self.path.display()))
    }
}

/// A text as a field of a CSV file (RFC 4180).
pub fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_cut_at_the_first_line_that_does_not_belong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let kept = |line: &str| Some(line.parse::<u32>().ok()? <= 2);
        let mut lines = LineFile::open(&path, &kept).unwrap();
        assert!(lines.is_empty());
        lines.add("1\n2").unwrap();
        lines.add("3").unwrap();
        drop(lines);
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"2").unwrap();
        let mut lines = LineFile::open(&path, &kept).unwrap();
        assert!(!lines.is_empty());
        lines.add("4").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n4\n");
    }

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(quoted("a b.png"), "a b.png");
        assert_eq!(quoted("a,\"b\".png"), "\"a,\"\"b\"\".png\"");
    }
}
