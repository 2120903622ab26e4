//! The commands of this crate, as the `lorarun` binary calls them: words in, exit code out.

use std::ffi::OsString;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use collectives::{CollectiveError, Env, exit_code, report_failure};
use formats::Family;
use models::ModelError;

use crate::dataset::DatasetError;
use crate::lease::LeaseLost;
use crate::options::{self, Action, Parsed, UsageError};
use crate::run::Run;
use crate::train::Ending;
use crate::{config_check, console, device, selftest};

/// A failure and the code it ends the process with.
struct Failure {
    code: i32,
    error: anyhow::Error,
}

/// `lorarun train ARGS`: trains as the rank that `env` says.
pub fn train_main(args: &[OsString], env: &Env) -> i32 {
    console::set_rank(env.rank);
    finish(env, train(args, env))
}

/// `lorarun plan ARGS`: prints what `train` with these arguments would do and take, and trains
/// nothing.
pub fn plan_main(args: &[OsString], env: &Env) -> i32 {
    console::set_rank(env.rank);
    finish(env, plan(args, env))
}

fn plan(args: &[OsString], env: &Env) -> Result<i32, Failure> {
    let dry = OsString::from("--dry_run");
    let mut words = args.to_vec();
    if !words.contains(&dry) {
        words.push(dry);
    }
    let parsed = read_options(&words)?;
    if parsed.action != Action::Train {
        return train(args, env);
    }
    let wrong = |error| Failure { code: code_of(&error, exit_code::CONFIGURATION), error };
    let run = Run::resolve(&parsed, env).map_err(wrong)?;
    run.print_summary();
    run.check().map_err(wrong)?;
    Ok(exit_code::DONE)
}

fn read_options(args: &[OsString]) -> Result<Parsed, Failure> {
    options::parse(args).map_err(|error| Failure {
        code: if error.is::<UsageError>() { exit_code::USAGE } else { exit_code::CONFIGURATION },
        error,
    })
}

fn train(args: &[OsString], env: &Env) -> Result<i32, Failure> {
    let wrong = |error| Failure { code: exit_code::CONFIGURATION, error };
    let parsed = read_options(args)?;
    match &parsed.action {
        Action::Help(search) => {
            let text = match search.as_deref() {
                Some("markdown") => options::markdown(),
                search => options::help_text(search).map_err(wrong)?,
            };
            console::data(text.trim_end());
            Ok(exit_code::DONE)
        }
        Action::WriteConfig(path) => {
            if env.rank == 0 {
                options::write_config(path, &parsed.options).map_err(wrong)?;
                console::note(&format!("wrote {}", path.display()));
            }
            Ok(exit_code::DONE)
        }
        Action::CheckConfig => Ok(config_check::report(&parsed)),
        Action::Train => {
            let run = Run::prepare(&parsed, env).map_err(|error| Failure {
                code: code_of(&error, exit_code::CONFIGURATION),
                error,
            })?;
            if run.is_dry() {
                run.print_plan();
                return Ok(exit_code::DONE);
            }
            if run.is_debug() {
                run.print_batches(env).map_err(|error| Failure {
                    code: code_of(&error, exit_code::FAILURE),
                    error,
                })?;
                return Ok(exit_code::DONE);
            }
            match run.train(env) {
                Ok(Ending::Complete) => Ok(exit_code::DONE),
                Ok(Ending::Stopped) => Ok(exit_code::REQUEUE),
                Err(error) => Err(Failure { code: code_of(&error, exit_code::FAILURE), error }),
            }
        }
    }
}

/// Data and model files that are wrong are configuration; ranks that are lost are not.
fn code_of(error: &anyhow::Error, otherwise: i32) -> i32 {
    let lost = |cause: &(dyn std::error::Error + 'static)| cause.is::<CollectiveError>();
    let wrong = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<DatasetError>() || cause.is::<ModelError>()
    };
    if error.chain().any(|cause| cause.is::<LeaseLost>()) {
        // Trying again would take the names from the run that has them now.
        exit_code::CONFIGURATION
    } else if error.chain().any(lost) {
        exit_code::FAILURE
    } else if error.chain().any(wrong) {
        exit_code::CONFIGURATION
    } else {
        otherwise
    }
}

/// Compares this machine's arithmetic with PyTorch's
#[derive(Debug, Parser)]
#[command(name = "lorarun selftest", rename_all = "snake_case")]
struct SelftestArgs {
    /// Folder with cases.json, init, ref and after5 tensors; default: a small set inside the program
    #[arg(long, requires = "base")]
    reference: Option<std::path::PathBuf>,
    /// Folder with the model, inputs and results without LoRA
    #[arg(long, requires = "reference")]
    base: Option<std::path::PathBuf>,
    /// Device to test
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Recompute blocks in the backward pass
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Compare each operation of a card with the CPU's instead of a model with PyTorch's
    #[arg(long, conflicts_with = "reference")]
    operations: bool,
    /// Only write a full-size model with random weights to this folder, for measurements: 2 GB, of
    /// SDXL 6.9 GB
    #[arg(long)]
    write_model: Option<std::path::PathBuf>,
    /// Which model `--write_model` writes
    #[arg(long, default_value = "sd1", requires = "write_model")]
    family: ModelFamily,
    /// Only compare the tensors of two files
    #[arg(long, num_args = 2, value_names = ["FILE", "FILE"])]
    compare: Option<Vec<std::path::PathBuf>>,
    /// How far numbers of `--compare` may differ, as a part of the tensor's largest
    #[arg(long, default_value = "0", requires = "compare")]
    tolerance: f64,
}

/// Families of models on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModelFamily {
    Sd1,
    Sd2,
    Sdxl,
}

/// `lorarun selftest ARGS`.
pub fn selftest_main(args: &[OsString], env: &Env) -> i32 {
    console::set_rank(env.rank);
    let words = std::iter::once(OsString::from("lorarun selftest")).chain(args.iter().cloned());
    let args = match SelftestArgs::try_parse_from(words) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { exit_code::USAGE } else { exit_code::DONE };
        }
    };
    let result = run_selftest(&args);
    finish(env, result.map_err(|error| Failure { code: exit_code::CONFIGURATION, error }))
}

fn run_selftest(args: &SelftestArgs) -> Result<i32> {
    if let Some(folder) = &args.write_model {
        let family = match args.family {
            ModelFamily::Sd1 => Family::Sd1,
            ModelFamily::Sd2 => Family::Sd2,
            ModelFamily::Sdxl => Family::Sdxl,
        };
        selftest::write_random_model(folder, family)?;
        return Ok(exit_code::DONE);
    }
    let report = match &args.compare {
        Some(files) => selftest::compare_pair(files, args.tolerance)?,
        None => run_on_device(args)?,
    };
    let failed = report.failed.len();
    console::data(&format!("{} comparisons, {failed} failed", report.compared));
    for name in &report.failed {
        console::note(&format!("failed: {name}"));
    }
    Ok(if failed == 0 { exit_code::DONE } else { exit_code::FAILURE })
}

fn run_on_device(args: &SelftestArgs) -> Result<selftest::Report> {
    let device = device::open(&args.device)?;
    match (&args.reference, &args.base) {
        _ if args.operations => selftest::run_operations(device),
        (Some(case), Some(base)) => selftest::run(case, base, device, args.gradient_checkpointing)
            .with_context(|| format!("selftest of {}", case.display())),
        _ => selftest::run_embedded(device, args.gradient_checkpointing),
    }
}

fn finish(env: &Env, result: Result<i32, Failure>) -> i32 {
    match result {
        Ok(code) => code,
        Err(Failure { code, error }) => {
            report_failure(env, &format!("error: {error:#}"));
            code
        }
    }
}
