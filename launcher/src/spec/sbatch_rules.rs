//! What is wrong with a batch script: what Slurm would take and the run would not survive.

use trainer::options::closest;

/// Directives that a script for lorarun may have.
const KNOWN: [&str; 44] = [
    "account",
    "array",
    "begin",
    "chdir",
    "comment",
    "constraint",
    "cpus-per-gpu",
    "cpus-per-task",
    "dependency",
    "distribution",
    "error",
    "exclude",
    "exclusive",
    "export",
    "gpu-bind",
    "gpus",
    "gpus-per-node",
    "gpus-per-task",
    "gres",
    "hint",
    "hold",
    "job-name",
    "licenses",
    "mail-type",
    "mail-user",
    "mem",
    "mem-per-cpu",
    "mem-per-gpu",
    "nice",
    "no-requeue",
    "nodelist",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "priority",
    "qos",
    "requeue",
    "reservation",
    "signal",
    "time",
    "tmp",
];
/// Those of which the value is a count.
const COUNTS: [&str; 6] =
    ["nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "cpus-per-gpu"];
/// The shortest warning, in seconds.
const LEAST_GRACE: u32 = 60;

/// The faults of a script.
pub fn faults_of(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let directives = directives(text, &mut faults);
    let value = |name: &str| {
        directives.iter().rfind(|(have, _)| have == name).map(|(_, value)| value.as_str())
    };
    for (name, value) in &directives {
        if !KNOWN.contains(&name.as_str()) {
            let near = closest(name, &KNOWN).map(|near| format!(", did you mean `--{near}`?"));
            faults.push(format!("unknown directive: `--{name}`{}", near.unwrap_or_default()));
        }
        if COUNTS.contains(&name.as_str()) && !is_count(name, value) {
            faults.push(format!("`--{name}` should be a number from 1, got: {value}"));
        }
    }
    if value("ntasks-per-node") != Some("1") {
        faults.push(
            "`--ntasks-per-node=1` is missing: one launcher starts a node's processes".into(),
        );
    }
    for name in ["gpus-per-task", "gpu-bind"] {
        if value(name).is_some() {
            faults.push(format!(
                "`--{name}` hides GPUs from the launcher, which starts a process on each it sees: \
                 use `--gpus-per-node`"
            ));
        }
    }
    match value("time") {
        Some(time) if is_time(time) => {}
        Some(time) => faults.push(format!("`--time` is no time limit, got: {time}")),
        None => faults.push("`--time` is missing".into()),
    }
    match value("signal") {
        Some(signal) => faults.extend(fault_of_signal(signal)),
        None => faults.push(
            "`--signal=USR1@SECONDS` is missing: the time limit would come without warning".into(),
        ),
    }
    if value("requeue").is_some() && value("open-mode") != Some("append") {
        faults.push("`--open-mode=append` is missing: a requeue would empty the log".into());
    }
    if value("no-requeue").is_some() {
        faults.push("`--no-requeue` ends the run at the first preemption".into());
    }
    faults.extend(faults_of_commands(text, value("requeue").is_some()));
    faults
}

/// The directives, in order, with their values.
fn directives(text: &str, faults: &mut Vec<String>) -> Vec<(String, String)> {
    let mut directives = Vec::new();
    let mut in_commands = false;
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("#SBATCH") {
            if in_commands {
                faults.push(format!("Slurm reads no directive after the first command: `{line}`"));
            }
            for word in words.split_whitespace() {
                match word.strip_prefix("--").map(|word| word.split_once('=').unwrap_or((word, "")))
                {
                    Some((name, value)) => directives.push((name.to_owned(), value.to_owned())),
                    None => faults.push(format!("write it as `--name=value`: `{line}`")),
                }
            }
        } else if !line.trim().is_empty() && !line.starts_with('#') {
            in_commands = true;
        }
    }
    directives
}

fn is_count(name: &str, value: &str) -> bool {
    // `--nodes=2-4`, `--gpus-per-node=a100:4`.
    let number = match name {
        "nodes" => value.split('-').next_back(),
        "gpus-per-node" => value.rsplit(':').next(),
        _ => Some(value),
    };
    let is_range = name != "nodes" || value.split('-').all(|part| part.parse::<u32>().is_ok());
    is_range
        && number.and_then(|number| number.parse::<u32>().ok()).is_some_and(|number| number > 0)
}

fn fault_of_signal(signal: &str) -> Option<String> {
    if signal.starts_with("B:") {
        return Some("`--signal=B:...` reaches the batch shell alone: leave `B:` out".into());
    }
    let (name, seconds) = signal.split_once('@')?;
    let name = name.strip_prefix("R:").unwrap_or(name);
    let is_polite = ["USR1", "SIGUSR1", "USR2", "SIGUSR2", "TERM", "SIGTERM", "10", "12", "15"];
    if !is_polite.contains(&name) {
        return Some(format!("`--signal` should be USR1, USR2 or TERM, got: {name}"));
    }
    match seconds.parse::<u32>() {
        Ok(LEAST_GRACE..=65535) => None,
        _ => Some(format!(
            "`--signal` should come {LEAST_GRACE} to 65535 seconds before the end, got: {seconds}"
        )),
    }
}

fn faults_of_commands(text: &str, requeue: bool) -> Vec<String> {
    let commands: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n")
        .replace("\\\n", " ");
    let mut faults = Vec::new();
    let Some(step) = commands.lines().find(|line| line.contains("srun ")) else {
        return vec!["no `srun`: without it signals do not reach the launcher".into()];
    };
    if !step.contains("--resume") {
        faults.push("`--resume auto` is missing: a requeued run would begin anew".into());
    }
    if step.contains("--kill-on-bad-exit=1") || step.contains(" -K") {
        faults.push("`--kill-on-bad-exit` ends nodes that still save, and hides exit codes".into());
    }
    if step.contains(" &") || step.contains("| ") {
        faults.push("the exit code of `srun` is lost: run it neither in a pipe nor behind".into());
    }
    if commands.contains("scontrol requeue") {
        if !requeue {
            faults.push("`--requeue` is missing: `scontrol requeue` would be refused".into());
        }
        if !commands.contains("75") {
            faults.push("only exit code 75 should be requeued".into());
        }
        if !commands.contains("JobState") {
            faults.push(
                "`scontrol requeue` brings back even a cancelled job: ask for its state".into(),
            );
        }
        if step.starts_with("exec ") {
            faults.push("after `exec` nothing is run: `scontrol requeue` is never reached".into());
        }
    }
    faults
}

/// Whether Slurm takes this as a time limit that is above zero.
pub fn is_time(text: &str) -> bool {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days), rest),
        None => (None, text),
    };
    let parts: Vec<&str> = days.into_iter().chain(rest.split(':')).collect();
    let is_number = |part: &&str| {
        !part.is_empty() && part.len() <= 6 && part.bytes().all(|b| b.is_ascii_digit())
    };
    let most = if days.is_some() { 4 } else { 3 };
    parts.len() <= most
        && parts.iter().all(is_number)
        && parts.iter().any(|part| part.parse::<u32>().is_ok_and(|number| number > 0))
}
