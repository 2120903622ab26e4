//! Where launchers show their runs: a folder of this user alone, with a socket for each launcher.
//!
//! The folder is `lorarun` in `XDG_RUNTIME_DIR`, or `lorarun-UID` where temporary files go. It is made
//! with mode 700; one that belongs to somebody else, or that others may enter, is not used. Who
//! connects gets one line, a JSON object, and the end.

use std::fs::DirBuilder;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::View;

/// How long a launcher may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest answer.
const LONGEST: u64 = 16 << 20;

/// A run that is shown.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its socket.
    pub path: PathBuf,
    /// What it said.
    pub view: View,
}

/// What is there.
#[derive(Debug, Default)]
pub struct Found {
    /// Runs that answer.
    pub runs: Vec<Source>,
    /// Sockets of living launchers that do not.
    pub foreign: usize,
}

/// The user of this process.
pub fn own_uid() -> u32 {
    // SAFETY: a plain system call that cannot fail.
    unsafe { libc::geteuid() }
}

/// The folder, whether it is there or not.
pub fn folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_dir()) {
        Some(path) => PathBuf::from(path).join("lorarun"),
        None => std::env::temp_dir().join(format!("lorarun-{}", own_uid())),
    }
}

/// Makes sure that a folder is there and is this user's alone.
pub fn claim(folder: &Path) -> Result<()> {
    let shown = folder.display();
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot make the folder: {shown}"));
        }
    }
    // Of the name itself: a link could lead into somebody else's folder.
    let facts = folder.symlink_metadata().with_context(|| format!("cannot look at: {shown}"))?;
    if !facts.is_dir() || facts.uid() != own_uid() || facts.mode() & 0o077 != 0 {
        bail!("the folder should be this user's alone (mode 700): {shown}");
    }
    Ok(())
}

/// File name for a launcher's socket.
pub fn file_name(job: &str, pid: u32) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    let job: String = job.chars().map(|c| if plain(c) { c } else { '_' }).take(32).collect();
    let job = if job.is_empty() { "run".to_owned() } else { job };
    format!("{job}.{pid}.sock")
}

/// The process number in a socket's name.
fn pid_of(path: &Path) -> Option<i32> {
    path.file_name()?.to_str()?.strip_suffix(".sock")?.rsplit_once('.')?.1.parse().ok()
}

/// All runs of this user on this machine. Sockets whose launcher is gone are removed.
pub fn find() -> Result<Found> {
    find_in(&folder())
}

/// The same, in a folder.
pub fn find_in(folder: &Path) -> Result<Found> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot look into: {}", folder.display()));
        }
    };
    let mut found = Found::default();
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Some(pid) = pid_of(&path) else { continue };
        match ask(&path) {
            Ok(view) => found.runs.push(Source { path, view }),
            // SAFETY: signal 0 only asks whether the process is there.
            Err(_) if unsafe { libc::kill(pid, 0) } != 0 => drop(std::fs::remove_file(&path)),
            Err(_) => found.foreign += 1,
        }
    }
    Ok(found)
}

/// What the launcher at a socket shows.
pub fn ask(path: &Path) -> Result<View> {
    let shown = path.display();
    let stream = UnixStream::connect(path)
        .with_context(|| format!("no launcher answers at the socket: {shown}"))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot set a time limit")?;
    let mut text = String::new();
    stream
        .take(LONGEST)
        .read_to_string(&mut text)
        .with_context(|| format!("the launcher does not answer: {shown}"))?;
    if text.is_empty() {
        bail!("the launcher shows its run to its own user alone: {shown}");
    }
    serde_json::from_str(&text).with_context(|| format!("this is no answer of a launcher: {shown}"))
}
