//! The command line of `lorarun spec`. What ends up in a file is checked here, word by word, so that
//! no value can mean more in a manifest or a shell than it says.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Options of `spec`.
#[derive(Debug, Args)]
pub struct Options {
    /// What to make.
    #[command(subcommand)]
    pub what: What,
}

/// The files that can be made, and their check.
#[derive(Debug, Subcommand)]
pub enum What {
    /// A batch script for Slurm that requeues itself until the run is done
    Slurm(SlurmAsked),
    /// An Indexed Job and its Service for Kubernetes
    Kubernetes(PodsAsked),
    /// A JobSet for Kubernetes
    #[command(alias = "job-set")]
    Jobset(PodsAsked),
    /// A TrainJob and its runtime for Kubeflow Trainer
    #[command(alias = "train-job")]
    Trainjob(PodsAsked),
    /// Say what is wrong with batch scripts or manifests, beyond what a schema sees
    Check {
        /// Batch scripts (`#!` first) or manifests
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// What every kind of file is made of.
#[derive(Debug, Args)]
pub struct Asked {
    /// Config of the run, as `lorarun train` takes it
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,

    /// Name of the job [default: the config's output_name]
    #[arg(long, value_name = "NAME", value_parser = label)]
    pub name: Option<String>,

    /// Number of nodes
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub nodes: u32,

    /// GPUs of each node, one process on each; 0 trains on the CPU with one process a node
    #[arg(long = "gpus_per_node", alias = "gpus-per-node", value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus_per_node: u32,

    /// CPU cores of each node [default: 8 for each process]
    #[arg(long = "cpus_per_node", alias = "cpus-per-node", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub cpus_per_node: Option<u32>,

    /// Memory of each node in GiB [default: estimated from the model's size]
    #[arg(long = "memory_gib", alias = "memory-gib", value_name = "GIB",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub memory_gib: Option<u32>,

    /// Seconds between the warning and the end, longer than a save takes
    #[arg(long = "grace", value_name = "SECONDS", default_value = "180",
          value_parser = clap::value_parser!(u32).range(60..=65535))]
    pub grace: u32,

    /// File to write [default: standard output]
    #[arg(short = 'o', long = "output", value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// What a batch script needs beside.
#[derive(Debug, Args)]
pub struct SlurmAsked {
    /// What all need.
    #[command(flatten)]
    pub asked: Asked,

    /// Time limit of one start: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS
    #[arg(long, value_name = "TIME", default_value = "08:00:00", value_parser = time_limit)]
    pub time: String,

    /// Partition [default: the cluster's]
    #[arg(long, value_name = "NAME", value_parser = word)]
    pub partition: Option<String>,

    /// Account to charge
    #[arg(long, value_name = "NAME", value_parser = word)]
    pub account: Option<String>,

    /// Quality of service
    #[arg(long, value_name = "NAME", value_parser = word)]
    pub qos: Option<String>,
}

/// What pods need beside.
#[derive(Debug, Args)]
pub struct PodsAsked {
    /// What all need.
    #[command(flatten)]
    pub asked: Asked,

    /// Image with lorarun, by tag or digest (deploy/Dockerfile makes one)
    #[arg(long, value_name = "IMAGE", value_parser = image)]
    pub image: String,

    /// Namespace
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = label)]
    pub namespace: String,

    /// Claim with config, model and pictures, and the folder where it is mounted: CLAIM[:FOLDER];
    /// may be repeated [default of the folder: the one that holds all absolute paths of the config,
    /// or /data]
    #[arg(long = "pvc", value_name = "CLAIM[:FOLDER]", default_value = "lorarun-data",
          value_parser = claim)]
    pub pvc: Vec<Claim>,

    /// Secret whose key `token` seals what the nodes say to each other
    #[arg(long = "token_secret", alias = "token-secret", value_name = "NAME",
          default_value = "lorarun-token", value_parser = label)]
    pub token_secret: String,
}

/// A claim and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: String,
    /// The folder, where one was said.
    pub folder: Option<String>,
}

/// A name as Kubernetes takes it.
pub fn label(text: &str) -> Result<String, String> {
    let is_fine = !text.is_empty()
        && text.len() <= 52
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    match is_fine {
        true => Ok(text.to_owned()),
        false => Err("lower-case letters, digits and hyphens are needed, at most 52 of them, \
                      beginning and ending with a letter or digit"
            .to_owned()),
    }
}

fn claim(text: &str) -> Result<Claim, String> {
    let (name, folder) = match text.split_once(':') {
        Some((name, folder)) => (name, Some(folder)),
        None => (text, None),
    };
    let name = label(name)?;
    let folder = folder.map(mount_folder).transpose()?;
    Ok(Claim { name, folder })
}

/// A folder where something can be mounted.
pub fn mount_folder(text: &str) -> Result<String, String> {
    let folder = text.trim_end_matches('/');
    let is_plain = folder.starts_with('/')
        && folder.split('/').skip(1).all(|part| {
            !matches!(part, "" | "." | "..")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@+ ".contains(&b))
        });
    let system = ["/tmp", "/dev", "/proc", "/sys", "/etc", "/usr", "/bin", "/lib", "/lib64"];
    let first = folder.split('/').nth(1).map(|part| format!("/{part}")).unwrap_or_default();
    if !is_plain {
        return Err(format!("an absolute folder of plain names is needed, got: {text}"));
    }
    if system.contains(&first.as_str()) {
        return Err(format!("`{first}` belongs to the system, choose another folder, got: {text}"));
    }
    Ok(folder.to_owned())
}

fn image(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"./:@_-".contains(&b);
    match !text.is_empty() && text.bytes().all(plain) && !text.starts_with(['-', '/', ':']) {
        true => Ok(text.to_owned()),
        false => Err("letters, digits and any of `./:@_-` are needed".to_owned()),
    }
}

fn word(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._,-".contains(&b);
    match !text.is_empty() && text.bytes().all(plain) && !text.starts_with('-') {
        true => Ok(text.to_owned()),
        false => Err("letters, digits and any of `._,-` are needed".to_owned()),
    }
}

fn time_limit(text: &str) -> Result<String, String> {
    match super::sbatch_rules::is_time(text) {
        true => Ok(text.to_owned()),
        false => Err(
            "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]] \
                      is needed"
                .to_owned(),
        ),
    }
}
