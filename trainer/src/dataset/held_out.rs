//! Sets images aside for validation (`validation_split`): which ones depends on the seed and on the
//! names of the files alone.
//!
//! Of each subset the share that is asked for is held out, rounded to the nearest number. The images
//! with the lowest draws go, a draw being keyed by seed and file name: an image that is added later
//! changes at most one place, two datasets of one folder (for several resolutions) hold out the same
//! images, and no image is in both parts. (sd-scripts shuffles the list, and rounds both parts up, so
//! that one image can be trained on and validated with.) Regularisation images are never held out.

use super::config::{DatasetPlan, SubsetOptions};
use super::error::DatasetError;
use super::scan::FoundImage;
use crate::rng::{Purpose, stream};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A dataset's plan with the images that belong to it.
pub(super) type Part = (DatasetPlan, Vec<FoundImage>);

/// A key for an image that does not depend on where its folder lies.
pub(super) fn image_key(path: &Path) -> u64 {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let digest = Sha256::digest(name.as_bytes());
    digest.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

/// Divides the images of a dataset into those to train on and those to validate with. Subsets of
/// which nothing is left are dropped from a part.
pub(super) fn hold_out(plan: &DatasetPlan, images: Vec<FoundImage>) -> (Part, Part) {
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (index, subset) in plan.subsets.iter().enumerate() {
        let mut own: Vec<FoundImage> =
            images.iter().filter(|image| image.subset == index).cloned().collect();
        let share = if subset.is_reg() { 0. } else { subset.options.validation_split };
        let count = (share * own.len() as f64).round_ties_even() as usize;
        let seed = subset.options.validation_seed;
        let draw = |image: &FoundImage| {
            stream(seed, Purpose::ValidationChoice, image_key(&image.path), 0).next_u64()
        };
        let mut draws: Vec<(u64, usize)> =
            own.iter().enumerate().map(|(at, image)| (draw(image), at)).collect();
        draws.sort_unstable();
        let mut is_held = vec![false; own.len()];
        draws.iter().take(count).for_each(|(_, at)| is_held[*at] = true);
        let mut held = is_held.iter();
        validation.extend(own.extract_if(.., |_| held.next() == Some(&true)));
        training.extend(own);
    }
    let all_held = |index: usize| {
        validation.iter().any(|image: &FoundImage| image.subset == index)
            && training.iter().all(|image| image.subset != index)
    };
    // A subset that never had an image stays: it is an error of its own.
    let trained: Vec<usize> = (0..plan.subsets.len()).filter(|index| !all_held(*index)).collect();
    let validated: Vec<usize> = (0..plan.subsets.len())
        .filter(|index| validation.iter().any(|image| image.subset == *index))
        .collect();
    let mut validation = keep(plan, validation, &validated);
    for subset in &mut validation.0.subsets {
        subset.options = plain(&subset.options);
    }
    (keep(plan, training, &trained), validation)
}

/// The subsets of `kept` alone, numbered anew.
fn keep(plan: &DatasetPlan, mut images: Vec<FoundImage>, kept: &[usize]) -> Part {
    let subsets = kept.iter().map(|index| plan.subsets[*index].clone()).collect();
    for image in &mut images {
        image.subset = kept.iter().position(|index| *index == image.subset).unwrap_or_default();
    }
    (DatasetPlan { subsets, ..plan.clone() }, images)
}

/// Options without everything that is drawn anew each time.
fn plain(options: &SubsetOptions) -> SubsetOptions {
    SubsetOptions {
        num_repeats: 1,
        shuffle_caption: false,
        caption_dropout_rate: 0.,
        caption_dropout_every_n_epochs: 0,
        caption_tag_dropout_rate: 0.,
        token_warmup_step: 0.,
        flip_aug: false,
        color_aug: false,
        random_crop: false,
        face_crop_aug_range: None,
        ..options.clone()
    }
}

/// Whether a dataset asks for validation.
pub(super) fn asks_for_validation(plan: &DatasetPlan) -> bool {
    plan.subsets.iter().any(|subset| !subset.is_reg() && subset.options.validation_split > 0.)
}

/// Refuses a split that leaves one side empty.
pub(super) fn check_split(
    asked: bool,
    training: usize,
    validation: usize,
) -> Result<(), DatasetError> {
    let (problem, advice) = match (asked, training, validation) {
        (true, 0, _) => (
            "`validation_split` leaves no image to train on",
            "1 holds out all of a subset; give another subset to train on, or a lower share",
        ),
        (true, _, 0) => (
            "`validation_split` leaves no image to validate with",
            "the share of each subset is rounded to whole images; raise it, or give a subset of its \
             own with `validation_split = 1.0`",
        ),
        _ => return Ok(()),
    };
    Err(DatasetError::Config {
        path: "dataset configuration".into(),
        table: "the datasets".into(),
        problem: problem.into(),
        advice: advice.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};
    use crate::dataset::{DatasetConfig, DatasetGroup};
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    fn config(folder: &Path, subsets: &[(&str, &str)]) -> DatasetConfig {
        let mut text = "[[datasets]]\nresolution = 128\n".to_owned();
        for (name, options) in subsets {
            text += &format!(
                "[[datasets.subsets]]\nimage_dir = '{}'\nclass_tokens = 'x'\n{options}\n",
                folder.join(name).display()
            );
        }
        let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run".into() };
        plan_datasets(&input, &DatasetDefaults::default()).unwrap()
    }

    fn scene(folders: &[(&str, usize)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, count) in folders {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            for number in 0..*count {
                let path = folder.path().join(name).join(format!("{number:02}.png"));
                image::RgbImage::new(128, 128).save(path).unwrap();
            }
        }
        folder
    }

    fn names(group: &DatasetGroup) -> BTreeSet<PathBuf> {
        let images = group.datasets.iter().flat_map(|dataset| &dataset.images);
        images.map(|image| image.path.clone()).collect()
    }

    #[test]
    fn every_image_is_on_one_side_and_the_seed_says_on_which() {
        let folder = scene(&[("a", 10), ("reg", 4), ("own", 2)]);
        let split = |seed: u64| {
            let share = format!(
                "validation_split = 0.3\nvalidation_seed = {seed}\nflip_aug = true\nnum_repeats = 3"
            );
            let subsets = [
                ("a", share.as_str()),
                ("reg", "is_reg = true"),
                ("own", "validation_split = 1.0"),
            ];
            let config = config(folder.path(), &subsets);
            let (training, validation) = DatasetGroup::open_split(config, true).unwrap();
            (training, validation.unwrap())
        };
        let (training, validation) = split(1);
        assert_eq!(names(&validation).len(), 3 + 2);
        assert_eq!(training.num_train_images(), 7 * 3);
        assert!(names(&training).is_disjoint(&names(&validation)));
        assert!(names(&validation).iter().all(|path| !path.starts_with(folder.path().join("reg"))));
        assert_eq!(training.datasets[0].plan.subsets.len(), 2, "a subset for validation alone");
        for subset in &validation.datasets[0].plan.subsets {
            assert!(!subset.options.flip_aug && subset.options.num_repeats == 1);
        }
        assert_eq!(names(&validation), names(&split(1).1));
        let other: BTreeSet<_> = (2..6).map(|seed| names(&split(seed).1)).collect();
        assert!(other.len() > 1, "the seed changes nothing");
        // Two more images push at most one out of the held ones for each that enters.
        let before = names(&validation);
        for number in 10..12 {
            let path = folder.path().join(format!("a/{number:02}.png"));
            image::RgbImage::new(128, 128).save(path).unwrap();
        }
        let after = names(&split(1).1);
        assert!(before.intersection(&after).count() >= 3, "{before:?} {after:?}");
    }

    #[test]
    fn a_split_that_empties_a_side_is_refused() {
        let folder = scene(&[("a", 3)]);
        for (options, expected) in [
            ("validation_split = 1.0", "leaves no image to train on"),
            ("validation_split = 0.1", "leaves no image to validate with"),
        ] {
            let config = config(folder.path(), &[("a", options)]);
            let message = DatasetGroup::open_split(config, true).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("hint"), "{message}");
        }
        let config = config(folder.path(), &[("a", "")]);
        assert!(DatasetGroup::open_split(config, true).unwrap().1.is_none());
    }
}
