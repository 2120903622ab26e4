//! Tasks of a Slurm step beyond the first one of their node: the first starts all processes, the others
//! stay until it has ended.
//!
//! They must not end early: with `srun --wait` or the site's `WaitTime`, Slurm ends a step some time
//! after its first task has ended. Nor may they die of a signal that is meant for the run: Slurm sends
//! signals to every task, and the step's exit code is the largest of its tasks'.

use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use crate::site::{Site, Source};

/// How long the first task may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Held by the first task as long as it lives; the kernel closes it in whatever way it ends.
pub struct Presence {
    _listener: UnixListener,
}

impl Presence {
    /// Lets the other tasks of this node see that the first one is there; `None` where there are none.
    pub fn show(site: &Site) -> Option<Presence> {
        if site.source != Source::Slurm || site.processes.is_none() {
            return None;
        }
        // Without it the others end early, which most sites allow.
        let listener = UnixListener::bind_addr(&address(&name_of(site))?).ok()?;
        Some(Presence { _listener: listener })
    }
}

/// Stays until the first task of this node has ended.
pub fn stay(site: &Site) {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    stay_until_gone(&name_of(site), PATIENCE);
}

/// Whether the first task was seen.
fn stay_until_gone(name: &str, patience: Duration) -> bool {
    let Some(address) = address(name) else { return false };
    let start = Instant::now();
    loop {
        if let Ok(mut stream) = UnixStream::connect_addr(&address) {
            // Nothing is ever said: this returns when the other side is gone.
            drop(stream.read(&mut [0]));
            return true;
        }
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Job, step and node: nodes may be one machine.
fn name_of(site: &Site) -> String {
    format!("lorarun-{}-{}", site.job, site.node)
}

/// A name that lies in no file system, so that nothing is left behind.
fn address(name: &str) -> Option<SocketAddr> {
    SocketAddr::from_abstract_name(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_others_stay_as_long_as_the_first() {
        let site = Site {
            source: Source::Slurm,
            processes: Some(2),
            job: format!("test-{}", std::process::id()),
            ..Site::alone()
        };
        let name = name_of(&site);
        assert!(!stay_until_gone(&name, Duration::ZERO));
        let presence = Presence::show(&site).unwrap();
        let other = std::thread::spawn(move || (stay_until_gone(&name, PATIENCE), Instant::now()));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!other.is_finished());
        let gone = Instant::now();
        drop(presence);
        let (seen, at) = other.join().unwrap();
        assert!(seen && at >= gone);
        assert!(Presence::show(&Site { processes: None, ..site }).is_none());
    }
}
