//! Which files a run writes, when, and which old ones it removes. Names are sd-scripts'.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use formats::atomic::remove_leftovers;
use formats::atomic_folder::recover;

use crate::console;
use crate::lease::lease_name;
use crate::options::{Options, SaveModelAs};

/// The files of a run.
#[derive(Clone, Debug)]
pub struct Saving {
    /// Folder of all files.
    pub output_dir: PathBuf,
    name: Option<String>,
    suffix: &'static str,
    every_n_epochs: Option<usize>,
    every_n_steps: Option<usize>,
    last_n_epochs: Option<usize>,
    last_n_steps: Option<usize>,
    states: StateSaving,
}

/// When states are saved beside the files, and how many stay.
#[derive(Clone, Copy, Debug, Default)]
struct StateSaving {
    with_files: bool,
    at_end: bool,
    last_n_epochs: Option<usize>,
    last_n_steps: Option<usize>,
}

/// What a file holds: the LoRA after an epoch, after a step, or at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavePoint {
    /// After this epoch, counted from 1.
    Epoch(usize),
    /// After this optimizer step, counted from 1.
    Step(usize),
    /// After the run.
    Last,
}

impl Saving {
    /// Reads the saving options; `epochs` is the length of the run.
    pub fn from_options(options: &Options, epochs: usize) -> Result<Self> {
        let Some(output_dir) = options.output_dir.clone() else {
            bail!(
                "`output_dir` is missing\nhint: say where the LoRA goes, for example `output_dir = \"output\"`"
            );
        };
        let ratio = options.save_n_epoch_ratio.filter(|n| *n > 0).map(|n| (epochs / n).max(1));
        Ok(Self {
            output_dir,
            name: options.output_name.clone(),
            suffix: match options.save_model_as {
                SaveModelAs::Safetensors => "safetensors",
                SaveModelAs::Ckpt => "ckpt",
                SaveModelAs::Pt => "pt",
            },
            every_n_epochs: ratio.or(options.save_every_n_epochs).filter(|n| *n > 0),
            every_n_steps: options.save_every_n_steps.filter(|n| *n > 0),
            last_n_epochs: options.save_last_n_epochs,
            last_n_steps: options.save_last_n_steps,
            states: StateSaving {
                with_files: options.save_state,
                at_end: options.save_state || options.save_state_on_train_end,
                last_n_epochs: options.save_last_n_epochs_state.or(options.save_last_n_epochs),
                last_n_steps: options.save_last_n_steps_state.or(options.save_last_n_steps),
            },
        })
    }

    /// Path of a file.
    pub fn path(&self, point: SavePoint) -> PathBuf {
        self.output_dir.join(format!("{}.{}", self.stem(point), self.suffix))
    }

    fn stem(&self, point: SavePoint) -> String {
        let name = |default: &str| self.name.clone().unwrap_or_else(|| default.to_owned());
        match point {
            SavePoint::Epoch(n) => format!("{}-{n:06}", name("epoch")),
            SavePoint::Step(n) => format!("{}-step{n:08}", name("at")),
            SavePoint::Last => name("last"),
        }
    }

    /// Folder of a state.
    pub fn state_path(&self, point: SavePoint) -> PathBuf {
        self.output_dir.join(format!("{}-state", self.stem(point)))
    }

    /// Whether a folder of this name is a state of a run with this name.
    pub fn is_state_name(&self, name: &str) -> bool {
        let is = |point| name == format!("{}-state", self.stem(point));
        let number = |digits: &str| digits.parse().ok();
        let stem = name.strip_suffix("-state").and_then(|stem| stem.rsplit_once('-'));
        let step = stem.and_then(|(_, end)| number(end.strip_prefix("step")?));
        let epoch = stem.and_then(|(_, end)| number(end));
        is(SavePoint::Last)
            || step.is_some_and(|step| is(SavePoint::Step(step)))
            || epoch.is_some_and(|epoch| is(SavePoint::Epoch(epoch)))
    }

    /// Whether a file of this name is one of a run with this name.
    pub fn is_file_name(&self, name: &str) -> bool {
        let stem = name.strip_suffix(self.suffix).and_then(|stem| stem.strip_suffix('.'));
        stem.is_some_and(|stem| {
            let stem = stem.strip_suffix("-ema").unwrap_or(stem);
            self.is_state_name(&format!("{stem}-state"))
        })
    }

    /// Clears what a killed run of this name left half written; a state that it was replacing comes
    /// back. On rank 0 alone.
    pub fn clear_leftovers(&self) -> Result<()> {
        if !self.output_dir.is_dir() {
            return Ok(());
        }
        let lease = lease_name(self);
        remove_leftovers(&self.output_dir, &|name| self.is_file_name(name) || name == lease)?;
        for name in recover(&self.output_dir, &|name| self.is_state_name(name))? {
            console::note(&format!("brought back a state that was being replaced: {name}"));
        }
        Ok(())
    }

    /// Whether a state is due with the file of `point`.
    pub fn state_due(&self, point: SavePoint) -> bool {
        match point {
            SavePoint::Last => self.states.at_end,
            SavePoint::Epoch(_) | SavePoint::Step(_) => self.states.with_files,
        }
    }

    /// The older state that is no longer wanted once that of `point` is written.
    pub fn outdated_state(&self, point: SavePoint) -> Option<PathBuf> {
        let kept = (self.states.last_n_epochs, self.states.last_n_steps);
        Some(self.state_path(self.before(point, kept)?))
    }

    /// Whether a file is due after `epoch` (from 1) of `epochs`; the last one is the final file.
    pub fn due_after_epoch(&self, epoch: usize, epochs: usize) -> bool {
        self.every_n_epochs.is_some_and(|n| epoch.is_multiple_of(n)) && epoch < epochs
    }

    /// Whether a file is due after `step` (from 1).
    pub fn due_after_step(&self, step: usize) -> bool {
        self.every_n_steps.is_some_and(|n| step.is_multiple_of(n))
    }

    /// The older file that is no longer wanted once `point` is written.
    pub fn outdated(&self, point: SavePoint) -> Option<PathBuf> {
        Some(self.path(self.before(point, (self.last_n_epochs, self.last_n_steps))?))
    }

    /// The newest point that is beyond the epochs and steps to keep.
    fn before(
        &self,
        point: SavePoint,
        (epochs, steps): (Option<usize>, Option<usize>),
    ) -> Option<SavePoint> {
        match point {
            SavePoint::Epoch(epoch) => {
                let kept = self.every_n_epochs? * epochs?;
                Some(SavePoint::Epoch(epoch.checked_sub(kept).filter(|n| *n > 0)?))
            }
            SavePoint::Step(step) => {
                let every = self.every_n_steps?;
                let before = step.checked_sub(steps? + 1)?;
                Some(SavePoint::Step(Some(before - before % every).filter(|n| *n > 0)?))
            }
            SavePoint::Last => None,
        }
    }

    /// Every file that a run of `steps` steps and `epochs` epochs will write, in order of name.
    pub fn planned(&self, steps: usize, epochs: usize) -> Vec<PathBuf> {
        let by_epoch =
            (1..=epochs).filter(|e| self.due_after_epoch(*e, epochs)).map(SavePoint::Epoch);
        let by_step = (1..=steps).filter(|s| self.due_after_step(*s)).map(SavePoint::Step);
        let points: Vec<_> = by_epoch.chain(by_step).chain([SavePoint::Last]).collect();
        let states = points.iter().filter(|p| self.state_due(**p)).map(|p| self.state_path(*p));
        points.iter().map(|p| self.path(*p)).chain(states).collect()
    }
}

/// Makes the folder and finds out now, not after the first hours, whether files can be written.
pub fn check_writable(folder: &Path) -> Result<()> {
    let fail = |error: std::io::Error| {
        anyhow::anyhow!(
            "cannot write to `output_dir`: {error}: {}\nhint: choose a folder that you may write to",
            folder.display()
        )
    };
    std::fs::create_dir_all(folder).map_err(fail)?;
    let probe = folder.join(format!(".lorarun-probe-{}", std::process::id()));
    std::fs::write(&probe, b"probe").map_err(fail)?;
    std::fs::remove_file(&probe).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saving() -> Saving {
        Saving {
            output_dir: "out".into(),
            name: Some("cat".into()),
            suffix: "safetensors",
            every_n_epochs: Some(2),
            every_n_steps: Some(10),
            last_n_epochs: Some(2),
            last_n_steps: Some(20),
            states: StateSaving { last_n_steps: Some(10), ..StateSaving::default() },
        }
    }

    #[test]
    fn names_are_those_of_the_reference() {
        let saving = saving();
        assert_eq!(saving.path(SavePoint::Epoch(2)), Path::new("out/cat-000002.safetensors"));
        assert_eq!(
            saving.path(SavePoint::Step(100)),
            Path::new("out/cat-step00000100.safetensors")
        );
        assert_eq!(saving.path(SavePoint::Last), Path::new("out/cat.safetensors"));
        let unnamed = Saving { name: None, ..saving };
        assert_eq!(unnamed.path(SavePoint::Last), Path::new("out/last.safetensors"));
        assert_eq!(unnamed.path(SavePoint::Epoch(1)), Path::new("out/epoch-000001.safetensors"));
        assert_eq!(unnamed.path(SavePoint::Step(1)), Path::new("out/at-step00000001.safetensors"));
    }

    #[test]
    fn old_files_go_when_enough_newer_ones_exist() {
        let saving = saving();
        assert_eq!(saving.outdated(SavePoint::Epoch(4)), None);
        assert_eq!(saving.outdated(SavePoint::Epoch(6)), Some(saving.path(SavePoint::Epoch(2))));
        assert_eq!(saving.outdated(SavePoint::Step(30)), None);
        assert_eq!(saving.outdated(SavePoint::Step(40)), Some(saving.path(SavePoint::Step(10))));
        assert_eq!(saving.outdated(SavePoint::Last), None);
    }

    #[test]
    fn the_last_epoch_is_the_final_file() {
        let names: Vec<_> = saving().planned(20, 4);
        assert_eq!(names.len(), 4);
        assert_eq!(names[0], Path::new("out/cat-000002.safetensors"));
        assert_eq!(names[3], Path::new("out/cat.safetensors"));
    }

    #[test]
    fn states_are_named_and_outdated_as_those_of_the_reference() {
        let saving = saving();
        let names = ["cat-000002-state", "cat-step00000100-state", "cat-state"];
        let points = [SavePoint::Epoch(2), SavePoint::Step(100), SavePoint::Last];
        for (name, point) in names.into_iter().zip(points) {
            assert_eq!(saving.state_path(point), Path::new("out").join(name));
            assert!(saving.is_state_name(name), "{name}");
            assert!(!saving.state_due(point));
        }
        for name in ["cat", "dog-state", "cat-2-state", "cat-dog-000002-state", "cat-step1-state"] {
            assert!(!saving.is_state_name(name), "{name}");
        }
        assert!(saving.is_file_name("cat-000002.safetensors") && !saving.is_file_name("cat.ckpt"));
        assert_eq!(
            saving.outdated_state(SavePoint::Step(30)),
            Some(saving.state_path(SavePoint::Step(10)))
        );
        assert_eq!(saving.outdated_state(SavePoint::Epoch(6)), None);
        let states = StateSaving { at_end: true, ..StateSaving::default() };
        let ending = Saving { states, ..saving };
        assert!(ending.state_due(SavePoint::Last) && !ending.state_due(SavePoint::Step(10)));
        let planned = ending.planned(20, 4);
        assert_eq!(planned.last().map(PathBuf::as_path), Some(Path::new("out/cat-state")));
    }
}
