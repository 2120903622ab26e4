//! Hosts in network namespaces: own addresses and names on one machine. One lab at a time on the whole
//! machine, since their names and addresses are fixed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::root;

/// Hosts `h1` to `hN` at 10.77.0.1 to 10.77.0.N; they go when it is dropped.
pub struct Lab {
    hosts: usize,
    /// Held as long as the lab stands.
    _lock: File,
}

fn script() -> PathBuf {
    root().join("tests/cluster/lab/netns.sh")
}

impl Lab {
    /// Makes hosts; `None`, said loudly, where the machine forbids it.
    pub fn up(test: &str, hosts: usize) -> Option<Lab> {
        let path = std::env::temp_dir().join("lorarun-lab.lock");
        let lock = File::create(path).expect("a lock file");
        // SAFETY: a plain system call on an open descriptor; the lock ends with the file.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        let down = Command::new("bash").arg(script()).arg("down").output();
        let up = Command::new("bash").arg(script()).args(["up", &hosts.to_string()]).output();
        let why = match (down, up) {
            (Ok(_), Ok(up)) if up.status.success() => return Some(Lab { hosts, _lock: lock }),
            (_, Ok(up)) => String::from_utf8_lossy(&up.stderr).trim().to_owned(),
            (_, Err(error)) => error.to_string(),
        };
        assert!(
            std::env::var_os("LORARUN_REQUIRE_LAB").is_none(),
            "{test} needs hosts in network namespaces: {why}"
        );
        eprintln!("SKIPPED {test}: no network namespaces (root and iproute2 are needed): {why}");
        None
    }

    /// Number of hosts.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// A command on a host, from 1. The process has the id of the child that is started.
    pub fn on(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("bash");
        command.arg(script()).args(["exec", &name(host), program]).current_dir(root());
        command
    }

    /// Cuts the power of a host: all its processes are gone, without a word on the network.
    pub fn cut_power(&self, host: usize) {
        self.run(&["kill", &name(host)]);
    }

    /// Pulls the cable.
    pub fn unplug(&self, host: usize) {
        self.run(&["unplug", &name(host)]);
    }

    /// Puts it back.
    pub fn plug(&self, host: usize) {
        self.run(&["plug", &name(host)]);
    }

    /// What `from` sends no longer reaches `to`; the other way is open.
    pub fn cut_one_way(&self, from: usize, to: usize) {
        self.run(&["cut1", &name(from), &name(to)]);
    }

    /// Ends all cuts between two hosts.
    pub fn heal(&self, one: usize, other: usize) {
        self.run(&["heal", &name(one), &name(other)]);
    }

    /// Ids of the processes that run on a host.
    pub fn processes(&self, host: usize) -> Vec<i32> {
        let space = format!("lr-{}", name(host));
        let output = Command::new("ip").args(["netns", "pids", &space]).output().expect("ip runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    fn run(&self, words: &[&str]) {
        let output = Command::new("bash").arg(script()).args(words).output().expect("bash runs");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// `h2`.
pub fn name(host: usize) -> String {
    format!("h{host}")
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A lab that is half gone is made anew by the next one.
        drop(Command::new("bash").arg(script()).arg("down").output());
    }
}
