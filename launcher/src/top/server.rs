//! The launcher's side: a thread that shows the job's table to who asks.
//!
//! It is not needed for anything else: where it cannot be, the user is told and the run goes on.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::View;
use super::rate::Rate;
use super::socket;
use crate::job::table::SharedTable;
use crate::output::tell;

/// How often the table is looked at for its steps.
const LOOK: Duration = Duration::from_millis(250);
/// How long who asks may take to read.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows a table until it is dropped.
pub struct Server {
    path: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Shows the table of this launcher's job to its user. A failure is told and is none of the run's.
pub fn serve(table: SharedTable, job: &str, command: String) -> Option<Server> {
    match serve_in(&socket::folder(), table, job, command) {
        Ok(server) => Some(server),
        Err(error) => {
            tell(&format!("warning: `lorarun top` will not see this run: {error:#}"));
            None
        }
    }
}

/// The same, in a folder.
pub fn serve_in(folder: &Path, table: SharedTable, job: &str, command: String) -> Result<Server> {
    socket::claim(folder)?;
    let pid = std::process::id();
    let path = folder.join(socket::file_name(job, pid));
    // One of a process that had this number before.
    drop(std::fs::remove_file(&path));
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("cannot open the socket: {}", path.display()))?;
    listener.set_nonblocking(true).context("cannot set up the socket")?;
    let over = Arc::new(AtomicBool::new(false));
    let view = View {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid,
        host: crate::summary::host_name(),
        command,
        ..View::default()
    };
    let is_over = Arc::clone(&over);
    let thread = std::thread::Builder::new()
        .name("top".to_owned())
        .spawn(move || answer_all(&listener, &table, view, &is_over))
        .context("cannot start a thread")?;
    Ok(Server { path, over, thread: Some(thread) })
}

fn answer_all(listener: &UnixListener, table: &SharedTable, mut view: View, over: &AtomicBool) {
    let mut rate = Rate::default();
    while !over.load(Ordering::Relaxed) {
        let somebody = wait_for(listener, LOOK);
        let now = Instant::now();
        view.table = table.get();
        let step = view.table.ranks.iter().map(|rank| rank.step).max().unwrap_or(0);
        rate.note(now, view.table.generation, step);
        view.steps_per_second = rate.steps_per_second(now);
        if somebody && let Ok((stream, _)) = listener.accept() {
            // Who asked and went away is no loss.
            drop(answer(stream, &view));
        }
    }
}

/// Waits until somebody connects, at most for `limit`.
fn wait_for(listener: &UnixListener, limit: Duration) -> bool {
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry that lives as long as the call.
    unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as libc::c_int) > 0 }
}

/// One line for who may have it; nothing for others.
fn answer(mut stream: UnixStream, view: &View) -> std::io::Result<()> {
    if !may_see(&stream) {
        return Ok(());
    }
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(view)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Whether who asks is this launcher's user, or root.
fn may_see(stream: &UnixStream) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: a place for the answer and its true size.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut size,
        )
    };
    done == 0 && (peer.uid == 0 || peer.uid == socket::own_uid())
}
