//! Pictures to start from, and masks of what of them is made anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use models::pipeline::{Mask, Picture};
use pictures::image_file;

use super::networks::name_of;
use super::options::SourceOptions;
use crate::Usage;

/// A picture to start from.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// Its file's name without ending.
    pub name: String,
    pub picture: Arc<Picture>,
}

/// All of them; taken in turn.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources {
    pictures: Vec<Source>,
    masks: Vec<Arc<Mask>>,
}

impl Sources {
    /// Reads the files of `--image_path` and `--mask_path`.
    ///
    /// # Errors
    /// A folder without pictures, a file that is none.
    pub fn open(options: &SourceOptions) -> anyhow::Result<Self> {
        let mut sources = Self::default();
        if let Some(path) = &options.image_path {
            for file in files("image_path", path)? {
                let picture = Arc::new(read(&file)?);
                sources.pictures.push(Source { name: name_of(&file), picture });
            }
        }
        if let Some(path) = &options.mask_path {
            for file in files("mask_path", path)? {
                sources.masks.push(Arc::new(Mask::of(&read(&file)?)));
            }
        }
        Ok(sources)
    }

    /// The picture of the `index`th prompt, if there is any.
    pub fn picture(&self, index: usize) -> Option<&Source> {
        self.pictures.get(index % self.pictures.len().max(1))
    }

    /// Its mask.
    pub fn mask(&self, index: usize) -> Option<Arc<Mask>> {
        self.masks.get(index % self.masks.len().max(1)).cloned()
    }
}

/// A file by itself, or the pictures of a folder by name.
fn files(option: &str, path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let failure = || format!("cannot read the folder of `--{option}`: {}", path.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).with_context(failure)? {
        let file = entry.with_context(failure)?.path();
        let ending = file.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        if ending.is_some_and(|ending| image_file::EXTENSIONS.contains(&ending.as_str())) {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() {
        let shown = path.display();
        return Err(Usage(format!("the folder of `--{option}` holds no picture: `{shown}`")).into());
    }
    Ok(found)
}

fn read(path: &Path) -> anyhow::Result<Picture> {
    let pixels = image_file::decode(path, false)
        .map_err(|error| anyhow::anyhow!("`{}` cannot be used, {error}", path.display()))?;
    Ok(Picture::from_rgb8(pixels.width, pixels.height, &pixels.data)?)
}
