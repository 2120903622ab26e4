//! Where a tool writes: never over what it reads, always under a known ending.

use std::path::{Path, PathBuf};

use anyhow::Context;
use formats::SaveAs;

use crate::Usage;

/// Checks a file to be written before the work begins, and makes its folder.
///
/// # Errors
/// An ending that names no container, a path that is one of `inputs` (also through links), a folder
/// that cannot be made.
pub(crate) fn prepare(save_to: &Path, inputs: &[&Path]) -> anyhow::Result<SaveAs> {
    let save_as = SaveAs::of_path(save_to).map_err(|error| Usage(error.to_string()))?;
    refuse_input(save_to, inputs)?;
    if let Some(folder) = save_to.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(|| {
            format!("cannot make the folder of `save_to`: {}", folder.display())
        })?;
    }
    Ok(save_as)
}

/// An error if `save_to` is one of `inputs`.
///
/// # Errors
/// A [`Usage`] that names the path.
pub(crate) fn refuse_input(save_to: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    let place =
        |path: &Path| -> PathBuf { path.canonicalize().unwrap_or_else(|_| path.to_path_buf()) };
    let target = place(save_to);
    if let Some(input) = inputs.iter().find(|input| place(input) == target) {
        return Err(Usage(format!(
            "`save_to` is a file that is read: `{}`\nhint: choose another name; nothing was \
             written",
            input.display()
        ))
        .into());
    }
    Ok(())
}
