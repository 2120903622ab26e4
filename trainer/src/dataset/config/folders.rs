//! `train_data_dir` and `reg_data_dir`: one subset per folder named `N_class tokens`.

use super::{
    DatasetConfig, DatasetDefaults, DatasetError, SubsetPlan, SubsetSource, plan_without_config,
};
use crate::dataset::scan::is_image;
use std::path::Path;

/// Plans one DreamBooth dataset from the folders under `train_data_dir` and `reg_data_dir`.
pub(super) fn plan_folders(
    train_data_dir: &Path,
    reg_data_dir: Option<&Path>,
    defaults: &DatasetDefaults,
) -> Result<DatasetConfig, DatasetError> {
    let mut warnings = Vec::new();
    let mut subsets = subsets_under(train_data_dir, false, defaults, &mut warnings)?;
    if subsets.is_empty() {
        let advice = if holds_images(train_data_dir) {
            "the images lie in `train_data_dir` itself: move them into a folder inside it that is \
             named `repeats_class tokens`, for example `10_sks dog`, or name it as `image_dir` in \
             a dataset file"
        } else {
            "`train_data_dir` should hold folders named `repeats_class tokens`, for example \
             `10_sks dog`, and these the images"
        };
        return Err(DatasetError::NoImages {
            place: train_data_dir.to_owned(),
            advice: advice.into(),
        });
    }
    if let Some(reg_data_dir) = reg_data_dir {
        let regularisation = subsets_under(reg_data_dir, true, defaults, &mut warnings)?;
        if regularisation.is_empty() {
            warnings.push(format!(
                "`reg_data_dir` holds no folder named `repeats_class tokens`: {}",
                reg_data_dir.display()
            ));
        }
        subsets.extend(regularisation);
    }
    plan_without_config(subsets, true, warnings, defaults)
}

fn subsets_under(
    parent: &Path,
    is_reg: bool,
    defaults: &DatasetDefaults,
    warnings: &mut Vec<String>,
) -> Result<Vec<SubsetPlan>, DatasetError> {
    if !parent.is_dir() {
        let option = if is_reg { "reg_data_dir" } else { "train_data_dir" };
        return Err(DatasetError::NoImages {
            place: parent.to_owned(),
            advice: format!(
                "`{option}` is not a folder; relative paths count from where the command is run"
            ),
        });
    }
    let read_error = |error| DatasetError::file("read the folder", parent, error);
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(parent).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            folders.push(path);
        }
    }
    folders.sort();
    let mut subsets = Vec::new();
    for image_dir in folders {
        let name = image_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match repeats_and_tokens(&name) {
            Some((0, _)) => {}
            Some((repeats, class_tokens)) => {
                let mut options = defaults.subset.clone();
                options.num_repeats = repeats;
                options.class_tokens = Some(class_tokens.to_owned());
                let source = SubsetSource::DreamBooth { image_dir, is_reg };
                subsets.push(SubsetPlan { source, options });
            }
            None => warnings.push(format!(
                "the folder is left out, its name does not begin with a number of repeats and \
                 `_`: {}",
                image_dir.display()
            )),
        }
    }
    Ok(subsets)
}

fn holds_images(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|path| is_image(&path))
}

/// `10_sks dog` is (10, `sks dog`); a name without `_` has no class tokens.
fn repeats_and_tokens(name: &str) -> Option<(u32, &str)> {
    let (repeats, tokens) = name.split_once('_').unwrap_or((name, ""));
    Some((repeats.trim().parse().ok()?, tokens))
}
