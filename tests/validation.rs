//! Validation measures and changes nothing; logs tell what happened, on any number of ranks.

use std::path::PathBuf;

use crate::harness::{Scene, quoted, text};
use serde_json::Value;

/// Eight images of which two are held out, logged.
fn scene(batch: &str) -> Scene {
    let mut scene = Scene::new();
    let logs = scene.folder.path().join("logs");
    scene
        .set("train_batch_size", batch)
        .set("max_train_steps", "4")
        .set("validation_split", "0.25")
        .set("validation_seed", "5")
        .set("logging_dir", quoted(&logs.display().to_string()));
    scene
}

/// The only run's log folder.
fn log_folder(scene: &Scene) -> PathBuf {
    let runs = std::fs::read_dir(scene.folder.path().join("logs")).expect("logs");
    let mut runs: Vec<PathBuf> = runs.flatten().map(|entry| entry.path()).collect();
    runs.sort();
    runs.pop().expect("a run's folder")
}

fn steps(scene: &Scene) -> Vec<Value> {
    let text = std::fs::read_to_string(log_folder(scene).join("steps.jsonl")).expect("a log");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The values of every validation, as written.
fn validations(scene: &Scene) -> Vec<Value> {
    steps(scene)
        .into_iter()
        .map(|line| line["validation"].clone())
        .filter(Value::is_object)
        .collect()
}

#[test]
fn validation_changes_no_bit_of_the_training() {
    let mut scene = scene("2");
    scene.set("validate_every_n_epochs", "1000");
    let without = scene.trained(&[]);
    assert!(validations(&scene).is_empty());
    scene.set("validate_every_n_epochs", "1").set("validate_every_n_steps", "1");
    // The metadata tells how often it was validated; the weights are the same to the bit.
    assert!(scene.trained(&[]).tensors == without.tensors, "validation changed the training");
    // Four steps and, at the end of the second epoch (which the run cuts short), one more line.
    let found = validations(&scene);
    assert!(found.len() >= 5, "{found:?}");
    let average = found[0]["loss/validation/step_average"].as_f64().expect("a number");
    assert!(average > 0. && average.is_finite());
    let parts = [200, 400, 600, 800].map(|timestep| {
        found[0][format!("loss/validation/step_current_{timestep}")].as_f64().expect("a number")
    });
    assert!((parts.iter().sum::<f64>() / 4. - average).abs() < 1e-9);
}

#[test]
fn every_number_of_ranks_validates_the_same() {
    // No learning: what is compared is the validation alone.
    let run = |processes: &str, cached: &str| {
        let mut scene = scene("1");
        scene.set("learning_rate", "0").set("cache_latents", cached).set("max_train_steps", "6");
        let output = scene.train(&["--num_processes", processes], &[]);
        assert!(output.status.success(), "{}", text(&output));
        validations(&scene).remove(0)
    };
    let one = run("1", "true");
    let average = "loss/validation/epoch_average";
    assert_eq!(one[average], run("2", "true")[average]);
    assert_eq!(one[average], run("3", "false")[average], "latents are cached or not");
}

#[test]
fn a_split_that_empties_a_side_is_one_clear_error() {
    for (share, expected) in
        [("1.0", "no image to train on"), ("0.01", "no image to validate with")]
    {
        let mut scene = scene("1");
        scene.set("validation_split", share);
        let output = scene.train(&["--num_processes", "2"], &[]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert_eq!(said.matches(expected).count(), 1, "{said}");
        assert!(!scene.output_dir().exists(), "{said}");
    }
}

#[test]
fn the_log_holds_every_step_and_every_image() {
    let table = |processes: &str, batch: &str| {
        let mut scene = scene(batch);
        scene.set("validation_split", "0").set("max_train_steps", "8").set("unet_lr", "5e-4");
        let output = scene.train(&["--num_processes", processes], &[]);
        assert!(output.status.success(), "{}", text(&output));
        let lines = steps(&scene);
        assert_eq!(lines.len(), 8);
        assert_eq!((&lines[7]["step"], &lines[7]["epoch"]), (&8.into(), &2.into()));
        assert_eq!(
            (&lines[0]["lr"]["unet"], &lines[0]["lr"]["textencoder"]),
            (&5e-4.into(), &1e-3.into())
        );
        assert!(lines.iter().all(|line| line["loss"].is_f64() && line["grad_norm"].is_f64()));
        std::fs::read_to_string(log_folder(&scene).join("image_losses.csv")).expect("a table")
    };
    let (one, two) = (table("1", "4"), table("2", "2"));
    let rows: Vec<&str> = one.lines().collect();
    assert_eq!(rows.len(), 1 + 2 * 8, "{one}");
    assert!(rows[1].starts_with("1,") && rows[16].starts_with("2,"), "{one}");
    assert_eq!(rows[16].split(',').nth(2), Some("4"), "two epochs of two repeats: {one}");
    // The folders differ by name; the numbers agree as far as the weights do.
    for (a, b) in rows.iter().zip(two.lines()).skip(1) {
        let number = |row: &str| row.split(',').nth(3).and_then(|x| x.parse::<f64>().ok());
        let (a, b) = (number(a).expect("a mean"), number(b).expect("a mean"));
        assert!((a - b).abs() < 1e-3 * a.abs(), "{a} {b}");
    }
}

#[test]
fn a_wandb_run_lies_beside_the_other_logs() {
    let mut scene = scene("2");
    let messages = scene.folder.path().join("messages.txt");
    scene
        .set("log_with", "'all'")
        .set("wandb_run_name", "'first try'")
        .set("console_log_file", quoted(&messages.display().to_string()));
    let output = scene.train(&[], &[]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("saved"), "messages go to the file: {said}");
    let messages = std::fs::read_to_string(messages).expect("messages");
    let hint = messages.lines().find(|line| line.contains("wandb sync")).expect("the folder");
    let folder = hint.split('`').nth(1).and_then(|c| c.strip_prefix("wandb sync ")).expect(hint);
    let run: Vec<PathBuf> =
        std::fs::read_dir(folder).expect(hint).flatten().map(|entry| entry.path()).collect();
    let file = run.iter().find(|path| path.extension().is_some_and(|e| e == "wandb"));
    let bytes = std::fs::read(file.expect("a run file")).expect("bytes");
    let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(bytes.starts_with(b":W&B") && holds(b"first try"), "{hint}");
    assert!(holds(b"loss/current") && holds(b"loss/validation/epoch_average"), "{hint}");
    assert!(log_folder(&scene).join("network_train").is_dir(), "TensorBoard's events");
}

#[test]
fn a_resumed_run_logs_as_if_nothing_had_happened() {
    let mut scene = scene("2");
    scene
        .set("max_train_steps", "8")
        .set("validate_every_n_steps", "2")
        .set("ema_decay", "0.9")
        .set("save_state", "true")
        .set("save_every_n_steps", "1");
    let file = |scene: &Scene, name: &str| {
        std::fs::read(scene.output_dir().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    // Times and memory differ from run to run.
    let told = |scene: &Scene| -> Vec<Value> {
        let mut lines = steps(scene);
        for line in lines.iter_mut().filter_map(Value::as_object_mut) {
            for key in ["time", "seconds", "images_per_second", "peak_memory"] {
                line.remove(key);
            }
        }
        lines
    };
    let table = |scene: &Scene| {
        std::fs::read_to_string(log_folder(scene).join("image_losses.csv")).expect("a table")
    };
    scene.trained(&[]);
    let (lines, images) = (told(&scene), table(&scene));
    let average = file(&scene, "small-ema.safetensors");
    // An epoch has six steps: once within one, once just after its end.
    for step in [3, 6] {
        let state = scene.output_dir().join(format!("small-step{step:08}-state"));
        let output = scene.train(&[], &["--resume", &state.display().to_string()]);
        assert!(output.status.success(), "{}", text(&output));
        let runs = std::fs::read_dir(scene.folder.path().join("logs")).expect("logs").count();
        assert_eq!(runs, 1, "the log goes on where it was");
        assert_eq!(told(&scene), lines, "from step {step}");
        assert_eq!(table(&scene), images, "from step {step}");
        assert!(file(&scene, "small-ema.safetensors") == average, "from step {step}");
    }
}
