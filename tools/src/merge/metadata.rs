//! What a merged file says of itself: sd-scripts' least `ss_` keys and ModelSpec's, with the titles
//! of all files that went into it.

use std::collections::BTreeMap;
use std::path::Path;

use formats::adapter::AdapterFile;
use formats::lora_file::Metadata;
use formats::model_files::{Container, ModelFiles};
use formats::model_spec::ModelSpec;
use formats::{Family, TensorFile};

use super::input::Input;
use crate::model_spec;

/// Keys of a model that stay true when adapters are merged into it.
const KEPT: [&str; 3] = ["modelspec.license", "modelspec.resolution", "modelspec.usage_hint"];

const TITLE: &str = "modelspec.title";
const PREDICTION: &str = "modelspec.prediction_type";

/// Metadata, and what the user should know of them.
pub(crate) type Told = (Metadata, Option<&'static str>);

const GUESSED: &str = "nothing tells whether this is a v-prediction model, the metadata say that it \
                       is, as sd-scripts' do";

/// A model's metadata after a merge. Its own keys outside of ModelSpec stay, ModelSpec's are made
/// new but for licence, resolution and usage hint.
pub(super) fn of_model(model: &ModelFiles, inputs: &[Input], save_to: &Path) -> Told {
    let own = match (model.container, model.files.first()) {
        (Container::SingleFile, Some(stored)) => stored.file.metadata().clone(),
        _ => Metadata::new(),
    };
    let titles = std::iter::once(title(&own, &model.path));
    let titles = titles.chain(inputs.iter().map(|input| title_of(&input.file)));
    let (v_parameterization, guessed) = predicts_v(model.family, &own, inputs);
    let spec = spec(model.family, v_parameterization, save_to, titles.collect());
    let mut metadata = spec.to_checkpoint_metadata();
    for (key, value) in own {
        if !key.starts_with("modelspec.") || KEPT.contains(&key.as_str()) {
            metadata.insert(key, value);
        }
    }
    (metadata, guessed.then_some(GUESSED))
}

/// A LoRA's metadata: rank and alpha of its modules are named where all have the same.
pub(crate) fn of_lora(
    inputs: &[Input],
    ranks: &[(usize, f32)],
    save_to: &Path,
    with_model_spec: bool,
) -> Told {
    let first_of =
        |key: &str| inputs.iter().find_map(|input| input.file.metadata.get(key)).cloned();
    let family = inputs.iter().find_map(|input| input.file.family).unwrap_or(Family::Sd1);
    let own = inputs.first().map(|input| input.file.metadata.clone()).unwrap_or_default();
    let (v_parameterization, guessed) = predicts_v(family, &own, inputs);
    let is_v2 = family == Family::Sd2;
    let v2 = first_of("ss_v2").unwrap_or_else(|| if is_v2 { "True" } else { "False" }.to_owned());
    let base = first_of("ss_base_model_version")
        .unwrap_or_else(|| family.version_tag(v_parameterization).to_owned());
    let mut metadata = Metadata::from([
        ("ss_network_module".to_owned(), "networks.lora".to_owned()),
        (
            "ss_network_dim".to_owned(),
            same_or_dynamic(ranks.iter().map(|(dim, _)| dim.to_string())),
        ),
        // As Python writes a float.
        (
            "ss_network_alpha".to_owned(),
            same_or_dynamic(ranks.iter().map(|(_, a)| format!("{a:?}"))),
        ),
        ("ss_v2".to_owned(), v2),
        ("ss_base_model_version".to_owned(), base),
    ]);
    if with_model_spec {
        let titles = inputs.iter().map(|input| title_of(&input.file)).collect();
        let spec = spec(family, v_parameterization, save_to, titles);
        metadata.extend(spec.to_metadata());
    }
    (metadata, (guessed && with_model_spec).then_some(GUESSED))
}

/// The one value, or `Dynamic`.
fn same_or_dynamic(values: impl Iterator<Item = String>) -> String {
    let mut values = values;
    let first = values.next().unwrap_or_default();
    if values.all(|value| value == first) { first } else { "Dynamic".to_owned() }
}

fn spec(
    family: Family,
    v_parameterization: bool,
    save_to: &Path,
    titles: Vec<String>,
) -> ModelSpec {
    model_spec::model_spec(save_to, family, v_parameterization, Some(titles.join(", ")))
}

/// (whether the model predicts v, whether that is a guess). Files say so by ModelSpec or by
/// sd-scripts' name of the base model.
fn predicts_v(family: Family, own: &Metadata, inputs: &[Input]) -> (bool, bool) {
    let all = std::iter::once(own).chain(inputs.iter().map(|input| &input.file.metadata));
    for metadata in all {
        if let Some(prediction) = metadata.get(PREDICTION) {
            return (prediction == "v", false);
        }
        if let Some(base) = metadata.get("ss_base_model_version") {
            return (base.ends_with("_v"), false);
        }
    }
    let is_v2 = family == Family::Sd2;
    (is_v2, is_v2)
}

fn title_of(file: &AdapterFile) -> String {
    title(&file.metadata, &file.path)
}

/// The title in the metadata, otherwise the file's name.
fn title(metadata: &BTreeMap<String, String>, path: &Path) -> String {
    metadata.get(TITLE).cloned().unwrap_or_else(|| stem(path))
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// For a file of a folder: its own, and the mark that transformers asks for.
pub(super) fn of_component(file: &dyn TensorFile) -> Metadata {
    let mut metadata = file.metadata().clone();
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    metadata
}
