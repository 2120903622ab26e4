//! From the words of the command line and the config file to [`Options`].
//!
//! The command line wins over the file, the file over the defaults. Names are strict: an unknown
//! one is refused with a suggestion. All faults of a file are reported at once.

use super::config_file::{ConfigFile, add_toml_suffix, find_config, read_config};
use super::foreign::Foreign;
use super::front_ends::{self, Meaning};
use super::suggest::closest;
use super::{Kind, OPTIONS, OptionSpec, Options, Origin, validate};
use anyhow::{Context, Result, anyhow, bail};
use std::ffi::OsString;
use std::path::PathBuf;
use toml::Value;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Train, or with `dry_run` print the plan.
    Train,
    /// Say what is wrong or unusual about the options.
    CheckConfig,
    /// Print the help, all of it or what matches the word.
    Help(Option<String>),
    /// Write the options to this file.
    WriteConfig(PathBuf),
}

/// The command line and the config file, read and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// What to do.
    pub action: Action,
    /// Every option. Checked across options only for [`Action::Train`].
    pub options: Options,
    /// `[general]` and `[[datasets]]` of the config file, where it holds them.
    pub datasets: Option<toml::Table>,
    /// The config file that was read.
    pub config_path: Option<PathBuf>,
    /// Remarks for the user: options without effect, values changed or ignored.
    pub notes: Vec<String>,
    /// What would stop the run; empty unless the action is [`Action::CheckConfig`].
    pub problems: Vec<String>,
}

/// A fault of the command line itself, as opposed to one in a config file.
#[derive(Debug)]
pub struct UsageError(anyhow::Error);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for UsageError {}

fn usage(error: anyhow::Error) -> anyhow::Error {
    UsageError(error).into()
}

/// Finds an option by name.
pub fn find_option(name: &str) -> Option<&'static OptionSpec> {
    OPTIONS.iter().find(|spec| spec.name == name)
}

/// Reads the words after `train` and the config file they name.
pub fn parse(args: &[OsString]) -> Result<Parsed> {
    if args.is_empty() {
        return Err(usage(anyhow!(
            "no config file is named\nhint: `lorarun train config.toml`, or `lorarun train --help`"
        )));
    }
    let line = CommandLine::read(args).map_err(usage)?;
    let mut parsed = Parsed {
        action: Action::Train,
        options: Options::default(),
        datasets: None,
        config_path: None,
        notes: line.ignored.clone(),
        problems: Vec::new(),
    };
    if let Some(search) = line.help {
        parsed.action = Action::Help(search);
        return Ok(parsed);
    }
    for (spec, value) in &line.values {
        assign(&mut parsed.options, spec, value, Origin::CommandLine).map_err(usage)?;
    }
    let config = config_name(line.positional, &parsed.options)?;
    if parsed.options.output_config {
        let Some(name) = config else {
            bail!(
                "`--output_config` needs the name of the file to write\nhint: add `--config_file NAME.toml`"
            );
        };
        parsed.action = Action::WriteConfig(add_toml_suffix(&name));
        return Ok(parsed);
    }
    if let Some(name) = config {
        let path = find_config(&name)?;
        let file = read_config(&path)?;
        let names_a_model =
            |(spec, _): &(&OptionSpec, Value)| spec.name == "pretrained_model_name_or_path";
        if file.entries.is_empty() && !line.values.iter().any(names_a_model) {
            bail!(
                "the file describes a dataset alone: `{}`\nhint: name it as `dataset_config` in a config file that names the model and the rest",
                path.display()
            );
        }
        // The file comes first so that the command line, applied once more, wins.
        parsed.options = Options::default();
        parsed.problems = apply_file(&mut parsed, &file, line.allows_unknown);
        for (spec, value) in &line.values {
            assign(&mut parsed.options, spec, value, Origin::CommandLine)?;
        }
        parsed.options.config_file = Some(path.clone());
        parsed.datasets = file.datasets;
        parsed.config_path = Some(path);
    }
    if parsed.options.config_check {
        parsed.action = Action::CheckConfig;
    } else if !parsed.problems.is_empty() {
        bail!(parsed.problems.join("\n"));
    }
    let has_datasets = parsed.datasets.is_some();
    let review = validate::check_and_complete(&mut parsed.options, has_datasets);
    parsed.notes.extend(review.notes);
    parsed.problems.extend(review.problems);
    if !parsed.problems.is_empty() && parsed.action == Action::Train {
        bail!(parsed.problems.join("\n"));
    }
    Ok(parsed)
}

/// Writes the options that differ from their defaults to a new TOML file.
pub fn write_config(path: &std::path::Path, options: &Options) -> Result<()> {
    use std::io::Write;
    let shown = path.display();
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("cannot make the config file: `{shown}`"))?;
    file.write_all(options.to_toml().as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write the config file: `{shown}`"))
}

/// The config file that is named, as first word or as option, but not as both.
fn config_name(positional: Option<String>, options: &Options) -> Result<Option<PathBuf>> {
    match (positional, &options.config_file) {
        (Some(first), Some(second)) if first.as_str() != second.as_os_str() => bail!(
            "two config files are named: `{first}` and `{}`\nhint: give one of them",
            second.display()
        ),
        (Some(first), _) => Ok(Some(PathBuf::from(first))),
        (None, second) => Ok(second.clone()),
    }
}

/// Sets every option of a file; gives the faults.
fn apply_file(parsed: &mut Parsed, file: &ConfigFile, allows_unknown: bool) -> Vec<String> {
    let allowed = file.entries.iter().find(|entry| entry.key == "allow_unknown");
    let allows_unknown =
        allows_unknown || allowed.is_some_and(|entry| !front_ends::is_nothing(&entry.value));
    let mut faults = Vec::new();
    let mut foreign = Foreign::default();
    for entry in &file.entries {
        let origin = Origin::File { path: file.path.clone(), line: entry.line };
        let place = format!("{}:{}", file.path.display(), entry.line);
        let key = entry.key.replace('-', "_");
        match find_option(&key) {
            Some(spec) if matches!(spec.name, "config_file" | "output_config") => {
                parsed
                    .notes
                    .push(format!("{place}: `{}` has no effect inside a config file", spec.name));
            }
            Some(spec) => {
                let Some(value) = front_ends::meant_value(spec, &entry.value) else { continue };
                if let Err(fault) = assign(&mut parsed.options, spec, &value, origin) {
                    faults.push(fault.to_string());
                }
            }
            None => match front_ends::meaning_of(&key) {
                Some(meaning) => faults.extend(foreign.take(&key, &entry.value, meaning, origin)),
                None if allows_unknown => parsed
                    .notes
                    .push(format!("warning: {place}: unknown option, ignored: `{}`", entry.key)),
                None => faults.push(format!(
                    "{place}: unknown option: `{}`{}",
                    entry.key,
                    hint_for(&entry.key)
                )),
            },
        }
    }
    faults.extend(foreign.apply(parsed));
    faults
}

/// Sets one option and remembers where it was written.
pub(super) fn assign(
    options: &mut Options,
    spec: &OptionSpec,
    value: &Value,
    origin: Origin,
) -> Result<()> {
    if let Err(mismatch) = (spec.assign)(options, value) {
        bail!(
            "{} must be {}, not {}",
            origin.name_option(spec.name),
            mismatch.expected,
            mismatch.got
        );
    }
    options.written.insert(spec.name, origin);
    Ok(())
}

/// Names that users bring from elsewhere, with where they belong.
const ELSEWHERE: &[(&str, &str)] = &[
    ("num_processes", "it belongs before `train`: `lorarun --num_processes N train ...`"),
    ("num_machines", "it belongs before `train`"),
    ("rank", "here it is `network_dim`"),
    ("lora_rank", "here it is `network_dim`"),
    ("lr", "here it is `learning_rate`"),
    ("steps", "here it is `max_train_steps`"),
    ("epochs", "here it is `max_train_epochs`"),
];

/// The hint line for an unknown name, or nothing.
fn hint_for(name: &str) -> String {
    let plain = name.replace('-', "_").to_lowercase();
    if let Some((_, advice)) = ELSEWHERE.iter().find(|(known, _)| *known == plain) {
        return format!("\nhint: {advice}");
    }
    match front_ends::meaning_of(&plain) {
        Some(Meaning::Ignored(reason)) => return format!("\nhint: leave it out: {reason}"),
        Some(Meaning::Unread(advice)) => return format!("\nhint: {advice}"),
        Some(Meaning::Named(name)) => return format!("\nhint: here it is `{name}`"),
        Some(Meaning::Argument(option, key)) => {
            return format!("\nhint: it belongs into `{option}`, as `{key}=VALUE`");
        }
        None => {}
    }
    let names: Vec<&str> = OPTIONS.iter().map(|spec| spec.name).collect();
    match closest(&plain, &names) {
        Some(known) => format!("\nhint: did you mean `{known}`?"),
        None => "\nhint: `lorarun train --help` lists the options".to_owned(),
    }
}

/// The words of the command line, taken apart but not applied.
#[derive(Default)]
struct CommandLine {
    positional: Option<String>,
    values: Vec<(&'static OptionSpec, Value)>,
    /// With `--allow_unknown`: a remark for each unknown option.
    ignored: Vec<String>,
    allows_unknown: bool,
    help: Option<Option<String>>,
}

impl CommandLine {
    fn read(args: &[OsString]) -> Result<Self> {
        let mut words = Vec::with_capacity(args.len());
        for arg in args {
            let Some(word) = arg.to_str() else {
                bail!("the command line is not valid UTF-8: `{}`", arg.to_string_lossy());
            };
            words.push(word.to_owned());
        }
        let allows_unknown = words.iter().any(|word| {
            matches!(word.replace('-', "_").as_str(), "__allow_unknown" | "__allow_unknown=true")
        });
        let mut line = CommandLine { allows_unknown, ..CommandLine::default() };
        let mut rest = words.into_iter().peekable();
        while let Some(word) = rest.next() {
            if word == "-h" || word == "--help" {
                line.help = Some(rest.next());
                break;
            }
            let Some(name) = word.strip_prefix("--").filter(|name| !name.is_empty()) else {
                line.take_positional(word)?;
                continue;
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let Some(spec) = find_option(&name.replace('-', "_")) else {
                if allows_unknown {
                    // Whether it takes values is not known: what follows up to the next option may be.
                    while rest.next_if(|word| !word.starts_with("--")).is_some() {}
                    line.ignored.push(format!("warning: unknown option, ignored: `--{name}`"));
                    continue;
                }
                bail!("unknown option: `--{name}`{}", hint_for(name));
            };
            let value = read_value(spec, inline, &mut rest)?;
            line.values.retain(|(other, _)| other.name != spec.name);
            line.values.push((spec, value));
        }
        Ok(line)
    }

    fn take_positional(&mut self, word: String) -> Result<()> {
        if word.starts_with('-') && word.len() > 1 {
            bail!("unknown option: `{word}`\nhint: options start with two dashes");
        }
        if let Some(first) = &self.positional {
            bail!(
                "more than one config file is named: `{first}` and `{word}`\nhint: put a value that contains spaces into quotes"
            );
        }
        self.positional = Some(word);
        Ok(())
    }
}

/// Takes the value of an option from after its `=` or from the next words.
fn read_value(
    spec: &OptionSpec,
    inline: Option<String>,
    rest: &mut std::iter::Peekable<std::vec::IntoIter<String>>,
) -> Result<Value> {
    let text = Value::String;
    if spec.kind.takes_many() {
        let mut items: Vec<Value> = inline.into_iter().map(text).collect();
        while let Some(word) = rest.next_if(|word| !word.starts_with("--")) {
            items.push(text(word));
        }
        return Ok(Value::Array(items));
    }
    if let Some(value) = inline {
        return Ok(text(value));
    }
    if spec.kind == Kind::Flag {
        return Ok(Value::Boolean(true));
    }
    match rest.next_if(|word| !word.starts_with("--")) {
        Some(word) => Ok(text(word)),
        None => {
            bail!("`--{}` needs a value: `--{} {}`", spec.name, spec.name, spec.kind.placeholder())
        }
    }
}
