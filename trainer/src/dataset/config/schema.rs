//! Which options exist, where they may stand and what they hold; checks a table against that.

use super::Origin;
use crate::dataset::error::DatasetError;
use pictures::Interpolation;
use toml::{Table, Value};

/// A place where options may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    General,
    Dataset,
    Subset,
}

/// The kind of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// `[general]`, which holds for both.
    Both,
    DreamBooth,
    FineTuning,
}

/// Where an option may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// `[general]` and `[[datasets]]`.
    Dataset,
    /// `[general]`, `[[datasets]]` and `[[datasets.subsets]]`.
    Anywhere,
    /// `[[datasets.subsets]]` alone.
    Subset,
    /// Known to sd-scripts, accepted anywhere; the text says why it changes nothing.
    NoEffect(&'static str),
    /// Known to sd-scripts, not built here; the text says what to do instead.
    Refused(&'static str),
}

/// What an option holds.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Bool,
    /// An integer of at least this.
    Int(i64),
    /// A number in this closed range.
    Number(f64, f64),
    Text,
    Interpolation,
    Resolution,
    FaceRange,
    Anything,
}

struct Row(&'static str, Kind, Scope, Method);

const NON_NEGATIVE: Kind = Kind::Number(0.0, f64::MAX);
const RATE: Kind = Kind::Number(0.0, 1.0);

const CACHE_INFO: &str = "only the header of each image is read at the start, which is fast";
const ATTRIBUTES: &str = "the trainers for Stable Diffusion 1 and 2 do not read them";
const SKIP: &str = "move the images that are not to be used out of the folder";

/// Every option of the dataset configuration.
const ROWS: &[Row] = &[
    Row("resolution", Kind::Resolution, Scope::Dataset, Method::Both),
    Row("batch_size", Kind::Int(1), Scope::Dataset, Method::Both),
    Row("enable_bucket", Kind::Bool, Scope::Dataset, Method::Both),
    Row("min_bucket_reso", Kind::Int(1), Scope::Dataset, Method::Both),
    Row("max_bucket_reso", Kind::Int(1), Scope::Dataset, Method::Both),
    Row("bucket_reso_steps", Kind::Int(1), Scope::Dataset, Method::Both),
    Row("bucket_no_upscale", Kind::Bool, Scope::Dataset, Method::Both),
    Row("prior_loss_weight", NON_NEGATIVE, Scope::Dataset, Method::DreamBooth),
    Row("resize_interpolation", Kind::Interpolation, Scope::Anywhere, Method::Both),
    Row("num_repeats", Kind::Int(0), Scope::Anywhere, Method::Both),
    Row("shuffle_caption", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("caption_separator", Kind::Text, Scope::Anywhere, Method::Both),
    Row("keep_tokens", Kind::Int(0), Scope::Anywhere, Method::Both),
    Row("keep_tokens_separator", Kind::Text, Scope::Anywhere, Method::Both),
    Row("secondary_separator", Kind::Text, Scope::Anywhere, Method::Both),
    Row("enable_wildcard", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("caption_prefix", Kind::Text, Scope::Anywhere, Method::Both),
    Row("caption_suffix", Kind::Text, Scope::Anywhere, Method::Both),
    Row("caption_dropout_rate", RATE, Scope::Anywhere, Method::Both),
    Row("caption_dropout_every_n_epochs", Kind::Int(0), Scope::Anywhere, Method::Both),
    Row("caption_tag_dropout_rate", RATE, Scope::Anywhere, Method::Both),
    Row("token_warmup_min", Kind::Int(0), Scope::Anywhere, Method::Both),
    Row("token_warmup_step", NON_NEGATIVE, Scope::Anywhere, Method::Both),
    Row("flip_aug", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("color_aug", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("random_crop", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("face_crop_aug_range", Kind::FaceRange, Scope::Anywhere, Method::Both),
    Row("alpha_mask", Kind::Bool, Scope::Anywhere, Method::Both),
    Row("caption_extension", Kind::Text, Scope::Anywhere, Method::DreamBooth),
    Row("class_tokens", Kind::Text, Scope::Anywhere, Method::DreamBooth),
    Row("cache_info", Kind::Bool, Scope::NoEffect(CACHE_INFO), Method::DreamBooth),
    Row("image_dir", Kind::Text, Scope::Subset, Method::Both),
    Row("is_reg", Kind::Bool, Scope::Subset, Method::DreamBooth),
    Row("metadata_file", Kind::Text, Scope::Subset, Method::FineTuning),
    Row("network_multiplier", Kind::Number(1.0, 1.0), Scope::Dataset, Method::Both),
    Row("custom_attributes", Kind::Anything, Scope::NoEffect(ATTRIBUTES), Method::Both),
    Row("skip_image_resolution", Kind::Anything, Scope::Refused(SKIP), Method::Both),
    Row("validation_seed", Kind::Int(0), Scope::Anywhere, Method::Both),
    Row("validation_split", RATE, Scope::Anywhere, Method::Both),
    Row("conditioning_data_dir", Kind::Text, Scope::Subset, Method::DreamBooth),
];

impl Scope {
    fn admits(self, level: Level) -> bool {
        match self {
            Scope::Dataset => level != Level::Subset,
            Scope::Anywhere => true,
            Scope::Subset => level == Level::Subset,
            Scope::NoEffect(_) => true,
            Scope::Refused(_) => false,
        }
    }

    fn places(self) -> &'static str {
        match self {
            Scope::Dataset => "`[general]` or `[[datasets]]`",
            Scope::Anywhere | Scope::NoEffect(_) => {
                "`[general]`, `[[datasets]]` or `[[datasets.subsets]]`"
            }
            Scope::Subset => "`[[datasets.subsets]]`",
            Scope::Refused(_) => "no table",
        }
    }
}

/// Checks the keys and types of one table; `subsets` is left to the caller.
pub(super) fn check_table(
    origin: &Origin,
    table_name: &str,
    table: &Table,
    level: Level,
    method: Method,
) -> Result<(), DatasetError> {
    for (key, value) in table {
        if level == Level::Dataset && key == "subsets" {
            continue;
        }
        let config = |problem: String, advice: String| DatasetError::Config {
            path: origin.path.clone(),
            table: table_name.to_owned(),
            problem,
            advice,
        };
        let Some(Row(_, kind, scope, owner)) = ROWS.iter().find(|row| row.0 == key) else {
            return Err(unknown_key(origin, table_name, key, level));
        };
        if let Scope::Refused(advice) = scope {
            return Err(config(format!("`{key}` is not supported yet"), (*advice).into()));
        }
        if !scope.admits(level) {
            return Err(config(
                format!("`{key}` has no meaning"),
                format!("it belongs in {}", scope.places()),
            ));
        }
        if *owner != Method::Both && method != Method::Both && *owner != method {
            let (has, wants) = match owner {
                Method::FineTuning => ("without", "with"),
                _ => ("with", "without"),
            };
            return Err(config(
                format!("`{key}` does not go {has} `metadata_file`"),
                format!("`{key}` is for subsets {wants} `metadata_file`"),
            ));
        }
        if let Some(expected) = kind.mismatch(value) {
            return Err(DatasetError::WrongValue {
                path: origin.path.clone(),
                table: table_name.to_owned(),
                key: key.clone(),
                expected,
                found: describe(value),
            });
        }
    }
    Ok(())
}

/// Remarks about the options of one table that change nothing.
pub(super) fn idle_options(table_name: &str, table: &Table) -> Vec<String> {
    let idle = |row: &'static Row| match row.2 {
        Scope::NoEffect(reason) if table.contains_key(row.0) => {
            Some(format!("`{}` of {table_name} has no effect here: {reason}", row.0))
        }
        _ => None,
    };
    ROWS.iter().filter_map(idle).collect()
}

/// Takes out the options of one table that do not exist; gives their names.
pub(super) fn take_unknown(table: &mut Table) -> Vec<String> {
    let names: Vec<String> = table.keys().cloned().collect();
    let known = |name: &String| name == "subsets" || ROWS.iter().any(|row| row.0 == name);
    let unknown: Vec<String> = names.into_iter().filter(|name| !known(name)).collect();
    for name in &unknown {
        table.remove(name);
    }
    unknown
}

/// An option of the dataset description, for the document.
pub struct DatasetOption {
    /// Name.
    pub name: &'static str,
    /// What its value is, in words.
    pub value: String,
    /// Where it may stand: `[general]`, `[[datasets]]`, `[[datasets.subsets]]`.
    pub places: &'static str,
    /// Used, without effect, or refused, with the reason.
    pub status: String,
}

/// Every option of the dataset description, in the order of the document.
pub fn dataset_options() -> impl Iterator<Item = DatasetOption> {
    ROWS.iter().map(|Row(name, kind, scope, _)| DatasetOption {
        name,
        value: kind.expected(),
        places: scope.places(),
        status: match scope {
            Scope::NoEffect(reason) => format!("no effect: {reason}"),
            Scope::Refused(advice) => format!("refused: not built; {advice}"),
            _ => "used".to_owned(),
        },
    })
}

/// The error for a key that does not exist, with what was probably meant.
pub(super) fn unknown_key(
    origin: &Origin,
    table_name: &str,
    key: &str,
    level: Level,
) -> DatasetError {
    let candidates = ROWS.iter().filter(|row| row.2.admits(level)).map(|row| row.0);
    DatasetError::UnknownKey {
        path: origin.path.clone(),
        table: table_name.to_owned(),
        key: key.to_owned(),
        suggestion: nearest(key, candidates),
    }
}

/// `did you mean ...` for the most similar of `candidates`, or nothing.
pub(super) fn nearest<'a>(key: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    candidates
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, name)| format!("did you mean `{name}`?"))
        .unwrap_or_default()
}

impl Kind {
    /// What is expected, if `value` is not it.
    fn mismatch(self, value: &Value) -> Option<String> {
        let whole = |value: &Value| value.as_integer().is_some_and(|v| (1..=65_536).contains(&v));
        let fits = match self {
            Kind::Bool => value.is_bool(),
            Kind::Int(least) => {
                value.as_integer().is_some_and(|v| v >= least && v <= i64::from(u32::MAX))
            }
            Kind::Number(low, high) => number(value).is_some_and(|v| v >= low && v <= high),
            Kind::Text => value.is_str(),
            Kind::Interpolation => {
                value.as_str().is_some_and(|name| Interpolation::from_name(name).is_some())
            }
            Kind::Resolution => {
                whole(value)
                    || value.as_array().is_some_and(|v| v.len() == 2 && v.iter().all(whole))
            }
            Kind::FaceRange => face_range(value).is_some(),
            Kind::Anything => true,
        };
        (!fits).then(|| self.expected())
    }

    fn expected(self) -> String {
        match self {
            Kind::Bool => "true or false".into(),
            Kind::Int(least) => format!("an integer of at least {least}"),
            Kind::Number(low, high) if high == f64::MAX => format!("a number of at least {low}"),
            Kind::Number(low, high) if low == high => format!("{low}: other values are not built"),
            Kind::Number(low, high) => format!("a number from {low} to {high}"),
            Kind::Text => "a string".into(),
            Kind::Interpolation => format!("one of `{}`", Interpolation::NAMES.join("`, `")),
            Kind::Resolution => "a number of pixels or [width, height]".into(),
            Kind::FaceRange => "two numbers above 0, the smaller one first".into(),
            Kind::Anything => "anything".into(),
        }
    }
}

/// An integer or float as a float.
pub(super) fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Integer(integer) => *integer as f64,
        Value::Float(float) => *float,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

/// `[low, high]` with 0 < low <= high.
pub(super) fn face_range(value: &Value) -> Option<(f64, f64)> {
    let [low, high] = value.as_array()?.as_slice() else { return None };
    let (low, high) = (number(low)?, number(high)?);
    (low > 0.0 && low <= high).then_some((low, high))
}

/// A value with its type, for messages.
pub(super) fn describe(value: &Value) -> String {
    let kind = match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "an array",
        Value::Table(_) => return "a table".into(),
    };
    format!("{value} ({kind})")
}
