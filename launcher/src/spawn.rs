//! Starts one rank: this binary again, with the environment contract set.
//!
//! A rank is in a process group of its own (Ctrl-C at the terminal reaches the launcher alone),
//! and the kernel kills it when the launcher dies, however that happens.

use std::ffi::OsString;
use std::io::pipe;
use std::os::fd::{OwnedFd, RawFd};
use std::process::Stdio;

use anyhow::{Context, Result};
use collectives::Env;
use collectives::env::nccl_defaults_on_shared_card;
use tokio::process::{Child, Command};

use crate::numa::{Binding, Call};
use crate::terminal;

/// Everything that makes a process a rank.
pub struct WorkerSpec {
    /// Its place in the run.
    pub env: Env,
    /// Whether NCCL shall take it for a host of its own.
    pub poses_as_host: bool,
    /// Cores that it is kept at.
    pub binding: Option<Binding>,
    /// Command line behind the program's name.
    pub arguments: Vec<OsString>,
    /// Where its stdout goes.
    pub stdout: Channel,
    /// Where its stderr goes.
    pub stderr: Channel,
}

/// How a stream of a rank reaches the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// It is the launcher's own.
    Inherited,
    /// The launcher reads it.
    Pipe,
    /// The launcher reads it, and to the rank it looks like a terminal.
    Terminal,
}

/// A started rank.
pub struct Worker {
    /// The process.
    pub child: Child,
    /// Process id, which is also the id of its process group.
    pub pid: i32,
    /// The launcher's end of its stdout, unless inherited.
    pub stdout: Option<OwnedFd>,
    /// The launcher's end of its stderr, unless inherited.
    pub stderr: Option<OwnedFd>,
}

impl WorkerSpec {
    /// Starts the process. Must be called on the thread that lives as long as the launcher: the
    /// kernel's "parent has died" is about the thread.
    pub fn start(self) -> Result<Worker> {
        let rank = self.env.rank;
        // The path of the running program even when its file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lorarun").args(&self.arguments).envs(self.env.to_variables());
        if let Some(threads) = self.env.threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        if self.poses_as_host {
            command.envs(nccl_defaults_on_shared_card(rank));
        }
        let (out, stdout) = self.stdout.open()?;
        let (err, stderr) = self.stderr.open()?;
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0).kill_on_drop(true);
        let inherited = [self.env.segment_fd, self.env.meeting_fd, self.env.snapshot_fd];
        let parent = std::process::id() as libc::pid_t;
        let call = self.binding.as_ref().map(Binding::call);
        // SAFETY: the closure runs between fork and exec and calls async-signal-safe functions only.
        unsafe { command.pre_exec(move || prepare_child(parent, inherited, call.as_ref())) };
        let child = command.spawn().with_context(|| format!("cannot start rank {rank}"))?;
        // A child that was not waited for has an id.
        let pid = child.id().context("a rank ended before it was started")? as i32;
        Ok(Worker { child, pid, stdout, stderr })
    }
}

impl Channel {
    /// The rank's end and the launcher's.
    fn open(self) -> Result<(Stdio, Option<OwnedFd>)> {
        Ok(match self {
            Channel::Inherited => (Stdio::inherit(), None),
            Channel::Pipe => {
                let (reader, writer) = pipe().context("cannot make a pipe")?;
                (writer.into(), Some(reader.into()))
            }
            Channel::Terminal => {
                let pair = terminal::open().context("cannot make a pseudo terminal")?;
                (pair.theirs.into(), Some(pair.ours))
            }
        })
    }
}

/// Runs in the child before the program is replaced.
fn prepare_child(
    parent: libc::pid_t,
    inherited: [Option<RawFd>; 3],
    binding: Option<&Call>,
) -> std::io::Result<()> {
    if let Some(call) = binding {
        call.make()?;
    }
    // SAFETY: async-signal-safe calls with plain integers.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // The launcher may have died before the line above; then nobody would kill this process.
        if libc::getppid() != parent {
            libc::_exit(128 + libc::SIGKILL);
        }
        for fd in inherited.into_iter().flatten() {
            if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        // Its group is in the background; a terminal set to `tostop` would stop it at its first line.
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
    }
    Ok(())
}
