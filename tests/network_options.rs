//! What a network leaves out in training does not depend on the ranks; norms, merged files, blocks.

use std::collections::{BTreeMap, BTreeSet};

use formats::lora_file::LoraFile;

use crate::equality::distance;
use crate::harness::{Scene, data, quoted, text};

/// A scene of three steps with a batch for each rank.
fn scene(batch: usize, options: &[(&str, &str)]) -> Scene {
    let mut scene = Scene::new();
    scene.set("train_batch_size", batch.to_string()).set("max_train_steps", "3");
    for (key, value) in options {
        scene.set(key, *value);
    }
    scene
}

const TWO: [&str; 2] = ["--num_processes", "2"];

/// Trains on one rank, on two, and with checkpointing; gives the first file.
///
/// With `reproducible`, so that the bytes are the same: in three steps AdamW is still the sign of the
/// gradient, and numbers whose gradient is nearly rounding differ by 6e-4 of their tensor without it.
fn same_everywhere(options: &[(&str, &str)]) -> LoraFile {
    let mut one = scene(4, options);
    let one = one.set("reproducible", "true").trained(&[]);
    let mut two = scene(2, options);
    let two = two.set("reproducible", "true").trained(&TWO);
    let (error, key) = distance(&two, &one);
    assert!(two.tensors == one.tensors, "2 ranks: {error} at {key}");
    let plain = scene(4, options).trained(&[]);
    let mut checkpointed = scene(4, options);
    let again = checkpointed.set("gradient_checkpointing", "true").trained(&[]);
    assert!(again.tensors == plain.tensors, "checkpointing changes the result");
    plain
}

#[test]
fn dropouts_belong_to_the_sample_not_to_the_rank() {
    let dropped = same_everywhere(&[
        ("network_dropout", "0.1"),
        ("network_args", "['rank_dropout=0.2', 'module_dropout=0.3']"),
    ]);
    let whole = scene(4, &[]).trained(&[]);
    assert!(distance(&whole, &dropped).0 > 0.01, "nothing was dropped");
}

const DYLORA: [(&str, &str); 3] = [
    ("network_module", "'networks.dylora'"),
    ("network_args", "['unit=2']"),
    ("optimizer_args", "['weight_decay=0.1']"),
];

#[test]
fn dylora_draws_the_same_ranks_everywhere() {
    let trained = same_everywhere(&DYLORA);
    assert_eq!(trained.metadata["ss_network_module"], "networks.dylora");
    assert_eq!(trained.tensors.keys().filter(|key| key.contains('[')).count(), 0);
}

/// Rows of each block of two ranks: of `down` as they are, of `up` its columns.
fn blocks(file: &LoraFile, module: &str) -> [Vec<f32>; 2] {
    let down = file.tensors[&format!("{module}.lora_down.weight")].to_f32();
    let up = file.tensors[&format!("{module}.lora_up.weight")].to_f32();
    let half = down.len() / 2;
    [0, 1].map(|block| {
        let columns = up.chunks(4).flat_map(|row| &row[2 * block..2 * block + 2]);
        down[block * half..][..half].iter().chain(columns).copied().collect()
    })
}

#[test]
fn a_step_of_dylora_moves_the_drawn_ranks_alone() {
    let one_step = |rate: &str, launcher: &[&str]| {
        let mut scene = scene(if launcher.is_empty() { 4 } else { 2 }, &DYLORA);
        scene.set("max_train_steps", "1").set("learning_rate", rate).trained(launcher)
    };
    let before = one_step("0.0", &[]);
    let after = [one_step("1e-3", &[]), one_step("1e-3", &TWO)];
    let names = before.tensors.keys().filter_map(|key| key.strip_suffix(".alpha"));
    let mut drawn: BTreeMap<usize, usize> = BTreeMap::new();
    for name in names {
        let before = blocks(&before, name);
        let moved = |file: &LoraFile| -> BTreeSet<usize> {
            let after = blocks(file, name);
            (0..2).filter(|block| after[*block] != before[*block]).collect()
        };
        let blocks = after.each_ref().map(moved);
        assert!(blocks[0].len() <= 1, "{name}: both blocks moved");
        assert_eq!(blocks[0], blocks[1], "{name}: ranks drew differently");
        for block in &blocks[0] {
            *drawn.entry(*block).or_default() += 1;
        }
    }
    // Weight decay moves the drawn `down` even where its gradient is zero.
    assert!(drawn.len() == 2 && drawn.values().all(|count| *count > 5), "{drawn:?}");
}

#[test]
fn norms_stay_below_their_limit() {
    let limit = 0.01;
    let trained = scene(4, &[("learning_rate", "1e-2"), ("scale_weight_norms", "0.01")]);
    let trained = trained.trained(&[]);
    let free = scene(4, &[("learning_rate", "1e-2")]).trained(&[]);
    let largest = |file: &LoraFile| {
        let names = file.tensors.keys().filter_map(|key| key.strip_suffix(".alpha"));
        let norm = |name: &str| {
            let of = |part: &str| file.tensors[&format!("{name}.{part}.weight")].to_f32();
            let (down, up) = (of("lora_down"), of("lora_up"));
            let n = down.len() / 4;
            let sum = up.chunks(4).flat_map(|row| {
                let down = &down;
                (0..n).map(move |j| (0..4).map(|k| row[k] * down[k * n + j]).sum::<f32>() / 4.)
            });
            sum.map(|x| f64::from(x * x)).sum::<f64>().sqrt()
        };
        names.map(norm).fold(0., f64::max)
    };
    assert!(largest(&free) > 2. * limit, "{}", largest(&free));
    assert!(largest(&trained) <= limit * 1.001, "{}", largest(&trained));
    assert_eq!(trained.metadata["ss_scale_weight_norms"], "0.01");
}

#[test]
fn base_weights_are_part_of_the_frozen_model() {
    let file = quoted(&data("lora/lierla_r4.safetensors").display().to_string());
    let with = |multiplier: &str| {
        let files = format!("[{file}]");
        let options = [("base_weights", files.as_str()), ("base_weights_multiplier", multiplier)];
        scene(4, &options).trained(&[])
    };
    let (none, plain) = (with("[0.0]"), scene(4, &[]).trained(&[]));
    assert!(none.tensors == plain.tensors, "a file merged with 0 changes something");
    assert!(distance(&with("[2.0]"), &plain).0 > 1e-3, "the merged file has no effect");
    let mut foreign = scene(4, &[]);
    foreign.set("base_weights", "['/nowhere/x.safetensors']");
    let output = foreign.train(&[], &[]);
    assert!(text(&output).contains("`base_weights`"), "{}", text(&output));
    assert!(!output.status.success());
}

#[test]
fn blocks_without_rank_or_rate_get_no_module() {
    let weights =
        "['down_lr_weight=0,0,0,0,0,0,1,1,1,1,1,1', 'mid_lr_weight=0.5', 'loraplus_lr_ratio=4']";
    let trained = scene(4, &[("network_args", weights)]).trained(&[]);
    let has = |start: &str| trained.tensors.keys().any(|key| key.starts_with(start));
    assert!(!has("lora_unet_down_blocks_0") && has("lora_unet_mid_block"));
    assert!(trained.metadata["ss_network_args"].contains("\"mid_lr_weight\": \"0.5\""));
    let mut wrong = scene(4, &[]);
    wrong.set("network_args", format!("['block_dims={}']", ["4"; 24].join(",")));
    let output = wrong.train(&[], &[]);
    assert!(!output.status.success());
    assert!(text(&output).contains("must have 25 numbers"), "{}", text(&output));
}
