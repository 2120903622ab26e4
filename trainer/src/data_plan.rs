//! From the run's options to the description of its datasets.

use anyhow::{Context, Result, bail};

use crate::dataset::{DatasetDefaults, DatasetGroup, DatasetInput, DatasetOptions, SubsetOptions};
use crate::options::{Options, Parsed};
use pictures::Interpolation;

/// Sides of SDXL's pictures are multiples of this, as in sd-scripts.
const SDXL_MULTIPLE: u32 = 32;

/// Where the datasets of a run are described.
pub fn dataset_input(parsed: &Parsed) -> Result<DatasetInput> {
    let options = &parsed.options;
    if let Some(path) = &options.dataset_config {
        if parsed.datasets.is_some() {
            bail!(
                "the datasets are described twice: in the config file and in `dataset_config`: {}\n\
                 hint: keep one of the two",
                path.display()
            );
        }
        return Ok(DatasetInput::File(path.clone()));
    }
    if let Some(table) = &parsed.datasets {
        let origin = parsed.config_path.clone().unwrap_or_default();
        return Ok(DatasetInput::Inline { table: table.clone(), origin });
    }
    if let Some(in_json) = &options.in_json {
        let image_dir = options.train_data_dir.clone();
        return Ok(DatasetInput::Metadata { in_json: in_json.clone(), image_dir });
    }
    let train_data_dir = options.train_data_dir.clone().context(
        "no training data is named\nhint: give `dataset_config = \"dataset.toml\"`, put \
         `[[datasets]]` tables into the config, or name `train_data_dir`",
    )?;
    Ok(DatasetInput::Folders { train_data_dir, reg_data_dir: options.reg_data_dir.clone() })
}

/// The options that hold where the dataset description is silent.
pub fn dataset_defaults(options: &Options) -> Result<DatasetDefaults> {
    let name = options.resize_interpolation.map(|choice| choice.as_str());
    let interpolation = name.and_then(Interpolation::from_name);
    let pixels = |value: usize, name: &str| {
        u32::try_from(value).with_context(|| format!("`{name}` is too large: {value}"))
    };
    let resolution = match options.resolution {
        Some(r) => Some((pixels(r.width, "resolution")?, pixels(r.height, "resolution")?)),
        None => None,
    };
    let dataset = DatasetOptions {
        resolution,
        batch_size: options.train_batch_size,
        enable_bucket: options.enable_bucket,
        min_bucket_reso: pixels(options.min_bucket_reso, "min_bucket_reso")?,
        max_bucket_reso: pixels(options.max_bucket_reso, "max_bucket_reso")?,
        bucket_reso_steps: pixels(options.bucket_reso_steps, "bucket_reso_steps")?,
        bucket_no_upscale: options.bucket_no_upscale,
        prior_loss_weight: options.prior_loss_weight,
        resize_interpolation: interpolation,
        resize_interpolation_name: name.map(str::to_owned),
    };
    let subset = SubsetOptions {
        num_repeats: pixels(options.dataset_repeats, "dataset_repeats")?,
        shuffle_caption: options.shuffle_caption,
        caption_separator: options.caption_separator.clone(),
        keep_tokens: options.keep_tokens,
        keep_tokens_separator: options.keep_tokens_separator.clone(),
        secondary_separator: options.secondary_separator.clone(),
        enable_wildcard: options.enable_wildcard,
        caption_prefix: options.caption_prefix.clone(),
        caption_suffix: options.caption_suffix.clone(),
        caption_dropout_rate: options.caption_dropout_rate,
        caption_dropout_every_n_epochs: options.caption_dropout_every_n_epochs as u64,
        caption_tag_dropout_rate: options.caption_tag_dropout_rate,
        token_warmup_min: options.token_warmup_min,
        token_warmup_step: options.token_warmup_step,
        flip_aug: options.flip_aug,
        color_aug: options.color_aug,
        random_crop: options.random_crop,
        face_crop_aug_range: options.face_crop_aug_range.map(|range| (range.low, range.high)),
        alpha_mask: options.alpha_mask,
        conditioning_data_dir: options
            .conditioning_data_dir
            .clone()
            .filter(|_| options.masked_loss),
        resize_interpolation: interpolation,
        resize_interpolation_name: name.map(str::to_owned),
        caption_extension: options.caption_extension.clone(),
        class_tokens: None,
        validation_split: options.validation_split,
        validation_seed: options.validation_seed.or(options.seed).unwrap_or(0),
    };
    let masked_loss = options.masked_loss;
    let allow_unknown = options.allow_unknown;
    // SDXL's U-Net halves its latents once less.
    let size_multiple = match options.sdxl {
        true => SDXL_MULTIPLE,
        false => DatasetDefaults::default().size_multiple,
    };
    Ok(DatasetDefaults { dataset, subset, masked_loss, allow_unknown, size_multiple })
}

/// What to say where `masked_loss` finds nothing to mask with; sd-scripts trains on in silence.
pub fn missing_masks(options: &Options, group: &DatasetGroup) -> Option<String> {
    (options.masked_loss && !group.has_masks()).then(|| {
        "`masked_loss` has no masks: every pixel counts\nhint: give a subset its \
         `conditioning_data_dir`, or `alpha_mask` for the alpha channel of its images"
            .to_owned()
    })
}
