//! The folder in which the ranks of one start record their collectives: private, gone after a good end,
//! kept under another name after a hang.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use collectives::recorder::Recording;

use super::watch::FlightReport;
use crate::summary::host_name;

/// The folder. Removed when dropped, unless it was kept.
#[derive(Debug)]
pub struct FlightFolder {
    path: PathBuf,
    is_kept: bool,
}

impl FlightFolder {
    /// Makes the folder of one start, in `log_dir` or where temporary files go.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(log_dir: Option<&Path>, generation: u64) -> io::Result<FlightFolder> {
        let base = log_dir.map_or_else(std::env::temp_dir, Path::to_path_buf);
        std::fs::create_dir_all(&base)?;
        sweep(&base);
        let path = base.join(format!("{}{}-{generation}", prefix(), std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(FlightFolder { path, is_kept: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last entry of a rank; `None` where there is none that can be read.
    pub fn last(&self, rank: usize) -> Option<FlightReport> {
        let recording = Recording::read(&self.path, rank).ok()?;
        let flight = recording.flights.last()?;
        let ago = SystemTime::now().duration_since(flight.entered).unwrap_or_default();
        Some(FlightReport {
            seq: flight.seq,
            op: flight.op.clone(),
            entered_ms_ago: u64::try_from(ago.as_millis()).unwrap_or(u64::MAX),
            left: flight.left.map(|(_, succeeded)| succeeded),
        })
    }

    /// Keeps it, under a name that is not swept away; gives that.
    pub fn keep(&mut self) -> &Path {
        if !self.is_kept {
            self.is_kept = true;
            let name = self.path.file_name().unwrap_or_default().to_string_lossy();
            let kept = self.path.with_file_name(name.replacen("flights", "hang", 1));
            if std::fs::rename(&self.path, &kept).is_ok() {
                self.path = kept;
            }
        }
        &self.path
    }
}

impl Drop for FlightFolder {
    fn drop(&mut self) {
        if !self.is_kept {
            // What cannot be removed now is swept away by the next launcher.
            drop(std::fs::remove_dir_all(&self.path));
        }
    }
}

/// Hosts may share the folder.
fn prefix() -> String {
    format!("lorarun-flights-{}-", host_name())
}

/// Removes what launchers of this host that were killed have left behind.
fn sweep(base: &Path) {
    let prefix = prefix();
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        let process = process.and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            // Perhaps another user's.
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_gone_unless_it_is_kept() {
        let base = tempfile::tempdir().unwrap();
        let folder = FlightFolder::create(Some(base.path()), 1).unwrap();
        let path = folder.path().to_owned();
        assert!(path.is_dir() && folder.last(0).is_none());
        drop(folder);
        assert!(!path.exists());
        let mut folder = FlightFolder::create(Some(base.path()), 2).unwrap();
        let kept = folder.keep().to_owned();
        drop(folder);
        assert!(kept.is_dir() && kept.to_string_lossy().contains("lorarun-hang-"));
    }

    #[test]
    fn what_killed_launchers_left_is_swept_away() {
        let base = tempfile::tempdir().unwrap();
        // No process has this number.
        let stale = base.path().join(format!("{}4194999-1", prefix()));
        let foreign = base.path().join("lorarun-flights-other.host-4194999-1");
        let own = FlightFolder::create(Some(base.path()), 1).unwrap();
        std::fs::create_dir(&stale).unwrap();
        std::fs::create_dir(&foreign).unwrap();
        let next = FlightFolder::create(Some(base.path()), 2).unwrap();
        assert!(!stale.exists() && foreign.exists());
        assert!(own.path().exists() && next.path().exists());
    }
}
