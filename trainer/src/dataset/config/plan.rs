//! The resolved dataset configuration: every option has its value, nothing is "maybe".
//!
//! The defaults are those of sd-scripts 0.10.1. Lengths of images are in pixels, resolutions are
//! (width, height).

use pictures::Interpolation;
use std::path::PathBuf;

/// Options that may be set for each subset.
#[derive(Debug, Clone, PartialEq)]
pub struct SubsetOptions {
    /// How often each image is used in an epoch. Default 1; 0 leaves the subset out.
    pub num_repeats: u32,
    /// Shuffle the tags of each caption. Default false.
    pub shuffle_caption: bool,
    /// What separates tags. Default `,`.
    pub caption_separator: String,
    /// How many leading tags keep their place. Default 0.
    pub keep_tokens: usize,
    /// What separates the parts of a caption that are kept from the part that is shuffled.
    pub keep_tokens_separator: String,
    /// A separator inside one tag, replaced by `caption_separator` after shuffling.
    pub secondary_separator: Option<String>,
    /// Use `{a|b}` and several caption lines as alternatives. Default false.
    pub enable_wildcard: bool,
    /// Put before each caption, with a space.
    pub caption_prefix: Option<String>,
    /// Put after each caption, with a space.
    pub caption_suffix: Option<String>,
    /// Probability of an empty caption. Default 0.
    pub caption_dropout_rate: f64,
    /// Every so many epochs all captions are empty. Default 0: never.
    pub caption_dropout_every_n_epochs: u64,
    /// Probability of leaving out each tag. Default 0.
    pub caption_tag_dropout_rate: f64,
    /// Number of tags at step 0 of the token warm-up. Default 1.
    pub token_warmup_min: usize,
    /// Step at which all tags are in use; below 1 a part of all steps. Default 0: no warm-up.
    pub token_warmup_step: f64,
    /// Mirror half of the samples. Default false.
    pub flip_aug: bool,
    /// Vary hue and gamma a little. Default false.
    pub color_aug: bool,
    /// Crop at a random place instead of the middle. Default false.
    pub random_crop: bool,
    /// Smallest and largest crop around a face as multiples of its size; the position of the face
    /// is in the file name (`..._cx_cy_w_h`).
    pub face_crop_aug_range: Option<(f64, f64)>,
    /// Weigh the loss by the alpha channel. Default false.
    pub alpha_mask: bool,
    /// Folder of masks for the loss. DreamBooth only, with `masked_loss`.
    pub conditioning_data_dir: Option<PathBuf>,
    /// How images are resized. Default: area when shrinking, Lanczos when growing.
    pub resize_interpolation: Option<Interpolation>,
    /// `resize_interpolation` as written, for the metadata.
    pub resize_interpolation_name: Option<String>,
    /// Extension of caption files. Default `.caption`. DreamBooth only.
    pub caption_extension: String,
    /// Caption of images without a caption file. DreamBooth only.
    pub class_tokens: Option<String>,
    /// Share of the images that is held out for validation. Default 0; 1: all of them.
    pub validation_split: f64,
    /// Seed of the choice. Default: the run's.
    pub validation_seed: u64,
}

impl Default for SubsetOptions {
    fn default() -> Self {
        Self {
            num_repeats: 1,
            shuffle_caption: false,
            caption_separator: ",".into(),
            keep_tokens: 0,
            keep_tokens_separator: String::new(),
            secondary_separator: None,
            enable_wildcard: false,
            caption_prefix: None,
            caption_suffix: None,
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            token_warmup_min: 1,
            token_warmup_step: 0.0,
            flip_aug: false,
            color_aug: false,
            random_crop: false,
            face_crop_aug_range: None,
            alpha_mask: false,
            conditioning_data_dir: None,
            resize_interpolation: None,
            resize_interpolation_name: None,
            caption_extension: ".caption".into(),
            class_tokens: None,
            validation_split: 0.0,
            validation_seed: 0,
        }
    }
}

/// Options of a whole dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetOptions {
    /// Width and height in pixels; with buckets their product is the largest area. Required.
    pub resolution: Option<(u32, u32)>,
    /// Samples per rank and micro-step. Default 1.
    pub batch_size: usize,
    /// Sort images into buckets of several aspect ratios. Default false.
    pub enable_bucket: bool,
    /// Shortest side of a bucket. Default 256.
    pub min_bucket_reso: u32,
    /// Longest side of a bucket. Default 1024.
    pub max_bucket_reso: u32,
    /// Sides of buckets are multiples of this. Default 64.
    pub bucket_reso_steps: u32,
    /// Never enlarge an image: small images get small buckets. Default false.
    pub bucket_no_upscale: bool,
    /// Loss weight of regularisation images. Default 1.
    pub prior_loss_weight: f64,
    /// Interpolation of subsets that name none.
    pub resize_interpolation: Option<Interpolation>,
    /// `resize_interpolation` as written, for the metadata.
    pub resize_interpolation_name: Option<String>,
}

impl Default for DatasetOptions {
    fn default() -> Self {
        Self {
            resolution: None,
            batch_size: 1,
            enable_bucket: false,
            min_bucket_reso: 256,
            max_bucket_reso: 1024,
            bucket_reso_steps: 64,
            bucket_no_upscale: false,
            prior_loss_weight: 1.0,
            resize_interpolation: None,
            resize_interpolation_name: None,
        }
    }
}

/// The dataset options of the command line: what holds where the configuration is silent.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetDefaults {
    /// Options of datasets (`train_batch_size` is `batch_size` here).
    pub dataset: DatasetOptions,
    /// Options of subsets (`dataset_repeats` is `num_repeats` here).
    pub subset: SubsetOptions,
    /// `masked_loss`: pictures may be masks.
    pub masked_loss: bool,
    /// Sides of the pictures must be a multiple of this: 64 for SD1 and SD2, 32 for SDXL.
    pub size_multiple: u32,
    /// Unknown names are left out with a warning instead of refused.
    pub allow_unknown: bool,
}

impl Default for DatasetDefaults {
    fn default() -> Self {
        Self {
            dataset: DatasetOptions::default(),
            subset: SubsetOptions::default(),
            masked_loss: false,
            size_multiple: 64,
            allow_unknown: false,
        }
    }
}

/// Where the images and captions of a subset come from.
#[derive(Debug, Clone, PartialEq)]
pub enum SubsetSource {
    /// A folder of images with caption files beside them.
    DreamBooth {
        /// The folder.
        image_dir: PathBuf,
        /// Regularisation images: balanced to the number of training images.
        is_reg: bool,
    },
    /// A metadata file with captions and tags.
    FineTuning {
        /// JSON or JSON lines.
        metadata_file: PathBuf,
        /// Folder of images named by relative paths.
        image_dir: Option<PathBuf>,
    },
}

/// One subset, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct SubsetPlan {
    /// Images and captions.
    pub source: SubsetSource,
    /// Its options.
    pub options: SubsetOptions,
}

impl SubsetPlan {
    /// True for regularisation images.
    pub fn is_reg(&self) -> bool {
        matches!(self.source, SubsetSource::DreamBooth { is_reg: true, .. })
    }
}

/// One dataset, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetPlan {
    /// True for folders with caption files, false for metadata files.
    pub is_dreambooth: bool,
    /// Width and height in pixels.
    pub resolution: (u32, u32),
    /// Its options; `min_bucket_reso` and `max_bucket_reso` are rounded to `bucket_reso_steps`.
    pub options: DatasetOptions,
    /// Its subsets, without duplicates.
    pub subsets: Vec<SubsetPlan>,
}

/// All datasets of a run, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetConfig {
    /// The datasets in the order of the configuration.
    pub datasets: Vec<DatasetPlan>,
    /// True where a dataset configuration was given, false for `train_data_dir` and `in_json`.
    pub from_user_config: bool,
    /// Things the user should know that are no errors.
    pub warnings: Vec<String>,
}
