//! A real Slurm of three nodes on this machine, in a folder of its own; it goes when it is dropped. One
//! at a time on the whole machine, since its ports are fixed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::root;
use crate::lab::Lab;

/// For what Slurm does in its own time: a requeued job waits for ten seconds at least.
const PATIENCE: Duration = Duration::from_secs(180);

/// The cluster.
pub struct Slurm {
    folder: tempfile::TempDir,
    /// Nodes are hosts with addresses of their own.
    lab: Option<Lab>,
    /// Held as long as it stands.
    _lock: File,
}

impl Slurm {
    /// Starts it; `None`, said loudly, where the machine forbids it. With `hosts` every node is a host
    /// of a lab, otherwise all share this machine's network.
    pub fn up(test: &str, hosts: bool) -> Option<Slurm> {
        let missing = ["slurmctld", "slurmd", "sbatch", "munged"]
            .into_iter()
            .find(|program| !is_installed(program));
        // SAFETY: a plain system call.
        let root_is_missing = unsafe { libc::geteuid() } != 0;
        if missing.is_some() || root_is_missing {
            let why = missing.map_or("root is needed".to_owned(), |it| format!("no `{it}`"));
            assert!(std::env::var_os("LORARUN_REQUIRE_LAB").is_none(), "{test} needs Slurm: {why}");
            eprintln!("SKIPPED {test}: Slurm cannot be started here: {why}");
            return None;
        }
        let lock = File::create(std::env::temp_dir().join("lorarun-slurm.lock")).expect("a lock");
        // SAFETY: a plain system call on an open descriptor; the lock ends with the file.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        let lab = match hosts {
            true => Some(Lab::up(test, 3)?),
            false => None,
        };
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Slurm's own user keeps its state in it.
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), mode).expect("a folder of this test");
        let slurm = Slurm { folder, lab, _lock: lock };
        let up = slurm.script("slurm-up.sh").output().expect("bash runs");
        let said = String::from_utf8_lossy(&up.stderr).into_owned();
        assert!(up.status.success(), "Slurm does not start: {said}");
        slurm.wait("three idle nodes", || {
            slurm.says("sinfo", &["-h", "-N", "-p", "main", "-o", "%T"]).matches("idle").count()
                == 3
        });
        Some(slurm)
    }

    fn script(&self, name: &str) -> Command {
        let mut command = Command::new("bash");
        command.arg(root().join("tests/cluster/lab").join(name)).env("LAB", self.folder.path());
        command.env("NETNS", if self.lab.is_some() { "1" } else { "0" });
        // Daemons keep what they inherit open: pipes would never end.
        command.stdin(Stdio::null());
        command
    }

    /// One of Slurm's programs, told of this cluster.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf")).current_dir(root());
        if self.lab.is_none() {
            // The names of its nodes are known to Slurm alone.
            command.env("MASTER_ADDR", "127.0.0.1");
        }
        command
    }

    /// What a program prints; it must succeed.
    pub fn says(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().expect("it runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {error}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Waits until something holds.
    pub fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "{what} did not come within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        start.elapsed()
    }

    /// Submits a script of `deploy/slurm`; one CPU a task, no GPUs.
    pub fn submit(&self, script: &str, options: &[&str], job: &JobFiles) -> Job<'_> {
        let path = root().join("deploy/slurm").join(script);
        let log = format!("--output={}", job.log.display());
        let mut command = self.command("sbatch");
        command.args(["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=100M", &log]);
        command.args(options).arg(path).arg(&job.config);
        command.env("LORARUN", &job.lorarun).env("LOGS", &job.logs);
        let output = command.output().expect("sbatch runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Job { slurm: self, id, log: job.log.clone() }
    }

    /// A step of `srun` by itself, one CPU a task.
    pub fn step(&self, options: &[&str], words: &[&str], log: &Path) -> Child {
        let log = File::create(log).expect("a log");
        let mut command = self.command("srun");
        command.args(["--cpus-per-task=1", "--mem=100M"]).args(options);
        command.arg(env!("CARGO_BIN_EXE_lorarun")).args(words);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        command.spawn().expect("srun runs")
    }

    /// Cuts the power of a node.
    pub fn cut_power(&self, node: usize) {
        self.lab.as_ref().expect("nodes that are hosts").cut_power(node);
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // What is half gone is made anew by the next one.
        drop(self.script("slurm-down.sh").stdout(Stdio::null()).stderr(Stdio::null()).status());
    }
}

/// Whether a program is found as the system's own users find it.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// What a job reads and writes.
pub struct JobFiles {
    pub config: PathBuf,
    pub log: PathBuf,
    pub logs: PathBuf,
    /// Starts lorarun with the launcher's options.
    pub lorarun: PathBuf,
}

impl JobFiles {
    /// Files in `folder`; every launcher gets `options`.
    pub fn new(folder: &Path, config: PathBuf, options: &str) -> JobFiles {
        let lorarun = folder.join("lorarun.sh");
        let text = format!("#!/bin/sh\nexec {} {options} \"$@\"\n", env!("CARGO_BIN_EXE_lorarun"));
        std::fs::write(&lorarun, text).expect("a script");
        std::fs::set_permissions(&lorarun, std::fs::Permissions::from_mode(0o755))
            .expect("its rights");
        JobFiles { config, log: folder.join("job.log"), logs: folder.join("logs"), lorarun }
    }
}

/// A job that was submitted.
pub struct Job<'a> {
    slurm: &'a Slurm,
    pub id: String,
    log: PathBuf,
}

impl Job<'_> {
    /// All that it has said, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// A fact of `scontrol show job`.
    pub fn fact(&self, name: &str) -> String {
        let facts = self.slurm.says("scontrol", &["show", "job", &self.id]);
        let value =
            facts.split_whitespace().find_map(|word| word.strip_prefix(&format!("{name}=")));
        value.unwrap_or_else(|| panic!("no `{name}`: {facts}")).to_owned()
    }

    /// Waits until the log has said something this often.
    pub fn wait_for(&self, text: &str, count: usize) {
        let start = Instant::now();
        while self.log().matches(text).count() < count {
            let state = self.fact("JobState");
            assert!(
                start.elapsed() < PATIENCE && !["FAILED", "COMPLETED"].contains(&state.as_str()),
                "`{text}` was not said {count} times, {state}:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until it is in this state.
    pub fn wait_until(&self, state: &str) -> Duration {
        let start = Instant::now();
        while self.fact("JobState") != state {
            assert!(start.elapsed() < 3 * PATIENCE, "never {state}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(200));
        }
        start.elapsed()
    }
}
