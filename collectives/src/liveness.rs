//! Is a peer's process still there?
//!
//! A pidfd tells even when the process is a zombie that nobody has reaped; where the kernel has
//! none (before 5.3), signal 0 tells once the parent has reaped it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Watch on one peer's process.
#[derive(Debug)]
pub(crate) enum Watch {
    /// The peer is a thread of this process: it lives as long as we do.
    SameProcess,
    /// A descriptor that becomes readable when the process ends.
    Descriptor(OwnedFd),
    /// Only the number is known.
    Number(libc::pid_t),
}

impl Watch {
    /// Starts watching process `pid`, which must be alive now (it has just been heard from).
    pub(crate) fn on(pid: u32) -> Watch {
        if pid == std::process::id() {
            return Watch::SameProcess;
        }
        let pid = pid as libc::pid_t;
        // SAFETY: pidfd_open takes two integers and returns a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd >= 0 {
            // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
            Watch::Descriptor(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
        } else {
            Watch::Number(pid)
        }
    }

    /// Whether the process has ended.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Watch::SameProcess => false,
            Watch::Descriptor(fd) => {
                let mut poll =
                    libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one valid pollfd, zero timeout.
                let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
                ready == 1 && poll.revents & libc::POLLIN != 0
            }
            Watch::Number(pid) => {
                // SAFETY: signal 0 delivers nothing.
                let sent = unsafe { libc::kill(*pid, 0) };
                sent == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_never_gone() {
        assert!(!Watch::on(std::process::id()).is_gone());
    }

    #[test]
    fn an_ended_child_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let watch = Watch::on(child.id());
        assert!(!watch.is_gone());
        child.kill().unwrap();
        let start = std::time::Instant::now();
        while !watch.is_gone() && start.elapsed().as_secs() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(watch.is_gone());
        child.wait().unwrap();
        assert!(watch.is_gone());
    }
}
