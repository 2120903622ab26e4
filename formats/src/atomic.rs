//! Files appear complete or not at all: written without a name, fsync, named, renamed into place,
//! fsync of the folder.
//!
//! On any error, on a panic of the writer and on a kill nothing is left behind and an earlier file
//! of the name stays as it was: Linux frees a file without a name with its last user. Where the
//! file system cannot make such files (some network file systems), a hidden temporary file takes
//! their place; it is removed on errors and panics, and [`remove_leftovers`] clears what a killed
//! process left.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use tempfile::NamedTempFile;

use crate::FormatError;

const SUFFIX: &str = ".part";

/// As for any other new file: the process's umask takes its share.
const PERMISSIONS: u32 = 0o666;

/// Writes `path` through `fill`.
///
/// # Errors
/// [`FormatError::DiskFull`] when space ran out, [`FormatError::Io`] otherwise, both naming
/// `path`.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), FormatError> {
    write_atomic_if(path, fill, || Ok(()))
}

/// [`write_atomic`] for who may lose the right to the name while it writes: `permit` is asked when
/// the whole file is on the disk, just before it gets its name; its error leaves everything as it
/// was.
///
/// # Errors
/// As [`write_atomic`], and those of `permit`.
pub fn write_atomic_if<E: From<FormatError>>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    permit: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let write = |file: &File| {
        let fail = |source| FormatError::io("write", path, source);
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer).map_err(fail)?;
        Ok(writer.flush().map_err(fail)?)
    };
    put(path, write, permit)
}

/// Writes `path` through `fill`, which may write anywhere in the new, empty file.
///
/// # Errors
/// Those of `fill`, and as [`write_atomic`].
pub fn write_atomic_in_place<E: From<FormatError>>(
    path: &Path,
    fill: impl FnOnce(&File) -> Result<(), E>,
) -> Result<(), E> {
    put(path, fill, || Ok(()))
}

fn put<E: From<FormatError>>(
    path: &Path,
    fill: impl FnOnce(&File) -> Result<(), E>,
    permit: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let fail = |action| move |source| FormatError::io(action, path, source);
    let folder = folder_of(path);
    let prefix = prefix_of(path)?;
    let temporary =
        Temporary::create(folder, &prefix).map_err(fail("create a file in the folder of"))?;
    fill(temporary.file())?;
    temporary.file().sync_all().map_err(fail("write"))?;
    permit()?;
    temporary.publish(folder, &prefix, path).map_err(fail("put in place"))?;
    let synced = File::open(folder).and_then(|f| f.sync_all());
    Ok(synced.map_err(|e| FormatError::io("sync", folder, e))?)
}

/// A file that is not yet visible under its name.
enum Temporary {
    /// Without any name (`O_TMPFILE`).
    Unnamed(File),
    /// With a hidden name, removed on drop.
    Hidden(NamedTempFile),
}

impl Temporary {
    fn create(folder: &Path, prefix: &str) -> io::Result<Self> {
        // Naming the file later goes through /proc.
        if Path::new("/proc/self/fd").exists() {
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            if let Ok(fd) = rustix::fs::open(folder, flags, Mode::from_raw_mode(PERMISSIONS)) {
                return Ok(Self::Unnamed(File::from(fd)));
            }
        }
        Self::create_hidden(folder, prefix)
    }

    fn create_hidden(folder: &Path, prefix: &str) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix).suffix(SUFFIX).permissions(Permissions::from_mode(PERMISSIONS));
        builder.tempfile_in(folder).map(Self::Hidden)
    }

    fn file(&self) -> &File {
        match self {
            Self::Unnamed(file) => file,
            Self::Hidden(file) => file.as_file(),
        }
    }

    /// Moves the finished file to `path`, over an earlier one.
    fn publish(self, folder: &Path, prefix: &str, path: &Path) -> io::Result<()> {
        match self {
            Self::Hidden(file) => file.persist(path).map(drop).map_err(|e| e.error),
            Self::Unnamed(file) => {
                // A link cannot replace a file, a rename can.
                let hidden = link_hidden(&file, folder, prefix)?;
                fs::rename(&hidden, path).inspect_err(|_| {
                    // The error of the rename is the one to report.
                    let _ = fs::remove_file(&hidden);
                })
            }
        }
    }
}

/// Gives a file without a name a hidden one in `folder`.
fn link_hidden(file: &File, folder: &Path, prefix: &str) -> io::Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    loop {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let hidden = folder.join(format!("{prefix}{}-{count}{SUFFIX}", std::process::id()));
        match linkat(CWD, &source, CWD, &hidden, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => return Ok(hidden),
            // Another process of this number left it behind.
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes the hidden files that killed processes left in `folder` of files whose names `ours`
/// accepts; for the only process that writes there. Returns how many were removed.
///
/// # Errors
/// [`FormatError::Io`] when the folder cannot be listed or a file not be removed.
pub fn remove_leftovers(folder: &Path, ours: &dyn Fn(&str) -> bool) -> Result<usize, FormatError> {
    let mut removed = 0;
    for entry in fs::read_dir(folder).map_err(|e| FormatError::io("list", folder, e))? {
        let entry = entry.map_err(|e| FormatError::io("list", folder, e))?;
        let name = entry.file_name();
        let hidden = name.to_str().and_then(|name| name.strip_prefix('.'));
        let name = hidden.and_then(|name| name.strip_suffix(SUFFIX)?.rsplit_once('.'));
        if name.is_some_and(|(name, _)| ours(name)) {
            fs::remove_file(entry.path())
                .map_err(|e| FormatError::io("remove", entry.path(), e))?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `.NAME.`: hidden, and telling which file it was to become.
fn prefix_of(path: &Path) -> Result<String, FormatError> {
    let name = path.file_name().ok_or_else(|| {
        FormatError::io("write", path, io::Error::other("the path ends in no file name"))
    })?;
    Ok(format!(".{}.", name.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        write_atomic(&path, |w| w.write_all(b"one")).unwrap();
        write_atomic(&path, |w| w.write_all(b"two")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(folder.path()), ["a.bin"]);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        let plain = folder.path().join("plain");
        fs::write(&plain, b"").unwrap();
        assert_eq!(mode, fs::metadata(&plain).unwrap().permissions().mode());
    }

    #[test]
    fn an_error_keeps_the_old_file_and_removes_the_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        fs::write(&path, b"old").unwrap();
        // A full disk as the kernel reports it.
        let error = write_atomic(&path, |w| {
            w.write_all(b"new")?;
            fs::OpenOptions::new().write(true).open("/dev/full")?.write_all(b"x")
        })
        .unwrap_err();
        assert!(matches!(error, FormatError::DiskFull { .. }), "{error}");
        assert!(error.to_string().starts_with("the disk is full, `"), "{error}");
        assert!(error.to_string().contains("a.bin"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn who_may_not_write_any_more_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        fs::write(&path, b"another's").unwrap();
        let forbidden = || Err(FormatError::io("write", &path, io::Error::other("not yours")));
        let error = write_atomic_if(&path, |w| w.write_all(b"mine"), forbidden).unwrap_err();
        assert!(error.to_string().contains("not yours"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"another's");
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn the_hidden_way_does_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        fs::write(&path, b"old").unwrap();
        let temporary = Temporary::create_hidden(folder.path(), ".a.bin.").unwrap();
        temporary.file().write_all(b"new").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        temporary.publish(folder.path(), ".a.bin.", &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        drop(Temporary::create_hidden(folder.path(), ".a.bin.").unwrap());
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn nothing_is_visible_while_writing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        write_atomic(&path, |w| {
            w.write_all(b"half")?;
            // What a kill at this point would leave: at most a hidden file.
            assert!(names(folder.path()).iter().all(|name| name.starts_with(".a.bin.")));
            w.write_all(b"whole")
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"halfwhole");
    }

    #[test]
    fn a_folder_in_the_way_is_an_error_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        fs::create_dir(&path).unwrap();
        let error = write_atomic(&path, |w| w.write_all(b"x")).unwrap_err();
        assert!(error.to_string().contains("a.bin"), "{error}");
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn a_panicking_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        let result = std::panic::catch_unwind(|| {
            write_atomic(&path, |_| panic!("writer failed")).unwrap();
        });
        assert!(result.is_err());
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_missing_folder_is_an_error_with_the_path() {
        let error = write_atomic(Path::new("/nonexistent/x.bin"), |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.bin"), "{error}");
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed_and_others_kept() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".a.bin.xYz123.part", ".b.bin.xYz123.part", "a.bin"] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        assert_eq!(remove_leftovers(folder.path(), &|name| name == "a.bin").unwrap(), 1);
        assert_eq!(names(folder.path()), [".b.bin.xYz123.part", "a.bin"]);
    }
}
