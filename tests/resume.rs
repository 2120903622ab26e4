//! A run that is stopped anywhere and resumed ends with the bytes of one that was not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use engine::ParamId;
use formats::{Dtype, OwnedTensor};
use trainer::state::accelerate::adamw_state;

use crate::equality::distance;
use crate::harness::{Scene, data, lorarun, quoted, text};
use crate::interruption::kill;
use crate::keys::full_size;

/// A run of ten steps in three epochs of four, each step saved with its state.
fn scene() -> Scene {
    let mut scene = Scene::new();
    scene
        .set("save_every_n_steps", "1")
        .set("save_state", "true")
        .set("save_last_n_steps", "2")
        .set("lr_scheduler", "'cosine'")
        .set("resume", "'auto'");
    scene
}

fn final_file(scene: &Scene) -> Vec<u8> {
    std::fs::read(scene.output_dir().join("small.safetensors")).expect("the trained file")
}

fn run(scene: &Scene, launcher: &[&str], more: &[&str]) -> String {
    let output = scene.train(launcher, more);
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// The bytes that an undisturbed run writes. The folder of its pictures is that of `scene`, as its
/// name is in the metadata.
fn undisturbed(scene: &mut Scene, launcher: &[&str]) -> Vec<u8> {
    run(scene, launcher, &[]);
    let bytes = final_file(scene);
    std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
    bytes
}

fn start(scene: &Scene, launcher: &[&str]) -> Child {
    let config = scene.write_config();
    let mut command = lorarun();
    command.args(launcher).arg("train").arg(config);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("lorarun starts")
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn hidden(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let is_hidden = |p: &PathBuf| p.file_name().is_some_and(|n| n.as_encoded_bytes()[0] == b'.');
    entries.flatten().map(|entry| entry.path()).filter(is_hidden).collect()
}

/// Splitmix64: the moments of the kills, from a seed that a failure prints.
pub struct Moments(pub u64);

impl Moments {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (word ^ (word >> 31)) % bound
    }
}

/// The newest step whose file is there.
pub fn newest_step(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let step = |name: &str| -> Option<u64> {
        name.strip_prefix("small-step")?.strip_suffix(".safetensors")?.parse().ok()
    };
    entries.flatten().filter_map(|entry| step(entry.file_name().to_str()?)).max().unwrap_or(0)
}

#[test]
fn ten_random_kills_leave_no_trace_in_the_final_file() {
    let mut scene = scene();
    scene.set("gradient_accumulation_steps", "2").set("train_batch_size", "2");
    let seed = std::time::UNIX_EPOCH.elapsed().expect("a clock").as_nanos() as u64;
    println!("seed of the kills: {seed}");
    let mut moments = Moments(seed);
    for launcher in [&[][..], &["--num_processes", "2"]] {
        let expected = undisturbed(&mut scene, launcher);
        // Five kills, each into the continuation of the one before: while the run starts, within a
        // step, or while the files and states of a step are written and old ones removed.
        for _ in 0..5 {
            let wanted = newest_step(&scene.output_dir()) + moments.below(4);
            let pause = Duration::from_micros(moments.below(60_000));
            let mut child = start(&scene, launcher);
            let began = Instant::now();
            let ended = loop {
                let ended = child.try_wait().expect("a status").is_some();
                if ended || newest_step(&scene.output_dir()) >= wanted {
                    break ended;
                }
                assert!(began.elapsed() < Duration::from_secs(120), "seed {seed}: step {wanted}");
                std::thread::sleep(Duration::from_millis(1));
            };
            std::thread::sleep(pause);
            child.kill().expect("killed");
            let output = child.wait_with_output().expect("ended");
            assert!(!ended || output.status.success(), "seed {seed}: {}", text(&output));
        }
        let said = run(&scene, launcher, &[]);
        assert!(final_file(&scene) == expected, "seed {seed}, {launcher:?}: {said}");
        assert!(hidden(&scene.output_dir()).is_empty(), "seed {seed}: left behind, {said}");
        std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
    }
}

/// Starts, asks for a stop after the file of `step` is there, and gives what was said.
fn stopped_after(scene: &Scene, launcher: &[&str], step: usize) -> String {
    let child = start(scene, launcher);
    wait_for(&scene.output_dir().join(format!("small-step{step:08}.safetensors")));
    kill(i32::try_from(child.id()).expect("a process id"), "-TERM");
    let output = child.wait_with_output().expect("ended");
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    text(&output)
}

#[test]
fn a_run_on_two_ranks_stopped_by_sigterm_goes_on_to_the_same_bytes() {
    let mut scene = scene();
    // Nothing asks for states but the stop.
    scene.set("save_state", "false").set("train_batch_size", "2").set("cache_latents", "false");
    let two = ["--num_processes", "2"];
    let expected = undisturbed(&mut scene, &two);
    let said = stopped_after(&scene, &two, 3);
    assert!(said.contains("--resume auto"), "{said}");
    let said = run(&scene, &two, &[]);
    assert!(said.contains("goes on from step"), "{said}");
    assert!(final_file(&scene) == expected, "{said}");
}

#[test]
fn another_number_of_ranks_goes_on_to_the_same_lora() {
    let mut scene = scene();
    let expected = scene.trained(&[]);
    std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
    stopped_after(&scene, &[], 4);
    scene.set("train_batch_size", "2");
    let resumed = scene.trained(&["--num_processes", "2"]);
    let (error, key) = distance(&resumed, &expected);
    assert!(error <= 1e-4, "{error} at {key}");
}

#[test]
fn a_finished_run_is_made_longer() {
    let mut scene = scene();
    scene.set("lr_scheduler", "'constant'").set("save_every_n_steps", "100");
    scene.set("save_state", "false").set("save_state_on_train_end", "true");
    let expected = undisturbed(&mut scene, &[]);
    scene.set("max_train_steps", "7");
    run(&scene, &[], &[]);
    assert!(scene.output_dir().join("small-state/state.json").is_file());
    let again = run(&scene, &[], &[]);
    assert!(again.contains("goes on from step 7"), "{again}");
    scene.set("max_train_steps", "10");
    run(&scene, &[], &[]);
    assert!(final_file(&scene) == expected);
}

#[test]
fn old_states_go_and_a_torn_one_is_passed_over() {
    let mut scene = scene();
    let expected = undisturbed(&mut scene, &[]);
    run(&scene, &[], &[]);
    let state = |step: usize| scene.output_dir().join(format!("small-step{step:08}-state"));
    let there: Vec<usize> = (1..=10).filter(|step| state(*step).exists()).collect();
    assert_eq!(there, [8, 9, 10]);
    std::fs::remove_dir_all(scene.output_dir().join("small-state")).expect("removed");
    std::fs::remove_file(state(10).join("state.json")).expect("removed");
    std::fs::write(state(9).join("optimizer.safetensors"), "torn").expect("written");
    std::fs::remove_file(scene.output_dir().join("small.safetensors")).expect("removed");
    let said = run(&scene, &[], &[]);
    assert!(said.contains("passes over a state") && said.contains("has 4 bytes of"), "{said}");
    assert!(said.contains("goes on from step 8"), "{said}");
    assert!(final_file(&scene) == expected, "{said}");
}

#[test]
fn what_cannot_be_resumed_is_one_clear_error() {
    let mut scene = scene();
    scene.set("max_train_steps", "2").set("save_last_n_steps", "1");
    run(&scene, &[], &[]);
    let state = scene.output_dir().join("small-state").display().to_string();
    let file = scene.output_dir().join("small.safetensors").display().to_string();
    let absent = scene.output_dir().join("absent").display().to_string();
    let torn = scene.output_dir().join("small-step00000002-state");
    std::fs::write(torn.join("weights.safetensors"), "torn").expect("written");
    let torn = torn.display().to_string();
    let refused = |more: &[&str], expected: &[&str]| {
        let output = scene.train(&[], more);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{more:?}: {said}");
        for words in expected {
            assert!(said.contains(words), "{more:?}: {said}");
        }
        assert!(said.contains("hint: ") && !said.contains("panicked"), "{more:?}: {said}");
        assert!(!said.contains("latents of"), "noticed late, {more:?}: {said}");
    };
    refused(&["--resume", &absent], &["`resume` is no folder", &absent]);
    refused(&["--resume", &file], &["`network_weights`", &file]);
    refused(&["--resume", &torn], &["`weights.safetensors` has 4 bytes of", &torn]);
    let with = |more: &[&'static str]| [&["--resume", &state], more].concat();
    refused(
        &with(&["--network_dim", "8"]),
        &["another network", "lora_down.weight` was [4, ", "here it is: [8, ", &state],
    );
    refused(&with(&["--network_train_unet_only"]), &["another network", "lora_te_"]);
    refused(&with(&["--network_alpha", "2"]), &["alpha of `lora_", "was 1, here it is: 2"]);
    refused(&with(&["--seed", "43"]), &["another seed, 42, this run has: 43"]);
    refused(&with(&["--max_train_steps", "1"]), &["more steps than the run, 1: 2"]);
    refused(
        &with(&["--train_batch_size", "2"]),
        &["a step takes 1 x 2 images", "the state's took: 1 x 4"],
    );
    refused(&["--initial_step", "2"], &["not below the run's steps, 2: 2"]);
    // What one changes on purpose is told and done.
    let said = run(&scene, &[], &with(&["--max_train_steps", "3", "--learning_rate", "0.0005"]));
    assert!(said.contains("`learning_rate` differs from the state's, 0.001"), "{said}");
}

#[test]
fn the_count_begins_where_the_options_say() {
    let mut scene = scene();
    scene.set("resume", "''").set("initial_epoch", "3").set("save_state", "false");
    let began = scene.trained(&[]);
    let steps = |n: usize| scene.output_dir().join(format!("small-step{n:08}.safetensors"));
    // 16 samples in batches of 4: the third epoch begins after 8 steps.
    assert!(!steps(8).exists() && steps(9).exists() && steps(10).exists());
    assert_eq!(began.metadata["ss_steps"], "10");
    assert_eq!(began.metadata["ss_epoch"], "3");
    scene.set("skip_until_initial_step", "true");
    let skipped = scene.trained(&[]);
    assert!(distance(&skipped, &began).0 > 1e-3, "the data are the same");
}

#[test]
fn a_state_of_sd_scripts_gives_its_lora_and_its_step() {
    let mut scene = scene();
    let state = scene.folder.path().join("foreign-state");
    std::fs::create_dir(&state).expect("a folder");
    let weights = data("lora/lierla_r4.safetensors");
    std::fs::copy(&weights, state.join("model.safetensors")).expect("copied");
    let steps = r#"{"current_epoch": 2, "current_step": 9}"#;
    std::fs::write(state.join("train_state.json"), steps).expect("written");
    scene
        .set("resume", quoted(&state.display().to_string()))
        .set("optimizer_args", "['weight_decay=0']")
        .set("learning_rate", "0.0");
    let said = run(&scene, &[], &[]);
    assert!(said.contains("not carried: the optimizer's state"), "{said}");
    let file = scene.output_dir().join("small-step00000010.safetensors");
    assert!(file.exists() && !scene.output_dir().join("small-step00000009.safetensors").exists());
    let (before, after) =
        [weights, file].map(|path| formats::lora_file::read(&path).expect("a LoRA file")).into();
    assert_eq!(distance(&after, &before).0, 0.);
    scene.set("network_dim", "8");
    let output = scene.train(&[], &[]);
    assert!(text(&output).contains("of another network"), "{}", text(&output));
}

#[test]
fn reproducible_runs_give_the_same_numbers_on_one_two_and_four_ranks() {
    // 16 samples: batches of 12 leave one of 4, which two of four ranks share unevenly.
    for (batch, accumulation) in [(12, "1"), (4, "3")] {
        let mut scene = scene();
        scene.set("reproducible", "true").set("max_train_steps", "4").set("resume", "''");
        scene.set("gradient_accumulation_steps", accumulation);
        let mut train = |ranks: usize| {
            scene.set("train_batch_size", (batch / ranks).to_string());
            scene.trained(&["--num_processes", &ranks.to_string()])
        };
        let one = train(1);
        for ranks in [2, 4] {
            let other = train(ranks);
            for (key, tensor) in &one.tensors {
                assert!(other.tensors[key] == *tensor, "{ranks} ranks, batch {batch}: {key}");
            }
        }
    }
    let mut scene = scene();
    scene.set("reproducible", "true");
    let output = scene.train(&["--num_processes", "3"], &[]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("this run has: 3"), "{}", text(&output));
}

#[test]
fn a_reproducible_run_goes_on_on_another_number_of_ranks_to_the_same_numbers() {
    let mut scene = scene();
    scene.set("reproducible", "true");
    let expected = scene.trained(&[]);
    std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
    stopped_after(&scene, &[], 4);
    scene.set("train_batch_size", "1");
    let resumed = scene.trained(&["--num_processes", "4"]);
    assert!(resumed.tensors == expected.tensors, "the numbers differ");
}

/// Trains four steps with states, then goes on from the second's state; the final files must be the
/// same bytes.
fn goes_on_exactly(settings: &[(&str, &str)]) {
    let mut scene = scene();
    scene.set("max_train_steps", "4").set("resume", "''");
    for (key, value) in settings {
        scene.set(key, *value);
    }
    let said = run(&scene, &[], &[]);
    let expected = final_file(&scene);
    let average = scene.output_dir().join("small-ema.safetensors");
    let expected_average = std::fs::read(&average).ok();
    let state = scene.output_dir().join("small-step00000002-state").display().to_string();
    std::fs::remove_file(scene.output_dir().join("small.safetensors")).expect("removed");
    let said = said + &run(&scene, &[], &["--resume", &state]);
    assert!(final_file(&scene) == expected, "{settings:?}: {said}");
    assert!(std::fs::read(&average).ok() == expected_average, "{settings:?}: {said}");
    assert!(!said.contains("differs from the state's"), "{settings:?}: {said}");
}

#[test]
fn whatever_draws_or_averages_goes_on_exactly() {
    goes_on_exactly(&[
        ("ema_decay", "0.9"),
        ("network_dropout", "0.2"),
        ("network_args", "['rank_dropout=0.2', 'module_dropout=0.2', 'loraplus_lr_ratio=4']"),
        ("scale_weight_norms", "0.05"),
        ("noise_offset", "0.1"),
        ("noise_offset_random_strength", "true"),
        ("ip_noise_gamma", "0.1"),
        ("min_snr_gamma", "5"),
        ("caption_dropout_rate", "0.3"),
        ("gradient_accumulation_steps", "3"),
        ("train_batch_size", "2"),
        ("validation_split", "0.25"),
    ]);
    goes_on_exactly(&[
        ("network_module", "'networks.dylora'"),
        ("network_args", "['unit=2']"),
        ("lr_scheduler", "'cosine_with_restarts'"),
        ("lr_scheduler_num_cycles", "2"),
        ("multires_noise_iterations", "4"),
        ("ip_noise_gamma", "0.1"),
        ("ip_noise_gamma_random_strength", "true"),
        ("shuffle_caption", "true"),
        ("token_warmup_step", "0.9"),
        ("flip_aug", "true"),
        ("random_crop", "true"),
        ("cache_latents", "false"),
        ("mixed_precision", "'bf16'"),
    ]);
    goes_on_exactly(&[
        ("network_module", "'networks.loha'"),
        ("network_args", "['conv_dim=2', 'use_tucker=True', 'dora_wd=True', 'module_dropout=0.2']"),
        ("network_dim", "2"),
    ]);
}

#[test]
fn the_moments_of_pytorch_find_their_parameters() {
    let network = full_size(true);
    let mut moments = BTreeMap::new();
    for number in 0..network.param_count() {
        let shape = network.file_shape(ParamId(number));
        let len: usize = shape.iter().product();
        let tensor = |shape: &[usize], values: &[f32]| {
            OwnedTensor::from_f32(shape, values, Dtype::F32).expect("a tensor")
        };
        let rising: Vec<f32> = (0..len).map(|n| (number * 7 + n) as f32).collect();
        let halves: Vec<f32> = rising.iter().map(|x| x / 2.).collect();
        moments.insert(format!("{number}.exp_avg"), tensor(&shape, &rising));
        moments.insert(format!("{number}.exp_avg_sq"), tensor(&shape, &halves));
        moments.insert(format!("{number}.step"), tensor(&[], &[12.]));
    }
    let state = adamw_state(&network, &moments).expect("a state that fits");
    let last = ParamId(network.param_count() - 1);
    for id in [ParamId(0), ParamId(1), last] {
        let key = network.key(id);
        assert_eq!(state.numbers[&format!("step/{key}")], 12.);
        let first = state.tensors[&format!("exp_avg/{key}")].to_f32();
        let in_file = network.file_order(id, &first);
        assert_eq!(in_file, moments[&format!("{}.exp_avg", id.0)].to_f32(), "{key}");
    }
    // A parameter more, or one of another shape, and nothing is taken.
    let mut other = moments.clone();
    other.insert("10000.step".to_owned(), moments["0.step"].clone());
    assert!(adamw_state(&network, &other).is_none());
    moments.insert("0.exp_avg".to_owned(), moments["0.step"].clone());
    assert!(adamw_state(&network, &moments).is_none());
    assert!(adamw_state(&network, &BTreeMap::new()).is_none());
}

/// The smallest run that moves weights, in each of these optimizers.
fn optimizers_go_on_exactly(optimizers: &[&str]) {
    for optimizer in optimizers {
        let name = quoted(optimizer);
        let adaptive = ["DAdapt", "Prodigy"].iter().any(|start| optimizer.starts_with(start));
        goes_on_exactly(&[
            ("optimizer_type", &name),
            ("learning_rate", if adaptive { "1.0" } else { "1e-3" }),
            ("train_batch_size", "1"),
            ("network_train_unet_only", "true"),
            ("lr_scheduler", "'constant'"),
        ]);
    }
}

#[test]
fn adams_go_on_exactly() {
    optimizers_go_on_exactly(&["AdamW", "AdamW8bit", "Adam8bit", "RAdam", "AdEMAMix8bit"]);
}

#[test]
fn light_optimizers_go_on_exactly() {
    optimizers_go_on_exactly(&["Lion", "Lion8bit", "SGDNesterov8bit", "AdaFactor", "CAME"]);
}

#[test]
fn optimizers_that_find_their_rate_go_on_exactly() {
    optimizers_go_on_exactly(&["Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptAdan", "DAdaptSGD"]);
}

#[test]
fn schedule_free_optimizers_go_on_exactly() {
    optimizers_go_on_exactly(&["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"]);
}
