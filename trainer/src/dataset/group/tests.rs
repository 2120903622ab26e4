//! Datasets from folders: buckets, repeats, regularisation images, damaged and absurd input.

use super::*;
use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};
use std::path::Path;

fn png(path: &Path, width: u32, height: u32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    image::RgbImage::new(width, height).save(path).unwrap();
}

fn open(folder: &Path, text: &str, strict: bool) -> Result<DatasetGroup, DatasetError> {
    let text = text.replace("DIR", &folder.display().to_string());
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    DatasetGroup::open(plan_datasets(&input, &DatasetDefaults::default())?, strict)
}

const TOML: &str = r#"
[[datasets]]
resolution = 256
enable_bucket = true
min_bucket_reso = 128
max_bucket_reso = 512
  [[datasets.subsets]]
  image_dir = "DIR/train"
  class_tokens = "Dog, pet"
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "DIR/reg"
  class_tokens = "dog"
  is_reg = true
"#;

#[test]
fn images_go_to_buckets_with_their_repeats() {
    let folder = tempfile::tempdir().unwrap();
    for (name, width, height) in
        [("train/a.png", 256, 256), ("train/b.png", 512, 256), ("train/c.png", 100, 100)]
    {
        png(&folder.path().join(name), width, height);
    }
    png(&folder.path().join("reg/r0.png"), 256, 256);
    png(&folder.path().join("reg/r1.png"), 256, 256);
    let group = open(folder.path(), TOML, true).unwrap();
    let dataset = &group.datasets[0];
    assert_eq!((dataset.num_train_images, dataset.num_reg_images), (6, 2));
    // Two regularisation images for six training samples: three times each.
    let repeats: Vec<u32> = dataset.images.iter().map(|image| image.repeats).collect();
    assert_eq!(repeats, [2, 2, 2, 3, 3]);
    let sizes: Vec<(Size, usize)> =
        dataset.buckets.iter().map(|bucket| (bucket.size, bucket.items.len())).collect();
    assert_eq!(sizes, [((256, 256), 10), ((320, 192), 2)]);
    assert_eq!(dataset.image_counts, [3, 2]);
    let tags = serde_json::to_string(&dataset.tag_frequency).unwrap();
    assert_eq!(tags, r#"{"train":{"dog":3,"pet":3},"reg":{"dog":2}}"#);
    assert!(group.warnings.is_empty(), "{:?}", group.warnings);
}

#[test]
fn regularisation_images_are_balanced() {
    let image = |repeats| ImageEntry {
        path: "r".into(),
        size: (1, 1),
        caption: String::new(),
        subset: 0,
        repeats,
        is_reg: true,
        bucket: (1, 1),
        resized: (1, 1),
        mask: None,
    };
    let repeats = |images: Vec<u32>, wanted| {
        let images = images.into_iter().map(image).collect();
        balance(images, wanted).iter().map(|image| image.repeats).collect::<Vec<_>>()
    };
    assert_eq!(repeats(vec![1, 1, 1], 7), [3, 2, 2]);
    assert_eq!(repeats(vec![2, 2, 2], 3), [2, 2]);
    assert_eq!(repeats(vec![5], 3), [5]);
    assert_eq!(repeats(vec![1, 1], 0), [0u32; 0]);
    assert_eq!(repeats(vec![], 4), [0u32; 0]);
}

#[test]
fn a_damaged_image_is_named_and_left_out_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    png(&folder.path().join("train/a.png"), 256, 256);
    png(&folder.path().join("train/z.png"), 256, 256);
    png(&folder.path().join("reg/r.png"), 256, 256);
    let bad = folder.path().join("train/b.png");
    for content in [&b""[..], b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xFF\xD8\xFF\xC0"]
    {
        std::fs::write(&bad, content).unwrap();
        let group = open(folder.path(), TOML, false).unwrap();
        assert_eq!(group.datasets[0].num_train_images, 4);
        assert!(group.warnings[0].contains("b.png"), "{:?}", group.warnings);
        let text = open(folder.path(), TOML, true).unwrap_err().to_string();
        assert!(text.contains("unusable image") && text.contains("b.png"), "{text}");
    }
    for name in ["train/a.png", "train/z.png"] {
        std::fs::rename(folder.path().join(name), folder.path().join(name).with_extension("x"))
            .unwrap();
    }
    let text = open(folder.path(), TOML, false).unwrap_err().to_string();
    assert!(text.contains("no images found") && text.contains("b.png"), "{text}");
    for name in ["train/a.x", "train/z.x"] {
        std::fs::rename(folder.path().join(name), folder.path().join(name).with_extension("png"))
            .unwrap();
    }
    std::fs::remove_file(&bad).unwrap();
    let group = open(folder.path(), TOML, false).unwrap();
    let before = group.fingerprint();
    let unusable = BTreeMap::from([((0, 1), "it cannot be decoded".to_owned())]);
    let group = group.without(&unusable).unwrap();
    assert_ne!(before, group.fingerprint());
    assert_eq!(group.datasets[0].num_train_images, 2);
    assert!(group.warnings[0].contains("z.png"), "{:?}", group.warnings);
    let unusable = BTreeMap::from([((0, 0), "x".to_owned())]);
    assert!(matches!(group.without(&unusable), Err(DatasetError::NoImages { .. })));
}

#[test]
fn colour_changes_and_random_crops_cannot_be_cached() {
    let folder = tempfile::tempdir().unwrap();
    png(&folder.path().join("train/a.png"), 256, 256);
    png(&folder.path().join("reg/r.png"), 256, 256);
    assert!(open(folder.path(), TOML, true).unwrap().check_latents_cacheable().is_ok());
    let toml = TOML.replace("num_repeats = 2", "random_crop = true");
    let error = open(folder.path(), &toml, true).unwrap().check_latents_cacheable();
    assert!(error.unwrap_err().to_string().contains("`random_crop`"));
}

#[test]
fn absurd_repeats_are_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    png(&folder.path().join("train/a.png"), 256, 256);
    png(&folder.path().join("reg/r.png"), 256, 256);
    let toml = TOML.replace("num_repeats = 2", "num_repeats = 4000000000");
    let text = open(folder.path(), &toml, true).unwrap_err().to_string();
    assert!(text.contains("4000000000 samples") && text.contains("num_repeats"), "{text}");
}
