//! `lorarun spec`: a batch script or manifest filled in from a config, and checks of such files.
//!
//! The files in `deploy/` are the templates: they are valid as they are, and what a run decides is put
//! in the place of their values. Whatever is rendered is checked by the same rules ([`rules`]) that
//! `lorarun spec check` applies to any file.

mod options;
mod render;
mod rules;
mod run_facts;
mod sbatch_rules;
mod template;

pub use options::Options;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use collectives::exit_code;

use crate::output::{print_data, tell};
use options::{Asked, What};

/// Renders or checks; gives the exit code.
pub fn run(options: &Options) -> i32 {
    let done = match &options.what {
        What::Check { files } => check(files),
        What::Slurm(asked) => make(&asked.asked, || render::slurm(asked)),
        What::Kubernetes(asked) => make(&asked.asked, || render::indexed_job(asked)),
        What::Jobset(asked) => make(&asked.asked, || render::jobset(asked)),
        What::Trainjob(asked) => make(&asked.asked, || render::trainjob(asked)),
    };
    match done {
        Ok(()) => exit_code::DONE,
        Err(error) => {
            tell(&format!("error: {error:#}"));
            exit_code::CONFIGURATION
        }
    }
}

/// Renders, checks what came out, and hands it over.
fn make(asked: &Asked, render: impl FnOnce() -> Result<String>) -> Result<()> {
    let text = render()?;
    let faults = faults_of(&text)?;
    if !faults.is_empty() {
        bail!("these options make a file that would not work:\n{}", faults.join("\n"));
    }
    match &asked.output {
        None => {
            print_data(&text);
            Ok(())
        }
        Some(path) => {
            write(path, &text)?;
            tell(&format!("wrote {}", path.display()));
            Ok(())
        }
    }
}

/// The file appears complete or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let shown = path.display();
    let name = path.file_name().with_context(|| format!("a file is needed, got: `{shown}`"))?;
    let temporary = path.with_file_name(format!(".{}.part", name.to_string_lossy()));
    let written = std::fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It may not even have been made.
        drop(std::fs::remove_file(&temporary));
    }
    written.with_context(|| format!("cannot write `{shown}`"))
}

fn check(files: &[std::path::PathBuf]) -> Result<()> {
    let mut count = 0;
    for file in files {
        let shown = file.display();
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read `{shown}`"))?;
        let faults = faults_of(&text).with_context(|| format!("`{shown}`"))?;
        count += faults.len();
        for fault in &faults {
            tell(&format!("{shown}: {fault}"));
        }
        if faults.is_empty() {
            tell(&format!("{shown}: nothing wrong"));
        }
    }
    match count {
        0 => Ok(()),
        1 => bail!("1 fault"),
        _ => bail!("{count} faults"),
    }
}

/// What is wrong with a batch script or with manifests.
fn faults_of(text: &str) -> Result<Vec<String>> {
    if text.starts_with("#!") {
        return Ok(sbatch_rules::faults_of(text));
    }
    rules::faults_of(text)
}

#[cfg(test)]
mod tests;
