//! `docs/options.md`: the option table as a document, written from the table and compared with it.

use super::{Group, Kind, OPTIONS, OptionSpec, Support, find_option};
use crate::dataset::config::dataset_options;
use std::fmt::Write;

/// What stands before the options.
const INTRODUCTION: &str = "\
# Options of `lorarun train`

Written from the option table of the program; do not edit. `lorarun train --help markdown` prints it;
`UPDATE_DOCS=1 cargo test -p trainer --lib options::docs` writes this file anew.

Names, defaults and meanings are those of sd-scripts' `train_network.py` and `sdxl_train_network.py`
(0.10.1), where they have the option. Each may stand in the config file as `name = value`, or on the
command line as `--name value`, which wins.

- **used**: it does what the text says.
- **no effect**: accepted, so that configs of sd-scripts run unchanged; the reason says why there is
  nothing to do. A run prints it once.
- **refused**: any value but the default ends the run with this reason before it begins.

Options of the dataset description (`[general]`, `[[datasets]]`, `[[datasets.subsets]]`) are at the end.
";

/// What stands before the options of the dataset description.
const DATASET_INTRODUCTION: &str = "
## Dataset description

In the file named by `--dataset_config` (TOML or JSON), or in the config file itself. A value in a
subset wins over one in its dataset, that over `[general]`, that over the options above.

| option | value | where | status | meaning |
|---|---|---|---|---|
";

/// The whole document.
pub fn markdown() -> String {
    let mut text = INTRODUCTION.to_owned();
    let mut group: Option<Group> = None;
    for spec in OPTIONS {
        if group != Some(spec.group) {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n## {}\n\n| option | value | default | status | meaning |\n|---|---|---|---|---|\n",
                spec.group.title()
            );
            group = Some(spec.group);
        }
        text += &row(spec);
    }
    text += DATASET_INTRODUCTION;
    for option in dataset_options() {
        let meaning = match find_option(option.name) {
            Some(_) => format!("as `--{}`", option.name),
            None => dataset_meaning(option.name).to_owned(),
        };
        let cells = [code(option.name), option.value, option.places.into(), option.status, meaning];
        text += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    text
}

/// What an option of the dataset description means that has no option of the run beside it.
fn dataset_meaning(name: &str) -> &'static str {
    match name {
        "batch_size" => "as `--train_batch_size`",
        "num_repeats" => "how often each image is used in an epoch; as `--dataset_repeats`",
        "image_dir" => "folder of the images; needed unless `metadata_file` names them",
        "class_tokens" => "caption of images that have no caption file",
        "is_reg" => "the images are regularization images, see `--prior_loss_weight`",
        "metadata_file" => "JSON file with captions and tags (fine-tuning style); as `--in_json`",
        "network_multiplier" => "strength of the LoRA while it is trained on this dataset",
        "custom_attributes" => "table for trainers of other models",
        "skip_image_resolution" => "leave out images up to a size",
        _ => "",
    }
}

fn row(spec: &OptionSpec) -> String {
    let value = match spec.kind {
        Kind::Flag => "flag".to_owned(),
        Kind::Choice(words) => code(&words.join("`, `")),
        kind => code(&kind.placeholder()),
    };
    let default = match (spec.default)() {
        None => String::new(),
        Some(toml::Value::Boolean(false)) => "off".to_owned(),
        Some(toml::Value::String(text)) if text.is_empty() => String::new(),
        Some(value) => code(&value.to_string()),
    };
    let status = match spec.support {
        Support::Supported => "used".to_owned(),
        Support::NoEffect(reason) => format!("no effect: {reason}"),
        Support::NotYet(advice) => format!("refused: not built yet; {advice}"),
        Support::Refused(reason) => format!("refused: {reason}"),
    };
    let help = spec.help.split_whitespace().collect::<Vec<_>>().join(" ");
    let cells = [code(spec.name), value, default, status, help];
    format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn repository(path: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
    }

    #[test]
    fn the_document_is_that_of_the_table() {
        let path = repository("docs/options.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, markdown()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            text == markdown(),
            "docs/options.md is not what the option table gives; write it with \
             `UPDATE_DOCS=1 cargo test -p trainer --lib options::docs`"
        );
    }

    #[test]
    fn options_of_the_dataset_description_have_a_meaning() {
        for option in dataset_options() {
            let name = option.name;
            assert!(find_option(name).is_some() || !dataset_meaning(name).is_empty(), "{name}");
        }
    }

    #[test]
    fn every_option_of_the_reference_is_listed_with_a_status() {
        let text = markdown();
        let reference = std::fs::read_to_string(repository("tests/data/options/options.txt"));
        for line in reference.unwrap().lines() {
            let name = line.trim_start_matches("--").split(' ').next().unwrap();
            // The help is no option of a run.
            if name == "help" {
                continue;
            }
            let row = text.lines().find(|row| row.starts_with(&format!("| `{name}` |")));
            let row = row.unwrap_or_else(|| panic!("{name} is missing"));
            let status = [" used ", " no effect: ", " refused: "];
            assert!(status.iter().any(|word| row.contains(word)), "{row}");
            assert_eq!(row.replace("\\|", "").matches('|').count(), 6, "{row}");
        }
    }
}
