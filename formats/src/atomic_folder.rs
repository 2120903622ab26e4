//! Folders appear complete or not at all: filled under a hidden name beside, every file and the
//! folder itself fsynced, then renamed into place and the parent fsynced.
//!
//! An earlier folder of the name is exchanged in one step where the system can do it
//! (`RENAME_EXCHANGE`); elsewhere it steps aside under a hidden name first, and [`recover`] puts it
//! back if the process died in between. At no moment are both gone.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::FormatError;

/// Ends the name of a folder that is being filled.
const PART: &str = ".part";
/// Ends the name of an earlier folder that has stepped aside.
const ASIDE: &str = ".aside";
/// Ends the name of a folder that is being removed.
const GONE: &str = ".gone";

/// Writes the folder `path`: `fill` gets an empty folder to write files and
/// folders into.
///
/// # Errors
/// Those of `fill`; [`FormatError::DiskFull`] or [`FormatError::Io`] naming `path`. An earlier
/// folder of the name is then untouched.
pub fn write_folder_atomic<E: From<FormatError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    write_folder_atomic_if(path, fill, || Ok(()))
}

/// [`write_folder_atomic`] for who may lose the right to the name while it writes: `permit` is asked
/// when the whole folder is on the disk, just before it gets its name; its error leaves everything
/// as it was.
///
/// # Errors
/// As [`write_folder_atomic`], and those of `permit`.
pub fn write_folder_atomic_if<E: From<FormatError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
    permit: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let hidden = hidden(path, PART)?;
    let fail = |action| move |source| FormatError::io(action, path, source);
    if hidden.exists() {
        fs::remove_dir_all(&hidden).map_err(fail("clear the place of"))?;
    }
    fs::create_dir(&hidden).map_err(fail("create the folder"))?;
    let written = fill(&hidden).and_then(|()| {
        sync_all(&hidden).map_err(fail("write"))?;
        permit()?;
        Ok(publish(&hidden, path).map_err(fail("write"))?)
    });
    if written.is_err() {
        // The error of the writing is the one to report.
        let _ = fs::remove_dir_all(&hidden);
    }
    written
}

/// Removes a folder so that it is whole until it is gone: renamed first, then emptied.
///
/// # Errors
/// [`FormatError::Io`].
pub fn remove_folder(path: &Path) -> Result<(), FormatError> {
    let gone = hidden(path, GONE)?;
    let fail = |source| FormatError::io("remove", path, source);
    if gone.exists() {
        fs::remove_dir_all(&gone).map_err(fail)?;
    }
    fs::rename(path, &gone).map_err(fail)?;
    fs::remove_dir_all(&gone).map_err(fail)
}

/// Clears what killed processes left in `parent` of folders whose names `ours` accepts: unfinished
/// and half-removed ones go, one that had stepped aside comes back unless its place is taken. For
/// the only process that writes there. Returns the names that came back.
///
/// # Errors
/// [`FormatError::Io`].
pub fn recover(parent: &Path, ours: &dyn Fn(&str) -> bool) -> Result<Vec<String>, FormatError> {
    let mut back = Vec::new();
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(back),
        Err(error) => return Err(FormatError::io("list", parent, error)),
    };
    for entry in entries {
        let path = entry.map_err(|e| FormatError::io("list", parent, e))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let Some(name) = name.strip_prefix('.') else { continue };
        let ends = [PART, ASIDE, GONE];
        let Some((name, end)) = ends.iter().find_map(|end| Some((name.strip_suffix(end)?, *end)))
        else {
            continue;
        };
        if !ours(name) {
            continue;
        }
        let place = parent.join(name);
        if end == ASIDE && !place.exists() {
            fs::rename(&path, &place).map_err(|e| FormatError::io("bring back", &place, e))?;
            back.push(name.to_owned());
        } else {
            fs::remove_dir_all(&path).map_err(|e| FormatError::io("remove", &path, e))?;
        }
    }
    Ok(back)
}

/// fsync of everything in a folder and of the folder.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else {
            File::open(path)?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

/// Puts the finished folder in its place and removes the one that was there.
fn publish(hidden_new: &Path, path: &Path) -> io::Result<()> {
    if !path.exists() {
        fs::rename(hidden_new, path)?;
        return sync_parent(path);
    }
    if renameat_with(CWD, hidden_new, CWD, path, RenameFlags::EXCHANGE).is_ok() {
        sync_parent(path)?;
        // The hidden name now holds the earlier folder.
        return fs::remove_dir_all(hidden_new);
    }
    let aside = hidden(path, ASIDE).map_err(io::Error::other)?;
    step_aside(hidden_new, path, &aside)
}

/// The way of file systems that cannot exchange: [`recover`] knows the moment in between.
fn step_aside(hidden_new: &Path, path: &Path, aside: &Path) -> io::Result<()> {
    if aside.exists() {
        fs::remove_dir_all(aside)?;
    }
    fs::rename(path, aside)?;
    fs::rename(hidden_new, path).inspect_err(|_| {
        // The error of the rename is the one to report.
        let _ = fs::rename(aside, path);
    })?;
    sync_parent(path)?;
    fs::remove_dir_all(aside)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// `.NAME.part` beside `path`.
fn hidden(path: &Path, end: &str) -> Result<PathBuf, FormatError> {
    let name = path.file_name().ok_or_else(|| {
        FormatError::io("write", path, io::Error::other("the path ends in no folder name"))
    })?;
    Ok(path.with_file_name(format!(".{}{end}", name.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) -> Result<(), FormatError> {
        write_folder_atomic(path, |folder| {
            fs::write(folder.join("a"), text).map_err(|e| FormatError::io("write", folder, e))
        })
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_replaced_whole_and_nothing_else_is_left() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("x-state");
        write(&path, "one").unwrap();
        fs::write(path.join("of-the-first-alone"), "").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "two");
        assert_eq!(names(&path), ["a"]);
        assert_eq!(names(parent.path()), ["x-state"]);
        remove_folder(&path).unwrap();
        assert!(names(parent.path()).is_empty());
    }

    #[test]
    fn a_failing_writer_leaves_the_earlier_folder() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("x-state");
        write(&path, "one").unwrap();
        let full = |folder: &Path| {
            fs::write(folder.join("a"), "half").unwrap();
            fs::write("/dev/full", "x").map_err(|e| FormatError::io("write", &path, e))
        };
        let error = write_folder_atomic(&path, full).unwrap_err();
        assert!(matches!(error, FormatError::DiskFull { .. }), "{error}");
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one");
        assert_eq!(names(parent.path()), ["x-state"]);
    }

    #[test]
    fn who_may_not_write_any_more_leaves_the_earlier_folder() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("x-state");
        write(&path, "another's").unwrap();
        let forbidden = || Err(FormatError::io("write", &path, io::Error::other("not yours")));
        let fill = |folder: &Path| {
            fs::write(folder.join("a"), "mine").map_err(|e| FormatError::io("write", folder, e))
        };
        write_folder_atomic_if(&path, fill, forbidden).unwrap_err();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "another's");
        assert_eq!(names(parent.path()), ["x-state"]);
    }

    #[test]
    fn without_exchange_the_earlier_folder_steps_aside_and_comes_back() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("x-state");
        let (part, aside) = (hidden(&path, PART).unwrap(), hidden(&path, ASIDE).unwrap());
        write(&path, "one").unwrap();
        fs::create_dir(&part).unwrap();
        fs::write(part.join("a"), "two").unwrap();
        step_aside(&part, &path, &aside).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "two");
        assert_eq!(names(parent.path()), ["x-state"]);

        // Killed between the two renames, while another folder was being written and removed.
        fs::rename(&path, &aside).unwrap();
        for name in [".x-state.part", ".x-2-state.gone", ".other.part"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let back = recover(parent.path(), &|name| name.ends_with("-state")).unwrap();
        assert_eq!(back, ["x-state"]);
        assert_eq!(names(parent.path()), [".other.part", "x-state"]);
        assert!(recover(Path::new("/nonexistent"), &|_| true).unwrap().is_empty());
    }
}
