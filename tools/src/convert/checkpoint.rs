//! Checkpoints: which way a conversion goes, and single files.

use std::collections::BTreeMap;
use std::path::Path;

use formats::model_files::{Container, ModelFiles};
use formats::{Family, FormatError, SaveAs, TensorSpec, open_tensor_file};

use super::copy::{Casting, Target, write};
use super::pipeline::{self, Noise};
use super::{Options, folder};
use crate::progress::tell;

/// Writes a single file.
pub(super) fn to_file(options: &Options, save_as: SaveAs) -> anyhow::Result<()> {
    if options.model.is_dir() {
        let model = open(&options.model)?;
        return folder_to_file(options, save_as, &model);
    }
    same_layout(options, save_as)
}

/// Writes a diffusers folder.
pub(super) fn to_folder(options: &Options) -> anyhow::Result<()> {
    let model = open(&options.model)?;
    let noise = pipeline::noise_of(&model, options.prediction_type)?;
    if model.container == Container::SingleFile {
        let keys: Vec<&str> = model.outside_components().iter().map(|(_, key)| *key).collect();
        tell_left_out(&keys, "a diffusers folder");
    }
    folder::write(&model, &options.save_to, casting(options), noise)?;
    tell(&format!("{}, {}: {}", model.family.title(), noise.title(), options.save_to.display()));
    Ok(())
}

fn open(path: &Path) -> Result<ModelFiles, FormatError> {
    let model = ModelFiles::open(path)?;
    for note in &model.notes {
        tell(note);
    }
    Ok(model)
}

fn casting(options: &Options) -> Casting {
    Casting { precision: options.save_precision, finite: options.finite }
}

/// A file of any tensors in another container or precision: every tensor stays.
fn same_layout(options: &Options, save_as: SaveAs) -> anyhow::Result<()> {
    let file = open_tensor_file(&options.model)?;
    let casting = casting(options);
    let names = file.names();
    let specs = names.iter().filter_map(|name| {
        let (dtype, shape) = file.describe(name)?;
        Some(casting.spec(TensorSpec { name: (*name).to_owned(), dtype, shape: shape.to_vec() }))
    });
    let specs: Vec<TensorSpec> = specs.collect();
    let mut metadata = file.metadata().clone();
    if casting.precision.is_some() {
        // Of other bytes than those that are written.
        metadata.retain(|key, _| key != "modelspec.hash_sha256" && !key.starts_with("sshs_"));
    }
    if save_as == SaveAs::Pickle && !metadata.is_empty() {
        tell(&format!("a torch checkpoint holds no metadata, {} are left out", metadata.len()));
    }
    let target = Target {
        path: &options.save_to,
        save_as,
        metadata: Some(&metadata).filter(|metadata| !metadata.is_empty()),
        source: &options.model,
    };
    write(&target, &specs, options.finite, |index| Ok(vec![file.view(&specs[index].name)?]))?;
    tell(&format!("{} tensors: {}", specs.len(), options.save_to.display()));
    Ok(())
}

fn folder_to_file(options: &Options, save_as: SaveAs, model: &ModelFiles) -> anyhow::Result<()> {
    let casting = casting(options);
    let noise = pipeline::noise_of(model, options.prediction_type)?;
    let mut layout = model.ldm_layout();
    for note in &layout.notes {
        tell(note);
    }
    let outside = model.outside_components().into_iter();
    layout.left_out.extend(outside.map(|(file, key)| {
        let folder = model.files[file].component.map_or("", |component| component.folder());
        format!("{folder}/{key}")
    }));
    let left_out: Vec<&str> = layout.left_out.iter().map(String::as_str).collect();
    tell_left_out(&left_out, "the LDM layout");
    let specs: Vec<TensorSpec> =
        layout.tensors.iter().map(|tensor| casting.spec(tensor.spec.clone())).collect();
    let metadata = metadata(model.family, noise);
    let target = Target {
        path: &options.save_to,
        save_as,
        metadata: Some(&metadata),
        source: &options.model,
    };
    write(&target, &specs, options.finite, |index| Ok(layout.tensors[index].read(model)?))?;
    tell(&format!("{}, {}: {}", model.family.title(), noise.title(), options.save_to.display()));
    Ok(())
}

/// What a single file cannot say by its tensors, by ModelSpec's names.
fn metadata(family: Family, noise: Noise) -> BTreeMap<String, String> {
    let architecture = match (family, noise.predicts_velocity()) {
        (Family::Sd1, _) => "stable-diffusion-v1",
        (Family::Sd2, false) => "stable-diffusion-v2-512",
        (Family::Sd2, true) => "stable-diffusion-v2-768-v",
        (Family::Sdxl, _) => "stable-diffusion-xl-v1-base",
    };
    let prediction = if noise.predicts_velocity() { "v" } else { "epsilon" };
    let pairs =
        [("modelspec.architecture", architecture), ("modelspec.prediction_type", prediction)];
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

fn tell_left_out(keys: &[&str], place: &str) {
    if keys.is_empty() {
        return;
    }
    let shown: Vec<String> = keys.iter().take(3).map(|key| format!("`{key}`")).collect();
    let more = if keys.len() > 3 { ", ..." } else { "" };
    tell(&format!(
        "left out, as {place} has no place for them ({} tensors): {}{more}",
        keys.len(),
        shown.join(", ")
    ));
}
