//! Files appear complete or not at all: temporary file in the same folder, fsync, rename, fsync
//! of the folder.
//!
//! On any error, and on a panic of the writer, the temporary file is removed and an earlier file
//! of the name stays as it was. Only a killed process leaves its temporary file behind:
//! [`remove_leftovers`] clears those.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::FormatError;

const SUFFIX: &str = ".part";

/// Writes `path` through `fill`.
///
/// # Errors
/// [`FormatError::DiskFull`] when space ran out, [`FormatError::Io`] otherwise, both naming
/// `path`.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), FormatError> {
    let fail = |action| move |source| FormatError::io(action, path, source);
    let folder = folder_of(path);
    let temporary = tempfile::Builder::new()
        .prefix(&prefix_of(path)?)
        .suffix(SUFFIX)
        // As any other new file: the process's umask takes its share.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(fail("create a file beside"))?;
    {
        let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file());
        fill(&mut writer).map_err(fail("write"))?;
        writer.flush().map_err(fail("write"))?;
    }
    temporary.as_file().sync_all().map_err(fail("write"))?;
    temporary.persist(path).map_err(|e| FormatError::io("rename to", path, e.error))?;
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| FormatError::io("sync", folder, e))
}

/// Removes the temporary files that killed processes left beside `path`; call it before a run
/// that alone writes there. Returns how many were removed.
///
/// # Errors
/// [`FormatError::Io`] when the folder cannot be listed or a file not be removed.
pub fn remove_leftovers(path: &Path) -> Result<usize, FormatError> {
    let folder = folder_of(path);
    let prefix = prefix_of(path)?;
    let mut removed = 0;
    for entry in fs::read_dir(folder).map_err(|e| FormatError::io("list", folder, e))? {
        let entry = entry.map_err(|e| FormatError::io("list", folder, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with(&prefix) && name.ends_with(SUFFIX) {
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
        assert_eq!(remove_leftovers(&folder.path().join("a.bin")).unwrap(), 1);
        assert_eq!(names(folder.path()), [".b.bin.xYz123.part", "a.bin"]);
    }
}
