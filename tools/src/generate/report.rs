//! How far the work is: a bar on a terminal, a line now and then elsewhere. Paths of files go to
//! stdout.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use models::pipeline::Progress;

use crate::progress::{print, tell};

/// Least time between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// The progress of a run of several pictures.
pub(super) struct Report {
    bar: Option<ProgressBar>,
    /// Pictures of the run, and those that are done.
    pictures: usize,
    done: usize,
    /// When the batch in work began, and when the last line was told.
    batch_start: Instant,
    told: Instant,
}

impl Report {
    /// A report on so many pictures.
    pub fn new(pictures: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{prefix} |{bar:24}| step {pos}/{len} {msg}");
            // The template is fixed and valid; the default bar would only look different.
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
            bar
        });
        let now = Instant::now();
        Self { bar, pictures, done: 0, batch_start: now, told: now }
    }

    /// A batch of so many pictures begins.
    pub fn begin(&mut self, count: usize) {
        self.batch_start = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_prefix(self.place(count));
            bar.set_position(0);
            bar.set_message("");
        }
    }

    /// A step of the batch in work is done.
    pub fn step(&mut self, count: usize, progress: Progress) {
        let seconds = self.batch_start.elapsed().as_secs_f64();
        let speed = progress.done as f64 / seconds.max(1e-9);
        let left = (progress.of - progress.done.min(progress.of)) as f64 / speed;
        let speed = format!("{speed:.2} it/s");
        if let Some(bar) = &self.bar {
            bar.set_length(progress.of as u64);
            bar.set_position(progress.done as u64);
            bar.set_message(format!("{speed}, {left:.0} s left"));
        } else if self.told.elapsed() >= PAUSE {
            self.told = Instant::now();
            let Progress { done, of } = progress;
            tell(&format!("{}: step {done} of {of}, {speed}", self.place(count)));
        }
    }

    /// A picture is written.
    pub fn wrote(&mut self, path: &Path) {
        self.done += 1;
        self.show_path(path);
    }

    /// A file beside the pictures is written.
    pub fn show_path(&self, path: &Path) {
        self.beside_bar(|| print(&path.display().to_string()));
    }

    /// Does what writes to the terminal without the bar in between.
    pub fn beside_bar(&self, write: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// More pictures belong to the run.
    pub fn add(&mut self, pictures: usize) {
        self.pictures += pictures;
    }

    fn place(&self, count: usize) -> String {
        let first = self.done + 1;
        match count {
            1 => format!("picture {first} of {}", self.pictures),
            count => format!("pictures {first} to {} of {}", self.done + count, self.pictures),
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
