//! The folder of pictures: which files are pictures, which belong to them, which are copied as they
//! are. Folders in it and hidden files are left alone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use pictures::image_file::EXTENSIONS;

use crate::Usage;
use crate::progress::tell;

/// A file with the ending of a picture.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// `photo.jpg`
    pub(super) name: String,
    /// `photo`
    pub(super) base: String,
    /// What follows `base` in the names of files that belong to the picture: `.txt`, `.caption`.
    pub(super) associated: Vec<String>,
}

/// What lies in a folder, sorted by name.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) folder: PathBuf,
    /// At least one.
    pub(super) pictures: Vec<Source>,
    /// Names of the other files.
    pub(super) others: Vec<String>,
}

/// An error if `destination` is `source` or lies in it, also through links.
///
/// # Errors
/// A [`Usage`], or a source that is no folder.
pub(super) fn refuse_inside(source: &Path, destination: &Path) -> anyhow::Result<()> {
    if !source.is_dir() {
        bail!("the folder of pictures is no folder: {}", source.display());
    }
    let unreadable = |path: &Path| format!("cannot be opened: {}", path.display());
    let within = source.canonicalize().with_context(|| unreadable(source))?;
    let place = future_place(destination).with_context(|| unreadable(destination))?;
    if place.starts_with(&within) {
        let how = if place == within { "is" } else { "lies in" };
        return Err(Usage(format!(
            "the folder to write to {how} the folder of pictures: {}\n\
             hint: choose one outside, so that no picture is replaced or resized twice; nothing was \
             written",
            destination.display()
        ))
        .into());
    }
    Ok(())
}

/// Where `path` will be once it is made: the part that is there followed through links.
fn future_place(path: &Path) -> std::io::Result<PathBuf> {
    let mut missing: Vec<OsString> = Vec::new();
    let mut there = std::path::absolute(path)?;
    loop {
        match there.canonicalize() {
            Ok(found) => return Ok(missing.iter().rev().fold(found, |path, name| path.join(name))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let Some(name) = there.file_name() else { return Err(error) };
                missing.push(name.to_owned());
                there.pop();
            }
            Err(error) => return Err(error),
        }
    }
}

/// Lists a folder.
///
/// # Errors
/// A folder that cannot be read or holds no picture, a name that is no UTF-8.
pub(super) fn list(folder: &Path) -> anyhow::Result<Listing> {
    let unreadable = || format!("the folder of pictures cannot be read: {}", folder.display());
    let (mut names, mut left_out) = (Vec::new(), 0);
    for entry in std::fs::read_dir(folder).with_context(unreadable)? {
        let entry = entry.with_context(unreadable)?;
        let name = entry.file_name().into_string().map_err(|name| {
            anyhow!("a file name is no UTF-8: {}\nhint: rename the file", name.display())
        })?;
        // A pipe or a device would be waited for; a link that leads nowhere is named when read.
        let special = entry.path().metadata().is_ok_and(|found| !found.is_file());
        if special || name.starts_with('.') {
            left_out += 1;
        } else {
            names.push(name);
        }
    }
    names.sort();
    let (pictures, others): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| is_picture(name));
    if pictures.is_empty() {
        bail!(
            "the folder holds no picture: {}\nhint: the endings are: {}",
            folder.display(),
            EXTENSIONS.join(", ")
        );
    }
    if left_out > 0 {
        tell(&format!("folders and hidden files are left out: {left_out}"));
    }
    let mut pictures: Vec<Source> = pictures
        .into_iter()
        .map(|name| {
            let base = name.rsplit_once('.').map_or(name.as_str(), |(base, _)| base).to_owned();
            Source { path: folder.join(&name), name, base, associated: Vec::new() }
        })
        .collect();
    associate(&mut pictures, &others);
    Ok(Listing { folder: folder.to_owned(), pictures, others })
}

fn is_picture(name: &str) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_lowercase());
    ending.is_some_and(|ending| EXTENSIONS.contains(&ending.as_str()))
}

/// `photo.txt` and `photo.tags.txt` belong to `photo.jpg`; the latter not if there is a
/// `photo.tags.jpg`.
fn associate(pictures: &mut [Source], others: &[String]) {
    for other in others {
        let belongs =
            |base: &str| other.strip_prefix(base).is_some_and(|tail| tail.starts_with('.'));
        let longest =
            pictures.iter().map(|p| &p.base).filter(|base| belongs(base)).max_by_key(|b| b.len());
        let Some(base) = longest.cloned() else { continue };
        for picture in pictures.iter_mut().filter(|picture| picture.base == base) {
            picture.associated.push(other[base.len()..].to_owned());
        }
    }
}

/// Copies a file, whole or not at all.
///
/// # Errors
/// What cannot be read or written.
pub(super) fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(from)
        .with_context(|| format!("cannot be opened: {}", from.display()))?;
    formats::atomic::write_atomic(to, |sink| std::io::copy(&mut file, sink).map(drop))
        .with_context(|| format!("cannot be copied: {}", from.display()))
}
