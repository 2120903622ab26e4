//! `convert`: the same weights in another layout or container.
//!
//! Checkpoints: a single file in the LDM layout to a diffusers folder and back, `.safetensors` to
//! `.ckpt` and back, and either in another precision. LoRAs: sd-scripts' names to diffusers' and back.

mod checkpoint;
mod copy;
mod folder;
mod lora;
mod pipeline;
mod shapes;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use formats::SaveAs;
use formats::adapter::AdapterFile;

use crate::finite::FiniteRule;
use crate::inspect::is_adapter;
use crate::precision::Precision;
use crate::{Usage, output};

/// Options of `convert`.
#[derive(Debug, Args)]
pub struct Options {
    /// What to convert: a LoRA, a model as a `.safetensors` or `.ckpt` file, or a diffusers folder
    #[arg(long = "model", value_name = "MODEL")]
    model: PathBuf,
    /// Where to write: `NAME.safetensors` or `NAME.ckpt` makes a single file (for WebUI, ComfyUI,
    /// sd-scripts), a name without an ending a diffusers folder
    #[arg(long = "save_to", value_name = "FILE_OR_FOLDER")]
    save_to: PathBuf,
    /// Of a LoRA, whose names to write; the other ones when left out
    #[arg(long = "to", value_enum)]
    to: Option<lora::Target>,
    /// Number type of the weights; as they are when left out
    #[arg(long = "save_precision", value_enum)]
    save_precision: Option<Precision>,
    /// What the model predicts, for the scheduler of a new diffusers folder; when left out: what
    /// the file says, else `v_prediction` for SD2 and `epsilon` for the others
    #[arg(long = "prediction_type", value_enum)]
    prediction_type: Option<Prediction>,
    #[command(flatten)]
    finite: FiniteRule,
}

/// What a U-Net predicts, by diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Prediction {
    /// The noise
    Epsilon,
    /// The velocity: noise and picture mixed
    #[value(name = "v_prediction", alias = "v")]
    Velocity,
}

/// What `save_to` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    File(SaveAs),
    Folder,
}

/// Does the work.
///
/// # Errors
/// A destination that is or lies in the source, is there already, or has an unknown ending; what
/// cannot be read, what cannot be written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if let Some(file) = adapter(&options.model)? {
        let save_as = output::prepare(&options.save_to, &[&options.model])?;
        let Options { to, save_to, save_precision, finite, .. } = options;
        return lora::convert(&file, *to, save_to, save_as, *save_precision, *finite);
    }
    if options.to.is_some() {
        return Err(Usage(format!(
            "`to` is for LoRAs, this is a model: `{}`\nhint: leave `to` out, the ending of \
             `save_to` says what to make",
            options.model.display()
        ))
        .into());
    }
    let destination = destination(&options.save_to)?;
    refuse_inside(&options.save_to, &options.model)?;
    match destination {
        Destination::File(save_as) => {
            output::prepare(&options.save_to, &[&options.model])?;
            checkpoint::to_file(options, save_as)
        }
        Destination::Folder => {
            output::refuse_input(&options.save_to, &[&options.model])?;
            checkpoint::to_folder(options)
        }
    }
}

/// The adapter, if the file is one.
fn adapter(path: &Path) -> anyhow::Result<Option<AdapterFile>> {
    if path.is_dir() {
        return Ok(None);
    }
    let file = formats::open_tensor_file(path)?;
    Ok(if is_adapter(file.as_ref()) { Some(AdapterFile::of(file)?) } else { None })
}

/// A known ending means a file, none a folder.
fn destination(path: &Path) -> anyhow::Result<Destination> {
    if path.is_dir() {
        let mut entries = std::fs::read_dir(path)?;
        if entries.next().is_some() {
            return Err(Usage(format!(
                "`save_to` is a folder that is not empty: `{}`\nhint: choose a new name; nothing \
                 was written",
                path.display()
            ))
            .into());
        }
        return Ok(Destination::Folder);
    }
    match SaveAs::of_path(path) {
        Ok(save_as) => Ok(Destination::File(save_as)),
        Err(_) if path.is_file() => {
            Err(Usage(format!("`save_to` is a file that is there already: `{}`", path.display()))
                .into())
        }
        Err(_) if path.extension().is_none() || ends_in_slash(path) => Ok(Destination::Folder),
        Err(_) => Err(Usage(format!(
            "`save_to` has an ending that names no kind of file: `{}`\nhint: end it in \
             `.safetensors` or `.ckpt` for a single file, in `/` for a diffusers folder",
            path.display()
        ))
        .into()),
    }
}

fn ends_in_slash(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

/// What is written must not become a part of what is read.
fn refuse_inside(save_to: &Path, model: &Path) -> anyhow::Result<()> {
    let Ok(model) = model.canonicalize() else { return Ok(()) };
    if !model.is_dir() {
        return Ok(());
    }
    // The nearest folder that exists.
    let mut place = save_to;
    let found = loop {
        match place.canonicalize() {
            Ok(found) => break found,
            Err(_) => match place.parent() {
                Some(parent) if parent.as_os_str().is_empty() => {
                    break Path::new(".").canonicalize()?;
                }
                Some(parent) => place = parent,
                None => return Ok(()),
            },
        }
    };
    if found != model && found.starts_with(&model) || found == model && place != save_to {
        return Err(Usage(format!(
            "`save_to` lies in the folder that is read: `{}`\nhint: choose a place beside it; \
             nothing was written",
            save_to.display()
        ))
        .into());
    }
    Ok(())
}
