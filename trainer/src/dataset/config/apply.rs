//! What the tables of the dataset configuration set: each key into its option.

use super::plan::{DatasetOptions, SubsetOptions};
use super::schema;
use pictures::Interpolation;
use toml::{Table, Value};

/// Reads options out of a table that the schema has checked.
struct Reader<'a>(&'a Table);

impl Reader<'_> {
    fn flag(&self, key: &str, into: &mut bool) {
        if let Some(value) = self.0.get(key).and_then(Value::as_bool) {
            *into = value;
        }
    }

    fn integer<T: TryFrom<i64>>(&self, key: &str, into: &mut T) {
        let value = self.0.get(key).and_then(Value::as_integer);
        if let Some(value) = value.and_then(|value| T::try_from(value).ok()) {
            *into = value;
        }
    }

    fn number(&self, key: &str, into: &mut f64) {
        if let Some(value) = self.0.get(key).and_then(schema::number) {
            *into = value;
        }
    }

    fn text(&self, key: &str) -> Option<String> {
        self.0.get(key).and_then(Value::as_str).map(str::to_owned)
    }

    fn optional_text(&self, key: &str, into: &mut Option<String>) {
        if let Some(value) = self.text(key) {
            *into = Some(value);
        }
    }

    fn plain_text(&self, key: &str, into: &mut String) {
        if let Some(value) = self.text(key) {
            *into = value;
        }
    }
}

/// Options of a dataset that a table sets.
pub(super) fn apply_dataset_options(options: &mut DatasetOptions, table: &Table) {
    let reader = Reader(table);
    options.resolution = match table.get("resolution") {
        Some(Value::Integer(side)) => Some((*side as u32, *side as u32)),
        Some(Value::Array(sides)) => {
            let side = |index: usize| sides.get(index).and_then(Value::as_integer).unwrap_or(0);
            Some((side(0) as u32, side(1) as u32))
        }
        _ => options.resolution,
    };
    reader.integer("batch_size", &mut options.batch_size);
    reader.flag("enable_bucket", &mut options.enable_bucket);
    reader.integer("min_bucket_reso", &mut options.min_bucket_reso);
    reader.integer("max_bucket_reso", &mut options.max_bucket_reso);
    reader.integer("bucket_reso_steps", &mut options.bucket_reso_steps);
    reader.flag("bucket_no_upscale", &mut options.bucket_no_upscale);
    reader.number("prior_loss_weight", &mut options.prior_loss_weight);
    if let Some(name) = reader.text("resize_interpolation") {
        options.resize_interpolation = Interpolation::from_name(&name);
        options.resize_interpolation_name = Some(name);
    }
}

/// Options of a subset that a table sets.
pub(super) fn apply_subset_options(options: &mut SubsetOptions, table: &Table) {
    let reader = Reader(table);
    reader.integer("num_repeats", &mut options.num_repeats);
    reader.flag("shuffle_caption", &mut options.shuffle_caption);
    reader.plain_text("caption_separator", &mut options.caption_separator);
    reader.integer("keep_tokens", &mut options.keep_tokens);
    reader.plain_text("keep_tokens_separator", &mut options.keep_tokens_separator);
    reader.optional_text("secondary_separator", &mut options.secondary_separator);
    reader.flag("enable_wildcard", &mut options.enable_wildcard);
    reader.optional_text("caption_prefix", &mut options.caption_prefix);
    reader.optional_text("caption_suffix", &mut options.caption_suffix);
    reader.number("caption_dropout_rate", &mut options.caption_dropout_rate);
    reader.integer("caption_dropout_every_n_epochs", &mut options.caption_dropout_every_n_epochs);
    reader.number("caption_tag_dropout_rate", &mut options.caption_tag_dropout_rate);
    reader.integer("token_warmup_min", &mut options.token_warmup_min);
    reader.number("token_warmup_step", &mut options.token_warmup_step);
    reader.flag("flip_aug", &mut options.flip_aug);
    reader.flag("color_aug", &mut options.color_aug);
    reader.flag("random_crop", &mut options.random_crop);
    reader.flag("alpha_mask", &mut options.alpha_mask);
    if let Some(folder) = reader.text("conditioning_data_dir") {
        options.conditioning_data_dir = Some(folder.into());
    }
    reader.plain_text("caption_extension", &mut options.caption_extension);
    reader.optional_text("class_tokens", &mut options.class_tokens);
    reader.number("validation_split", &mut options.validation_split);
    reader.integer("validation_seed", &mut options.validation_seed);
    if let Some(range) = table.get("face_crop_aug_range").and_then(schema::face_range) {
        options.face_crop_aug_range = Some(range);
    }
    if let Some(name) = reader.text("resize_interpolation") {
        options.resize_interpolation = Interpolation::from_name(&name);
        options.resize_interpolation_name = Some(name);
    }
}
