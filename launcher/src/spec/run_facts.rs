//! What a config says of the run that a cluster has to know: its name, its files, what it takes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use trainer::options::{OPTIONS, Options, Parsed};

use super::options::Asked;

/// Memory of a process beside the model, in GiB: pictures, latents, the libraries of a card.
const BESIDE_MODEL_GIB: u64 = 6;
/// Memory of a process whose model is not here to be measured, in GiB.
const UNKNOWN_MODEL_GIB: u64 = 16;

/// The facts.
#[derive(Debug)]
pub struct RunFacts {
    /// Name of the job, as Kubernetes and Slurm take it.
    pub name: String,
    /// The config as it was named.
    pub config: String,
    /// Absolute paths of the config with the options that hold them, itself included.
    pub paths: Vec<(String, PathBuf)>,
    /// Processes of a node.
    pub processes: u32,
    /// CPU cores of a node.
    pub cpus: u32,
    /// Memory of a node.
    pub memory_gib: u32,
}

impl RunFacts {
    /// Reads the config.
    ///
    /// # Errors
    /// A config that `train` would refuse.
    pub fn gather(asked: &Asked) -> Result<RunFacts> {
        let config = asked.config.to_str().context("the name of the config should be UTF-8")?;
        if config.chars().any(char::is_control) {
            bail!("the name of the config should have no control characters, got: {config:?}");
        }
        let parsed = trainer::options::parse(&[asked.config.clone().into_os_string()])?;
        let name = asked.name.clone().unwrap_or_else(|| name_of(&parsed.options));
        let processes = asked.gpus_per_node.max(1);
        let memory = asked.memory_gib.unwrap_or_else(|| memory_gib(&parsed.options, processes));
        Ok(RunFacts {
            name,
            config: config.to_owned(),
            paths: absolute_paths(&asked.config, &parsed)?,
            processes,
            cpus: asked.cpus_per_node.unwrap_or(8 * processes),
            memory_gib: memory,
        })
    }
}

/// The output name in the letters that a job may have.
fn name_of(options: &Options) -> String {
    let name = options.output_name.as_deref().unwrap_or("lorarun").to_lowercase();
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(52).collect();
    let parts: Vec<&str> = plain.split('-').filter(|part| !part.is_empty()).collect();
    match parts.is_empty() {
        true => "lorarun".to_owned(),
        false => parts.join("-"),
    }
}

/// A model is mapped and its weights are converted, so that it is there twice for a while.
fn memory_gib(options: &Options, processes: u32) -> u32 {
    let model = options.pretrained_model_name_or_path.as_ref();
    let bytes = model.and_then(|path| std::fs::metadata(path).ok()).filter(|facts| facts.is_file());
    let each = match bytes {
        Some(facts) => BESIDE_MODEL_GIB + (2 * facts.len()).div_ceil(1 << 30),
        None => UNKNOWN_MODEL_GIB,
    };
    u32::try_from(each * u64::from(processes)).unwrap_or(u32::MAX)
}

/// Every text of config and datasets that is an absolute path, with what holds it.
fn absolute_paths(config: &Path, parsed: &Parsed) -> Result<Vec<(String, PathBuf)>> {
    let mut paths = Vec::new();
    if config.is_absolute() {
        paths.push(("the config".to_owned(), config.to_owned()));
    }
    let written = OPTIONS.iter().filter(|spec| parsed.options.written.contains_key(spec.name));
    for spec in written.filter(|spec| spec.name != "config_file") {
        if let Some(value) = (spec.read)(&parsed.options) {
            walk(spec.name, &value, &mut paths);
        }
    }
    if let Some(datasets) = &parsed.datasets {
        walk("datasets", &toml::Value::Table(datasets.clone()), &mut paths);
    }
    if let Some(path) = &parsed.options.dataset_config {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read `dataset_config`: `{shown}`"))?;
        if let Ok(table) = text.parse::<toml::Table>() {
            walk("datasets", &toml::Value::Table(table), &mut paths);
        }
    }
    Ok(paths)
}

fn walk(key: &str, value: &toml::Value, paths: &mut Vec<(String, PathBuf)>) {
    match value {
        toml::Value::String(text) if text.len() > 1 && text.starts_with('/') => {
            paths.push((format!("`{key}`"), PathBuf::from(text)));
        }
        toml::Value::Array(values) => values.iter().for_each(|value| walk(key, value, paths)),
        toml::Value::Table(table) => table.iter().for_each(|(key, value)| walk(key, value, paths)),
        _ => {}
    }
}
