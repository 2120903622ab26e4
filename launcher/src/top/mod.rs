//! `lorarun top`: the runs of this machine, as the launcher of each shows them at its socket
//! (`socket`, `server`), as a table on the terminal (`screen`), as plain text (`text`) or as JSON.

mod rate;
mod screen;
mod server;
mod socket;
mod text;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use collectives::exit_code;
use serde::{Deserialize, Serialize};

pub use self::server::serve;
use self::socket::{Found, Source};
use crate::job::table::{JobState, Table};
use crate::output::{print_data, tell};

/// What a launcher shows of its run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Version of the program.
    pub version: String,
    /// Process number of the launcher.
    pub pid: u32,
    /// Host of the launcher.
    pub host: String,
    /// The command that the ranks run.
    pub command: String,
    /// Optimizer steps a second; `None` until two were seen.
    pub steps_per_second: Option<f64>,
    /// The job.
    #[serde(flatten)]
    pub table: Table,
}

impl View {
    /// What the user calls the run.
    pub fn name(&self) -> String {
        match self.table.job.as_str() {
            "" => self.pid.to_string(),
            job => job.to_owned(),
        }
    }
}

/// Options of `lorarun top`.
#[derive(Debug, Args)]
pub struct Options {
    /// The run to show, where there are several: the name of its job (`--rdzv_id`, or what Slurm or
    /// Kubernetes call it), or the process number of its launcher
    #[arg(long, value_name = "NAME")]
    job: Option<String>,

    /// The socket of a launcher, where it is not in its usual place
    #[arg(long, value_name = "PATH", conflicts_with = "job")]
    socket: Option<PathBuf>,

    /// Print what is known as a JSON object on one line
    #[arg(long)]
    json: bool,

    /// Print once and end, also on a terminal
    #[arg(long)]
    once: bool,

    /// Seconds from one look to the next; text and JSON are printed once without it
    #[arg(long, value_name = "SECONDS", value_parser = crate::cli::parse_seconds,
          conflicts_with = "once")]
    interval: Option<f64>,
}

/// Shows a run until it ends or the user has seen enough.
pub fn run(options: &Options) -> i32 {
    match show(options) {
        Ok(code) => code,
        Err(error) => {
            tell(&format!("error: {error:#}"));
            exit_code::FAILURE
        }
    }
}

fn show(options: &Options) -> Result<i32> {
    let source = match &options.socket {
        Some(path) => Source { path: path.clone(), view: socket::ask(path)? },
        None => match choose(socket::find()?, options.job.as_deref()) {
            Ok(source) => source,
            Err(message) => {
                tell(&message);
                return Ok(exit_code::FAILURE);
            }
        },
    };
    let pause = Duration::from_secs_f64(options.interval.unwrap_or(1.0).max(0.1));
    if std::io::stdout().is_terminal() && !options.json && !options.once {
        screen::run(source, pause)?;
        return Ok(exit_code::DONE);
    }
    let mut view = source.view;
    loop {
        if options.json {
            print_data(&(serde_json::to_string(&view)? + "\n"));
        } else {
            print_data(&text::table(&view));
        }
        if options.interval.is_none() || view.table.state == JobState::Over {
            return Ok(exit_code::DONE);
        }
        std::thread::sleep(pause);
        match socket::ask(&source.path) {
            Ok(newer) => view = newer,
            // Its launcher has ended, and the run with it.
            Err(_) => return Ok(exit_code::DONE),
        }
        if !options.json {
            print_data("\n");
        }
    }
}

/// The run that is meant; words where none is.
fn choose(found: Found, name: Option<&str>) -> Result<Source, String> {
    let Found { mut runs, foreign } = found;
    // Two nodes of one job may be on one machine; each shows all of it.
    runs.dedup_by(|one, other| {
        !one.view.table.job.is_empty() && one.view.table.job == other.view.table.job
    });
    let beside = match foreign {
        0 => String::new(),
        count => format!("\nnote: launchers that do not answer: {count}"),
    };
    if let Some(name) = name {
        let is_it =
            |source: &Source| source.view.name() == name || source.view.pid.to_string() == name;
        return match runs.iter().position(is_it) {
            Some(at) => Ok(runs.swap_remove(at)),
            None => Err(format!(
                "error: no run of this name on this machine: {name}\n{}{beside}",
                list(&runs)
            )),
        };
    }
    if runs.len() == 1 {
        return Ok(runs.remove(0));
    }
    if runs.is_empty() {
        return Err(format!(
            "no run of yours is going on on this machine{beside}\n\
             hint: runs of several processes are seen, and those with `--log_dir` or \
             `--max_restarts`; a single process draws its own progress bar"
        ));
    }
    Err(format!("several runs are going on; choose one\n{}{beside}", list(&runs)))
}

/// A line for each run.
fn list(runs: &[Source]) -> String {
    if runs.is_empty() {
        return "no run of yours is going on".to_owned();
    }
    let line = |source: &Source| {
        let (view, table) = (&source.view, &source.view.table);
        let step = table.ranks.iter().map(|rank| rank.step).max().unwrap_or(0);
        format!(
            "  lorarun top --job {}    {}, ranks: {}, step {step}: {}",
            view.name(),
            table.state.name(),
            table.ranks.len(),
            view.command
        )
    };
    runs.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;
