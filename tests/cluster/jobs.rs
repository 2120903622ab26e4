//! A job of several launchers, one on each host of a lab: starts them, reads what they say as they say
//! it, waits for words and for ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lab::{Lab, name};

/// A line and when it was read.
type Said = Arc<Mutex<Vec<(Instant, String)>>>;

/// One launcher.
pub struct Launcher {
    child: Child,
    said: Said,
    readers: Vec<std::thread::JoinHandle<()>>,
    /// For messages.
    host: usize,
}

/// How a launcher ended.
#[derive(Debug)]
pub struct End {
    /// As a shell shows it.
    pub code: i32,
    /// All lines of stdout and stderr.
    pub text: String,
}

impl Launcher {
    /// Starts `lorarun` with these arguments on a host.
    pub fn start(lab: &Lab, host: usize, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = lab.on(host, env!("CARGO_BIN_EXE_lorarun"));
        command.args(arguments).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("bash runs");
        let said = Said::default();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("a pipe")),
            Box::new(child.stderr.take().expect("a pipe")),
        ];
        let readers = streams
            .into_iter()
            .map(|stream| {
                let said = said.clone();
                std::thread::spawn(move || {
                    for line in BufReader::new(stream).lines().map_while(Result::ok) {
                        eprintln!("{}: {line}", name(host));
                        locked(&said).push((Instant::now(), line));
                    }
                })
            })
            .collect();
        Self { child, said, readers, host }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call on a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0, "{} is gone", self.host);
    }

    /// The time of the first line with `text` that was said at `since` or later.
    pub fn find(&self, text: &str, since: Instant) -> Option<(Instant, String)> {
        let said = locked(&self.said);
        said.iter().find(|(at, line)| *at >= since && line.contains(text)).cloned()
    }

    /// Waits for a line with `text`.
    pub fn wait_for(&mut self, text: &str, since: Instant, limit: Duration) -> (Instant, String) {
        let start = Instant::now();
        loop {
            if let Some(found) = self.find(text, since) {
                return found;
            }
            let ended = self.child.try_wait().expect("a child");
            if let Some(status) = ended
                && self.readers.iter().all(std::thread::JoinHandle::is_finished)
                && self.find(text, since).is_none()
            {
                panic!("{} ended ({status}) before it said: {text}", name(self.host));
            }
            assert!(
                start.elapsed() < limit,
                "{} did not say within {limit:?}: {text}",
                name(self.host)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// How often a line with `text` was said.
    pub fn count(&self, text: &str) -> usize {
        locked(&self.said).iter().filter(|(_, line)| line.contains(text)).count()
    }

    /// Waits for its end.
    pub fn end(mut self, limit: Duration) -> End {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if start.elapsed() >= limit {
                self.signal(libc::SIGKILL);
                panic!("{} did not end within {limit:?}", name(self.host));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader");
        }
        let code = std::os::unix::process::ExitStatusExt::signal(&status)
            .map_or_else(|| status.code().unwrap_or(-1), |signal| 128 + signal);
        let said = locked(&self.said);
        let lines: Vec<&str> = said.iter().map(|(_, line)| line.as_str()).collect();
        End { code, text: lines.join("\n") }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts a launcher on every host: `--nnodes`, numbers and addresses, then `options` and `command`.
pub fn start_all(lab: &Lab, nodes: &str, options: &[&str], command: &[&str]) -> Vec<Launcher> {
    (1..=lab.hosts()).map(|host| start_one(lab, host, nodes, options, command)).collect()
}

/// The launcher of one host.
pub fn start_one(
    lab: &Lab,
    host: usize,
    nodes: &str,
    options: &[&str],
    command: &[&str],
) -> Launcher {
    let number = (host - 1).to_string();
    let place = ["--nnodes", nodes, "--node_rank", &number, "--master_addr", "h1"];
    let arguments: Vec<&str> = place.iter().chain(options).chain(command).copied().collect();
    Launcher::start(lab, host, &arguments, &[("LORARUN_TOKEN", "a token of this test")])
}

/// Ids of the ranks among the processes of a host: those whose environment says so, with their
/// numbers.
pub fn ranks_of(lab: &Lab, host: usize) -> Vec<(usize, i32)> {
    let mut ranks = Vec::new();
    for pid in lab.processes(host) {
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else { continue };
        let variables = String::from_utf8_lossy(&environment).into_owned();
        let number = variables.split('\0').find_map(|v| v.strip_prefix("RANK=")?.parse().ok());
        ranks.extend(number.map(|number| (number, pid)));
    }
    ranks.sort_unstable();
    ranks
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: a plain system call on a process of this test.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "process {pid} is gone");
}

/// Waits until no process runs on a host any more; gives the time that took.
pub fn wait_until_empty(lab: &Lab, host: usize, limit: Duration) -> Duration {
    let start = Instant::now();
    loop {
        let left = lab.processes(host);
        if left.is_empty() {
            return start.elapsed();
        }
        assert!(start.elapsed() < limit, "{} still runs: {left:?}", name(host));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn locked(said: &Said) -> MutexGuard<'_, Vec<(Instant, String)>> {
    said.lock().unwrap_or_else(PoisonError::into_inner)
}
