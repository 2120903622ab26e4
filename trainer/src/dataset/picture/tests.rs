//! Pictures: resizing, cropping, mirroring, orientation, colours, and bad files.

use super::*;
use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};
use crate::dataset::group::DatasetGroup;
use image::{ImageBuffer, Rgb, RgbImage, Rgba, RgbaImage};

fn gradient(width: u32, height: u32) -> RgbImage {
    ImageBuffer::from_fn(width, height, |x, y| Rgb([(x % 256) as u8, (y % 256) as u8, 77]))
}

fn group(folder: &Path, dataset: &str, subset: &str) -> DatasetGroup {
    let text = format!(
        "[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\nimage_dir = \"{}\"\n\
         class_tokens = \"x\"\n{subset}",
        folder.display()
    );
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    DatasetGroup::open(plan_datasets(&input, &DatasetDefaults::default()).unwrap(), true).unwrap()
}

fn sample(global_index: u64) -> Variation {
    Variation::Sample { seed: 3, global_index }
}

#[test]
fn an_image_covers_its_bucket_from_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    gradient(128, 64).save(folder.path().join("a.png")).unwrap();
    let group = group(folder.path(), "", "");
    let dataset = &group.datasets[0];
    let picture = prepare(dataset, &dataset.images[0], Variation::None).unwrap();
    assert_eq!((picture.size, picture.original_size), ((64, 64), (128, 64)));
    assert_eq!(picture.rgb.len(), 64 * 64 * 3);
    // Not resized: columns 32..96 of the file.
    let value = |column: f32| column / 127.5 - 1.0;
    assert!((picture.rgb[0] - value(32.0)).abs() < 1e-6);
    assert!((picture.rgb[63 * 3] - value(95.0)).abs() < 1e-6);
    assert!((picture.rgb[64 * 3 + 1] - value(1.0)).abs() < 1e-6);
    assert_eq!(picture.crop, [0.0, 16.0, 64.0, 48.0]);
    assert_eq!(prepare(dataset, &dataset.images[0], sample(0)).unwrap(), picture);
}

#[test]
fn flips_and_crops_are_keyed_by_the_sample() {
    let folder = tempfile::tempdir().unwrap();
    gradient(200, 100).save(folder.path().join("a.png")).unwrap();
    let group = group(folder.path(), "", "flip_aug = true\nrandom_crop = true");
    let dataset = &group.datasets[0];
    let at = |index| prepare(dataset, &dataset.images[0], sample(index)).unwrap();
    assert_eq!(at(5), at(5));
    let flipped = (0..200).filter(|index| at(*index).flipped).count();
    assert!((70..130).contains(&flipped), "{flipped}");
    let starts: std::collections::HashSet<u32> =
        (0..50).map(|index| at(index).rgb[0].to_bits()).collect();
    assert!(starts.len() > 20, "{}", starts.len());
    // Without buckets a random crop takes unscaled pixels: neighbours differ by one step.
    let picture = (0..50).map(at).find(|picture| !picture.flipped).unwrap();
    assert!((picture.rgb[3] - picture.rgb[0] - 1.0 / 127.5).abs() < 1e-5);
}

#[test]
fn mirroring_twice_is_nothing_and_takes_the_mask_along() {
    let folder = tempfile::tempdir().unwrap();
    let image: RgbaImage = ImageBuffer::from_fn(64, 64, |x, y| {
        Rgba([x as u8, y as u8, 0, if x < 8 { 255 } else { 51 }])
    });
    image.save(folder.path().join("a.png")).unwrap();
    let group = group(folder.path(), "", "alpha_mask = true");
    let dataset = &group.datasets[0];
    let picture = prepare(dataset, &dataset.images[0], Variation::None).unwrap();
    let alpha = picture.alpha.clone().unwrap();
    assert_eq!(alpha.len(), 64);
    assert!((alpha[0] - 1.0).abs() < 1e-6 && (alpha[1] - 0.2).abs() < 1e-6);
    let mirror = mirrored(&picture);
    assert_eq!(mirror.alpha.as_ref().unwrap()[7], alpha[0]);
    assert_eq!(mirror.rgb[..3], picture.rgb[63 * 3..64 * 3]);
    assert_eq!(mirrored(&mirror), picture);
}

#[test]
fn an_image_that_changed_since_the_start_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    gradient(64, 64).save(folder.path().join("a.png")).unwrap();
    let group = group(folder.path(), "", "");
    gradient(64, 80).save(folder.path().join("a.png")).unwrap();
    let dataset = &group.datasets[0];
    let problem = prepare(dataset, &dataset.images[0], Variation::None).unwrap_err();
    assert!(problem.contains("64x64") && problem.contains("64x80"), "{problem}");
}

#[test]
fn faces_stay_in_the_crop() {
    let folder = tempfile::tempdir().unwrap();
    let mut image = gradient(400, 300);
    for (x, y) in [(300, 100), (301, 101), (299, 100)] {
        image.put_pixel(x, y, Rgb([255, 255, 255]));
    }
    image.save(folder.path().join("p_300_100_60_60.png")).unwrap();
    assert_eq!(
        face_in_name(Path::new("p_300_100_60_50.png")),
        Some(Face { center: [300, 100], size: 60 })
    );
    assert_eq!(face_in_name(Path::new("p_1_2_3.png")), None);
    assert_eq!(face_in_name(Path::new("a_b_c_d_e.png")), None);
    let group = group(folder.path(), "", "face_crop_aug_range = [1, 2]");
    let dataset = &group.datasets[0];
    for index in 0..20 {
        let picture = prepare(dataset, &dataset.images[0], sample(index)).unwrap();
        // Blue is 77 everywhere but at the face.
        let brightest = picture.rgb.chunks_exact(3).map(|p| p[2]).fold(f32::MIN, f32::max);
        assert!(brightest > 77.0 / 127.5 - 1.0 + 0.1, "{index}: {brightest}");
    }
}

#[test]
fn color_changes_are_small_and_sometimes_absent() {
    assert_eq!(shift_hue([10, 200, 30], 0.0), [10, 200, 30]);
    assert_eq!(shift_hue([255, 0, 0], 120.0), [0, 255, 0]);
    assert_eq!(shift_hue([9, 9, 9], 50.0), [9, 9, 9]);
    let base = Pixels { width: 1, height: 1, channels: 3, data: vec![200, 100, 50] };
    let mut unchanged = 0;
    for index in 0..300 {
        let mut pixels = base.clone();
        vary_color(&mut pixels, &mut stream(1, Purpose::Color, index, 0));
        unchanged += u32::from(pixels == base);
        for (new, old) in pixels.data.iter().zip(&base.data) {
            assert!(new.abs_diff(*old) < 65, "{pixels:?}");
        }
    }
    assert!((160..240).contains(&unchanged), "{unchanged}");
}

#[test]
fn a_mask_picture_acts_as_an_alpha_channel_of_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["rgb", "rgba", "masks"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let shade = |x: u32, y: u32| ((x * 7 + y * 3) % 256) as u8;
    let image = gradient(150, 100);
    image.save(at("rgb/a.png")).unwrap();
    let mask = RgbImage::from_fn(150, 100, |x, y| Rgb([shade(x, y), 0, 255]));
    mask.save(at("masks/a.bmp")).unwrap();
    RgbaImage::from_fn(150, 100, |x, y| {
        let Rgb([red, green, blue]) = *image.get_pixel(x, y);
        Rgba([red, green, blue, shade(x, y)])
    })
    .save(at("rgba/a.png"))
    .unwrap();
    let open = |images: &str, subset: &str, masked_loss: bool| {
        let text = format!(
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = \"{}\"\n\
             class_tokens = \"x\"\nflip_aug = true\nrandom_crop = true\n{subset}",
            at(images).display()
        );
        let table = text.parse().unwrap();
        let input = DatasetInput::Inline { table, origin: "run.toml".into() };
        let defaults = DatasetDefaults { masked_loss, ..DatasetDefaults::default() };
        DatasetGroup::open(plan_datasets(&input, &defaults)?, true)
    };
    let folder_key = format!("conditioning_data_dir = \"{}\"", at("masks").display());
    let masked = open("rgb", &folder_key, true).unwrap();
    let alpha = open("rgba", "alpha_mask = true", false).unwrap();
    let plain = open("rgb", "", true).unwrap();
    assert!(masked.has_masks() && alpha.has_masks() && !plain.has_masks());
    assert_ne!(masked.fingerprint(), plain.fingerprint());
    for index in 0..8 {
        let picture = |group: &DatasetGroup| {
            let dataset = &group.datasets[0];
            prepare(dataset, &dataset.images[0], sample(index)).unwrap()
        };
        assert_eq!(picture(&masked), picture(&alpha));
        assert_eq!(picture(&masked).rgb, picture(&plain).rgb);
        assert_eq!(picture(&plain).alpha, None);
    }
    let text = open("rgb", &folder_key, false).unwrap_err().to_string();
    assert!(text.contains("`conditioning_data_dir` is for `masked_loss`"), "{text}");
}
