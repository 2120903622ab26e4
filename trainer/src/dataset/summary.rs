//! What a dataset tells about itself: lines for the user, values for the metadata of files.
//!
//! The metadata has the keys, the nesting and the order of sd-scripts.

use super::config::{SubsetPlan, SubsetSource};
use super::group::{Dataset, DatasetGroup};
use super::order::Sampler;
use crate::metadata::DatasetFacts;
use serde_json::{Map, Value, json};
use std::path::Path;

fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl DatasetGroup {
    /// Training images of all datasets, repeats counted.
    pub fn num_train_images(&self) -> u64 {
        self.datasets.iter().map(|dataset| dataset.num_train_images).sum()
    }

    /// Regularisation images of all datasets, repeats counted, before balancing.
    pub fn num_reg_images(&self) -> u64 {
        self.datasets.iter().map(|dataset| dataset.num_reg_images).sum()
    }

    /// Name and value of the lines that describe the data at the start of a run.
    pub fn summary(&self, sampler: &Sampler) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        for (number, dataset) in self.datasets.iter().enumerate() {
            let name = if self.datasets.len() == 1 {
                "dataset".to_owned()
            } else {
                format!("dataset {}", number + 1)
            };
            let (width, height) = dataset.plan.resolution;
            lines.push((
                name,
                format!(
                    "{width}x{height}, batch size {}, {} bucket{}",
                    dataset.plan.options.batch_size,
                    dataset.buckets.len(),
                    if dataset.buckets.len() == 1 { "" } else { "s" }
                ),
            ));
            for (subset, count) in dataset.plan.subsets.iter().zip(&dataset.image_counts) {
                lines.push(("  images".to_owned(), subset_line(subset, *count)));
            }
            for bucket in &dataset.buckets {
                let (width, height) = bucket.size;
                let value = format!("{width}x{height}: {} samples", bucket.items.len());
                lines.push(("  bucket".to_owned(), value));
            }
        }
        lines.push((
            "samples per epoch".to_owned(),
            format!(
                "{} ({} of training images, {} of regularisation images)",
                sampler.samples_per_epoch(),
                self.num_train_images(),
                sampler.samples_per_epoch() - self.num_train_images()
            ),
        ));
        lines.push(("batches per epoch".to_owned(), sampler.batches_per_epoch().to_string()));
        lines
    }

    /// The dataset's part of the metadata of files.
    pub fn facts(&self) -> DatasetFacts {
        let tag_frequency = Value::Object(self.merged_tag_frequency());
        match self.datasets.as_slice() {
            [dataset] if !self.from_user_config => {
                let bucketed = dataset.plan.options.enable_bucket;
                let side = |side: u32| bucketed.then_some(side as usize);
                DatasetFacts::Folders {
                    enable_bucket: bucketed,
                    bucket_no_upscale: bucketed && dataset.plan.options.bucket_no_upscale,
                    min_bucket_reso: side(dataset.plan.options.min_bucket_reso),
                    max_bucket_reso: side(dataset.plan.options.max_bucket_reso),
                    dataset_dirs: folder_dirs(dataset, false),
                    reg_dataset_dirs: folder_dirs(dataset, true),
                    tag_frequency,
                    bucket_info: bucket_info(dataset),
                }
            }
            datasets => DatasetFacts::Config {
                datasets: datasets.iter().map(dataset_value).collect(),
                tag_frequency,
                dataset_dirs: config_dirs(datasets),
            },
        }
    }

    /// Folder to tag to count; a folder that several datasets use counts once.
    fn merged_tag_frequency(&self) -> Map<String, Value> {
        let mut merged = Map::new();
        for (folder, frequency) in self.datasets.iter().flat_map(|d| &d.tag_frequency) {
            if !merged.contains_key(folder) {
                merged.insert(folder.clone(), frequency.clone());
            }
        }
        merged
    }
}

fn subset_line(subset: &SubsetPlan, count: usize) -> String {
    let place = match &subset.source {
        SubsetSource::DreamBooth { image_dir, .. } => image_dir,
        SubsetSource::FineTuning { metadata_file, .. } => metadata_file,
    };
    let regularisation = if subset.is_reg() { ", regularisation" } else { "" };
    let repeats = subset.options.num_repeats;
    format!("{count} x {repeats} repeats{regularisation}, {}", place.display())
}

/// `{"buckets": {index: {resolution, count}}, "mean_img_ar_error"}`, or null without buckets.
fn bucket_info(dataset: &Dataset) -> Value {
    if !dataset.plan.options.enable_bucket {
        return Value::Null;
    }
    let buckets: Map<String, Value> = dataset
        .buckets
        .iter()
        .enumerate()
        .map(|(index, bucket)| {
            let entry = json!({"resolution": bucket.size, "count": bucket.items.len()});
            (index.to_string(), entry)
        })
        .collect();
    json!({"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error})
}

fn dataset_value(dataset: &Dataset) -> Value {
    let options = &dataset.plan.options;
    let side = |side: u32| options.enable_bucket.then_some(side);
    let subsets: Vec<Value> = dataset
        .plan
        .subsets
        .iter()
        .zip(&dataset.image_counts)
        .map(|(subset, count)| subset_value(subset, *count))
        .collect();
    json!({
        "is_dreambooth": dataset.plan.is_dreambooth,
        "batch_size_per_device": options.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": dataset.plan.resolution,
        "enable_bucket": options.enable_bucket,
        "min_bucket_reso": side(options.min_bucket_reso),
        "max_bucket_reso": side(options.max_bucket_reso),
        "tag_frequency": dataset.tag_frequency,
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": options.resize_interpolation_name,
        "subsets": subsets,
    })
}

fn subset_value(subset: &SubsetPlan, count: usize) -> Value {
    let options = &subset.options;
    let mut value = json!({
        "img_count": count,
        "num_repeats": options.num_repeats,
        "color_aug": options.color_aug,
        "flip_aug": options.flip_aug,
        "random_crop": options.random_crop,
        "shuffle_caption": options.shuffle_caption,
        "keep_tokens": options.keep_tokens,
        "keep_tokens_separator": options.keep_tokens_separator,
        "secondary_separator": options.secondary_separator,
        "enable_wildcard": options.enable_wildcard,
        "caption_prefix": options.caption_prefix,
        "caption_suffix": options.caption_suffix,
        "resize_interpolation": options.resize_interpolation_name,
    });
    match &subset.source {
        SubsetSource::DreamBooth { image_dir, is_reg } => {
            value["image_dir"] = base_name(image_dir).into();
            value["class_tokens"] = json!(options.class_tokens);
            value["is_reg"] = (*is_reg).into();
        }
        SubsetSource::FineTuning { metadata_file, image_dir } => {
            if let Some(image_dir) = image_dir {
                value["image_dir"] = base_name(image_dir).into();
            }
            value["metadata_file"] = base_name(metadata_file).into();
        }
    }
    value
}

fn dir_entry(subset: &SubsetPlan, count: usize) -> Value {
    json!({"n_repeats": subset.options.num_repeats, "img_count": count})
}

/// Name of folder or metadata file to repeats and count; equal names get a number.
fn config_dirs(datasets: &[Dataset]) -> Value {
    let mut dirs = Map::new();
    for dataset in datasets {
        for (subset, count) in dataset.plan.subsets.iter().zip(&dataset.image_counts) {
            let base = match &subset.source {
                SubsetSource::DreamBooth { is_reg: true, .. } => continue,
                SubsetSource::DreamBooth { image_dir, .. } => base_name(image_dir),
                SubsetSource::FineTuning { metadata_file, .. } => base_name(metadata_file),
            };
            let mut name = base.clone();
            let mut number = 2;
            while dirs.contains_key(&name) {
                name = format!("{base} ({number})");
                number += 1;
            }
            dirs.insert(name, dir_entry(subset, *count));
        }
    }
    Value::Object(dirs)
}

/// The same for `train_data_dir` and `in_json`, for training or regularisation images.
fn folder_dirs(dataset: &Dataset, is_reg: bool) -> Value {
    let subsets = dataset.plan.subsets.iter().zip(&dataset.image_counts);
    let dirs: Map<String, Value> = subsets
        .filter(|(subset, _)| subset.is_reg() == is_reg)
        .map(|(subset, count)| {
            let place = match &subset.source {
                SubsetSource::DreamBooth { image_dir, .. } => image_dir,
                SubsetSource::FineTuning { metadata_file, .. } => metadata_file,
            };
            (base_name(place), dir_entry(subset, *count))
        })
        .collect();
    Value::Object(dirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};
    use crate::metadata::python_json;

    fn pngs(folder: &Path, names: &[&str], size: (u32, u32)) {
        std::fs::create_dir_all(folder).unwrap();
        for name in names {
            image::RgbImage::new(size.0, size.1).save(folder.join(name)).unwrap();
        }
    }

    /// The dataset that `train_c3lier.json` was written for gives its values again, byte for byte.
    #[test]
    fn metadata_equals_that_of_the_reference() {
        let reference: std::collections::BTreeMap<String, String> =
            serde_json::from_str(include_str!("../../../tests/data/lora/train_c3lier.json"))
                .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("sks3");
        pngs(&images, &["a.png", "b.png", "c.png"], (256, 256));
        for (name, caption) in [
            ("a", "a photo of sks dog"),
            ("b", "a photo of sks dog sitting on a bench"),
            ("c", "sks dog running, Motion blur"),
        ] {
            std::fs::write(images.join(format!("{name}.txt")), caption).unwrap();
        }
        let toml = format!(
            "[[datasets]]\nresolution = 256\nbatch_size = 1\n[[datasets.subsets]]\n\
             image_dir = \"{}\"\nclass_tokens = \"sks dog\"\ncaption_extension = \".txt\"",
            images.display()
        );
        let input =
            DatasetInput::Inline { table: toml.parse().unwrap(), origin: "run.toml".into() };
        let config = plan_datasets(&input, &DatasetDefaults::default()).unwrap();
        let group = DatasetGroup::open(config, true).unwrap();
        let DatasetFacts::Config { datasets, tag_frequency, dataset_dirs } = group.facts() else {
            panic!("a dataset configuration gives `Config`")
        };
        assert_eq!(python_json(&datasets), reference["ss_datasets"]);
        assert_eq!(python_json(&tag_frequency), reference["ss_tag_frequency"]);
        assert_eq!(python_json(&dataset_dirs), reference["ss_dataset_dirs"]);
        assert_eq!(group.num_train_images().to_string(), reference["ss_num_train_images"]);
        let sampler = Sampler::new(&group, 1, 1, 1);
        let batches = sampler.batches_per_epoch().to_string();
        assert_eq!(batches, reference["ss_num_batches_per_epoch"]);
    }

    #[test]
    fn folders_and_buckets() {
        let folder = tempfile::tempdir().unwrap();
        pngs(&folder.path().join("train/4_sks dog"), &["a.png"], (512, 256));
        pngs(&folder.path().join("train/4_sks dog"), &["b.png"], (256, 256));
        pngs(&folder.path().join("reg/1_dog"), &["r.png"], (256, 256));
        let mut defaults = DatasetDefaults::default();
        defaults.dataset.resolution = Some((256, 256));
        defaults.dataset.enable_bucket = true;
        defaults.dataset.min_bucket_reso = 128;
        let input = DatasetInput::Folders {
            train_data_dir: folder.path().join("train"),
            reg_data_dir: Some(folder.path().join("reg")),
        };
        let group = DatasetGroup::open(plan_datasets(&input, &defaults).unwrap(), true).unwrap();
        let DatasetFacts::Folders { dataset_dirs, reg_dataset_dirs, bucket_info, .. } =
            group.facts()
        else {
            panic!("folders give `Folders`")
        };
        assert_eq!(
            python_json(&dataset_dirs),
            r#"{"4_sks dog": {"n_repeats": 4, "img_count": 2}}"#
        );
        assert_eq!(
            python_json(&reg_dataset_dirs),
            r#"{"1_dog": {"n_repeats": 1, "img_count": 1}}"#
        );
        assert_eq!(bucket_info["buckets"]["0"], json!({"resolution": [256, 256], "count": 12}));
        assert_eq!(bucket_info["buckets"]["1"], json!({"resolution": [320, 192], "count": 4}));
        let error = (2.0 - 320.0 / 192.0) / 3.0;
        let mean = bucket_info["mean_img_ar_error"].as_f64().unwrap();
        assert!((mean - error).abs() < 1e-12);
        let sampler = Sampler::new(&group, 1, 2, 1);
        let lines = group.summary(&sampler);
        let last: Vec<&str> = lines[lines.len() - 2..].iter().map(|l| l.1.as_str()).collect();
        assert_eq!(last, ["16 (8 of training images, 8 of regularisation images)", "8"]);
    }
}
