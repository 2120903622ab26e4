//! Options that depend on the kind of the base model: what contradicts it, what it does not read.
//!
//! For SDXL the rules of sd-scripts' `sdxl_train_network.py`. `v2` is compared where the model is opened.

use anyhow::{Result, bail};
use formats::Family;

use crate::base::Base;
use crate::options::Options;

/// Compares the options with the kind of the base model; gives remarks.
///
/// # Errors
/// `sdxl` for a model that is not.
pub fn check_family(options: &Options, base: &Base) -> Result<Vec<String>> {
    let family = base.files.family;
    let (is_sdxl, path) = (family == Family::Sdxl, base.files.path.display());
    let mut notes = Vec::new();
    if options.sdxl && !is_sdxl {
        bail!(
            "`sdxl = true` contradicts the model `{path}`, which is: {}\nhint: remove `sdxl`, or \
             choose an SDXL model",
            family.title()
        );
    }
    if !is_sdxl {
        return Ok(notes);
    }
    if options.is_written("sdxl") && !options.sdxl {
        notes.push(format!("`sdxl = false` is ignored, the model is {}: {path}", family.title()));
    }
    if options.clip_skip.is_some_and(|skip| skip > 1) {
        notes.push(
            "`clip_skip` has no effect on SDXL: its text encoders are always read before their last \
             layer"
                .to_owned(),
        );
    }
    Ok(notes)
}
