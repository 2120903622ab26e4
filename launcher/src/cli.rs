//! The launcher's command line: which ranks to start, and which command they run.
//!
//! Option names are those of `accelerate launch`, spelt with underscores; hyphens are taken too.
//! What follows a command belongs to it and is passed on untouched.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use collectives::{Env, MAX_RANKS, exit_code};

use sha2::{Digest, Sha256};

use crate::cards::{Cards, Ranks};
use crate::job::options::JobOptions;
use crate::site::Site;
use crate::{check_ranks, doctor};

/// `--version` says what was built, from what, by what.
const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit   ",
    env!("BUILD_COMMIT"),
    "\ntarget   ",
    env!("BUILD_TARGET"),
    "\nprofile  ",
    env!("BUILD_PROFILE"),
    "\ncompiler ",
    env!("BUILD_COMPILER"),
);

const AFTER_HELP: &str = "\
Examples:
  lorarun train config.toml
      one process, all CPU cores
  lorarun --num_processes 2 train config.toml --max_train_steps 100
      two processes on this machine that share the work; options after the config file win
  lorarun --num_processes 4 --log_dir logs train config.toml
      as above, with what each process says in logs/rank0.log, logs/rank1.log, ...
  lorarun --gpu_ids 0,2,3 train config.toml --device cuda
      three processes, each on a card of its own
  lorarun plan config.toml --vram_limit 8GB
      what that run would take of such a card, and the files it would write
  lorarun --num_processes 4 check-ranks
      do the processes reach each other, and how fast
  lorarun doctor
      which cards and libraries there are, and how to get what is missing

Ctrl-C ends politely: the current step is finished and saved. A second Ctrl-C ends at once.
When one process fails, the others are stopped and its exit code is returned.

Exit codes:
  0 done, 64 wrong usage, 75 saved, start me again, 78 wrong configuration,
  128 + n ended by signal n, else the code of the first process that failed";

/// Trains LoRAs for Stable Diffusion, on one process or several
#[derive(Debug, Parser)]
#[command(
    name = "lorarun",
    version,
    long_version = LONG_VERSION,
    after_help = AFTER_HELP,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// Which processes to start.
    #[command(flatten)]
    pub launch: Launch,
    /// What they run.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of the launcher itself; they come before the command.
#[derive(Debug, Args)]
pub struct Launch {
    /// Number of processes (ranks), on all machines together [default: one per card of `--gpu_ids`,
    /// else 1 on each machine]
    #[arg(long = "num_processes", alias = "num-processes", value_name = "N",
          value_parser = parse_count)]
    pub num_processes: Option<usize>,

    /// Cards to use, one process on each: numbers as CUDA counts them, or `all`. A card named twice
    /// is shared by two processes
    #[arg(long = "gpu_ids", alias = "gpu-ids", value_name = "IDS", value_parser = Cards::parse)]
    pub gpu_ids: Option<Cards>,

    /// Several nodes as one job.
    #[command(flatten)]
    pub job: JobOptions,

    /// Number of processes on each node, where `num_processes` is not given
    #[arg(long = "nproc_per_node", aliases = ["nproc-per-node"], value_name = "N",
          value_parser = parse_count, conflicts_with = "num_processes")]
    pub nproc_per_node: Option<usize>,

    /// CPU threads of each process [default: CPU cores / processes]
    #[arg(
        long = "num_cpu_threads_per_process",
        alias = "num-cpu-threads-per-process",
        value_name = "T",
        value_parser = parse_count
    )]
    pub num_cpu_threads_per_process: Option<usize>,

    /// Folder for one log file per process, `rank0.log` and so on; lines are appended
    #[arg(long = "log_dir", alias = "log-dir", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,

    /// Seconds that one process waits for the others before it gives up
    #[arg(
        long = "collective_timeout",
        alias = "collective-timeout",
        value_name = "SECONDS",
        default_value = "600",
        value_parser = parse_seconds
    )]
    pub collective_timeout: f64,
}

/// What the ranks run.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a LoRA as a config file says; `lorarun train --help` explains every option
    #[command(disable_help_flag = true)]
    Train(Passed),
    /// Say what `train` would do, take on the card and in memory, and write; nothing is loaded
    #[command(disable_help_flag = true)]
    Plan(Passed),
    /// Compare what this machine computes with PyTorch's results
    #[command(disable_help_flag = true)]
    Selftest(Passed),
    /// Check that the processes of this machine reach each other, and measure how fast
    #[command(name = "check-ranks", alias = "check_ranks")]
    CheckRanks(check_ranks::Options),
    /// Say what this machine trains with: cards, libraries and their versions, what is missing
    Doctor(doctor::Options),
    /// Offline work on files.
    #[command(flatten)]
    Tool(tools::Command),
}

/// Arguments that another crate understands.
#[derive(Debug, Args)]
pub struct Passed {
    /// Passed on as they are
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

impl Command {
    /// The command line that makes a rank run this: everything from the command's name on, as it
    /// was given.
    pub fn arguments(&self) -> Vec<OsString> {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let start = command_position(&arguments);
        arguments[start..].to_vec()
    }
}

impl Cli {
    /// What no single option can know: which ranks there are, and whether the environment already
    /// says who this process is.
    pub fn ranks(&self, env: &Env, site: &Site) -> Result<Ranks, String> {
        let ranks = Ranks::new(self.processes_here(site)?, self.launch.gpu_ids.as_ref())?
            .with_nccl_on_shared_card(env.nccl_on_shared_card);
        let count = ranks.count();
        if count > MAX_RANKS {
            return Err(format!("ranks on one host should be 1 to {MAX_RANKS}, got: {count}"));
        }
        let asked = match self.launch.num_processes {
            Some(count) => format!("--num_processes {count}"),
            None => format!("--gpu_ids with {count} cards"),
        };
        let alone = match self.command {
            Command::Selftest(_) => Some("`selftest`"),
            Command::Doctor(_) => Some("`doctor`"),
            Command::Tool(_) => Some("a tool"),
            Command::Train(_) | Command::Plan(_) | Command::CheckRanks(_) => None,
        };
        if let Some(alone) = alone.filter(|_| count > 1 || site.nodes.1 > 1) {
            return Err(format!(
                "{alone} is the work of one process, got: `{asked}`\n\
                 hint: `check-ranks` tests several"
            ));
        }
        if count > 1 && env.world_size > 1 {
            return Err(format!(
                "`{asked}` starts ranks, but the environment says that this process is \
                 one: `RANK` {} of `WORLD_SIZE` {}\n\
                 hint: unset `RANK` and `WORLD_SIZE`, or leave it out",
                env.rank, env.world_size
            ));
        }
        Ok(ranks)
    }
}

impl Cli {
    /// Processes that this node starts, where anything says so.
    fn processes_here(&self, site: &Site) -> Result<Option<usize>, String> {
        let nodes = site.nodes.1;
        match self.launch.num_processes {
            Some(count) if nodes > 1 && !count.is_multiple_of(nodes) => Err(format!(
                "`--num_processes` counts the processes of all {nodes} nodes, which must be equally \
                 many on each, got: {count}\nhint: `--nproc_per_node` counts those of one node"
            )),
            Some(count) => Ok(Some(count / nodes)),
            None => Ok(self.launch.nproc_per_node.or(site.processes)),
        }
    }
}

impl Command {
    /// A number for what the ranks will do: the arguments and what the files among them hold.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for argument in self.arguments() {
            hash.update((argument.len() as u64).to_le_bytes());
            hash.update(argument.as_encoded_bytes());
            let path = std::path::Path::new(&argument);
            if path.extension().is_some_and(|ending| ending == "toml" || ending == "yaml") {
                hash.update(std::fs::read(path).unwrap_or_default());
            }
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Prints what the parser has to say: help and version to stdout with code 0, errors to stderr.
pub fn exit_after(error: &clap::Error) -> ExitCode {
    // A closed stdout or stderr leaves nobody to tell.
    drop(error.print());
    if error.use_stderr() { ExitCode::from(exit_code::USAGE as u8) } else { ExitCode::SUCCESS }
}

/// Index of the command's name: the first argument that is neither a launcher option nor the value
/// of one. Every launcher option takes a value, `--name value` or `--name=value`.
fn command_position(arguments: &[OsString]) -> usize {
    let mut index = 0;
    while let Some(argument) = arguments.get(index) {
        let text = argument.to_string_lossy();
        match text.strip_prefix("--") {
            None => break,
            Some(option) if option.contains('=') => index += 1,
            Some(_) => index += 2,
        }
    }
    index.min(arguments.len())
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(count) => Ok(count),
        Err(_) => Err("a whole number from 1 is needed".to_owned()),
    }
}

pub(crate) fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 1e9 => Ok(seconds),
        _ => Err("a number of seconds above 0 is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_command_is_found_behind_launcher_options() {
        for (line, position) in [
            ("train a.toml", 0),
            ("--num_processes 2 train a.toml --seed 1", 2),
            ("--num-processes=2 --log_dir logs train --help", 3),
            ("", 0),
        ] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            assert_eq!(command_position(&arguments), position, "{line}");
        }
    }

    #[test]
    fn every_launcher_option_takes_a_value() {
        // `command_position` relies on it.
        for argument in Cli::command().get_arguments() {
            let name = argument.get_id().as_str();
            assert!(
                matches!(name, "help" | "version") || argument.get_action().takes_values(),
                "{name}"
            );
        }
    }

    #[test]
    fn underscores_and_hyphens_are_one() {
        for option in ["--num_processes", "--num-processes"] {
            let cli = Cli::try_parse_from(["lorarun", option, "3", "check-ranks"]).unwrap();
            assert_eq!(cli.launch.num_processes, Some(3));
        }
    }

    #[test]
    fn what_follows_a_command_is_passed_on_untouched() {
        let words = ["a.toml", "--num_processes", "7", "--help", "-x", "--", "--version"];
        for command in ["train", "plan", "selftest"] {
            let line = ["lorarun", "--num_processes", "2", command].into_iter().chain(words);
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.launch.num_processes, Some(2));
            let (Command::Train(passed) | Command::Plan(passed) | Command::Selftest(passed)) =
                cli.command
            else {
                panic!("another command than {command}");
            };
            assert_eq!(passed.arguments, words.map(OsString::from));
        }
    }

    #[test]
    fn no_processes_are_refused() {
        let error =
            Cli::try_parse_from(["lorarun", "--num_processes", "0", "check-ranks"]).unwrap_err();
        assert!(error.to_string().contains("at least 1 is needed"), "{error}");
    }
}
