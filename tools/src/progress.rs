//! How far a tool is: a bar on a terminal, nothing elsewhere; lines for the user on stderr.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar of one tool's work. Shared by threads.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar over `total` pieces, called `what` (`modules`, `pictures`).
    pub fn of_pieces(what: &'static str, total: usize) -> Self {
        Self::new(total as u64, &format!("{{wide_bar}} {{pos}}/{{len}} {what} {{eta}}"))
    }

    /// A bar over bytes.
    pub fn of_bytes(total: u64) -> Self {
        Self::new(total, "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    }

    fn new(total: u64, template: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let plain = ProgressStyle::default_bar();
            bar.set_style(ProgressStyle::with_template(template).unwrap_or(plain));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar }
    }

    /// Takes `amount` more as done.
    pub fn advance(&self, amount: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(amount);
        }
    }

    /// A line above the bar.
    pub fn tell(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tell(line)),
            None => tell(line),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line for the user on stderr. A reader that went away is not an error.
pub(crate) fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Data on stdout.
pub(crate) fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
