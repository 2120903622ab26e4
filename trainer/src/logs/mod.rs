//! The logs of a run: TensorBoard events, an offline run of Weights & Biases, one JSON line per step,
//! and a table of the images' losses.
//!
//! `logging_dir/<prefix><date and time>/` holds `steps.jsonl` and `image_losses.csv`, the folder of
//! the tracker in it the TensorBoard events, `wandb` the offline run; tags are sd-scripts'. Rank 0 writes alone; every call
//! is on its way to the disk when it returns, so a killed run keeps every finished step. A resumed
//! run goes on in the folder of the run it continues: what that one logged after the saved state is
//! cut off.

mod protobuf;
mod table;
mod tensorboard;
mod wandb;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use formats::model_spec::civil_time;
use serde_json::{Map, Value, json};

use crate::console;
use crate::loss_history::ImageLoss;
use crate::memory::peak_resident;
use crate::options::{LogWith, Options};
use crate::samples::Sample;
use table::LineFile;
pub use tensorboard::EventWriter;
use wandb::{RunNames, WandbRun};

/// The learning rate of a parameter group.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// Name of the group, as in sd-scripts' tags: `unet`, `textencoder`.
    pub label: String,
    /// Learning rate in this step.
    pub lr: f64,
    /// The same times the optimizer's own estimate, for those that have one.
    pub scaled: Option<f64>,
}

/// Norms of the LoRA's products, where `scale_weight_norms` limits them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KeyNorms {
    /// Modules that were scaled down in this step.
    pub scaled: usize,
    /// Mean over the modules.
    pub mean: f64,
    /// The largest.
    pub max: f64,
}

/// What is logged after each optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepLog {
    /// Optimizer step, from 1.
    pub step: usize,
    /// Epoch, from 1.
    pub epoch: usize,
    /// Loss of this step; `None` where it was left out.
    pub loss: Option<f64>,
    /// Its moving average over an epoch.
    pub average_loss: f64,
    /// Learning rates of the groups.
    pub rates: Vec<Rate>,
    /// Norm of all gradients before clipping; not finite in a step that was left out.
    pub gradient_norm: f64,
    /// The loss scale, in fp16.
    pub loss_scale: Option<f64>,
    /// With `scale_weight_norms`.
    pub key_norms: Option<KeyNorms>,
    /// Wall time of the step in seconds.
    pub seconds: f64,
    /// Images of the step, over all ranks.
    pub images: usize,
}

impl StepLog {
    /// Tags and values for TensorBoard: sd-scripts' and a few of our own.
    fn scalars(&self) -> Vec<(String, f64)> {
        let mut all: Vec<(String, f64)> = Vec::new();
        let mut add = |tag: String, value: f64| {
            if value.is_finite() && all.iter().all(|(known, _)| *known != tag) {
                all.push((tag, value));
            }
        };
        if let Some(loss) = self.loss {
            add("loss/current".to_owned(), loss);
        }
        add("loss/average".to_owned(), self.average_loss);
        for rate in &self.rates {
            add(format!("lr/{}", rate.label), rate.lr);
            if let Some(scaled) = rate.scaled {
                add(format!("lr/d*lr/{}", rate.label), scaled);
            }
        }
        if let Some(norms) = self.key_norms {
            add("max_norm/keys_scaled".to_owned(), norms.scaled as f64);
            add("max_norm/max_key_norm".to_owned(), norms.max);
            add("norm/avg_key_norm".to_owned(), norms.mean);
        }
        add("grad_norm".to_owned(), self.gradient_norm);
        if let Some(scale) = self.loss_scale {
            add("loss_scale".to_owned(), scale);
        }
        add("time/step_seconds".to_owned(), self.seconds);
        add("time/images_per_second".to_owned(), self.images as f64 / self.seconds);
        all
    }

    /// The line of `steps.jsonl`; its `time` is when it was written, in seconds since 1970.
    fn line(&self) -> String {
        let mut rates = Map::new();
        let mut scaled = Map::new();
        for rate in &self.rates {
            rates.insert(rate.label.clone(), json!(rate.lr));
            if let Some(value) = rate.scaled {
                scaled.insert(rate.label.clone(), json!(value));
            }
        }
        let mut line = json!({
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "average": self.average_loss,
            "lr": rates,
            "grad_norm": self.gradient_norm,
            "time": rounded(protobuf::now()),
            "seconds": rounded(self.seconds),
            "images_per_second": rounded(self.images as f64 / self.seconds),
            "peak_memory": peak_resident(),
        });
        if let Value::Object(line) = &mut line {
            if let Some(scale) = self.loss_scale {
                line.insert("loss_scale".to_owned(), scale.into());
            }
            if !scaled.is_empty() {
                line.insert("d*lr".to_owned(), Value::Object(scaled));
            }
            if let Some(norms) = self.key_norms {
                let value = json!({"scaled": norms.scaled, "mean": norms.mean, "max": norms.max});
                line.insert("key_norms".to_owned(), value);
            }
            if self.loss.is_none() {
                line.insert("left_out".to_owned(), json!(true));
            }
        }
        line.to_string()
    }
}

/// To the microsecond: what is beyond is noise.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// Finds out before anything heavy happens whether the log that is asked for can be written.
pub fn check(options: &Options) -> Result<()> {
    RunNames::from_options(options)?;
    let Some(folder) = &options.logging_dir else { return Ok(()) };
    let fail = |error: std::io::Error| {
        anyhow::anyhow!(
            "cannot write to `logging_dir`: {error}: {}\nhint: choose a folder that you may write to",
            folder.display()
        )
    };
    std::fs::create_dir_all(folder).map_err(fail)?;
    let probe = folder.join(format!(".lorarun-probe-{}", std::process::id()));
    std::fs::write(&probe, b"probe").map_err(fail)?;
    std::fs::remove_file(&probe).map_err(fail)
}

/// The log of one run.
#[derive(Debug)]
pub struct RunLog {
    logging_dir: PathBuf,
    /// `<prefix><date and time>`.
    run: String,
    tracker: String,
    /// The options as text, with `log_config`.
    config: Option<String>,
    tensorboard: bool,
    wandb: Option<RunNames>,
    options: Box<Options>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    events: Option<EventWriter>,
    wandb: Option<WandbRun>,
    steps: LineFile,
    images: LineFile,
}

impl RunLog {
    /// The log that the options ask for; `None` without `logging_dir`. `started_at` is in seconds
    /// since 1970 and names the folder (in UTC). Nothing is made yet.
    pub fn new(options: &Options, started_at: f64) -> Result<Option<Self>> {
        let Some(logging_dir) = options.logging_dir.clone() else { return Ok(None) };
        let [year, month, day, hour, minute, second] = civil_time(started_at as i64);
        let prefix = options.log_prefix.as_deref().unwrap_or_default();
        // TensorBoard shows text as Markdown; an indented block stays as it is.
        let config = || options.to_toml().lines().map(|line| format!("    {line}\n")).collect();
        Ok(Some(Self {
            logging_dir,
            run: format!("{prefix}{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}"),
            tracker: options.log_tracker_name.clone().unwrap_or_else(|| "network_train".into()),
            config: options.log_config.then(config),
            tensorboard: options.log_with != Some(LogWith::Wandb),
            wandb: match options.log_with {
                Some(LogWith::Wandb | LogWith::All) => Some(RunNames::from_options(options)?),
                _ => None,
            },
            options: Box::new(options.clone()),
            open: None,
        }))
    }

    /// Name of the run's folder in `logging_dir`.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The folder that everything is written to.
    pub fn folder(&self) -> PathBuf {
        self.logging_dir.join(&self.run)
    }

    /// Goes on in the folder of an earlier run, if it is still there.
    pub fn continue_run(&mut self, run: &str) {
        let plain = Path::new(run).components().count() == 1;
        if plain && self.logging_dir.join(run).is_dir() {
            self.run = run.to_owned();
        }
    }

    /// Opens the files for a run that has `steps` finished steps and `epochs` finished epochs.
    pub fn open(&mut self, steps: usize, epochs: usize) -> Result<()> {
        let folder = self.folder();
        let tracker = folder.join(&self.tracker);
        std::fs::create_dir_all(&tracker)
            .with_context(|| format!("cannot make the log folder: {}", tracker.display()))?;
        let mut events = match self.tensorboard {
            true => Some(EventWriter::create(&tracker)?),
            false => None,
        };
        if let Some(events) = &mut events {
            if steps > 0 {
                events.restart(steps + 1)?;
            }
            if let Some(config) = &self.config {
                events.text("config", steps, config)?;
            }
        }
        let wandb = match &self.wandb {
            Some(names) => {
                let run = WandbRun::create(&folder, &self.tracker, names, &self.options)?;
                let place = run.path().parent().unwrap_or(&folder).display().to_string();
                console::note(&format!("for Weights & Biases: `wandb sync {place}`"));
                Some(run)
            }
            None => None,
        };
        let is_before = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            Some(line.get("step")?.as_u64()? <= steps as u64)
        };
        let of_epoch = |line: &str| {
            let first = line.split(',').next()?;
            Some(first == "epoch" || first.parse::<usize>().ok()? <= epochs)
        };
        let mut images = LineFile::open(&folder.join("image_losses.csv"), &of_epoch)?;
        if images.is_empty() {
            images.add("epoch,image,count,mean,last")?;
        }
        let steps = LineFile::open(&folder.join("steps.jsonl"), &is_before)?;
        self.open = Some(Open { events, wandb, steps, images });
        Ok(())
    }

    /// Logs an optimizer step.
    pub fn step(&mut self, values: &StepLog) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.scalars(values.step, (values.step, values.epoch), &as_pairs(&values.scalars()))?;
        open.steps.add(&values.line())
    }

    /// Logs the end of epoch `epoch` (from 1), after `step` steps; the reference counts epochs on
    /// this curve.
    pub fn epoch<'r>(
        &mut self,
        (step, epoch): (usize, usize),
        average_loss: f64,
        images: impl Iterator<Item = (&'r Path, &'r ImageLoss)>,
    ) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.scalars(epoch, (step, epoch), &[("loss/epoch_average", average_loss)])?;
        let mut rows = Vec::new();
        for (image, loss) in images.filter(|(_, loss)| loss.count > 0) {
            rows.push(format!(
                "{epoch},{},{},{},{}",
                table::quoted(&image.display().to_string()),
                loss.count,
                loss.mean(),
                loss.last
            ));
        }
        if rows.is_empty() { Ok(()) } else { open.images.add(&rows.join("\n")) }
    }

    /// Logs scalars of a validation at `at`: a step or, as the reference does for its epoch curves,
    /// an epoch. The JSON line names the step.
    pub fn validation(
        &mut self,
        at: usize,
        (step, epoch): (usize, usize),
        values: &[(String, f64)],
    ) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.scalars(at, (step, epoch), &as_pairs(values))?;
        let values: Map<String, Value> =
            values.iter().map(|(tag, value)| (tag.clone(), json!(value))).collect();
        open.steps.add(&json!({"step": step, "validation": values}).to_string())
    }

    /// Logs a sample picture under sd-scripts' name.
    pub fn sample(&mut self, (step, epoch): (usize, usize), sample: &Sample) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let tag = format!("sample_{}", sample.number);
        if let Some(events) = &mut open.events {
            events.image(&tag, step, sample.size, &sample.png)?;
        }
        match &mut open.wandb {
            Some(wandb) => wandb.picture((&tag, sample), step, epoch),
            None => Ok(()),
        }
    }

    /// The run is over.
    pub fn finish(&mut self) -> Result<()> {
        match self.open.as_mut().and_then(|open| open.wandb.as_mut()) {
            Some(wandb) => wandb.finish(),
            None => Ok(()),
        }
    }
}

impl Open {
    /// Scalars for the tools: TensorBoard shows them at `at`, wandb by step and epoch.
    fn scalars(
        &mut self,
        at: usize,
        (step, epoch): (usize, usize),
        values: &[(&str, f64)],
    ) -> Result<()> {
        if let Some(events) = &mut self.events {
            events.scalars(at, values)?;
        }
        match &mut self.wandb {
            Some(wandb) => wandb.log(values, step, epoch),
            None => Ok(()),
        }
    }
}

fn as_pairs(values: &[(String, f64)]) -> Vec<(&str, f64)> {
    values.iter().map(|(tag, value)| (tag.as_str(), *value)).collect()
}

#[cfg(test)]
mod tests;
