//! Sleep until a word shared between processes changes, and wake who sleeps on it.
//!
//! The one place with the system call; no process-private flag, because waiters are other processes.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` holds `seen`, for at most `timeout`. Spurious returns happen: check again.
pub(crate) fn wait(word: &AtomicU32, seen: u32, timeout: Duration) {
    let time = libc::timespec {
        tv_sec: timeout.as_secs().min(3600) as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    };
    // SAFETY: the address is that of a live, aligned u32 and the kernel only reads it; `time`
    // outlives the call. Every outcome (changed value, timeout, interrupt) means "check again".
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const time);
    }
}

/// Wakes every process and thread that sleeps on `word`.
pub(crate) fn wake_all(word: &AtomicU32) {
    // SAFETY: the address is that of a live, aligned u32; waking touches nothing else.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}
