//! How far a run is: the progress bar, the loss average it shows, and the start-up summary's layout.
//!
//! Everything goes to stderr through [`crate::console`] and comes from rank 0 alone. On a terminal
//! there is a bar; elsewhere a plain line at most every ten seconds and at the end of each epoch.

use crate::console;
use crate::logs::KeyNorms;
use crate::optimizer::OptimizerState;
use anyhow::{Result, bail};
use formats::{Dtype, OwnedTensor};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Shortest time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The bar, or the plain lines, of a run.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    total_steps: usize,
    total_epochs: usize,
    /// Step count before the first step of this display; a resumed run does not start at 0.
    first_step: Option<usize>,
    started: Instant,
    last_line: Instant,
    key_norms: Option<KeyNorms>,
}

impl Progress {
    /// Starts the display of a run. On other ranks than 0 (`main` is false) it shows nothing.
    pub fn start(total_steps: usize, total_epochs: usize, main: bool) -> Self {
        let bar = (main && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total_steps as u64);
            bar.set_style(bar_style());
            bar.enable_steady_tick(Duration::from_millis(500));
            console::attach_bar(Some(bar.clone()));
            bar
        });
        Progress {
            bar,
            total_steps,
            total_epochs,
            first_step: None,
            started: Instant::now(),
            last_line: Instant::now(),
            key_norms: None,
        }
    }

    /// Shows a run that goes on after `step` steps.
    pub fn begin_after(&mut self, step: usize) {
        self.first_step = Some(step);
        if let Some(bar) = &self.bar {
            bar.set_position(step as u64);
        }
    }

    /// Shows that `step` optimizer steps are done, the last one in `epoch` (from 1).
    /// `key_norms` where `scale_weight_norms` is at work.
    pub fn step(
        &mut self,
        step: usize,
        epoch: usize,
        average_loss: f64,
        key_norms: Option<KeyNorms>,
    ) {
        self.key_norms = key_norms;
        let status = self.status(step, epoch, average_loss);
        match &self.bar {
            Some(bar) => {
                bar.set_position(step as u64);
                bar.set_message(status.details());
            }
            None if self.last_line.elapsed() >= LINE_INTERVAL => self.note_line(&status),
            None => {}
        }
    }

    /// Shows the end of an epoch.
    pub fn end_epoch(&mut self, step: usize, epoch: usize, average_loss: f64) {
        let status = self.status(step, epoch, average_loss);
        if self.bar.is_none() {
            self.note_line(&status);
        }
    }

    fn note_line(&mut self, status: &Status) {
        self.last_line = Instant::now();
        console::note(&status.line());
    }

    fn status(&mut self, step: usize, epoch: usize, average_loss: f64) -> Status {
        let first = *self.first_step.get_or_insert(step.saturating_sub(1));
        Status {
            step,
            steps_seen: step - first.min(step),
            total_steps: self.total_steps,
            epoch,
            total_epochs: self.total_epochs,
            average_loss,
            elapsed: self.started.elapsed(),
            key_norms: self.key_norms,
        }
    }
}

/// Leaves the last state of the bar on the screen.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            console::attach_bar(None);
            bar.abandon();
        }
    }
}

/// The state of a run at one moment.
#[derive(Clone, Copy, Debug)]
struct Status {
    step: usize,
    steps_seen: usize,
    total_steps: usize,
    epoch: usize,
    total_epochs: usize,
    average_loss: f64,
    elapsed: Duration,
    key_norms: Option<KeyNorms>,
}

impl Status {
    /// All of it in one plain line.
    fn line(&self) -> String {
        format!("step {}/{} {}", self.step, self.total_steps, self.details())
    }

    /// Epoch, loss, speed and time left: the speed is the mean since the start, as the reference's.
    fn details(&self) -> String {
        let speed = self.steps_seen as f64 / self.elapsed.as_secs_f64().max(1e-9);
        let left = self.total_steps.saturating_sub(self.step) as f64 / speed.max(1e-9);
        let shown_speed = if speed >= 1.0 {
            format!("{speed:.2} it/s")
        } else {
            format!("{:.2} s/it", 1.0 / speed.max(1e-9))
        };
        let norms = self.key_norms.map_or_else(String::new, |norms| {
            format!(" keys_scaled={} avg_key_norm={:.4}", norms.scaled, norms.mean)
        });
        format!(
            "epoch {}/{} avr_loss={:.4}{norms} {shown_speed}, {} left",
            self.epoch,
            self.total_epochs,
            self.average_loss,
            format_duration(left),
        )
    }
}

fn bar_style() -> ProgressStyle {
    let style = ProgressStyle::with_template(
        "steps {percent:>3}% |{bar:24}| {pos}/{len} [{elapsed}] {wide_msg}",
    );
    // The template is fixed and valid; the default bar would only look different.
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("█▉▊▋▌▍▎▏ ")
}

/// `1:02:03`, or `02:03` below an hour; a dash for what cannot be told.
pub fn format_duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds >= 1e9 {
        return "-".to_owned();
    }
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes:02}:{seconds:02}")
    }
}

/// A title and rows of two columns; the values start in one column.
pub fn format_summary(title: &str, rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut text = title.to_owned();
    for (name, value) in rows {
        let mut lines = value.lines();
        text += &format!("\n  {name:<width$}  {}", lines.next().unwrap_or_default());
        for line in lines {
            text += &format!("\n  {:width$}  {line}", "");
        }
    }
    text
}

/// Moving average of the loss over one epoch, as the reference computes it: from the second epoch
/// on, each loss replaces the one of the same place in the epoch before.
///
/// A step that was left out has no loss: its place stays empty and does not count. (The reference
/// would show NaN from then on.)
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossRecorder {
    /// NaN where there is none.
    losses: Vec<f64>,
    total: f64,
}

impl LossRecorder {
    /// Records a loss. `epoch` and `step`, the place within the epoch, count from 0.
    pub fn add(&mut self, epoch: usize, step: usize, loss: Option<f64>) {
        let loss = loss.unwrap_or(f64::NAN);
        if epoch == 0 {
            self.losses.push(loss);
        } else {
            if self.losses.len() <= step {
                self.losses.resize(step + 1, 0.0);
            }
            let before = std::mem::replace(&mut self.losses[step], loss);
            self.total -= if before.is_nan() { 0. } else { before };
        }
        self.total += if loss.is_nan() { 0. } else { loss };
    }

    /// The average; 0 before the first loss.
    pub fn moving_average(&self) -> f64 {
        let count = self.losses.iter().filter(|loss| !loss.is_nan()).count();
        if count == 0 { 0.0 } else { self.total / count as f64 }
    }

    /// Everything to go on from.
    pub fn state(&self) -> OptimizerState {
        let data = self.losses.iter().flat_map(|loss| loss.to_le_bytes()).collect();
        let losses = OwnedTensor { dtype: Dtype::F64, shape: vec![self.losses.len()], data };
        let mut state = OptimizerState::default();
        state.tensors.insert("losses".to_owned(), losses);
        // Not the sum of the losses: its rounding has a history.
        state.numbers.insert("total".to_owned(), self.total);
        state
    }

    /// Goes on from a state of [`LossRecorder::state`].
    pub fn load_state(&mut self, state: &OptimizerState) -> Result<()> {
        let losses = state.tensors.get("losses").filter(|tensor| tensor.dtype == Dtype::F64);
        let (Some(losses), Some(total)) = (losses, state.numbers.get("total")) else {
            bail!("the saved average of the loss lacks `losses` or `total`");
        };
        let number = |bytes: &[u8]| bytes.try_into().map(f64::from_le_bytes).unwrap_or(f64::NAN);
        self.losses = losses.data.chunks_exact(8).map(number).collect();
        self.total = *total;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_average_replaces_the_epoch_before() {
        let mut recorder = LossRecorder::default();
        assert_eq!(recorder.moving_average(), 0.0);
        for (step, loss) in [1.0, 2.0, 3.0].into_iter().enumerate() {
            recorder.add(0, step, Some(loss));
        }
        assert_eq!(recorder.moving_average(), 2.0);
        recorder.add(1, 0, Some(4.0));
        assert_eq!(recorder.moving_average(), 3.0);
        recorder.add(1, 5, Some(6.0));
        assert_eq!(recorder.moving_average(), 15.0 / 6.0);
        let mut resumed = LossRecorder::default();
        resumed.load_state(&recorder.state()).unwrap();
        assert_eq!(resumed, recorder);
        assert!(resumed.load_state(&OptimizerState::default()).is_err());
    }

    #[test]
    fn a_step_without_a_loss_does_not_count() {
        let mut recorder = LossRecorder::default();
        for (step, loss) in [Some(1.0), None, Some(3.0)].into_iter().enumerate() {
            recorder.add(0, step, loss);
        }
        assert_eq!(recorder.moving_average(), 2.0);
        recorder.add(1, 1, Some(5.0));
        recorder.add(1, 2, None);
        assert_eq!(recorder.moving_average(), 3.0);
    }

    #[test]
    fn details_of_fast_and_slow_runs() {
        let mut status = Status {
            step: 30,
            steps_seen: 20,
            total_steps: 130,
            epoch: 2,
            total_epochs: 10,
            average_loss: 0.123456,
            elapsed: Duration::from_secs(10),
            key_norms: None,
        };
        assert_eq!(status.details(), "epoch 2/10 avr_loss=0.1235 2.00 it/s, 00:50 left");
        status.key_norms = Some(KeyNorms { scaled: 3, mean: 0.5, max: 1.0 });
        let shown = status.details();
        assert!(shown.contains("avr_loss=0.1235 keys_scaled=3 avg_key_norm=0.5000 2"), "{shown}");
        status.key_norms = None;
        status.elapsed = Duration::from_secs(800);
        assert_eq!(status.details(), "epoch 2/10 avr_loss=0.1235 40.00 s/it, 1:06:40 left");
        status.steps_seen = 0;
        assert!(status.details().ends_with("- left"));
    }

    #[test]
    fn summary_is_aligned() {
        let rows = [("images", "12".to_owned()), ("steps", "a\nb".to_owned())];
        assert_eq!(format_summary("Plan", &rows), "Plan\n  images  12\n  steps   a\n          b");
    }

    #[test]
    fn plain_lines_keep_their_distance() {
        let mut progress = Progress::start(100, 2, false);
        assert!(progress.bar.is_none());
        let started = progress.last_line;
        progress.step(1, 1, 0.5, None);
        assert_eq!(progress.last_line, started, "too early for a line");
        progress.last_line -= LINE_INTERVAL;
        progress.step(2, 1, 0.5, None);
        assert!(progress.last_line >= started, "a line was due");
        let second = progress.last_line;
        progress.end_epoch(3, 1, 0.25);
        assert!(progress.last_line > second, "the end of an epoch always shows");
        assert!(
            progress.status(3, 1, 0.25).line().starts_with("step 3/100 epoch 1/2 avr_loss=0.2500")
        );
    }

    #[test]
    fn speed_counts_only_the_steps_of_this_process() {
        let mut progress = Progress::start(100, 2, false);
        assert_eq!(progress.status(51, 1, 0.5).steps_seen, 1);
        assert_eq!(progress.status(53, 1, 0.5).steps_seen, 3);
    }
}
