//! `inspect`: what a LoRA or a checkpoint is, and which programs would load it.
//!
//! Of a model headers alone are read. Of an adapter every number is: norms and hashes are made anew.

mod adapter;
mod loaders;
mod model;
mod norms;
mod text;
mod training;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use formats::adapter::AdapterFile;
use formats::model_files::ModelFiles;
use formats::{FormatError, open_tensor_file};
use serde::Serialize;

use crate::progress::{print, tell};

pub(crate) use adapter::sshs;

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct Options {
    /// LoRAs and other adapters, checkpoints, diffusers folders; of another folder, the files in it
    #[arg(value_name = "FILE_OR_FOLDER", required = true)]
    paths: Vec<PathBuf>,
    /// Write one JSON array with everything that was found, all of the metadata too
    #[arg(long = "json")]
    json: bool,
    /// Show every entry of the metadata
    #[arg(long = "metadata")]
    metadata: bool,
}

/// What a path turned out to be.
#[derive(Serialize)]
#[serde(untagged)]
enum Report {
    Adapter(Box<adapter::AdapterReport>),
    Model(Box<model::ModelReport>),
}

/// Looks at every path. Those that cannot be read are told, the others are shown all the same.
///
/// # Errors
/// A path that cannot be read, after the others were shown.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let paths = expand(&options.paths)?;
    let mut reports = Vec::new();
    let mut failed = Vec::new();
    for path in &paths {
        match look(path) {
            Ok(report) if options.json => reports.push(report),
            Ok(report) => print(&text_of(&report, options.metadata)),
            Err(error) => failed.push(error),
        }
    }
    if options.json {
        print(&serde_json::to_string_pretty(&reports).context("the report does not fit JSON")?);
    }
    let Some(last) = failed.pop() else { return Ok(()) };
    for error in failed {
        tell(&format!("error: {error:#}"));
    }
    Err(last)
}

fn text_of(report: &Report, metadata: bool) -> String {
    match report {
        Report::Adapter(report) => text::adapter(report, metadata),
        Report::Model(report) => text::model(report, metadata),
    }
}

/// Files as given; of folders that are no model, the files of tensors in them.
pub(crate) fn expand(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in paths {
        if !path.is_dir() || is_model_folder(path) {
            all.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path)
            .with_context(|| format!("cannot read the folder `{}`", path.display()))?;
        let mut files = Vec::new();
        for entry in entries {
            let file = entry.with_context(|| format!("cannot read `{}`", path.display()))?.path();
            let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            if file.is_file() && ["safetensors", "ckpt", "pt", "pth", "bin"].contains(&ending) {
                files.push(file);
            }
        }
        if files.is_empty() {
            bail!("the folder holds no `.safetensors`, `.ckpt` or `.pt`: `{}`", path.display());
        }
        files.sort();
        all.extend(files);
    }
    Ok(all)
}

pub(crate) fn is_model_folder(path: &Path) -> bool {
    path.join("model_index.json").exists() || path.join("unet").is_dir()
}

/// A file of tensors by what it holds.
pub(crate) enum Opened {
    /// An adapter of a kind that can be read.
    Adapter(AdapterFile),
    /// A whole model.
    Model(Box<ModelFiles>),
    /// Neither; why it is no model.
    Tensors(Arc<dyn formats::TensorFile>, String),
}

/// Opens a path as what it is.
///
/// # Errors
/// A file that cannot be read, an adapter that breaks the rules, a folder that is no model.
pub(crate) fn open(path: &Path) -> Result<Opened, FormatError> {
    if path.is_dir() {
        return Ok(Opened::Model(Box::new(ModelFiles::open(path)?)));
    }
    let file = open_tensor_file(path)?;
    if is_adapter(file.as_ref()) {
        return Ok(Opened::Adapter(AdapterFile::of(file)?));
    }
    match ModelFiles::open(path) {
        Ok(model) => Ok(Opened::Model(Box::new(model))),
        Err(
            error @ (FormatError::Unsupported { .. }
            | FormatError::UnsupportedFamily { .. }
            | FormatError::MissingTensor { .. }),
        ) => Ok(Opened::Tensors(file, error.to_string())),
        Err(error) => Err(error),
    }
}

/// Whether the keys of a file are those of adapters, sound or not.
pub(crate) fn is_adapter(file: &dyn formats::TensorFile) -> bool {
    const PARTS: [&str; 5] = ["lora_", ".lora.", ".hada_", ".lokr_", "lora_linear_layer"];
    const ENDINGS: [&str; 5] = [".diff", ".diff_b", ".w_norm", ".b_norm", ".dora_scale"];
    file.names().iter().any(|name| {
        PARTS.iter().any(|part| name.contains(part))
            || ENDINGS.iter().any(|ending| name.ends_with(ending))
    })
}

fn look(path: &Path) -> anyhow::Result<Report> {
    Ok(match open(path)? {
        Opened::Adapter(file) => Report::Adapter(Box::new(adapter::report(&file)?)),
        Opened::Model(found) => Report::Model(Box::new(model::report(&found))),
        Opened::Tensors(file, why) => {
            // The first line is the reason, the rest are hints for people who want to train.
            let why = why.lines().next().unwrap_or_default().to_owned();
            Report::Model(Box::new(model::report_tensors(file.as_ref(), why)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
    }

    /// The fields that scripts read: names and values of the JSON.
    #[test]
    fn the_json_of_an_adapter_and_of_a_model() {
        let json = |name: &str| serde_json::to_value(look(&data(name)).unwrap()).unwrap();
        let lora = json("lora/lierla_r4.safetensors");
        assert_eq!(lora["kind"], "adapter");
        assert_eq!(lora["family"], "sd1");
        assert_eq!(lora["naming"], "kohya");
        assert_eq!(lora["network"], "LoRA (LierLa)");
        // Its numbers were drawn anew after sd-scripts had written it.
        assert_eq!(lora["hashes"]["sshs_model_agrees"], false);
        let resized = json("formats/sd_scripts_resized.safetensors");
        assert_eq!(resized["hashes"]["sshs_model_agrees"], true);
        assert_eq!(lora["training"]["steps"], "3");
        assert_eq!(lora["programs"][0]["program"], "webui");
        assert_eq!(lora["programs"][0]["loads"], "yes");
        let unet = &lora["parts"][1];
        assert_eq!((&unet["part"], &unet["modules"]), (&"unet".into(), &192.into()));
        assert_eq!(unet["ranks"], serde_json::json!([{"value": 4, "modules": 192}]));
        assert!(unet["norm_mean"].as_f64().unwrap() > 0.0);
        let model = json("parity/model");
        assert_eq!(model["kind"], "diffusers folder");
        assert_eq!((&model["family"], &model["prediction"]), (&"sd1".into(), &"epsilon".into()));
        let components: Vec<&str> = model["components"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|part| part["component"].as_str())
            .collect();
        assert_eq!(components, ["unet", "text_encoder", "vae"]);
        let other = json("objective/draws.safetensors");
        assert_eq!((&other["kind"], &other["family"]), (&"tensors".into(), &().into()));
    }

    /// Norms beside the fixtures' own: the sum of squares of what each module adds.
    #[test]
    fn norms_are_those_of_the_library_that_wrote_the_file() {
        let text = std::fs::read_to_string(data("adapters/expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut compared = 0;
        for (name, layers) in expected.as_object().unwrap() {
            let file = AdapterFile::open(&data("adapters").join(name)).unwrap();
            for (module, norm) in file.modules.iter().zip(norms::norms(&file).unwrap()) {
                let exact = layers[&module.name]["squares"].as_f64().unwrap().sqrt();
                assert!(
                    (norm / exact - 1.0).abs() < 1e-5,
                    "{name} {}: {norm} {exact}",
                    module.name
                );
                compared += 1;
            }
        }
        assert_eq!(compared, 26);
    }

    #[test]
    fn texts_name_what_matters() {
        let text = |name: &str| text_of(&look(&data(name)).unwrap(), false);
        let lora = text("adapters/diffusers_metadata.safetensors");
        for part in ["LoRA (C3Lier)", "PEFT's names", "alpha 3 to 5", "does not load", "drops 8:"] {
            assert!(lora.contains(part), "{part}\n{lora}");
        }
        let model = text("parity/model");
        assert!(model.contains("M parameters in") && model.contains("predicts epsilon"), "{model}");
    }
}
