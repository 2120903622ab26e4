//! Batches: the same on any number of ranks, from any step on, also when files go bad.

use super::*;

use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};

fn images(folder: &Path, count: u32) {
    for index in 0..count {
        let width = if index % 4 == 3 { 128 } else { 64 };
        image::RgbImage::from_fn(width, 64, |x, y| {
            image::Rgb([x as u8, y as u8, (index * 9) as u8])
        })
        .save(folder.join(format!("i{index:02}.png")))
        .unwrap();
        std::fs::write(folder.join(format!("i{index:02}.txt")), format!("a{index}, b, c, d"))
            .unwrap();
    }
}

fn parts(folder: &Path, batch_size: usize, world_size: usize) -> LoaderParts {
    let text = format!(
        "[general]\ncaption_extension = \".txt\"\nshuffle_caption = true\nflip_aug = true\n\
         [[datasets]]\nresolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\n\
         max_bucket_reso = 128\nbatch_size = {batch_size}\nprior_loss_weight = 0.5\n\
         bucket_no_upscale = true\n[[datasets.subsets]]\nimage_dir = \"{}\"\nrandom_crop = true",
        folder.display()
    );
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    let config = plan_datasets(&input, &DatasetDefaults::default()).unwrap();
    let group = DatasetGroup::open(config, false).unwrap();
    LoaderParts {
        sampler: Arc::new(Sampler::new(&group, 7, world_size, 2)),
        group: Arc::new(group),
        tokenizers: Arc::new(Tokenizers {
            first: ClipTokenizer::embedded(false).unwrap(),
            second: None,
        }),
        latents: None,
    }
}

fn options(rank: usize, world_size: usize, max_train_steps: u64) -> LoaderOptions {
    LoaderOptions {
        rank,
        world: World::whole(world_size),
        seed: 7,
        max_train_steps,
        first_step: 0,
        workers: 3,
        token_length: TokenLength::One,
        weighted_captions: false,
        fill_ranks: false,
    }
}

fn all(parts: &LoaderParts, options: LoaderOptions) -> Vec<Batch> {
    let (first, end) = (options.first_step as usize, options.max_train_steps as usize);
    let mut loader = Loader::start(parts.clone(), options).unwrap();
    let count = (first..end).map(|step| loader.batches_in_step(step)).sum();
    let batches = (0..count).map(|_| loader.next_batch().unwrap()).collect();
    let text = loader.next_batch().unwrap_err().to_string();
    assert!(text.contains("no batches after the last step"), "{text}");
    batches
}

/// What the ranks' batches are when put together.
fn joined(folder: &Path, batch_size: usize, world_size: usize) -> Vec<Batch> {
    let parts = parts(folder, batch_size, world_size);
    let mut ranks: Vec<_> =
        (0..world_size).map(|rank| all(&parts, options(rank, world_size, 6)).into_iter()).collect();
    let mut out = Vec::new();
    while let Some(mut first) = ranks[0].next() {
        for other in &mut ranks[1..] {
            let other = other.next().unwrap();
            assert_eq!((first.step, first.size), (other.step, other.size));
            first.samples.extend(other.samples);
            first.images.as_mut().unwrap().extend(other.images.unwrap());
            first.input_ids.extend(other.input_ids);
        }
        assert_eq!(first.samples.len(), first.global_count);
        assert_eq!(first.full_share, batch_size);
        out.push(Batch { full_share: 0, ..first });
    }
    out
}

#[test]
fn one_rank_of_four_two_of_two_and_four_of_one_train_the_same() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 11);
    let reference = joined(folder.path(), 4, 1);
    assert_eq!(reference.len(), 3 * 4);
    assert_eq!(reference[0].input_ids.len(), reference[0].samples.len() * 77);
    assert!(reference == joined(folder.path(), 2, 2));
    assert!(reference == joined(folder.path(), 1, 4));
    let counts: Vec<usize> = reference.iter().map(|batch| batch.global_count).collect();
    assert!(counts.contains(&2) && counts.contains(&1), "{counts:?}");
    assert!(reference.iter().flat_map(|b| &b.samples).any(|s| s.caption != "a0, b, c, d"));
}

#[test]
fn fewer_and_more_ranks_share_the_batches_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 11);
    let keys = |batch: &Batch| -> Vec<(u64, String)> {
        let sample = |s: &crate::dataset::SampleMeta| (s.global_index, s.caption.clone());
        batch.samples.iter().map(sample).collect()
    };
    // Made for four ranks with two samples each: 8 of the one size, at most 3 of the other.
    let parts = parts(folder.path(), 2, 4);
    let whole = all(&parts, LoaderOptions { fill_ranks: true, ..of_four(0, 1) });
    assert!(whole.iter().all(|batch| (batch.full_share, batch.part) == (8, 0)));
    for ranks in [1, 2, 4, 8, 16] {
        for fill_ranks in [false, true] {
            let of_rank = |rank| LoaderOptions { fill_ranks, ..of_four(rank, ranks) };
            let mut batches: Vec<_> =
                (0..ranks).map(|rank| all(&parts, of_rank(rank)).into_iter()).collect();
            let micro_steps = if fill_ranks { 1 } else { of_four(0, ranks).world.micro_steps() };
            let counts: Vec<usize> = batches.iter().map(ExactSizeIterator::len).collect();
            assert_eq!(counts, vec![whole.len() * micro_steps; ranks]);
            for expected in &whole {
                let mut seen = Vec::new();
                for rank in &mut batches {
                    for part in 0..micro_steps {
                        let batch = rank.next().unwrap();
                        assert_eq!((batch.part, batch.index), (part, expected.index));
                        let told = if part == 0 { expected.global_count } else { 0 };
                        assert_eq!(batch.new_samples(), told);
                        assert!(fill_ranks || batch.samples.len() <= 2, "{ranks} ranks");
                        seen.extend(keys(&batch));
                    }
                }
                assert_eq!(seen, keys(expected), "{ranks} ranks");
            }
        }
    }
}

/// Two epochs on `ranks` ranks of a run made for four.
fn of_four(rank: usize, ranks: usize) -> LoaderOptions {
    LoaderOptions { world: World { ranks, full: 4 }, ..options(rank, ranks, 2) }
}

#[test]
fn a_run_can_begin_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 11);
    let parts = parts(folder.path(), 2, 1);
    let whole = all(&parts, options(0, 1, 7));
    for first_step in [1, 3, 6] {
        let rest = all(&parts, LoaderOptions { first_step, ..options(0, 1, 7) });
        assert!(whole.iter().filter(|b| b.step >= first_step).eq(rest.iter()), "{first_step}");
    }
}

#[test]
fn a_file_that_goes_bad_is_replaced_by_another_or_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    images(folder.path(), 3);
    let mut parts = parts(folder.path(), 3, 1);
    let bad = folder.path().join("i01.png");
    std::fs::write(&bad, b"gone").unwrap();
    let batches = all(&parts, options(0, 1, 1));
    let names: Vec<PathBuf> = batches[0].samples.iter().map(|s| s.image_path.clone()).collect();
    assert_eq!(names.len(), 3);
    assert!(!names.contains(&bad));
    let mut group = (*parts.group).clone();
    group.datasets[0].strict_data = true;
    parts.group = Arc::new(group);
    let mut loader = Loader::start(parts, options(0, 1, 1)).unwrap();
    assert!(loader.next_batch().unwrap_err().to_string().contains("i01.png"));
}

#[test]
fn weights_masks_and_loss_weights() {
    let folder = tempfile::tempdir().unwrap();
    let (train, reg) = (folder.path().join("t"), folder.path().join("r"));
    for (folder, alpha) in [(&train, 0u8), (&reg, 255)] {
        std::fs::create_dir_all(folder).unwrap();
        image::RgbaImage::from_pixel(64, 64, image::Rgba([9, 9, 9, alpha]))
            .save(folder.join("a.png"))
            .unwrap();
    }
    let text = format!(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\nprior_loss_weight = 0.25\n\
         [[datasets.subsets]]\nimage_dir = \"{}\"\nclass_tokens = \"a (b:1.5)\"\n\
         alpha_mask = true\n[[datasets.subsets]]\nimage_dir = \"{}\"\nclass_tokens = \"x\"\n\
         is_reg = true",
        train.display(),
        reg.display()
    );
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    let config = plan_datasets(&input, &DatasetDefaults::default()).unwrap();
    let group = DatasetGroup::open(config, true).unwrap();
    let parts = LoaderParts {
        sampler: Arc::new(Sampler::new(&group, 1, 1, 1)),
        group: Arc::new(group),
        tokenizers: Arc::new(Tokenizers {
            first: ClipTokenizer::embedded(true).unwrap(),
            second: None,
        }),
        latents: None,
    };
    let options = LoaderOptions {
        weighted_captions: true,
        token_length: TokenLength::Two,
        ..options(0, 1, 1)
    };
    let batch = all(&parts, options).remove(0);
    let own = batch.samples.iter().position(|s| s.loss_weight == 1.0).unwrap();
    assert_eq!(batch.samples[1 - own].loss_weight, 0.25);
    let alone = batch.sample(own);
    assert_eq!((alone.samples.len(), alone.global_count), (1, batch.global_count));
    assert_eq!(alone.samples[0], batch.samples[own]);
    assert_eq!(alone.alpha_masks.unwrap(), [0.0; 64]);
    assert_eq!(alone.token_weights.unwrap()[..4], [1.0, 1.0, 1.5, 1.0]);
    assert_eq!(alone.input_ids[..], batch.input_ids[own * 154..][..154]);
    assert_eq!(
        alone.images.unwrap()[..],
        batch.images.as_ref().unwrap()[own * 3 * 4096..][..3 * 4096]
    );
    let masks = batch.alpha_masks.unwrap();
    assert_eq!(masks.len(), 2 * 64);
    assert!(masks[own * 64..][..64].iter().all(|value| *value == 0.0));
    assert!(masks[(1 - own) * 64..][..64].iter().all(|value| *value == 1.0));
    assert_eq!((batch.chunks, batch.input_ids.len()), (2, 2 * 2 * 77));
    let weights = batch.token_weights.unwrap();
    assert_eq!(weights[own * 154..][..4], [1.0, 1.0, 1.5, 1.0]);
}

#[test]
fn workers_leave_a_core_to_the_arithmetic() {
    assert_eq!(worker_count(0, 1), 1);
    assert_eq!(worker_count(8, 1_000_000), 1);
    assert!(worker_count(8, 1) <= 8);
}
