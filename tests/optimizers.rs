//! Optimizers in whole runs: what they keep from step to step survives a stop, what they average is
//! what is saved, and what files say about them.

use crate::harness::{Scene, text};

/// Four steps with an optimizer.
fn scene(optimizer: &str, args: &str, rate: &str) -> Scene {
    let mut scene = Scene::new();
    scene
        .set("optimizer_type", format!("'{optimizer}'"))
        .set("optimizer_args", args)
        .set("learning_rate", rate)
        .set("max_train_steps", "4")
        .set("save_state_on_train_end", "true")
        .set("resume", "'auto'");
    scene
}

#[test]
fn a_run_in_two_halves_ends_as_one_does() {
    // In 8 bits from 64 values on, so that the small model has such tensors.
    for (optimizer, args, rate) in [
        ("AdamW8bit", "['min_8bit_size=64']", "1e-3"),
        ("AdaFactor", "[]", "1e-3"),
        ("Prodigy", "['d0=1e-3']", "1.0"),
        ("AdamWScheduleFree", "['warmup_steps=2']", "1e-2"),
    ] {
        let mut scene = scene(optimizer, args, rate);
        let whole = scene.trained(&[]);
        std::fs::remove_dir_all(scene.output_dir()).expect("the folder is removed");
        scene.set("max_train_steps", "2");
        let half = scene.trained(&[]);
        assert!(half.tensors != whole.tensors, "{optimizer} stands still");
        scene.set("max_train_steps", "4");
        let resumed = scene.trained(&[]);
        assert!(resumed.tensors == whole.tensors, "{optimizer}");
    }
}

#[test]
fn files_name_the_optimizer_as_the_reference_does() {
    let mut scene = scene("adafactor", "['scale_parameter=False']", "1e-3");
    let file = scene.set("max_train_steps", "1").trained(&[]);
    assert_eq!(
        file.metadata["ss_optimizer"],
        "transformers.optimization.Adafactor(scale_parameter=False,relative_step=True)"
    );
    assert_eq!(file.metadata["ss_learning_rate"], "None");
    assert_eq!(file.metadata["ss_unet_lr"], "None");
    assert_eq!(file.metadata["ss_lr_scheduler"], "adafactor:0.001");
}

#[test]
fn unknown_optimizers_and_settings_are_refused_before_the_run() {
    for (optimizer, args, expected) in [
        ("AdamW9bit", "[]", "did you mean `AdamW8bit`?"),
        ("Lion", "['eps=1e-8']", "unknown key in `optimizer_args`: `eps`"),
        ("Prodigy", "['d_coef=two']", "not a value that Python would read: `two`"),
        ("Prodigy", "['betas=0.9']", "must be two numbers"),
    ] {
        let output = scene(optimizer, args, "1.0").train(&[], &[]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains(expected), "{said}");
    }
    let mut scene = scene("Prodigy", "[]", "1.0");
    let said = text(&scene.set("unet_lr", "0.5").train(&[], &[]));
    assert!(said.contains("must have one learning rate for all with Prodigy"), "{said}");
}
