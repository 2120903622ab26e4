//! What a run says: data to standard output, everything else to standard error, rank 0 alone.

use std::io::Write;
use std::sync::OnceLock;

use indicatif::ProgressBar;

static SILENT: OnceLock<bool> = OnceLock::new();
static BAR: std::sync::Mutex<Option<ProgressBar>> = std::sync::Mutex::new(None);

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

/// A line for the user, above the progress bar where there is one.
pub fn note(text: &str) {
    if is_silent() {
        return;
    }
    let bar = BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
    note(&format!("warning: {text}"));
}

/// Keeps notes and the bar out of each other's way; `None` when the bar is gone.
pub fn attach_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}
