//! Which state `resume` means: a folder, or with `auto` the newest whole one of this run's name.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::accelerate;
use super::folder::{MANIFEST, StateFolder};
use crate::checkpoint::Saving;
use crate::console;

/// A state to go on from.
#[derive(Clone, Debug)]
pub enum Found {
    /// One of ours.
    Own(Box<StateFolder>),
    /// One that sd-scripts wrote through accelerate.
    Foreign(PathBuf),
}

/// Finds the state that the user named. Whatever is wrong with it is an error.
pub fn named(path: &Path) -> Result<Found> {
    if !path.is_dir() {
        let hint = match path.extension() {
            Some(_) if path.is_file() => {
                "a LoRA file is continued with `network_weights`; `resume` takes a folder that \
                 `save_state` wrote"
            }
            _ => "`resume = \"auto\"` finds the newest state of this run in `output_dir`",
        };
        bail!("`resume` is no folder: {}\nhint: {hint}", path.display());
    }
    if !path.join(MANIFEST).exists() && accelerate::recognise(path) {
        return Ok(Found::Foreign(path.to_owned()));
    }
    let folder = StateFolder::open(path).and_then(|folder| folder.read().map(|_| folder));
    let folder = folder.with_context(|| {
        "`resume` cannot go on from this state\nhint: name another state, or let \
         `resume = \"auto\"` choose the newest whole one"
    })?;
    Ok(Found::Own(Box::new(folder)))
}

/// Finds the newest whole state among those that a run with these names writes.
pub fn newest(saving: &Saving) -> Result<Option<Found>> {
    let mut states = Vec::new();
    for path in candidates(saving)? {
        if !path.join(MANIFEST).exists() && accelerate::recognise(&path) {
            console::note(&format!(
                "`resume = \"auto\"` passes over a state of sd-scripts: {}\nhint: name it to use \
                 its weights",
                path.display()
            ));
            continue;
        }
        match StateFolder::open(&path) {
            Ok(state) => states.push(state),
            Err(error) => skip(&error),
        }
    }
    // Steps of another batch size count differently; epochs do not.
    states.sort_by(|a, b| {
        let epochs = a.facts.cmp_epochs(&b.facts);
        epochs.then((a.facts.step, &a.path).cmp(&(b.facts.step, &b.path)))
    });
    while let Some(state) = states.pop() {
        match state.read() {
            Ok(_) => return Ok(Some(Found::Own(Box::new(state)))),
            Err(error) => skip(&error),
        }
    }
    Ok(None)
}

fn skip(error: &anyhow::Error) {
    console::note(&format!("`resume = \"auto\"` passes over a state: {error:#}"));
}

/// Folders in `output_dir` whose names are those of this run's states.
fn candidates(saving: &Saving) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(&saving.output_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let folder = saving.output_dir.display();
            return Err(error).with_context(|| format!("cannot list `output_dir`: {folder}"));
        }
    };
    let is_state = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        path.is_dir() && name.is_some_and(|name| saving.is_state_name(name))
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_state).collect())
}
