//! The `lorarun` binary: starts and watches one process per rank, and hands commands on.
//!
//! This file alone knows which command is served by which crate. The way of a command: the launcher
//! (`cli`, `job`) starts this same binary once per rank with the environment contract of
//! `collectives::env` set; each of those lands in [`run_as_rank`]. With one process there is no
//! second one: the launcher becomes the rank.

mod accelerate_config;
mod accepted;
mod cards;
mod check_ranks;
mod cli;
mod doctor;
mod fault;
mod hostlist;
mod intent;
mod job;
mod later_tasks;
mod launch;
mod machine;
mod numa;
mod output;
mod prepare;
mod site;
mod spawn;
mod spec;
mod streams;
mod summary;
mod supervise;
mod terminal;
mod top;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use collectives::{Env, exit_code, report_failure, signals};

use crate::cards::Ranks;
use crate::cli::{Cli, Command};
use crate::job::agent::Node;
use crate::job::event::Policy;
use crate::job::table::SharedTable;
use crate::output::tell;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::exit_after(&error),
    };
    let env = match Env::from_process() {
        Ok(env) => env,
        Err(error) => {
            tell(&format!("error: {error}"));
            return exit(exit_code::CONFIGURATION);
        }
    };
    let code = if env.is_supervised() { run_as_rank(cli.command, &env) } else { launch(cli, env) };
    exit(code)
}

/// Starts the ranks of this node, or becomes the only one.
fn launch(mut cli: Cli, env: Env) -> i32 {
    let (site, ranks) = match prepare::prepare(&mut cli, &env) {
        Ok(settled) => settled,
        Err(refusal) => {
            tell(&format!("error: {}", refusal.message));
            return refusal.code;
        }
    };
    if site.task > 0 {
        // The first task of this node starts the processes of all of them.
        later_tasks::stay(&site);
        return exit_code::DONE;
    }
    let _presence = later_tasks::Presence::show(&site);
    let (launch, command) = (&cli.launch, &cli.command);
    let policy = launch.job.policy(&site);
    // A rank that another launcher has started is that one's to watch.
    let is_watched = env.world_size == 1 && is_watched(&cli, &policy);
    if site.nodes.1 == 1 && ranks.count() == 1 && !is_watched {
        return run_alone(cli, &ranks, env);
    }
    let token = match launch.job.token(env.token) {
        Ok(token) => token,
        Err(message) => {
            tell(&format!("error: {message}"));
            return exit_code::USAGE;
        }
    };
    let table = SharedTable::default();
    let shown = command.arguments();
    let shown: Vec<_> = shown.iter().map(|word| word.to_string_lossy()).collect();
    // Until this function returns.
    let _server = top::serve(table.clone(), &site.job, shown.join(" "));
    let node = Node { site: &site, launch, ranks: &ranks, command, policy, token, table };
    job::agent::take_part(&node).unwrap_or_else(|error| {
        tell(&format!("error: {error:#}"));
        exit_code::FAILURE
    })
}

/// Whether even a single rank is a process of its own: its output is led elsewhere, or it is started
/// again after a failure.
fn is_watched(cli: &Cli, policy: &Policy) -> bool {
    let is_led = cli.launch.log_dir.is_some() || cli.launch.local_ranks_filter.is_some();
    match cli.command {
        Command::Train(_) | Command::CheckRanks(_) => is_led || policy.max_restarts > 0,
        Command::Plan(_) => is_led,
        _ => false,
    }
}

/// Becomes the only rank.
fn run_alone(cli: Cli, ranks: &Ranks, mut env: Env) -> i32 {
    env.card = ranks.card(0).or(env.card);
    if cli.launch.num_cpu_threads_per_process.is_some() {
        env.threads = cli.launch.num_cpu_threads_per_process;
    }
    if let Some(Err(error)) = ranks.binding(0).map(|binding| binding.call().make()) {
        tell(&format!("warning: cannot keep this process at its cores: {error}"));
    }
    run_as_rank(cli.command, &env)
}

/// Runs a command in this process, as the rank that `env` says.
fn run_as_rank(command: Command, env: &Env) -> i32 {
    if let Err(error) = prepare_process(&command, env) {
        report_failure(env, &format!("error: {error:#}"));
        return exit_code::FAILURE;
    }
    match command {
        Command::Train(passed) => trainer::cli::train_main(&passed.all(), env),
        Command::Plan(passed) => trainer::cli::plan_main(&passed.all(), env),
        Command::Selftest(passed) => trainer::cli::selftest_main(&passed.all(), env),
        Command::CheckRanks(options) => check_ranks::run(&options, env),
        Command::Doctor(options) => doctor::run(&options),
        Command::Top(options) => top::run(&options),
        Command::Spec(options) => spec::run(&options),
        Command::Tool(tool) => tool.run(),
    }
}

/// What holds for a rank whatever it does: its share of the processor, and a stop that is polite.
fn prepare_process(command: &Command, env: &Env) -> Result<()> {
    // Nothing of these needs saving; there a signal ends the process, and no partial file stays.
    let has_nothing_to_save = matches!(
        command,
        Command::Selftest(_)
            | Command::Doctor(_)
            | Command::Spec(_)
            | Command::Top(_)
            | Command::Tool(_)
    );
    if !has_nothing_to_save {
        signals::install().context("cannot install signal handlers")?;
    }
    if let Some(threads) = env.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .with_context(|| format!("cannot start the pool of CPU threads: {threads}"))?;
    }
    Ok(())
}

/// The low byte is all that a parent process sees.
fn exit(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
