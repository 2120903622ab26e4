//! The launcher's command line: which ranks to start, and which command they run.
//!
//! Option names are those of `accelerate launch`, spelt with underscores; hyphens are taken too.
//! What follows a command belongs to it and is passed on untouched.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use collectives::{Env, MAX_RANKS, exit_code};
use sha2::{Digest, Sha256};

use crate::cards::{PerNode, Ranks};
use crate::intent::Intent;
pub use crate::launch::{Launch, parse_seconds};
use crate::site::Site;
use crate::{cards, check_ranks, doctor, spec, top};

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
Examples, one machine:
  lorarun train config.toml
      one process on each card; without cards one process with all CPU cores
  lorarun --num_processes 2 train config.toml --max_train_steps 100
      two processes that share the work; options after the config file win
  lorarun --num_processes 4 --log_dir logs train config.toml
      as above, with what each process says in logs/rank0.log, logs/rank1.log, ...
  lorarun --gpu_ids 0,2,3 train config.toml --device cuda
      three processes, each on a card of its own
  lorarun --config_file accelerate.yaml train config.toml
      what accelerate was told by `accelerate config`, for this launch
  lorarun plan config.toml --vram_limit 8GB
      what that run would take of such a card, and the files it would write
  lorarun --num_processes 4 check-ranks
      do the processes reach each other, and how fast
  lorarun top
      what the runs of this machine are at: every rank, its step, loss and waiting
  lorarun doctor
      which cards and libraries there are, and how to get what is missing

Several machines, the same on each but for its number:
  lorarun --nnodes 2 --node_rank 0 --master_addr gpu0 train config.toml     on gpu0
  lorarun --nnodes 2 --node_rank 1 --master_addr gpu0 train config.toml     on gpu1
      all cards of both; a lost process starts again from memory, at most 3 times
  lorarun --nnodes 1:3 ... train config.toml
      goes on with fewer machines when some are lost for good, at the same batch
  srun --nodes 2 --ntasks-per-node 1 lorarun train config.toml
      under Slurm, in Kubernetes and in Kubeflow the environment says all of it

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
    /// Show the runs of this machine: ranks, steps, loss, waiting, why ranks were started again
    Top(top::Options),
    /// Fill in a batch script or manifest for a cluster from a config, or check one
    Spec(spec::Options),
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
    /// What the launcher's options add to them.
    #[arg(skip)]
    pub added: Vec<OsString>,
}

impl Passed {
    /// All of them.
    pub fn all(&self) -> Vec<OsString> {
        [self.arguments.as_slice(), &self.added].concat()
    }
}

impl Command {
    /// The command line that makes a rank run this: everything from the command's name on, as it
    /// was given, and what the launcher's options add.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        arguments.drain(..command_position(&arguments));
        if let Command::Train(passed) | Command::Plan(passed) = self {
            arguments.extend(passed.added.iter().cloned());
        }
        arguments
    }
}

impl Cli {
    /// What no single option can know: which ranks there are, and whether the environment already
    /// says who this process is.
    pub fn ranks(&self, env: &Env, site: &Site, intent: &Intent) -> Result<Ranks, String> {
        let gpu_ids = self.launch.gpu_ids.as_ref();
        let mut processes = self.processes_here(site)?;
        // A rank of another launcher, or one that was told its card, is one.
        if processes.is_none() && gpu_ids.is_none() && env.world_size == 1 && env.card.is_none() {
            processes = intent.processes();
        }
        let ranks =
            Ranks::new(processes, gpu_ids)?.with_nccl_on_shared_card(env.nccl_on_shared_card);
        let count = ranks.count();
        if let Some(cards) = intent.cards_needed(gpu_ids.is_some()) {
            cards::check(&ranks, cards)?;
        }
        if count > MAX_RANKS {
            return Err(format!("ranks on one host should be 1 to {MAX_RANKS}, got: {count}"));
        }
        let asked = match self.launch.num_processes {
            Some(count) => format!("--num_processes {count}"),
            None if self.launch.nproc_per_node.is_some() => format!("--nproc_per_node {count}"),
            None => format!("--gpu_ids with {count} cards"),
        };
        let alone = match self.command {
            Command::Selftest(_) => Some("`selftest`"),
            Command::Doctor(_) => Some("`doctor`"),
            Command::Top(_) => Some("`top`"),
            Command::Spec(_) => Some("`spec`"),
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
        let on_each = |count: usize| match count.is_multiple_of(nodes) {
            true => Ok(Some(count / nodes)),
            false => Err(format!(
                "`--num_processes` counts the processes of all {nodes} nodes, which must be equally \
                 many on each, got: {count}\nhint: `--nproc_per_node` counts those of one node"
            )),
        };
        if let Some(count) = self.launch.num_processes {
            return on_each(count);
        }
        match self.launch.nproc_per_node {
            Some(PerNode::Count(count)) => Ok(Some(count)),
            Some(PerNode::Cpu) => Ok(Some(1)),
            Some(PerNode::Gpu | PerNode::Auto) => Ok(None),
            None => match (site.processes, self.launch.file.num_processes) {
                (Some(count), _) => Ok(Some(count)),
                (None, Some(count)) => on_each(count),
                (None, None) => Ok(None),
            },
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
/// of one.
fn command_position(arguments: &[OsString]) -> usize {
    let definition = Cli::command();
    let mut index = 0;
    while let Some(argument) = arguments.get(index) {
        let text = argument.to_string_lossy();
        let Some(option) = text.strip_prefix('-').filter(|option| !option.is_empty()) else {
            break;
        };
        index += if takes_next(&definition, option) { 2 } else { 1 };
    }
    index.min(arguments.len())
}

/// Whether the value of an option, given without its first dash, is the next argument.
fn takes_next(definition: &clap::Command, option: &str) -> bool {
    let takes_value = |known: &clap::Arg| known.get_action().takes_values();
    match option.strip_prefix('-') {
        Some(name) if name.contains('=') => false,
        Some(name) => definition.get_arguments().any(|known| {
            let is_it = known.get_long() == Some(name)
                || known.get_all_aliases().is_some_and(|aliases| aliases.contains(&name));
            is_it && takes_value(known)
        }),
        // One letter; what follows it in the same word is its value.
        None => definition.get_arguments().any(|known| {
            known.get_short().is_some_and(|short| option == short.to_string()) && takes_value(known)
        }),
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
            ("--cpu --numa_affinity train a.toml", 2),
            ("--multi-gpu -m --nnodes 2:4 --master_addr h train --cpu", 6),
            ("-t 3 --log-dir logs -r0:1 check-ranks", 5),
            ("-qm --dynamo_backend no train", 3),
            ("--enable-cpu-affinity --nproc-per-node=gpu train", 2),
            ("", 0),
        ] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            assert_eq!(command_position(&arguments), position, "{line}");
        }
    }

    #[test]
    fn every_option_has_both_spellings() {
        for argument in Cli::command().get_arguments() {
            let Some(long) = argument.get_long() else { continue };
            let aliases = argument.get_all_aliases().unwrap_or_default();
            let names: Vec<&str> = aliases.into_iter().chain([long]).collect();
            for name in &names {
                let other = name.replace('_', "-");
                assert!(names.contains(&other.as_str()), "`--{name}` has no `--{other}`");
            }
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
