//! The same config gives the same LoRA: on any number of ranks, twice, with checkpointing.

use crate::harness::Scene;
use formats::lora_file::LoraFile;

fn values(file: &LoraFile, key: &str) -> Vec<f32> {
    let tensor = &file.tensors[key];
    let mut out = Vec::new();
    formats::extend_f32(tensor.dtype, &tensor.data, &mut out);
    out
}

/// Largest relative distance `|a-b| / |b|` over all tensors.
pub fn distance(a: &LoraFile, b: &LoraFile) -> (f64, String) {
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    let mut worst = (0., String::new());
    for key in a.tensors.keys() {
        let (x, y) = (values(a, key), values(b, key));
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let difference = norm(&mut x.iter().zip(&y).map(|(x, y)| f64::from(*x) - f64::from(*y)));
        let size = norm(&mut y.iter().map(|y| f64::from(*y)));
        let relative = if difference == 0. { 0. } else { difference / size };
        if relative > worst.0 {
            worst = (relative, key.clone());
        }
    }
    worst
}

fn with_batch(size: usize) -> Scene {
    let mut scene = Scene::new();
    scene.set("train_batch_size", size.to_string());
    scene
}

#[test]
fn one_two_and_four_ranks_train_the_same_lora() {
    let one = with_batch(4).trained(&["--num_processes", "1"]);
    let two = with_batch(2).trained(&["--num_processes", "2"]);
    let four = with_batch(1).trained(&["--num_processes", "4"]);
    let moved = one.tensors.keys().filter(|k| k.ends_with("lora_up.weight"));
    assert!(moved.flat_map(|k| values(&one, k)).any(|x| x != 0.), "nothing was learned");
    // 1e-4 is the acceptance bound. Sums over a batch are taken in another order, rounding differs
    // in the last bits, and AdamW turns that into a relative error of the update.
    for (name, other) in [("2 ranks", &two), ("4 ranks", &four)] {
        let (error, key) = distance(other, &one);
        assert!(error <= 1e-4, "{name}: {error} at {key}");
    }
}

/// All that is drawn or weighted for each sample: offset, octaves, disturbance, masks, tags.
fn with_every_noise(batch: usize) -> Scene {
    let mut scene = with_batch(batch);
    let masks = scene.folder.path().join("masks");
    std::fs::create_dir(&masks).expect("a new folder");
    for index in 0..8_u32 {
        let mask = image::GrayImage::from_fn(128, 128, |x, y| {
            image::Luma([if x > 16 * index { 255 } else { y as u8 }])
        });
        mask.save(masks.join(format!("{index}.png"))).expect("a saved mask");
    }
    scene.set("conditioning_data_dir", crate::harness::quoted(&masks.display().to_string()));
    for (key, value) in [
        ("masked_loss", "true"),
        ("noise_offset", "0.1"),
        ("noise_offset_random_strength", "true"),
        ("adaptive_noise_scale", "0.1"),
        ("multires_noise_iterations", "6"),
        ("ip_noise_gamma", "0.1"),
        ("ip_noise_gamma_random_strength", "true"),
        ("loss_type", "'huber'"),
        ("min_snr_gamma", "5"),
        ("shuffle_caption", "true"),
        ("token_warmup_step", "0.8"),
        ("lr_scheduler", "'warmup_stable_decay'"),
        ("lr_warmup_steps", "2"),
        ("lr_decay_steps", "0.5"),
        ("max_train_steps", "6"),
    ] {
        scene.set(key, value);
    }
    scene
}

#[test]
fn noise_masks_and_tags_belong_to_the_sample_not_to_the_rank() {
    let one = with_every_noise(4).trained(&[]);
    let two = with_every_noise(2).trained(&["--num_processes", "2"]);
    let (error, key) = distance(&two, &one);
    assert!(error <= 1e-4, "{error} at {key}");
    // They do something: without the masks another LoRA comes out.
    let mut unmasked = with_every_noise(4);
    unmasked.set("masked_loss", "false");
    assert!(distance(&unmasked.trained(&[]), &one).0 > 1e-3);
}

#[test]
fn a_partial_last_batch_is_shared_among_the_ranks() {
    // 16 samples in batches of 6: the last batch of an epoch has 4, then 2 ranks have 3+1.
    let one = with_batch(6).trained(&[]);
    let two = with_batch(3).trained(&["--num_processes", "2"]);
    let (error, key) = distance(&two, &one);
    assert!(error <= 1e-4, "{error} at {key}");
}

#[test]
fn the_same_config_gives_the_same_bytes() {
    let scene = with_batch(2);
    let read = || std::fs::read(scene.output_dir().join("small.safetensors")).expect("a file");
    scene.trained(&["--num_processes", "2"]);
    let first = read();
    scene.trained(&["--num_processes", "2"]);
    assert!(first == read(), "two runs of one config differ");
}

#[test]
fn bf16_arithmetic_learns_the_same_direction() {
    let single = with_batch(4).trained(&[]);
    let mut scene = with_batch(4);
    scene.set("mixed_precision", "'bf16'");
    let half = scene.trained(&[]);
    // bf16 keeps 8 bits: single updates differ, all of them together point the same way.
    let (mut dot, mut a, mut b) = (0., 0., 0.);
    for key in single.tensors.keys().filter(|key| key.ends_with("lora_up.weight")) {
        for (x, y) in values(&single, key).iter().zip(values(&half, key)) {
            dot += f64::from(*x) * f64::from(y);
            a += f64::from(*x) * f64::from(*x);
            b += f64::from(y) * f64::from(y);
        }
    }
    let cosine = dot / (a * b).sqrt();
    assert!(cosine > 0.9, "cosine {cosine}");
}

#[test]
fn checkpointing_changes_no_bit() {
    let plain = with_batch(2).trained(&[]);
    let mut scene = with_batch(2);
    scene.set("gradient_checkpointing", "true");
    let checkpointed = scene.trained(&[]);
    assert_eq!(distance(&checkpointed, &plain), (0., String::new()));
}
