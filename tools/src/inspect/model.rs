//! What a checkpoint is: its family, components, number types and what its metadata say.

use std::collections::BTreeMap;
use std::path::Path;

use formats::model_files::{ComponentKind, Container, ModelFiles};
use formats::{TensorFile, Weights};
use serde::Serialize;

use super::adapter::{DtypeReport, dtypes, family_word};
use super::training::Training;

/// Everything told of a model, or of a file of tensors that is none.
#[derive(Debug, Serialize)]
pub(crate) struct ModelReport {
    /// `checkpoint`, `diffusers folder` or `tensors`.
    pub kind: &'static str,
    pub path: String,
    pub bytes: u64,
    pub family: Option<&'static str>,
    /// `epsilon` or `v`, where the metadata or the scheduler say.
    pub prediction: Option<String>,
    pub components: Vec<ComponentReport>,
    /// Tensors of no component: EMA weights, training state.
    pub other_tensors: usize,
    /// Keeps an average of its U-Net's weights beside them.
    pub ema: bool,
    pub dtypes: Vec<DtypeReport>,
    /// Why it is no model, for `tensors`; what was noticed otherwise.
    pub notes: Vec<String>,
    /// Programs that load such a model, by the form it has.
    pub loaded_by: Vec<&'static str>,
    pub training: Training,
    pub metadata: BTreeMap<String, String>,
}

/// One component.
#[derive(Debug, Serialize)]
pub(crate) struct ComponentReport {
    /// `unet`, `text_encoder`, `text_encoder_2`, `vae`.
    pub component: &'static str,
    pub tensors: usize,
    pub parameters: usize,
}

const COMPONENTS: [ComponentKind; 4] = [
    ComponentKind::Unet,
    ComponentKind::TextEncoder,
    ComponentKind::TextEncoder2,
    ComponentKind::Vae,
];

/// Looks at an open model.
pub(crate) fn report(model: &ModelFiles) -> ModelReport {
    let mut components = Vec::new();
    for kind in COMPONENTS {
        let Some(component) = model.component(kind) else { continue };
        let names = component.names();
        let shapes = names.iter().filter_map(|name| component.shape(name));
        components.push(ComponentReport {
            component: kind.folder(),
            tensors: names.len(),
            parameters: shapes.map(|shape| shape.iter().product::<usize>()).sum(),
        });
    }
    let files: Vec<&dyn TensorFile> =
        model.files.iter().map(|stored| stored.file.as_ref()).collect();
    let metadata = files.first().map(|file| file.metadata().clone()).unwrap_or_default();
    let folder = model.container == Container::Folder;
    let mut notes = model.notes.clone();
    if model.component(ComponentKind::Vae).is_none() {
        notes.push("it has no VAE: programs take their own".to_owned());
    }
    let (other_tensors, ema) = if folder { (0, false) } else { others(&files) };
    ModelReport {
        kind: if folder { "diffusers folder" } else { "checkpoint" },
        path: model.path.display().to_string(),
        bytes: size_of(&files),
        family: Some(family_word(model.family)),
        prediction: prediction(&model.path, &metadata),
        components,
        other_tensors,
        ema,
        dtypes: all_dtypes(&files),
        notes,
        loaded_by: if folder {
            vec!["diffusers", "sd-scripts", "lorarun"]
        } else {
            vec![
                "webui",
                "forge",
                "comfyui",
                "diffusers (from_single_file)",
                "sd-scripts",
                "lorarun",
            ]
        },
        training: Training::of(&metadata),
        metadata,
    }
}

/// A file that is neither an adapter nor a model.
pub(crate) fn report_tensors(file: &dyn TensorFile, why: String) -> ModelReport {
    let metadata = file.metadata().clone();
    ModelReport {
        kind: "tensors",
        path: file.path().display().to_string(),
        bytes: size_of(&[file]),
        family: None,
        prediction: None,
        components: Vec::new(),
        other_tensors: file.names().len(),
        ema: false,
        dtypes: dtypes(file),
        notes: vec![why],
        loaded_by: Vec::new(),
        training: Training::of(&metadata),
        metadata,
    }
}

/// Tensors of a single file outside its components, and whether an average is among them.
fn others(files: &[&dyn TensorFile]) -> (usize, bool) {
    const KNOWN: [&str; 4] =
        ["model.diffusion_model.", "cond_stage_model.", "conditioner.", "first_stage_model."];
    let names = files.iter().flat_map(|file| file.names());
    let outside = |name: &&str| !KNOWN.iter().any(|prefix| name.starts_with(prefix));
    let outside: Vec<&str> = names.filter(outside).collect();
    (outside.len(), outside.iter().any(|name| name.starts_with("model_ema.")))
}

fn size_of(files: &[&dyn TensorFile]) -> u64 {
    let size = |file: &&dyn TensorFile| std::fs::metadata(file.path()).map_or(0, |data| data.len());
    files.iter().map(size).sum()
}

fn all_dtypes(files: &[&dyn TensorFile]) -> Vec<DtypeReport> {
    let mut sums: Vec<DtypeReport> = Vec::new();
    for report in files.iter().flat_map(|file| dtypes(*file)) {
        match sums.iter_mut().find(|sum| sum.dtype == report.dtype) {
            Some(sum) => {
                sum.tensors += report.tensors;
                sum.values += report.values;
            }
            None => sums.push(report),
        }
    }
    sums.sort_by_key(|report| std::cmp::Reverse(report.values));
    sums
}

/// From ModelSpec, or the scheduler of a folder.
fn prediction(path: &Path, metadata: &BTreeMap<String, String>) -> Option<String> {
    if let Some(said) = metadata.get("modelspec.prediction_type") {
        return Some(said.clone());
    }
    let text = std::fs::read_to_string(path.join("scheduler/scheduler_config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let said = config.get("prediction_type")?.as_str()?;
    Some(if said == "v_prediction" { "v".to_owned() } else { said.to_owned() })
}
