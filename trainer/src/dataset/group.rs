//! The datasets of a run with their images sorted into buckets; what the sampler draws from.

use super::buckets::{BucketChooser, Size};
use super::config::{DatasetConfig, DatasetPlan, SubsetPlan, SubsetSource};
use super::error::DatasetError;
use super::held_out::{asks_for_validation, check_split, hold_out};
use super::mask::{Mask, warn_of_unused};
use super::scan::{FoundImage, scan_subset};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

/// Most samples in an epoch of a dataset: their order is held in memory.
const MAX_SAMPLES: u64 = 100_000_000;

/// One image of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEntry {
    /// The file.
    pub path: PathBuf,
    /// Width and height in pixels, upright.
    pub size: Size,
    /// The caption as written; several lines are alternatives if `enable_wildcard`.
    pub caption: String,
    /// Index of the subset in the plan of its dataset.
    pub subset: usize,
    /// How often it is used in an epoch.
    pub repeats: u32,
    /// A regularisation image.
    pub is_reg: bool,
    /// The size it is trained at.
    pub bucket: Size,
    /// The size it is resized to before cropping.
    pub resized: Size,
    /// Picture that weighs its loss (`masked_loss`).
    pub mask: Option<Mask>,
}

/// The images of one size; each index of `Dataset::images` as often as it is repeated.
#[derive(Debug, Clone, PartialEq)]
pub struct Bucket {
    /// Width and height in pixels.
    pub size: Size,
    /// Indices into `Dataset::images`.
    pub items: Vec<u32>,
}

/// One `[[datasets]]`.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Its options and subsets.
    pub plan: DatasetPlan,
    /// Training images in the order of the subsets and of their names, then regularisation images.
    pub images: Vec<ImageEntry>,
    /// Sorted by size; none is empty.
    pub buckets: Vec<Bucket>,
    /// Number of images found for each subset of the plan.
    pub image_counts: Vec<usize>,
    /// Tag to count, for each folder or metadata file, in the order of first appearance.
    pub tag_frequency: serde_json::Map<String, serde_json::Value>,
    /// Training images times repeats.
    pub num_train_images: u64,
    /// Regularisation images times repeats, before balancing.
    pub num_reg_images: u64,
    /// Mean distance of the aspect ratios of images and buckets, without repeats.
    pub mean_aspect_error: f64,
    /// Damaged images end the run instead of being left out.
    pub strict_data: bool,
    found: Vec<FoundImage>,
}

/// All datasets of a run.
#[derive(Debug, Clone)]
pub struct DatasetGroup {
    /// The datasets in the order of the configuration.
    pub datasets: Vec<Dataset>,
    /// True where a dataset configuration was given.
    pub from_user_config: bool,
    /// Things the user should know that are no errors; images that are left out are named.
    pub warnings: Vec<String>,
}

impl DatasetGroup {
    /// Finds all images and sorts them into buckets.
    ///
    /// With `strict_data` an image that cannot be used is an error; otherwise it is named in
    /// `warnings` and left out.
    ///
    /// # Errors
    /// Folders without images, images without captions, unreadable caption files.
    pub fn open(config: DatasetConfig, strict_data: bool) -> Result<Self, DatasetError> {
        Self::open_split(config, strict_data).map(|(training, _)| training)
    }

    /// As [`Self::open`], with the images that `validation_split` holds out: those to train on, then,
    /// where it is asked for, those to validate with.
    ///
    /// # Errors
    /// As [`Self::open`]; a split that leaves one of the two sides empty.
    pub fn open_split(
        config: DatasetConfig,
        strict_data: bool,
    ) -> Result<(Self, Option<Self>), DatasetError> {
        let DatasetConfig { datasets: plans, from_user_config, mut warnings } = config;
        let asked = plans.iter().any(asks_for_validation);
        let mut datasets = Vec::with_capacity(plans.len());
        let mut held_out = Vec::new();
        for plan in plans {
            let mut images = Vec::new();
            for (index, subset) in plan.subsets.iter().enumerate() {
                let found = scan_subset(subset, index)?;
                for error in found.unusable {
                    leave_out(error, strict_data, &mut warnings)?;
                }
                warnings.extend(found.warnings);
                images.extend(found.images);
            }
            let ((plan, images), (held_plan, held)) = hold_out(&plan, images);
            // All of it may be for validation.
            let all_held = !held.is_empty() && plan.subsets.iter().all(SubsetPlan::is_reg);
            if !held.is_empty() {
                held_out.push(Dataset::assemble(held_plan, held, strict_data, &mut warnings)?);
            }
            if !all_held {
                datasets.push(Dataset::assemble(plan, images, strict_data, &mut warnings)?);
            }
        }
        let all = || datasets.iter().chain(&held_out);
        let subsets = all().flat_map(|dataset| &dataset.plan.subsets);
        let folders = subsets.filter_map(|s| s.options.conditioning_data_dir.as_ref()).collect();
        let found = all().flat_map(|dataset| &dataset.found);
        let used = found.filter_map(|image| Some(&image.mask.as_ref()?.path)).collect();
        warn_of_unused(&folders, &used, &mut warnings)?;
        let count = |datasets: &[Dataset]| datasets.iter().map(|d| d.images.len()).sum();
        check_split(asked, count(&datasets), count(&held_out))?;
        let validation =
            asked.then(|| Self { datasets: held_out, from_user_config, warnings: Vec::new() });
        Ok((Self { datasets, from_user_config, warnings }, validation))
    }

    /// The same datasets without some images, given as (dataset, image) and the reason.
    ///
    /// # Errors
    /// A dataset of which nothing is left.
    pub fn without(self, unusable: &BTreeMap<(u32, u32), String>) -> Result<Self, DatasetError> {
        let Self { datasets, from_user_config, mut warnings } = self;
        let mut rest = Vec::with_capacity(datasets.len());
        for (number, dataset) in datasets.into_iter().enumerate() {
            let mut paths = HashSet::new();
            for ((_, image), problem) in
                unusable.range((number as u32, 0)..=(number as u32, u32::MAX))
            {
                if let Some(entry) = dataset.images.get(*image as usize) {
                    let error = DatasetError::image(&entry.path, problem.clone());
                    leave_out(error, false, &mut warnings)?;
                    paths.insert(entry.path.clone());
                }
            }
            let Dataset { plan, mut found, strict_data, .. } = dataset;
            found.retain(|image| !paths.contains(&image.path));
            rest.push(Dataset::assemble(plan, found, strict_data, &mut warnings)?);
        }
        Ok(Self { datasets: rest, from_user_config, warnings })
    }

    /// Images in a batch of one rank, for each dataset.
    pub fn batch_sizes(&self) -> Vec<usize> {
        self.datasets.iter().map(|dataset| dataset.plan.options.batch_size.max(1)).collect()
    }

    /// The image of (dataset, image).
    pub fn image(&self, dataset: u32, image: u32) -> Option<&ImageEntry> {
        self.datasets.get(dataset as usize)?.images.get(image as usize)
    }

    /// Whether some image has a mask for its loss, its own or its alpha channel.
    pub fn has_masks(&self) -> bool {
        self.datasets.iter().any(|dataset| {
            let with_alpha = dataset.plan.subsets.iter().any(|subset| subset.options.alpha_mask);
            with_alpha || dataset.images.iter().any(|image| image.mask.is_some())
        })
    }

    /// Whether latents can be made once: no colour changes and no random crops.
    ///
    /// # Errors
    /// Names the option that is in the way.
    pub fn check_latents_cacheable(&self) -> Result<(), DatasetError> {
        for (number, dataset) in self.datasets.iter().enumerate() {
            for subset in &dataset.plan.subsets {
                let options = &subset.options;
                let blocker = match (options.color_aug, options.random_crop) {
                    (true, _) => "color_aug",
                    (_, true) => "random_crop",
                    _ => continue,
                };
                return Err(DatasetError::Config {
                    path: "dataset configuration".into(),
                    table: format!("dataset {}", number + 1),
                    problem: format!("`cache_latents` does not go with `{blocker}`"),
                    advice: format!(
                        "remove one of the two; `{blocker}` changes the pixels each time"
                    ),
                });
            }
        }
        Ok(())
    }

    /// A hash of what is trained on (names, sizes, captions, repeats, buckets, masks): ranks that disagree
    /// here see different files.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for dataset in &self.datasets {
            hasher.update(b"dataset");
            for image in &dataset.images {
                let line = format!(
                    "{}\0{:?}\0{}\0{}\0{:?}\0{:?}\0{:?}\n",
                    image.path.file_name().unwrap_or_default().to_string_lossy(),
                    image.size,
                    image.caption,
                    image.repeats,
                    image.bucket,
                    image.resized,
                    image.mask.as_ref().map(|mask| &mask.hash)
                );
                hasher.update(line.as_bytes());
            }
        }
        hasher.finalize().into()
    }
}

/// Names an unusable image in the warnings, or refuses it.
fn leave_out(
    error: DatasetError,
    strict_data: bool,
    warnings: &mut Vec<String>,
) -> Result<(), DatasetError> {
    if strict_data {
        return Err(error);
    }
    warnings.push(format!("{error}; it is left out"));
    Ok(())
}

impl Dataset {
    fn assemble(
        plan: DatasetPlan,
        found: Vec<FoundImage>,
        strict_data: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Self, DatasetError> {
        let chooser = BucketChooser::new(&plan);
        let mut fitted = Vec::with_capacity(found.len());
        let mut kept = Vec::with_capacity(found.len());
        for image in found {
            match chooser.fit(image.size) {
                Ok(fit) => {
                    fitted.push(fit);
                    kept.push(image);
                }
                Err(problem) => {
                    let error = DatasetError::image(&image.path, problem);
                    leave_out(error, strict_data, warnings)?;
                }
            }
        }
        let found = kept;
        let mut image_counts = vec![0usize; plan.subsets.len()];
        let mut dataset = Self {
            image_counts: Vec::new(),
            images: Vec::with_capacity(found.len()),
            buckets: Vec::new(),
            tag_frequency: serde_json::Map::new(),
            num_train_images: 0,
            num_reg_images: 0,
            mean_aspect_error: 0.0,
            strict_data,
            plan,
            found: Vec::new(),
        };
        let mut regularisation = Vec::new();
        let mut aspect_error = 0.0;
        for (image, fit) in found.iter().zip(&fitted) {
            image_counts[image.subset] += 1;
            let subset = &dataset.plan.subsets[image.subset];
            let entry = ImageEntry {
                path: image.path.clone(),
                size: image.size,
                caption: image.caption.clone(),
                subset: image.subset,
                repeats: subset.options.num_repeats,
                is_reg: subset.is_reg(),
                bucket: fit.bucket,
                resized: fit.resized,
                mask: image.mask.clone(),
            };
            aspect_error += fit.aspect_error.abs();
            if entry.is_reg {
                dataset.num_reg_images += u64::from(entry.repeats);
                regularisation.push(entry);
            } else {
                dataset.num_train_images += u64::from(entry.repeats);
                dataset.images.push(entry);
            }
        }
        if !found.is_empty() {
            dataset.mean_aspect_error = aspect_error / found.len() as f64;
        }
        dataset.check_not_empty(&image_counts, warnings)?;
        let wanted = dataset.num_train_images;
        if wanted.saturating_mul(2) > MAX_SAMPLES {
            return Err(DatasetError::Config {
                path: "dataset configuration".into(),
                table: "[[datasets]]".into(),
                problem: format!("an epoch would have {wanted} samples or more"),
                advice: "lower `num_repeats`, or the number at the start of the folder's name"
                    .into(),
            });
        }
        if dataset.num_reg_images > wanted {
            warnings.push(format!(
                "there are more regularisation images than training images ({} to {wanted}, with \
                 repeats); some are not used",
                dataset.num_reg_images
            ));
        }
        dataset.images.extend(balance(regularisation, wanted));
        dataset.tag_frequency = count_tags(&dataset.plan, &found);
        dataset.image_counts = image_counts;
        dataset.found = found;
        dataset.fill_buckets();
        Ok(dataset)
    }

    fn check_not_empty(
        &self,
        image_counts: &[usize],
        warnings: &[String],
    ) -> Result<(), DatasetError> {
        for (subset, count) in self.plan.subsets.iter().zip(image_counts) {
            let place = match &subset.source {
                SubsetSource::DreamBooth { image_dir, .. } => image_dir,
                SubsetSource::FineTuning { metadata_file, .. } => metadata_file,
            };
            if *count == 0 {
                let example = warnings.iter().rev().find(|warning| warning.contains("left out"));
                return Err(DatasetError::NoImages {
                    place: place.clone(),
                    advice: match example {
                        Some(warning) => format!("none can be used; the last of them: {warning}"),
                        None => "none of its images can be used".into(),
                    },
                });
            }
        }
        if self.images.is_empty() {
            return Err(DatasetError::NoImages {
                place: "dataset".into(),
                advice: "it has regularisation images (`is_reg`) alone; add training images".into(),
            });
        }
        Ok(())
    }

    fn fill_buckets(&mut self) {
        let mut buckets: BTreeMap<Size, Vec<u32>> = BTreeMap::new();
        for (index, image) in self.images.iter().enumerate() {
            let items = buckets.entry(image.bucket).or_default();
            items.extend(std::iter::repeat_n(index as u32, image.repeats as usize));
        }
        self.buckets = buckets.into_iter().map(|(size, items)| Bucket { size, items }).collect();
    }
}

/// As many regularisation images as there are training images (with repeats): in the first round
/// with their own repeats, then each once more, until there are enough. The rest is not used.
fn balance(mut images: Vec<ImageEntry>, wanted: u64) -> Vec<ImageEntry> {
    let mut used = 0u64;
    let mut registered = 0;
    while registered < images.len() && used < wanted {
        used += u64::from(images[registered].repeats);
        registered += 1;
    }
    images.truncate(registered);
    while used < wanted && !images.is_empty() {
        for image in &mut images {
            if used >= wanted {
                break;
            }
            image.repeats += 1;
            used += 1;
        }
    }
    images
}

/// Tag counts by folder or metadata file, lower case, split at commas.
fn count_tags(
    plan: &DatasetPlan,
    found: &[FoundImage],
) -> serde_json::Map<String, serde_json::Value> {
    let mut counts = serde_json::Map::new();
    for (index, subset) in plan.subsets.iter().enumerate() {
        let place = match &subset.source {
            SubsetSource::DreamBooth { image_dir, .. } => image_dir,
            SubsetSource::FineTuning { metadata_file, .. } => metadata_file,
        };
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let entry = counts.entry(name).or_insert_with(|| serde_json::json!({}));
        let Some(frequency) = entry.as_object_mut() else { continue };
        for text in found.iter().filter(|i| i.subset == index).filter_map(|i| i.tags.as_ref()) {
            for tag in text.split(',').map(str::trim).filter(|tag| !tag.is_empty()) {
                let count = frequency.entry(tag.to_lowercase()).or_insert_with(|| 0.into());
                *count = (count.as_u64().unwrap_or(0) + 1).into();
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests;
