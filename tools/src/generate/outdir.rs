//! Where pictures go: a folder that can be written to, and the names in it.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::Usage;

/// An error if `folder` could not be made and written to. Nothing is made: neither the folder nor a
/// file with a name.
///
/// # Errors
/// A [`Usage`] that names the folder and the reason.
pub(super) fn check(folder: &Path) -> Result<(), Usage> {
    let refuse = |reason: String| {
        Usage(format!(
            "cannot write to `--outdir`, {reason}: `{}`\nhint: choose another folder; nothing was \
             done yet",
            folder.display()
        ))
    };
    let absolute = std::path::absolute(folder).map_err(|error| refuse(error.to_string()))?;
    let there = absolute.ancestors().find(|place| place.symlink_metadata().is_ok());
    let there = there.unwrap_or(Path::new("/"));
    if !there.is_dir() {
        let name =
            if there == absolute { "it".to_owned() } else { format!("`{}`", there.display()) };
        return Err(refuse(format!("{name} is not a folder")));
    }
    tempfile::tempfile_in(there).map_err(|error| refuse(error.to_string()))?;
    Ok(())
}

/// How files are named.
#[derive(Clone, Debug)]
pub(super) struct Names {
    folder: PathBuf,
    /// `im_000001.png`, from 1.
    pub sequential: bool,
}

impl Names {
    /// Names in `folder`.
    pub fn new(folder: &Path, sequential: bool) -> Self {
        Self { folder: folder.to_path_buf(), sequential }
    }

    /// The file of a picture: the `index`th of this run, from 0. `stage` tells those of a picture that
    /// is made in two stages apart (`0`, `1`), else it is empty.
    pub fn of(&self, index: usize, seed: u64, stage: &str) -> PathBuf {
        self.folder.join(match self.sequential {
            true => format!("im_{stage}{:06}.png", index + 1),
            false => format!("im_{}_{stage}{index:03}_{seed}.png", now()),
        })
    }

    /// The file of the contact sheet.
    pub fn of_grid(&self) -> PathBuf {
        self.folder.join(match self.sequential {
            true => "grid.png".to_owned(),
            false => format!("grid_{}.png", now()),
        })
    }

    /// A file of this name; `.png` is added to another ending.
    pub fn called(&self, name: &str) -> PathBuf {
        let is_png = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
        self.folder.join(if is_png { name.to_owned() } else { format!("{name}.png") })
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_folder(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.folder).with_context(|| {
            format!("cannot make the folder of `--outdir`: {}", self.folder.display())
        })
    }
}

/// Local time as `20260102030405`.
fn now() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |since| since.as_secs()) as libc::time_t;
    // SAFETY: zeros are a valid `tm`, which is only read once it was filled.
    let mut local: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both point to values that live through the call.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut local) };
    format!(
        "{:04}{:02}{:02}{:02}{:02}{:02}",
        local.tm_year + 1900,
        local.tm_mon + 1,
        local.tm_mday,
        local.tm_hour,
        local.tm_min,
        local.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_made_is_refused_before_it_is_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let new = folder.path().join("a/b");
        assert!(check(&new).is_ok());
        assert!(!new.exists() && !folder.path().join("a").exists());
        let file = folder.path().join("file");
        std::fs::write(&file, "x").expect("written");
        let said = check(&file).expect_err("a file").0;
        assert!(said.starts_with("cannot write to `--outdir`, it is not a folder: `"), "{said}");
        let said = check(&file.join("deeper")).expect_err("below a file").0;
        assert!(said.contains("file` is not a folder"), "{said}");
        assert!(check(Path::new("/proc/self/x")).is_err());
    }

    #[test]
    fn names_are_those_of_the_reference() {
        let mut names = Names::new(Path::new("out"), true);
        assert_eq!(names.of(0, 7, ""), Path::new("out/im_000001.png"));
        assert_eq!(names.of(11, 7, "1"), Path::new("out/im_1000012.png"));
        assert_eq!(names.called("ring"), Path::new("out/ring.png"));
        assert_eq!(names.called("ring.v2"), Path::new("out/ring.v2.png"));
        assert_eq!(names.called("ring.PNG"), Path::new("out/ring.PNG"));
        names.sequential = false;
        let name = names.of(3, 42, "0").display().to_string();
        let digits =
            name.strip_prefix("out/im_").and_then(|rest| rest.strip_suffix("_0003_42.png"));
        let digits = digits.unwrap_or_else(|| panic!("{name}"));
        assert!(digits.len() == 14 && digits.starts_with("20"), "{name}");
    }
}
