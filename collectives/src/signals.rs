//! A polite stop: signals set a flag that the training loop polls once a step.
//!
//! The first SIGINT or SIGTERM asks for a stop, and so do SIGUSR1 and SIGUSR2, which schedulers send
//! some time before their SIGTERM. A second SIGINT ends the process at once with code 130. Further SIGTERMs
//! within [`REPEAT_GRACE_S`] seconds are the same request (Slurm delivers its SIGTERM two or three
//! times); one that comes later ends the process with code 143. After these announcements alone,
//! SIGINT and SIGTERM count as first ones. The handler touches atomics and calls async-signal-safe functions
//! only.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};

/// Seconds during which repeated SIGTERMs count as one.
pub const REPEAT_GRACE_S: i64 = 5;

/// Whether a stop was asked for.
static STOP: AtomicBool = AtomicBool::new(false);
/// Number of SIGINTs and SIGTERMs so far.
static REQUESTS: AtomicU32 = AtomicU32::new(0);
/// Monotonic second of the first of them; meaningful once `REQUESTS` is not 0.
static FIRST_AT: AtomicI64 = AtomicI64::new(0);

/// Installs the handlers for SIGINT, SIGTERM, SIGUSR1 and SIGUSR2. Calling it again changes nothing.
pub fn install() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: a zeroed sigaction is a valid one; the handler is an `extern "C"` function that
        // calls only async-signal-safe functions and stays alive as long as the program.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether a stop was asked for, by a signal or by [`request_stop`].
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Asks for a stop from inside the program.
pub fn request_stop() {
    STOP.store(true, Ordering::Relaxed);
}

/// Counts a request and returns how many there were before it.
fn note_request(now: i64) -> u32 {
    let before = REQUESTS.fetch_add(1, Ordering::Relaxed);
    if before == 0 {
        FIRST_AT.store(now, Ordering::Relaxed);
    }
    before
}

/// Seconds of the monotonic clock.
fn monotonic_second() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place to write; the call is async-signal-safe.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec
}

extern "C" fn on_signal(signal: libc::c_int) {
    request_stop();
    if signal == libc::SIGUSR1 || signal == libc::SIGUSR2 {
        return;
    }
    let now = monotonic_second();
    let before = note_request(now);
    let repeated_term = signal == libc::SIGTERM
        && now.saturating_sub(FIRST_AT.load(Ordering::Relaxed)) <= REPEAT_GRACE_S;
    if before > 0 && !repeated_term {
        // SAFETY: _exit is async-signal-safe; no destructor needs to run, files are written
        // through temporaries.
        unsafe { libc::_exit(128 + signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: the flag is a process-wide state.
    #[test]
    fn a_signal_sets_the_flag_and_repeated_terms_are_one_request() {
        install().unwrap();
        assert!(!stop_requested());
        for announcement in [libc::SIGUSR1, libc::SIGUSR2] {
            // SAFETY: raises a signal that the handler above takes.
            unsafe { libc::raise(announcement) };
            assert!(stop_requested());
        }
        assert_eq!(REQUESTS.load(Ordering::Relaxed), 0);
        for _ in 0..3 {
            // SAFETY: raises a signal that the handler above takes.
            unsafe { libc::raise(libc::SIGTERM) };
        }
        assert_eq!(REQUESTS.load(Ordering::Relaxed), 3);
    }
}
