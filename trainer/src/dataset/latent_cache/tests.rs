//! The latent cache: encoded once, repaired, shared by the ranks, and resumed.

use super::*;
use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};
use std::sync::atomic::{AtomicUsize, Ordering};

/// An "encoder" whose moments are averages of the image, so that they can be checked.
struct Averages<'a> {
    images: &'a AtomicUsize,
    poison: bool,
    /// Fails once so many images have been encoded.
    fails_after: usize,
}

impl LatentEncoder for Averages<'_> {
    fn encode(&mut self, images: &[f32], shape: [usize; 4]) -> anyhow::Result<Vec<f32>> {
        let [count, height, width, channels] = shape;
        assert_eq!((images.len(), channels), (count * height * width * 3, 3));
        let before = self.images.load(Ordering::SeqCst);
        anyhow::ensure!(before + count <= self.fails_after, "the power is gone");
        self.images.fetch_add(count, Ordering::SeqCst);
        let (h, w) = (height / 8, width / 8);
        let mut out = Vec::with_capacity(count * h * w * 8);
        for image in images.chunks_exact(height * width * 3) {
            for y in 0..h {
                for x in 0..w {
                    let pixel = &image[(y * 8 * width + x * 8) * 3..][..3];
                    out.extend([pixel[0], pixel[1], pixel[2], 0.5, 1.0, 2.0, 3.0, 4.0]);
                }
            }
        }
        if self.poison {
            out[3] = f32::NAN;
        }
        Ok(out)
    }

    fn blame(&self) -> String {
        "what the encoder of this test gives is not finite".to_owned()
    }
}

fn images(folder: &Path, count: u8) {
    std::fs::create_dir_all(folder).unwrap();
    for index in 0..count {
        let (width, height) = if index % 3 == 0 { (128, 64) } else { (64, 64) };
        image::RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([x as u8, y as u8, index.wrapping_mul(20)])
        })
        .save(folder.join(format!("i{index:02}.png")))
        .unwrap();
    }
}

fn open(folder: &Path, subset: &str) -> DatasetGroup {
    open_with(folder, subset, DatasetDefaults::default())
}

fn open_with(folder: &Path, subset: &str, defaults: DatasetDefaults) -> DatasetGroup {
    let text = format!(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = \"{}\"\n\
         class_tokens = \"x\"\n{subset}",
        folder.display()
    );
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    let config = plan_datasets(&input, &defaults).unwrap();
    DatasetGroup::open(config, false).unwrap()
}

struct Setting<'a> {
    place: CachePlace,
    vae: &'a str,
    strict_data: bool,
    poison: bool,
    fails_after: usize,
}

const TO_DISK: Setting<'_> = Setting {
    place: CachePlace::BesideImages,
    vae: "vae1",
    strict_data: false,
    poison: false,
    fails_after: usize::MAX,
};

type Outcome = Result<(DatasetGroup, LatentStore), DatasetError>;

fn cache(group: &DatasetGroup, world_size: usize, setting: &Setting<'_>) -> (Vec<Outcome>, usize) {
    let encoded = AtomicUsize::new(0);
    let comms = Comm::local_group(world_size).unwrap();
    let outcomes = std::thread::scope(|scope| {
        let encoded = &encoded;
        let ranks: Vec<_> = comms
            .into_iter()
            .map(|comm| {
                scope.spawn(move || {
                    let mut encoder = Averages {
                        images: encoded,
                        poison: setting.poison,
                        fails_after: setting.fails_after,
                    };
                    let options = CacheOptions {
                        place: setting.place.clone(),
                        share: (comm.rank(), comm.world_size()),
                        vae: setting.vae.into(),
                        batch_size: 2,
                        workers: 2,
                        strict_data: setting.strict_data,
                        skip_check: false,
                        progress: &mut |done, all| assert!(done <= all),
                    };
                    cache_latents(group.clone(), &mut encoder, &comm, options)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    (outcomes, encoded.load(Ordering::SeqCst))
}

fn only(outcomes: Vec<Outcome>) -> (DatasetGroup, LatentStore) {
    let mut outcomes = outcomes;
    outcomes.remove(0).unwrap()
}

#[test]
fn encoded_once_then_read_and_only_what_changed_is_encoded_again() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 7);
    let group = open(folder.path(), "");
    let (outcomes, encoded) = cache(&group, 1, &TO_DISK);
    assert_eq!(encoded, 7);
    let (same, store) = only(outcomes);
    assert_eq!((same.fingerprint(), store.len()), (group.fingerprint(), 7));
    let latents = store.get(0, 0).unwrap();
    assert_eq!((latents.latent_size, latents.moments.len()), ((8, 8), 8 * 8 * 8));
    // The middle 64 columns of 128: latent (0, 1) is pixel column 40.
    assert!((latents.moments[8] - (40.0 / 127.5 - 1.0)).abs() < 1e-6);
    assert_eq!(cache(&group, 1, &TO_DISK).1, 0);
    assert_eq!(cache(&group, 1, &Setting { vae: "other", ..TO_DISK }).1, 7);

    // A touched file is hashed and found the same; a changed one is encoded again.
    let path = folder.path().join("i01.png");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(cache(&group, 1, &TO_DISK).1, 0);
    image::RgbImage::new(64, 64).save(&path).unwrap();
    assert_eq!(cache(&group, 1, &TO_DISK).1, 1);
}

#[test]
fn damaged_and_half_written_cache_files_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 4);
    let group = open(folder.path(), "flip_aug = true");
    let (outcomes, encoded) = cache(&group, 1, &TO_DISK);
    assert_eq!(encoded, 8);
    let (_, store) = only(outcomes);
    let latents = store.get(0, 1).unwrap();
    assert_eq!(latents.moments_of(true)[0], latents.moments_of(false)[7 * 8] + 7.0 / 127.5);

    let cache_folder = folder.path().join(CACHE_FOLDER);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&cache_folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 4);
    let mut bytes = std::fs::read(&files[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&files[0], &bytes).unwrap();
    std::fs::write(&files[1], &bytes[..100]).unwrap();
    std::fs::remove_file(&files[2]).unwrap();
    assert!(store.get(0, 0).unwrap_err().to_string().contains("checksum"));
    let (outcomes, encoded) = cache(&group, 1, &TO_DISK);
    assert_eq!(encoded, 6);
    let (_, store) = only(outcomes);
    assert!((0..4).all(|image| store.get(0, image).is_ok()));
}

#[test]
fn ranks_share_the_work_and_hold_all_of_it() {
    let folder = tempfile::tempdir().unwrap();
    images(&folder.path().join("img"), 9);
    let group = open(&folder.path().join("img"), "");
    let place = CachePlace::Temporary(folder.path().join("tmp"));
    let setting = Setting { place, ..TO_DISK };
    let (outcomes, encoded) = cache(&group, 3, &setting);
    assert_eq!(encoded, 9);
    assert!(!folder.path().join("tmp").exists());
    let stores: Vec<LatentStore> = outcomes.into_iter().map(|o| o.unwrap().1).collect();
    for image in 0..9 {
        let first = stores[0].get(0, image).unwrap();
        assert!(stores.iter().all(|store| store.get(0, image).unwrap() == first));
    }
}

#[test]
fn a_damaged_image_is_left_out_on_all_ranks_or_refused_by_all() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 6);
    // The header is good, the pixels are cut off.
    let path = folder.path().join("i04.png");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let group = open(folder.path(), "");
    assert_eq!(group.datasets[0].images.len(), 6);
    let refused = Setting { strict_data: true, ..TO_DISK };
    let (outcomes, _) = cache(&group, 2, &refused);
    for outcome in outcomes {
        let text = outcome.err().unwrap().to_string();
        assert!(text.contains("i04.png"), "{text}");
    }
    let (outcomes, _) = cache(&group, 2, &TO_DISK);
    for outcome in outcomes {
        let (group, store) = outcome.unwrap();
        assert_eq!((group.datasets[0].images.len(), store.len()), (5, 5));
        assert!(group.warnings[0].contains("i04.png"), "{:?}", group.warnings);
        assert!(store.get(0, 4).is_ok());
    }
}

#[test]
fn latents_that_are_not_finite_name_their_image() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 2);
    let group = open(folder.path(), "");
    let (outcomes, _) = cache(&group, 1, &Setting { poison: true, ..TO_DISK });
    let text = outcomes[0].as_ref().err().unwrap().to_string();
    assert!(text.contains("not finite") && text.contains(".png"), "{text}");
}

#[test]
fn the_same_image_in_two_datasets_is_encoded_once() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 3);
    let subset = format!(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = \"{}\"\n\
         class_tokens = \"y\"",
        folder.path().display()
    );
    let group = open(folder.path(), &subset);
    let (outcomes, encoded) = cache(&group, 2, &TO_DISK);
    assert_eq!(encoded, 3);
    assert_eq!(only(outcomes).1.len(), 6);
}

#[test]
fn ranks_that_see_different_images_stop_together() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 3);
    let all = open(folder.path(), "");
    let fewer = all.clone().without(&BTreeMap::from([((0, 1), "gone".to_owned())])).unwrap();
    let encoded = AtomicUsize::new(0);
    let comms = Comm::local_group(2).unwrap();
    std::thread::scope(|scope| {
        for (comm, group) in comms.into_iter().zip([all, fewer]) {
            let encoded = &encoded;
            scope.spawn(move || {
                let mut encoder =
                    Averages { images: encoded, poison: false, fails_after: usize::MAX };
                let options = CacheOptions {
                    place: CachePlace::BesideImages,
                    share: (comm.rank(), comm.world_size()),
                    vae: "v".into(),
                    batch_size: 1,
                    workers: 1,
                    strict_data: false,
                    skip_check: false,
                    progress: &mut |_, _| {},
                };
                let outcome = cache_latents(group, &mut encoder, &comm, options);
                let text = outcome.err().unwrap().to_string();
                assert!(text.contains("see different images"), "{text}");
            });
        }
    });
    assert_eq!(encoded.load(Ordering::SeqCst), 0);
}

#[test]
fn what_killed_runs_left_is_cleared_away_when_it_is_old() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 1);
    let cache_folder = folder.path().join(CACHE_FOLDER);
    std::fs::create_dir(&cache_folder).unwrap();
    let (old, new) = (cache_folder.join("a.part"), cache_folder.join("b.part"));
    for path in [&old, &new] {
        std::fs::write(path, "half").unwrap();
    }
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(100_000);
    std::fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
    let group = open(folder.path(), "");
    only(cache(&group, 1, &TO_DISK).0);
    assert!(!old.exists() && new.exists());
}

#[test]
fn an_end_in_the_middle_loses_nothing_that_was_done() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 9);
    let group = open(folder.path(), "");
    let (outcomes, encoded) = cache(&group, 2, &Setting { fails_after: 5, ..TO_DISK });
    for outcome in outcomes {
        let text = outcome.err().unwrap().to_string();
        assert!(text.contains("the power is gone"), "{text}");
    }
    assert!((1..9).contains(&encoded), "{encoded}");
    assert_eq!(cache(&group, 2, &TO_DISK).1, 9 - encoded);
}

#[test]
fn another_mask_is_cached_anew_and_mirrored_with_its_image() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 2);
    let masks = folder.path().join("masks");
    std::fs::create_dir(&masks).unwrap();
    let save = |name: &str, width: u32, left: u8| {
        let mask = image::GrayImage::from_fn(width, 64, |x, _| {
            image::Luma([if x < 8 { left } else { 255 }])
        });
        mask.save(masks.join(name)).unwrap();
    };
    save("i00.png", 128, 0);
    save("i01.png", 64, 0);
    let subset = format!("flip_aug = true\nconditioning_data_dir = \"{}\"", masks.display());
    let run = || {
        let defaults = DatasetDefaults { masked_loss: true, ..DatasetDefaults::default() };
        let group = open_with(folder.path(), &subset, defaults);
        let (outcomes, encoded) = cache(&group, 1, &TO_DISK);
        let (_, store) = only(outcomes);
        let latents = store.get(0, 1).unwrap();
        (encoded, latents.alpha_of(false).unwrap(), latents.alpha_of(true).unwrap())
    };
    let (encoded, alpha, mirrored) = run();
    assert_eq!(encoded, 4);
    assert_eq!((alpha[..2].to_vec(), alpha[7]), (vec![0., 1.], 1.));
    assert_eq!((mirrored[0], mirrored[6..8].to_vec()), (1., vec![1., 0.]));
    assert_eq!(run().0, 0);
    save("i01.png", 64, 51);
    let (encoded, alpha, _) = run();
    assert_eq!((encoded, alpha[0]), (2, 0.2));
}
