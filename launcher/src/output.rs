//! What ranks say: lines with the rank's number before them, log files, and the last lines of each.
//!
//! One plain thread per stream: a terminal that is held (Ctrl-S) or a pager that does not read must
//! not keep the launcher from watching its ranks.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write, stderr, stdout};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::streams::{Route, Routes};
use crate::terminal::visible;

/// Lines kept of each rank for the summary.
const KEPT_LINES: usize = 12;
/// Longest line, in bytes; longer ones are passed on in parts.
const LINE_BYTES: usize = 16 * 1024;

/// Where a captured stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The launcher's stdout.
    Stdout,
    /// The launcher's stderr.
    Stderr,
}

/// How a captured stream is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Style {
    /// Lines with this before them.
    Prefixed(String),
    /// Lines as they are.
    Plain,
    /// Every byte at once; the log gets what a terminal would show in the end.
    Raw,
}

/// The streams of one rank.
#[derive(Clone)]
pub struct RankOutput {
    style: Style,
    routes: Routes,
    log: Option<Arc<Log>>,
    last_lines: Arc<Mutex<VecDeque<String>>>,
}

/// Tells the user something, one or more lines, on stderr. A reader that went away must not end a
/// run, so nothing here can fail.
pub fn tell(lines: &str) {
    Target::Stderr.write(&[lines.trim_end().as_bytes(), b"\n"].concat());
}

/// Writes data to stdout, as given.
pub fn print_data(text: &str) {
    Target::Stdout.write(text.as_bytes());
}

/// A log file; the first failure to write it is told once.
struct Log {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

impl RankOutput {
    /// Output of `rank`, each line with `[rank n] ` before it, and copied to `log_dir/rank<n>.log`
    /// if there is a folder; `routes` may leave out the one or the other.
    pub fn new(rank: usize, log_dir: Option<&Path>, routes: Routes) -> Result<RankOutput> {
        let log = log_dir.map(|folder| Log::open(folder, rank).map(Arc::new)).transpose()?;
        let style = Style::Prefixed(format!("[rank {rank}] "));
        Ok(RankOutput { style, routes, log, last_lines: Arc::default() })
    }

    /// The same rank's stream whose lines stay as they are.
    pub fn plain(&self) -> RankOutput {
        RankOutput { style: Style::Plain, ..self.clone() }
    }

    /// The same rank's stream that is drawn on a terminal.
    pub fn raw(&self) -> RankOutput {
        RankOutput { style: Style::Raw, ..self.clone() }
    }

    /// Path of the log file.
    pub fn log_path(&self) -> Option<&Path> {
        self.log.as_ref().map(|log| log.path.as_path())
    }

    /// The last lines of both streams, oldest first; empty when nothing was captured.
    pub fn last_lines(&self) -> Vec<String> {
        let lines = self.last_lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }

    fn route(&self, target: Target) -> Route {
        match target {
            Target::Stdout => self.routes.stdout,
            Target::Stderr => self.routes.stderr,
        }
    }

    /// Passes on what was just read.
    fn pass_on_bytes(&self, bytes: &[u8], target: Target) {
        if self.style == Style::Raw && self.route(target).shown {
            target.write(bytes);
        }
    }

    /// Passes one complete line on, without its line end.
    fn pass_on_line(&self, line: &[u8], target: Target) {
        let remains;
        let mut line = line;
        let Route { shown, logged } = self.route(target);
        match &self.style {
            Style::Raw => {
                remains = visible(line);
                line = &remains;
            }
            _ if !shown => {}
            Style::Plain => target.write(&[line, b"\n"].concat()),
            Style::Prefixed(prefix) => target.write(&[prefix.as_bytes(), line, b"\n"].concat()),
        }
        if let Some(log) = self.log.as_ref().filter(|_| logged) {
            log.append(line);
        }
        let mut lines = self.last_lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(line).into_owned());
    }
}

impl Target {
    /// One write under the stream's lock, so that lines of several ranks do not mix. A reader that
    /// went away does not concern the ranks.
    fn write(self, bytes: &[u8]) {
        drop(match self {
            Target::Stdout => stdout().lock().write_all(bytes),
            Target::Stderr => stderr().lock().write_all(bytes),
        });
    }
}

impl Log {
    fn open(folder: &Path, rank: usize) -> Result<Log> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the log folder: {}", folder.display()))?;
        let path = folder.join(format!("rank{rank}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open the log file: {}", path.display()))?;
        Ok(Log { path, file: Mutex::new(Some(file)) })
    }

    fn append(&self, line: &[u8]) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = file.as_mut() else { return };
        let written = open.write_all(line).and_then(|()| open.write_all(b"\n"));
        if let Err(error) = written {
            tell(&format!(
                "warning: cannot write the log file any more: {}: {error}",
                self.path.display()
            ));
            *file = None;
        }
    }
}

/// Makes the log folder and writes a file in it for a moment: what cannot be logged should be known
/// before a run begins.
pub fn check_log_folder(folder: &Path) -> Result<(), String> {
    let trial = folder.join(format!(".trial-{}", std::process::id()));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&trial, b""))
        .and_then(|()| std::fs::remove_file(&trial))
        .map_err(|error| {
            format!(
                "cannot write logs to the folder: {}: {error}\n\
                 hint: `--log_dir` names another one",
                folder.display()
            )
        })
}

/// The threads that read the ranks' streams.
pub struct Pumps {
    running: usize,
    ended: Receiver<()>,
    end: Sender<()>,
}

impl Pumps {
    /// None yet.
    pub fn new() -> Pumps {
        let (end, ended) = channel();
        Pumps { running: 0, ended, end }
    }

    /// Reads `stream` to its end on a thread of its own.
    pub fn add(&mut self, stream: OwnedFd, output: RankOutput, target: Target) -> Result<()> {
        let end = self.end.clone();
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || {
                pump(
                    &mut File::from(stream),
                    &mut |bytes| output.pass_on_bytes(bytes, target),
                    &mut |line| output.pass_on_line(line, target),
                );
                // The launcher may have stopped listening.
                let _ = end.send(());
            })
            .context("cannot start a thread for a rank's output")?;
        self.running += 1;
        Ok(())
    }

    /// Waits until all streams are read to their ends, for at most `limit`: a process that a rank
    /// has started may keep a stream open.
    pub fn finish(self, limit: Duration) {
        let start = Instant::now();
        for _ in 0..self.running {
            if self.ended.recv_timeout(limit.saturating_sub(start.elapsed())).is_err() {
                break;
            }
        }
    }
}

/// Reads a stream to its end: hands on all that was read, and complete lines.
fn pump(stream: &mut impl Read, on_bytes: &mut impl FnMut(&[u8]), on_line: &mut impl FnMut(&[u8])) {
    let mut buffer = vec![0; LINE_BYTES];
    let mut line = Vec::new();
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            // A pseudo terminal whose other end is closed says so by an error.
            Err(_) => break,
        };
        on_bytes(&buffer[..count]);
        for part in buffer[..count].split_inclusive(|&byte| byte == b'\n') {
            line.extend_from_slice(part);
            if line.ends_with(b"\n") {
                line.pop();
                on_line(&line);
                line.clear();
            } else if line.len() >= LINE_BYTES {
                on_line(&line);
                line.clear();
            }
        }
    }
    if !line.is_empty() {
        on_line(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        pump(&mut &bytes[..], &mut |_| (), &mut |line| {
            lines.push(String::from_utf8(line.to_vec()).unwrap())
        });
        lines
    }

    #[test]
    fn streams_are_cut_at_line_ends() {
        assert_eq!(lines_of(b""), Vec::<String>::new());
        assert_eq!(lines_of(b"one\n\ntwo\nrest"), ["one", "", "two", "rest"]);
    }

    #[test]
    fn endless_lines_are_passed_on_in_parts() {
        let long = vec![b'x'; 3 * LINE_BYTES + 5];
        let lines = lines_of(&long);
        assert_eq!(lines.concat().len(), long.len());
        assert!(lines.iter().all(|line| line.len() <= 2 * LINE_BYTES) && lines.len() > 1);
    }
}
