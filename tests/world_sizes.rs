//! A run keeps its batch whatever number of processes goes on with it, and says so where it cannot.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::equality::distance;
use crate::harness::{Scene, lorarun, quoted, text};
use crate::interruption::kill;

/// Twelve steps of 8 images, 2 a rank of four. Of 42 samples an epoch's last batch has two.
fn scene() -> Scene {
    let mut scene = Scene::new();
    for index in 8..21 {
        for kind in ["png", "txt"] {
            let from = scene.images().join(format!("{}.{kind}", index % 8));
            let to = scene.images().join(format!("{index}.{kind}"));
            std::fs::copy(from, to).expect("a copied picture");
        }
    }
    scene
        .set("train_batch_size", "2")
        .set("max_train_steps", "12")
        .set("save_every_n_steps", "1")
        .set("save_state", "true")
        .set("lr_scheduler", "'cosine'")
        .set("resume", "'auto'");
    scene
}

fn final_file(scene: &Scene) -> Vec<u8> {
    std::fs::read(scene.output_dir().join("small.safetensors")).expect("the trained file")
}

fn run(scene: &Scene, ranks: usize, more: &[&str]) -> String {
    let output = scene.train(&["--num_processes", &ranks.to_string()], more);
    assert!(output.status.success(), "{ranks} ranks: {}", text(&output));
    text(&output)
}

/// Starts on `ranks` processes, asks for a stop once the state of `step` is there, and gives what was
/// said.
fn stopped_after(scene: &Scene, ranks: usize, step: usize) -> String {
    let mut command = lorarun();
    command.args(["--num_processes", &ranks.to_string()]).arg("train").arg(scene.write_config());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("lorarun starts");
    let state = scene.output_dir().join(format!("small-step{step:08}-state/state.json"));
    let began = Instant::now();
    while !state.exists() {
        assert!(began.elapsed() < Duration::from_secs(180), "{} is missing", state.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    kill(i32::try_from(child.id()).expect("a process id"), "-TERM");
    let output = child.wait_with_output().expect("ended");
    assert_eq!(output.status.code(), Some(75), "{ranks} ranks: {}", text(&output));
    text(&output)
}

/// The newest step whose state is in a folder.
fn newest_step(folder: &Path) -> usize {
    let step = |name: &str| name.strip_prefix("small-step")?.strip_suffix("-state")?.parse().ok();
    let entries = std::fs::read_dir(folder).expect("the folder").flatten();
    entries.filter_map(|entry| step(entry.file_name().to_str()?)).max().expect("a state")
}

/// Losses of the steps in the logs, by step.
fn losses(logs: &Path) -> BTreeMap<u64, String> {
    let mut losses = BTreeMap::new();
    for run in std::fs::read_dir(logs).expect("the logs").flatten() {
        let text = std::fs::read_to_string(run.path().join("steps.jsonl")).expect("the steps");
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let step = line["step"].as_u64().expect("a step");
            losses.insert(step, line["loss"].to_string());
        }
    }
    losses
}

#[test]
fn a_run_goes_on_with_four_two_eight_and_one_process_to_the_same_bytes() {
    let mut scene = scene();
    let logs = scene.folder.path().join("logs");
    scene.set("reproducible", "true").set("logging_dir", quoted(&logs.display().to_string()));
    run(&scene, 4, &[]);
    let (expected, expected_losses) = (final_file(&scene), losses(&logs));
    assert_eq!(expected_losses.len(), 12);
    for folder in [&scene.output_dir(), &logs] {
        std::fs::remove_dir_all(folder).expect("the folder is removed");
    }
    stopped_after(&scene, 4, 1);
    let output = scene.train(&["--num_processes", "3"], &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("has 8 images (2 x 4 ranks), which so many ranks cannot"), "{said}");
    assert!(said.contains("evenly: 3\nhint: give it 1, 2, 4 or 8 ranks; or"), "{said}");

    let said = stopped_after(&scene, 2, newest_step(&scene.output_dir()) + 1);
    assert!(said.contains("goes on from step"), "{said}");
    assert!(said.contains("2 a rank, 2 of 4 ranks, in 2 micro-steps: 8 images a step"), "{said}");
    let said = stopped_after(&scene, 8, newest_step(&scene.output_dir()) + 1);
    assert!(said.contains("1 of 2 a rank, 8 ranks in place of 4: 8 images a step"), "{said}");
    let said = run(&scene, 1, &[]);
    assert!(said.contains("goes on from step"), "{said}");
    assert!(final_file(&scene) == expected, "other bytes: {said}");
    assert_eq!(losses(&logs), expected_losses);
}

#[test]
fn fewer_processes_take_micro_steps_and_three_only_another_batch() {
    let mut scene = scene();
    scene.set("gradient_accumulation_steps", "2").set("max_train_steps", "6");
    let expected = scene.trained(&["--num_processes", "4"]);
    std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
    stopped_after(&scene, 4, 1);
    let copy = scene.folder.path().join("stopped");
    std::fs::rename(scene.output_dir(), &copy).expect("renamed");
    let state = copy.join(format!("small-step{:08}-state", newest_step(&copy)));
    scene.set("resume", quoted(&state.display().to_string()));

    let said = run(&scene, 2, &[]);
    let line = "2 a rank, 2 of 4 ranks, in 2 micro-steps, 2 accumulated: 16 images a step";
    assert!(said.contains(line), "{said}");
    let resumed = formats::lora_file::read(&scene.output_dir().join("small.safetensors"));
    let (error, key) = distance(&resumed.expect("a LoRA file"), &expected);
    assert!(error <= 1e-4, "{error} at {key}");

    let output = scene.train(&["--num_processes", "3"], &[]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("`--allow_batch_change`"), "{}", text(&output));
    let said = run(&scene, 3, &["--allow_batch_change"]);
    assert!(said.contains("a step takes 2 x 6 images"), "{said}");
    assert!(said.contains("some images can come twice or not at all"), "{said}");
    assert!(said.contains("2 a rank, 3 ranks, 2 accumulated: 12 images a step"), "{said}");
    let other = formats::lora_file::read(&scene.output_dir().join("small.safetensors"));
    assert_eq!(other.expect("a LoRA file").metadata["ss_steps"], "6");
}

#[test]
fn one_process_in_place_of_four_sees_the_same_batches_and_learns_the_same() {
    let mut scene = scene();
    scene.set("save_state", "false").set("resume", "''").set("max_train_steps", "4");
    let alone = |more: &[&str]| {
        let mut command = lorarun();
        command.env("LORARUN_FULL_WORLD_SIZE", "4").arg("train").arg(scene.write_config());
        let output = command.args(more).output().expect("lorarun runs");
        assert!(output.status.success(), "{}", text(&output));
        output
    };
    let images = |output: &std::process::Output| -> Vec<String> {
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        out.lines().filter(|line| line.starts_with("  ")).map(str::to_owned).collect()
    };
    let seen = images(&alone(&["--debug_dataset"]));
    assert_eq!(seen.len(), 3 * 8 + 2, "the small batch is among them");
    let whole = scene.train(&[], &["--debug_dataset", "--train_batch_size", "8"]);
    assert_eq!(seen, images(&whole), "{}", text(&whole));

    let said = text(&alone(&[]));
    assert!(said.contains("2 a rank, 1 of 4 ranks, in 4 micro-steps: 8 images a step"), "{said}");
    let file = scene.output_dir().join("small.safetensors");
    let alone = formats::lora_file::read(&file).expect("a LoRA file");
    let four = scene.trained(&["--num_processes", "4"]);
    let (error, key) = distance(&alone, &four);
    assert!(error <= 1e-4, "{error} at {key}");
}
