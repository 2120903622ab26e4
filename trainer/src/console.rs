//! What a run says: data to standard output, everything else to standard error, rank 0 alone.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use crate::options::LogLevel;

/// Messages of at least this weight are shown.
static LEAST: AtomicU8 = AtomicU8::new(NOTE);
const NOTE: u8 = 0;
const WARNING: u8 = 1;
/// Instead of standard error.
static FILE: Mutex<Option<File>> = Mutex::new(None);
static SILENT: OnceLock<bool> = OnceLock::new();
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Called once at the start: ranks above 0 are silent.
pub fn set_rank(rank: usize) {
    // Set twice only by tests, with the same meaning.
    let _ = SILENT.set(rank != 0);
}

fn is_silent() -> bool {
    SILENT.get().copied().unwrap_or(false)
}

/// Lines of data to standard output. A reader that went away is not an error.
pub fn data(text: &str) {
    if !is_silent() {
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }
}

/// Obeys `console_log_level` and `console_log_file`.
pub fn configure(level: Option<LogLevel>, file: Option<&Path>) -> Result<()> {
    let least = match level {
        None | Some(LogLevel::Debug | LogLevel::Info) => NOTE,
        Some(LogLevel::Warning) => WARNING,
        Some(LogLevel::Error | LogLevel::Critical) => WARNING + 1,
    };
    LEAST.store(least, Ordering::Relaxed);
    let opened = match file {
        Some(path) if !is_silent() => {
            let file = File::options().append(true).create(true).open(path);
            Some(file.with_context(|| {
                format!("cannot write to `console_log_file`: {}", path.display())
            })?)
        }
        _ => None,
    };
    *FILE.lock().unwrap_or_else(PoisonError::into_inner) = opened;
    Ok(())
}

/// A line for the user, above the progress bar where there is one.
pub fn note(text: &str) {
    show(NOTE, text);
}

fn show(weight: u8, text: &str) {
    if is_silent() || weight < LEAST.load(Ordering::Relaxed) {
        return;
    }
    if let Some(file) = &mut *FILE.lock().unwrap_or_else(PoisonError::into_inner) {
        // As on a terminal that went away: the run matters more than its messages.
        let _ = writeln!(file, "{text}");
        return;
    }
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    let write = || {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    };
    match &*bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A line that asks for attention.
pub fn warn(text: &str) {
    show(WARNING, &format!("warning: {text}"));
}

/// Keeps notes and the bar out of each other's way; `None` when the bar is gone.
pub fn attach_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}
