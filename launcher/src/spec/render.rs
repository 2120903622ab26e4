//! The templates of `deploy/`, filled in.

use std::path::Path;

use anyhow::{Result, bail};

use super::options::{Asked, Claim, PodsAsked, SlurmAsked, mount_folder};
use super::run_facts::RunFacts;
use super::template::{fill, with_heading, without_lines};

const SBATCH: &str = include_str!("../../../deploy/slurm/auto_requeue.sbatch");
const INDEXED_JOB: &str = include_str!("../../../deploy/kubernetes/indexed_job.yaml");
const JOBSET: &str = include_str!("../../../deploy/kubernetes/jobset.yaml");
const TRAINJOB: &str = include_str!("../../../deploy/kubernetes/kubeflow_trainjob.yaml");

/// Where a claim is mounted when the config has no absolute path.
const DATA: &str = "/data";

/// A batch script that requeues itself.
pub fn slurm(options: &SlurmAsked) -> Result<String> {
    let asked = &options.asked;
    let facts = RunFacts::gather(asked)?;
    let directive = |name: &str, value: &Option<String>| match value {
        Some(value) => format!("#SBATCH --{name}={value}\n"),
        None => String::new(),
    };
    let more = [
        directive("partition", &options.partition),
        directive("account", &options.account),
        directive("qos", &options.qos),
    ];
    let text = fill(
        SBATCH,
        &[
            ("--job-name=lorarun", format!("--job-name={}", facts.name)),
            ("--nodes=1\n", format!("--nodes={}\n{}", asked.nodes, more.concat())),
            ("--gpus-per-node=4", format!("--gpus-per-node={}", asked.gpus_per_node)),
            ("--cpus-per-task=32", format!("--cpus-per-task={}", facts.cpus)),
            ("--mem=128G", format!("--mem={}G", facts.memory_gib)),
            ("--time=08:00:00", format!("--time={}", options.time)),
            ("USR1@120", format!("USR1@{}", asked.grace)),
            ("CONFIG=${1:-config.toml}", format!("CONFIG={}", shell_word(&facts.config))),
        ],
    )?;
    let text = match asked.gpus_per_node {
        0 => without_gpu_lines(&text),
        _ => text,
    };
    Ok(text.replace(
        "#   sbatch --nodes=2 deploy/slurm/auto_requeue.sbatch config.toml\n",
        "# (made by `lorarun spec slurm`; submit it with `sbatch`, from where the config's paths count)\n",
    ))
}

/// An Indexed Job and its Service.
pub fn indexed_job(options: &PodsAsked) -> Result<String> {
    let (facts, pods) = Pods::new(options, 0)?;
    let Pods { name, nodes, .. } = &pods;
    let mut values = pods.values(&facts)?;
    values.extend([
        ("  name: lorarun\n  namespace: default", pods.metadata("")),
        ("job-name: lorarun", format!("job-name: {name}")),
        ("value: lorarun-0.lorarun-nodes", format!("value: {name}-0.{name}-nodes")),
        ("lorarun-nodes", format!("{name}-nodes")),
        ("namespace: default", format!("namespace: {}", options.namespace)),
        ("completions: 2", format!("completions: {nodes}")),
        ("parallelism: 2", format!("parallelism: {nodes}")),
        ("value: \"2\"", format!("value: \"{nodes}\"")),
    ]);
    pods.finish(INDEXED_JOB, &values, "kubernetes")
}

/// A JobSet.
pub fn jobset(options: &PodsAsked) -> Result<String> {
    let (facts, pods) = Pods::new(options, 8)?;
    let Pods { name, nodes, .. } = &pods;
    let mut values = pods.values(&facts)?;
    values.extend([
        ("  name: lorarun\n  namespace: default", pods.metadata("")),
        ("value: lorarun-nodes-0-0.lorarun-nodes", format!("value: {name}-nodes-0-0.{name}-nodes")),
        ("subdomain: lorarun-nodes", format!("subdomain: {name}-nodes")),
        ("completions: 2", format!("completions: {nodes}")),
        ("parallelism: 2", format!("parallelism: {nodes}")),
        ("value: \"2\"", format!("value: \"{nodes}\"")),
    ]);
    pods.finish(JOBSET, &values, "jobset")
}

/// A TrainJob and its runtime.
pub fn trainjob(options: &PodsAsked) -> Result<String> {
    let (facts, pods) = Pods::new(options, 12)?;
    let Pods { name, nodes, .. } = &pods;
    let mut values = pods.values(&facts)?;
    values.extend([
        ("  name: lorarun\n  namespace: default", pods.metadata("")),
        ("  name: lorarun-runtime\n  namespace: default", pods.metadata("-runtime")),
        ("name: lorarun-runtime", format!("name: {name}-runtime")),
        ("numNodes: 2", format!("numNodes: {nodes}")),
        ("numProcPerNode: 4", format!("numProcPerNode: {}", facts.processes)),
    ]);
    pods.finish(TRAINJOB, &values, "trainjob")
}

/// What the three kinds of pods share.
struct Pods<'a> {
    options: &'a PodsAsked,
    name: String,
    nodes: u32,
    /// Claims and their folders.
    mounts: Vec<(String, String)>,
    /// How much deeper the pod lies than in the Indexed Job.
    depth: usize,
}

impl Pods<'_> {
    fn new(options: &PodsAsked, depth: usize) -> Result<(RunFacts, Pods<'_>)> {
        let facts = RunFacts::gather(&options.asked)?;
        let mounts = mounts(&options.pvc, &facts)?;
        let (name, nodes) = (facts.name.clone(), options.asked.nodes);
        Ok((facts, Pods { options, name, nodes, mounts, depth }))
    }

    fn metadata(&self, suffix: &str) -> String {
        format!("  name: {}{suffix}\n  namespace: {}", self.name, self.options.namespace)
    }

    /// What is put in the place of what every template has.
    fn values(&self, facts: &RunFacts) -> Result<Vec<(&'static str, String)>> {
        let Asked { gpus_per_node, grace, .. } = self.options.asked;
        let (pad, wide) = (" ".repeat(self.depth + 8), " ".repeat(self.depth + 12));
        let mut mounts = String::new();
        let mut volumes = String::new();
        for (index, (claim, folder)) in self.mounts.iter().enumerate() {
            let volume = if index == 0 { "data".to_owned() } else { format!("data-{index}") };
            let folder = serde_json::to_string(folder)?;
            let last = if index + 1 == self.mounts.len() { "" } else { "\n" };
            mounts += &format!("- name: {volume}\n{wide}  mountPath: {folder}{last}");
            volumes += &format!(
                "- name: {volume}\n{pad}  persistentVolumeClaim:\n{pad}    claimName: {claim}{last}"
            );
            if !last.is_empty() {
                mounts += &wide;
                volumes += &pad;
            }
        }
        let mount = match self.depth {
            0 => "- name: data\n              mountPath: /data",
            8 => "- name: data\n                      mountPath: /data",
            _ => "- name: data\n                          mountPath: /data",
        };
        let volume = match self.depth {
            0 => {
                "- name: data\n          persistentVolumeClaim:\n            claimName: lorarun-data"
            }
            8 => {
                "- name: data\n                  persistentVolumeClaim:\n                    \
                 claimName: lorarun-data"
            }
            _ => {
                "- name: data\n                      persistentVolumeClaim:\n                        \
                 claimName: lorarun-data"
            }
        };
        let folder = self.mounts.first().map_or(DATA, |(_, folder)| folder.as_str());
        Ok(vec![
            (mount, mounts),
            (volume, volumes),
            ("backoffLimit: 8", format!("backoffLimit: {}", 4 * self.nodes)),
            (
                "terminationGracePeriodSeconds: 180",
                format!("terminationGracePeriodSeconds: {grace}"),
            ),
            (
                "image: registry.example.com/lorarun:0.1.0",
                format!("image: {}", serde_json::to_string(&self.options.image)?),
            ),
            ("\"/data/config.toml\"", serde_json::to_string(&facts.config)?),
            ("workingDir: /data", format!("workingDir: {}", serde_json::to_string(folder)?)),
            ("name: lorarun-token", format!("name: {}", self.options.token_secret)),
            ("cpu: \"32\"", format!("cpu: \"{}\"", facts.cpus)),
            ("memory: 128Gi", format!("memory: {}Gi", facts.memory_gib)),
            ("nvidia.com/gpu: 4", format!("nvidia.com/gpu: {gpus_per_node}")),
        ])
    }

    fn finish(&self, template: &str, values: &[(&str, String)], kind: &str) -> Result<String> {
        let text = fill(template, values)?;
        let text = without_lines(&text, "nvidia.com/gpu: 0");
        let secret = format!(
            "kubectl -n {} create secret generic {} --from-literal=token=\"$(openssl rand -hex 32)\"",
            self.options.namespace, self.options.token_secret
        );
        let many = match self.nodes {
            1 => "",
            _ => {
                "\n# With several nodes every claim must be mountable by all of them (ReadWriteMany)."
            }
        };
        let heading = format!(
            "# Made by `lorarun spec {kind}`; `lorarun spec check FILE` checks it again after a change.\n\
             # Once for each namespace, the secret by which nodes know each other:\n\
             #   {secret}{many}"
        );
        Ok(with_heading(&text, &heading))
    }
}

/// Every claim with its folder; together they hold every absolute path of the config.
fn mounts(claims: &[Claim], facts: &RunFacts) -> Result<Vec<(String, String)>> {
    let mut mounts = Vec::new();
    for claim in claims {
        let folder = match &claim.folder {
            Some(folder) => folder.clone(),
            None if claims.len() > 1 => bail!(
                "several claims need their folders, got: `--pvc {0}`\n\
                 hint: `--pvc {0}:/folder`",
                claim.name
            ),
            None => shared_folder(facts)?,
        };
        if mounts.iter().any(|(_, other)| *other == folder) {
            bail!("two claims have the same folder: {folder}");
        }
        mounts.push((claim.name.clone(), folder));
    }
    for (key, path) in &facts.paths {
        if !mounts.iter().any(|(_, folder)| path.starts_with(folder)) {
            let folders: Vec<&str> = mounts.iter().map(|(_, folder)| folder.as_str()).collect();
            bail!(
                "{key} lies outside of what is mounted ({}): {}\n\
                 hint: `--pvc CLAIM:FOLDER` mounts a claim there; it may be repeated",
                folders.join(", "),
                path.display()
            );
        }
    }
    Ok(mounts)
}

/// The folder that holds all absolute paths.
fn shared_folder(facts: &RunFacts) -> Result<String> {
    let mut paths = facts.paths.iter();
    let Some((_, first)) = paths.next() else { return Ok(DATA.to_owned()) };
    let mut shared = first.parent().unwrap_or(Path::new("/")).to_owned();
    for (_, path) in paths {
        while !path.starts_with(&shared) {
            shared = shared.parent().unwrap_or(Path::new("/")).to_owned();
        }
    }
    let said: Vec<String> =
        facts.paths.iter().map(|(key, path)| format!("{key} {}", path.display())).collect();
    let shared = shared.to_string_lossy().into_owned();
    mount_folder(&shared).map_err(|why| {
        anyhow::anyhow!(
            "no folder for the claim holds all paths of the config: {why}\n{}\n\
             hint: `--pvc CLAIM:FOLDER` says where it is mounted; it may be repeated",
            said.join("\n")
        )
    })
}

/// A text as one word of a shell.
fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Without GPUs their line goes, and the comment that explains it.
fn without_gpu_lines(text: &str) -> String {
    let is_about_gpus =
        |line: &str| line.starts_with("#SBATCH --gpus") || line.starts_with("# Counted per node");
    text.split_inclusive('\n').filter(|line| !is_about_gpus(line)).collect()
}
