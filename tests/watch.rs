//! Steps that are not finite are left out by all ranks together; the average has its own file.

use std::path::Path;

use crate::harness::{Scene, text};
use formats::lora_file::{self, LoraFile};

fn assert_finite(path: &Path) -> LoraFile {
    let file = lora_file::read(path).expect("a LoRA file");
    for (key, tensor) in &file.tensors {
        assert!(tensor.to_f32().iter().all(|x| x.is_finite()), "{}: {key}", path.display());
    }
    file
}

/// A scene in which one image's loss is never finite: a word of its caption has an absurd weight.
fn poisoned(batch: &str) -> Scene {
    let mut scene = Scene::new();
    scene.set("weighted_captions", "true").set("train_batch_size", batch);
    std::fs::write(
        scene.images().join("3.txt"),
        "(sks:9999999999999999999999999999999999999999) circle",
    )
    .expect("a caption");
    scene
}

#[test]
fn a_bad_image_costs_its_steps_and_nothing_else() {
    let mut files = Vec::new();
    for (processes, batch) in [("1", "4"), ("2", "2")] {
        let mut scene = poisoned(batch);
        scene.set("console_log_level", "'WARNING'");
        let output = scene.train(&["--num_processes", processes], &[]);
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        let line =
            said.lines().find(|l| l.contains("is left out")).unwrap_or_else(|| panic!("{said}"));
        assert!(!said.contains("saved"), "warnings alone: {said}");
        assert!(line.contains("the loss") && line.contains("3.png"), "{line}");
        assert!(!line.contains("2.png"), "only the image to blame: {line}");
        assert_eq!(line.contains("of rank"), processes == "2", "{line}");
        files.push(assert_finite(&scene.output_dir().join("small.safetensors")));
    }
    // The same steps are left out whoever computes them; rounding differs as between any worlds.
    for (key, tensor) in &files[0].tensors {
        for (a, b) in tensor.to_f32().iter().zip(files[1].tensors[key].to_f32()) {
            assert!((a - b).abs() <= 1e-5, "{key}: {a}, {b}");
        }
    }
    let moved = files[0].tensors.iter().filter(|(key, _)| key.ends_with("lora_up.weight"));
    assert!(moved.flat_map(|(_, t)| t.to_f32()).any(|x| x != 0.), "nothing was learned");
}

#[test]
fn a_run_that_blew_up_stops_and_earlier_files_stand() {
    for processes in ["1", "2"] {
        let mut scene = Scene::new();
        scene
            .set("learning_rate", "1e30")
            .set("train_batch_size", "2")
            .set("save_every_n_steps", "1")
            .set("save_last_n_steps", "1")
            .set("max_skipped_steps", "2");
        let output = scene.train(&["--num_processes", processes], &[]);
        let said = text(&output);
        assert!(!output.status.success(), "{said}");
        assert!(said.contains("3 steps in a row are not finite, the last is step 4"), "{said}");
        assert!(said.contains("hint: lower `learning_rate`"), "{said}");
        assert_finite(&scene.output_dir().join("small-step00000001.safetensors"));
        let files = std::fs::read_dir(scene.output_dir()).expect("a folder").count();
        assert_eq!(files, 1, "nothing is written while steps are left out: {said}");
    }
}

#[test]
fn the_average_goes_into_a_file_of_its_own() {
    let read = |scene: &Scene, name: &str| {
        std::fs::read(scene.output_dir().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let mut scene = Scene::new();
    scene.set("train_batch_size", "2").set("max_train_steps", "5");
    scene.trained(&[]);
    let plain = read(&scene, "small.safetensors");
    scene.set("ema_decay", "0.9").set("save_every_n_steps", "3");
    scene.trained(&[]);
    assert!(read(&scene, "small.safetensors") == plain, "the average must not change the training");
    assert!(read(&scene, "small-ema.safetensors") != plain, "the average is the last weights");
    let first = assert_finite(&scene.output_dir().join("small-ema.safetensors"));
    assert_finite(&scene.output_dir().join("small-step00000003-ema.safetensors"));
    scene.set("train_batch_size", "1");
    scene.trained(&["--num_processes", "2"]);
    let other = assert_finite(&scene.output_dir().join("small-ema.safetensors"));
    for (key, tensor) in &first.tensors {
        for (a, b) in tensor.to_f32().iter().zip(other.tensors[key].to_f32()) {
            assert!((a - b).abs() <= 1e-5, "{key}: {a}, {b}");
        }
    }
}
