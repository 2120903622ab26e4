//! Reads the dataset configuration: what was written, strictly, into the plan of what is done.
//!
//! The format is that of sd-scripts (TOML or JSON with `[general]`, `[[datasets]]` and
//! `[[datasets.subsets]]`). A value in a subset wins over one in its dataset, that over `[general]`,
//! that over the command line. Without a dataset configuration there are `train_data_dir` and
//! `reg_data_dir` (folders named `N_class tokens`) or `in_json` (a metadata file).

mod apply;
mod folders;
mod plan;
mod schema;
#[cfg(test)]
mod tests;

pub use plan::{
    DatasetConfig, DatasetDefaults, DatasetOptions, DatasetPlan, SubsetOptions, SubsetPlan,
    SubsetSource,
};

pub use schema::{DatasetOption, dataset_options};

use super::error::DatasetError;
use apply::{apply_dataset_options, apply_subset_options};
use pictures::image_file::MAX_PIXELS;
use schema::{Level, Method};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Longest side of a bucket, in pixels.
const LARGEST_SIDE: u32 = 65_536;

/// Where the description of the datasets comes from.
#[derive(Debug, Clone)]
pub enum DatasetInput {
    /// `dataset_config`: a TOML or JSON file.
    File(PathBuf),
    /// Inline tables of the main configuration: the keys `general` and `datasets`.
    Inline {
        /// A table with `general` and `datasets`.
        table: Table,
        /// The main configuration, for messages.
        origin: PathBuf,
    },
    /// `train_data_dir` and `reg_data_dir` with folders named `N_class tokens`.
    Folders {
        /// Parent of the folders of training images.
        train_data_dir: PathBuf,
        /// Parent of the folders of regularisation images.
        reg_data_dir: Option<PathBuf>,
    },
    /// `in_json`: one fine-tuning subset.
    Metadata {
        /// JSON or JSON lines.
        in_json: PathBuf,
        /// `train_data_dir`: the folder of images named by relative paths.
        image_dir: Option<PathBuf>,
    },
}

/// The file that messages name.
pub(crate) struct Origin {
    pub(crate) path: PathBuf,
}

impl Origin {
    fn command_line() -> Self {
        Self { path: PathBuf::from("command line") }
    }

    fn config(&self, table: &str, problem: String, advice: impl Into<String>) -> DatasetError {
        DatasetError::Config {
            path: self.path.clone(),
            table: table.to_owned(),
            problem,
            advice: advice.into(),
        }
    }
}

/// Reads `input` into the plan of all datasets.
///
/// # Errors
/// An unreadable file, an unknown key, a wrong type, an option in the wrong place, or a combination
/// of options that cannot work; each names the file, the table, the key and what to do.
pub fn plan_datasets(
    input: &DatasetInput,
    defaults: &DatasetDefaults,
) -> Result<DatasetConfig, DatasetError> {
    match input {
        DatasetInput::File(path) => {
            let table = read_table(path)?;
            plan_table(&Origin { path: path.clone() }, table, defaults)
        }
        DatasetInput::Inline { table, origin } => {
            plan_table(&Origin { path: origin.clone() }, table.clone(), defaults)
        }
        DatasetInput::Folders { train_data_dir, reg_data_dir } => {
            folders::plan_folders(train_data_dir, reg_data_dir.as_deref(), defaults)
        }
        DatasetInput::Metadata { in_json, image_dir } => {
            let source = SubsetSource::FineTuning {
                metadata_file: in_json.clone(),
                image_dir: image_dir.clone(),
            };
            let subset = SubsetPlan { source, options: defaults.subset.clone() };
            plan_without_config(vec![subset], false, Vec::new(), defaults)
        }
    }
}

/// The plan of one dataset that no configuration describes.
fn plan_without_config(
    subsets: Vec<SubsetPlan>,
    is_dreambooth: bool,
    warnings: Vec<String>,
    defaults: &DatasetDefaults,
) -> Result<DatasetConfig, DatasetError> {
    let mut config = DatasetConfig { datasets: Vec::new(), from_user_config: false, warnings };
    let parts = Parts { is_dreambooth, options: defaults.dataset.clone(), subsets };
    let origin = Origin::command_line();
    let plan = finish(&origin, "the options", parts, defaults, &mut config.warnings)?;
    config.datasets.push(plan);
    Ok(config)
}

fn read_table(path: &Path) -> Result<Table, DatasetError> {
    if !path.exists() {
        return Err(DatasetError::Parse {
            path: path.to_owned(),
            message:
                "there is no such file\nhint: relative paths count from where the command is run"
                    .into(),
        });
    }
    let text =
        std::fs::read_to_string(path).map_err(|error| DatasetError::file("read", path, error))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let parse_error = |message: String| DatasetError::Parse { path: path.to_owned(), message };
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    match extension.as_deref() {
        Some("toml") => {
            text.parse::<Table>().map_err(|error| parse_error(error.to_string().trim_end().into()))
        }
        Some("json") => {
            let json: serde_json::Value =
                serde_json::from_str(text).map_err(|error| parse_error(error.to_string()))?;
            match from_json(json) {
                Some(Value::Table(table)) => Ok(table),
                _ => Err(parse_error("the file should hold one object".into())),
            }
        }
        _ => Err(parse_error("its name should end in `.toml` or `.json`".into())),
    }
}

/// JSON as TOML values; `null` means that the option is not given.
fn from_json(json: serde_json::Value) -> Option<Value> {
    use serde_json::Value as Json;
    Some(match json {
        Json::Null => return None,
        Json::Bool(value) => Value::Boolean(value),
        Json::Number(number) => match number.as_i64() {
            Some(integer) => Value::Integer(integer),
            None => Value::Float(number.as_f64()?),
        },
        Json::String(text) => Value::String(text),
        Json::Array(items) => Value::Array(items.into_iter().filter_map(from_json).collect()),
        Json::Object(entries) => Value::Table(
            entries.into_iter().filter_map(|(key, value)| Some((key, from_json(value)?))).collect(),
        ),
    })
}

fn plan_table(
    origin: &Origin,
    mut root: Table,
    defaults: &DatasetDefaults,
) -> Result<DatasetConfig, DatasetError> {
    let mut warnings = Vec::new();
    if defaults.allow_unknown {
        drop_unknown(origin, &mut root, &mut warnings);
    }
    let root = &root;
    for key in root.keys() {
        if key != "general" && key != "datasets" {
            let meant = schema::nearest(key, ["general", "datasets"].into_iter());
            let suggestion = if meant.is_empty() {
                "options go into `[general]`, `[[datasets]]` or `[[datasets.subsets]]`".into()
            } else {
                meant
            };
            return Err(DatasetError::UnknownKey {
                path: origin.path.clone(),
                table: "the top level".into(),
                key: key.clone(),
                suggestion,
            });
        }
    }
    let empty = Table::new();
    let general = match root.get("general") {
        None => &empty,
        Some(value) => as_table(origin, "the top level", "general", value)?,
    };
    schema::check_table(origin, "[general]", general, Level::General, Method::Both)?;
    warnings.extend(schema::idle_options("[general]", general));
    let mut config = DatasetConfig { datasets: Vec::new(), from_user_config: true, warnings };
    for (index, dataset) in tables_of(origin, "the top level", root, "datasets")?.iter().enumerate()
    {
        let name = format!("[[datasets]] {}", index + 1);
        let parts = read_dataset(origin, &name, (general, dataset), defaults)?;
        config.warnings.extend(schema::idle_options(&name, dataset));
        for table in tables_of(origin, &name, dataset, "subsets")? {
            config.warnings.extend(schema::idle_options(&format!("a subset of {name}"), table));
        }
        let plan = finish(origin, &name, parts, defaults, &mut config.warnings)?;
        config.datasets.push(plan);
    }
    if config.datasets.is_empty() {
        return Err(origin.config(
            "the top level",
            "there is no dataset".into(),
            "add `[[datasets]]` with `[[datasets.subsets]]` and its `image_dir`",
        ));
    }
    Ok(config)
}

/// Takes unknown names out of all tables, each with a warning.
fn drop_unknown(origin: &Origin, root: &mut Table, warnings: &mut Vec<String>) {
    fn tables<'a>(parent: &'a mut Table, key: &str) -> impl Iterator<Item = &'a mut Table> {
        let items = parent.get_mut(key).and_then(Value::as_array_mut);
        items.into_iter().flatten().filter_map(Value::as_table_mut)
    }
    let mut names: Vec<String> =
        root.keys().filter(|key| *key != "general" && *key != "datasets").cloned().collect();
    root.retain(|key, _| key == "general" || key == "datasets");
    if let Some(general) = root.get_mut("general").and_then(Value::as_table_mut) {
        names.extend(schema::take_unknown(general));
    }
    for dataset in tables(root, "datasets") {
        names.extend(schema::take_unknown(dataset));
        for subset in tables(dataset, "subsets") {
            names.extend(schema::take_unknown(subset));
        }
    }
    if !names.is_empty() {
        let path = origin.path.display();
        warnings.push(format!("unknown options of `{path}` are ignored: `{}`", names.join("`, `")));
    }
}

/// A dataset before its rules are checked.
struct Parts {
    is_dreambooth: bool,
    options: DatasetOptions,
    subsets: Vec<SubsetPlan>,
}

fn read_dataset(
    origin: &Origin,
    name: &str,
    (general, dataset): (&Table, &Table),
    defaults: &DatasetDefaults,
) -> Result<Parts, DatasetError> {
    let subset_tables = tables_of(origin, name, dataset, "subsets")?;
    let with_metadata =
        subset_tables.iter().filter(|table| table.contains_key("metadata_file")).count();
    let is_dreambooth = with_metadata == 0;
    if !is_dreambooth && with_metadata < subset_tables.len() {
        return Err(origin.config(
            name,
            "subsets with and without `metadata_file` are mixed".into(),
            "a dataset holds one kind of subset; split it into two `[[datasets]]`",
        ));
    }
    if subset_tables.is_empty() {
        return Err(origin.config(
            name,
            "there is no subset".into(),
            "add `[[datasets.subsets]]` with its `image_dir`",
        ));
    }
    let method = if is_dreambooth { Method::DreamBooth } else { Method::FineTuning };
    schema::check_table(origin, name, dataset, Level::Dataset, method)?;

    let mut options = defaults.dataset.clone();
    apply_dataset_options(&mut options, general);
    apply_dataset_options(&mut options, dataset);
    let mut inherited = defaults.subset.clone();
    apply_subset_options(&mut inherited, general);
    apply_subset_options(&mut inherited, dataset);
    let mut subsets = Vec::with_capacity(subset_tables.len());
    for (index, table) in subset_tables.iter().enumerate() {
        let subset_name = format!("[[datasets.subsets]] {} of {name}", index + 1);
        schema::check_table(origin, &subset_name, table, Level::Subset, method)?;
        let path = |key: &str| table.get(key).and_then(Value::as_str).map(PathBuf::from);
        let source = match (path("metadata_file"), path("image_dir")) {
            (Some(metadata_file), image_dir) => {
                SubsetSource::FineTuning { metadata_file, image_dir }
            }
            (None, Some(image_dir)) => {
                let is_reg = table.get("is_reg").and_then(Value::as_bool).unwrap_or(false);
                SubsetSource::DreamBooth { image_dir, is_reg }
            }
            (None, None) => {
                return Err(origin.config(
                    &subset_name,
                    "`image_dir` is missing".into(),
                    "give the folder of the images as `image_dir`, or a `metadata_file`",
                ));
            }
        };
        let mut options = inherited.clone();
        apply_subset_options(&mut options, table);
        subsets.push(SubsetPlan { source, options });
    }
    Ok(Parts { is_dreambooth, options, subsets })
}

fn as_table<'a>(
    origin: &Origin,
    table: &str,
    key: &str,
    value: &'a Value,
) -> Result<&'a Table, DatasetError> {
    value.as_table().ok_or_else(|| DatasetError::WrongValue {
        path: origin.path.clone(),
        table: table.to_owned(),
        key: key.to_owned(),
        expected: "a table".into(),
        found: schema::describe(value),
    })
}

/// The tables of an array of tables; an absent key is an empty array.
fn tables_of<'a>(
    origin: &Origin,
    table: &str,
    parent: &'a Table,
    key: &str,
) -> Result<Vec<&'a Table>, DatasetError> {
    match parent.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            items.iter().map(|item| as_table(origin, table, key, item)).collect()
        }
        Some(value) => Err(DatasetError::WrongValue {
            path: origin.path.clone(),
            table: table.to_owned(),
            key: key.to_owned(),
            expected: "an array of tables (`[[...]]`)".into(),
            found: schema::describe(value),
        }),
    }
}

/// Checks the rules between options and drops subsets that count for nothing.
fn finish(
    origin: &Origin,
    name: &str,
    parts: Parts,
    defaults: &DatasetDefaults,
    warnings: &mut Vec<String>,
) -> Result<DatasetPlan, DatasetError> {
    let Parts { is_dreambooth, mut options, subsets } = parts;
    let Some(resolution) = options.resolution else {
        return Err(origin.config(
            name,
            "`resolution` is missing".into(),
            "give it in pixels, for example `resolution = 512`",
        ));
    };
    check_resolution(origin, name, resolution, &mut options, defaults.size_multiple, warnings)?;
    let mut kept: Vec<SubsetPlan> = Vec::with_capacity(subsets.len());
    for mut subset in subsets {
        let place = match &subset.source {
            SubsetSource::DreamBooth { image_dir, .. } => image_dir.display().to_string(),
            SubsetSource::FineTuning { metadata_file, .. } => metadata_file.display().to_string(),
        };
        if subset.options.num_repeats == 0 {
            warnings.push(format!("`num_repeats` is 0, so the subset is left out: {place}"));
            continue;
        }
        let same = |other: &SubsetPlan| match (&other.source, &subset.source) {
            (
                SubsetSource::DreamBooth { image_dir: left, .. },
                SubsetSource::DreamBooth { image_dir: right, .. },
            ) => left == right,
            (
                SubsetSource::FineTuning { metadata_file: left, .. },
                SubsetSource::FineTuning { metadata_file: right, .. },
            ) => left == right,
            _ => false,
        };
        if kept.iter().any(same) {
            warnings.push(format!("the subset is given twice, the first one is used: {place}"));
            continue;
        }
        if subset.is_reg() || !is_dreambooth {
            // The common folder of masks is for training images.
            let own = &mut subset.options.conditioning_data_dir;
            if *own == defaults.subset.conditioning_data_dir {
                *own = None;
            }
        }
        if subset.options.conditioning_data_dir.is_some() && !defaults.masked_loss {
            return Err(origin.config(
                name,
                format!("`conditioning_data_dir` is for `masked_loss`, which is off: {place}"),
                "add `masked_loss = true` to the run's options, or remove the folder",
            ));
        }
        let subset_options = &mut subset.options;
        if subset_options.caption_separator.is_empty() {
            return Err(origin.config(name, "`caption_separator` is empty".into(), ""));
        }
        let extension = &mut subset_options.caption_extension;
        if !extension.is_empty() && !extension.starts_with('.') {
            extension.insert(0, '.');
        }
        if subset_options.face_crop_aug_range.is_some() && options.enable_bucket {
            warnings.push(format!(
                "`face_crop_aug_range` has no effect together with `enable_bucket`: {place}"
            ));
        }
        kept.push(subset);
    }
    if kept.is_empty() {
        return Err(origin.config(name, "every subset is left out".into(), ""));
    }
    Ok(DatasetPlan { is_dreambooth, resolution, options, subsets: kept })
}

fn check_resolution(
    origin: &Origin,
    name: &str,
    (width, height): (u32, u32),
    options: &mut DatasetOptions,
    multiple: u32,
    warnings: &mut Vec<String>,
) -> Result<(), DatasetError> {
    let steps = options.bucket_reso_steps;
    let is_huge = u64::from(width) * u64::from(height) > MAX_PIXELS;
    if width == 0 || height == 0 || is_huge || options.max_bucket_reso > LARGEST_SIDE {
        return Err(origin.config(
            name,
            format!(
                "pictures of this size cannot be trained on: `resolution` {width}x{height}, \
                 `max_bucket_reso` {}",
                options.max_bucket_reso
            ),
            "sizes are in pixels, for example `resolution = 512`",
        ));
    }
    if !options.enable_bucket {
        if !width.is_multiple_of(multiple) || !height.is_multiple_of(multiple) {
            return Err(origin.config(
                name,
                format!("`resolution` {width}x{height} is not a multiple of {multiple}"),
                format!("use a multiple of {multiple}, or `enable_bucket = true`"),
            ));
        }
        return Ok(());
    }
    if steps == 0 || !steps.is_multiple_of(multiple) {
        return Err(origin.config(
            name,
            format!("`bucket_reso_steps` is not a multiple of {multiple}: {steps}"),
            format!(
                "this model needs pictures whose sides are multiples of {multiple}; SDXL, of 32: say \
                 `sdxl = true`"
            ),
        ));
    }
    let rounded_min = options.min_bucket_reso - options.min_bucket_reso % steps;
    let rounded_max = options.max_bucket_reso.next_multiple_of(steps);
    for (key, value, rounded) in [
        ("min_bucket_reso", &mut options.min_bucket_reso, rounded_min),
        ("max_bucket_reso", &mut options.max_bucket_reso, rounded_max),
    ] {
        if *value != rounded {
            warnings.push(format!(
                "`{key}` is changed to a multiple of `bucket_reso_steps`: {value} -> {rounded}"
            ));
            *value = rounded;
        }
    }
    // A rounded minimum of 0 would make buckets without an area.
    options.min_bucket_reso = options.min_bucket_reso.max(steps);
    if width.min(height) < options.min_bucket_reso {
        return Err(origin.config(
            name,
            format!(
                "`min_bucket_reso` {} is larger than the `resolution` {width}x{height}",
                options.min_bucket_reso
            ),
            "lower `min_bucket_reso` or raise `resolution`",
        ));
    }
    if width.max(height) > options.max_bucket_reso {
        return Err(origin.config(
            name,
            format!(
                "`max_bucket_reso` {} is smaller than the `resolution` {width}x{height}",
                options.max_bucket_reso
            ),
            "raise `max_bucket_reso` or lower `resolution`",
        ));
    }
    Ok(())
}
