//! Bad input of every kind: one clear error, the right exit code, no file and no folder left.

use std::path::Path;

use super::{attempt_in, inputs, read, scene, with_value, write};
use crate::harness::{data, text};

/// Runs, and asserts that it fails as said: exit code, words in the message, nothing written.
fn refused(folder: &Path, arguments: &str, code: i32, words: &[&str]) {
    let before = listing(folder);
    let output = attempt_in(folder, arguments);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(code), "lorarun {arguments}\n{said}");
    for word in words {
        assert!(said.contains(word), "lorarun {arguments}\nlacks: {word}\n{said}");
    }
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert_eq!(listing(folder), before, "{arguments}");
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

const TWO: &str = "--models in/lierla_r4.safetensors in/lierla_r4b.safetensors";

#[test]
fn numbers_of_models_and_ratios_that_differ() {
    let scene = scene();
    for tool in ["merge", "svd-merge"] {
        let arguments = format!("{tool} {TWO} --ratios 0.5 --save_to out.safetensors");
        refused(scene.path(), &arguments, 64, &["`models`", "2", "`ratios`", "1"]);
    }
}

#[test]
fn a_lora_of_another_family() {
    let scene = scene();
    let v2 = data("parity-sd2/lierla/init.safetensors");
    let arguments = format!(
        "merge --sd_model in/tiny_ldm.safetensors --models {} --ratios 1 --save_to out.safetensors",
        v2.display()
    );
    refused(scene.path(), &arguments, 1, &["lora_", "init.safetensors"]);
    let arguments = format!(
        "merge --models in/lierla_r4.safetensors {} --ratios 1 1 --concat --save_to out.safetensors",
        v2.display()
    );
    refused(scene.path(), &arguments, 1, &["lora_"]);
}

#[test]
fn ranks_and_units_that_cannot_be() {
    let scene = scene();
    let zero = format!("svd-merge {TWO} --ratios 1 1 --new_rank 0 --save_to out.safetensors");
    refused(scene.path(), &zero, 64, &["`new_rank`"]);
    let zero = "resize-lora --model in/lierla_r4.safetensors --new_rank 0 --save_to o.safetensors";
    refused(scene.path(), zero, 64, &["`new_rank`"]);
    let zero = "extract --model_org in/tiny_ldm.safetensors --model_tuned \
                in/tiny_ldm_perturbed.safetensors --dim 0 --save_to o.safetensors";
    refused(scene.path(), zero, 64, &["`dim`"]);
    let unit = "extract-dylora --model in/dylora_r16.safetensors --save_to o.safetensors --unit";
    refused(scene.path(), &format!("{unit} 5"), 64, &["`unit`", "16", "1, 2, 4, 8, 16"]);
    refused(scene.path(), &format!("{unit} 0"), 64, &["`unit`"]);
}

#[test]
fn a_file_read_and_written_at_once() {
    let scene = scene();
    let lora = scene.path().join("a.safetensors");
    std::fs::copy(inputs().join("lierla_r4.safetensors"), &lora).expect("a copy");
    let bytes = std::fs::read(&lora).expect("a file");
    let ways = [
        "merge --models a.safetensors in/lierla_r4b.safetensors --ratios 1 1 --save_to",
        "svd-merge --models in/lierla_r4b.safetensors a.safetensors --ratios 1 1 --save_to",
        "resize-lora --model a.safetensors --new_rank 2 --save_to",
        "convert --model a.safetensors --to diffusers --save_to",
    ];
    for way in ways {
        // Also under another spelling of its name.
        for name in ["a.safetensors", "./a.safetensors"] {
            refused(scene.path(), &format!("{way} {name}"), 64, &["`save_to`"]);
        }
    }
    assert_eq!(std::fs::read(&lora).expect("a file"), bytes);
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let scene = scene();
    let key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight";
    let tensors = with_value(&read(&inputs().join("lierla_r4.safetensors")), key, f32::NAN);
    write(&scene.path().join("nan.safetensors"), &tensors);
    let other = "in/lierla_r4b.safetensors";
    let ways = [
        format!("merge --models nan.safetensors {other} --ratios 1 1"),
        "merge --sd_model in/tiny_ldm.safetensors --models nan.safetensors --ratios 1".to_owned(),
        format!("svd-merge --models {other} nan.safetensors --ratios 1 1"),
        "resize-lora --model nan.safetensors --new_rank 2".to_owned(),
        "extract-dylora --model nan.safetensors --unit 2".to_owned(),
    ];
    for way in ways {
        let arguments = format!("{way} --save_to out.safetensors");
        refused(scene.path(), &arguments, 1, &[key, "NaN", "--allow_nan", "nan.safetensors"]);
    }
    let key = "model.diffusion_model.middle_block.1.proj_in.weight";
    let tensors = with_value(&read(&inputs().join("tiny_ldm.safetensors")), key, f32::NAN);
    write(&scene.path().join("model.safetensors"), &tensors);
    let ways = [
        "extract --model_org in/tiny_ldm.safetensors --model_tuned model.safetensors",
        "merge --sd_model model.safetensors --models in/lierla_r4.safetensors --ratios 1",
    ];
    for way in ways {
        let arguments = format!("{way} --save_to out.safetensors");
        refused(scene.path(), &arguments, 1, &["NaN", "--allow_nan", "model.safetensors"]);
    }
    let merge = "merge --sd_model model.safetensors --models nan.safetensors --ratios 1";
    let output =
        attempt_in(scene.path(), &format!("{merge} --allow_nan --save_to out.safetensors"));
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn files_that_end_too_early() {
    let scene = scene();
    for (from, to) in [("lierla_r4", "lora"), ("tiny_ldm", "model")] {
        let bytes = std::fs::read(inputs().join(format!("{from}.safetensors"))).expect("a file");
        let half = &bytes[..bytes.len() / 2];
        std::fs::write(scene.path().join(format!("{to}.safetensors")), half).expect("half a file");
    }
    let ways = [
        "merge --models lora.safetensors in/lierla_r4b.safetensors --ratios 1 1",
        "merge --sd_model model.safetensors --models in/lierla_r4.safetensors --ratios 1",
        "merge --sd_model in/tiny_ldm.safetensors --models lora.safetensors --ratios 1",
        "svd-merge --models lora.safetensors in/lierla_r4b.safetensors --ratios 1 1",
        "resize-lora --model lora.safetensors",
        "extract --model_org in/tiny_ldm.safetensors --model_tuned model.safetensors",
        "extract-dylora --model lora.safetensors --unit 2",
        "convert --model model.safetensors",
    ];
    for way in ways {
        let arguments = format!("{way} --save_to out.safetensors");
        refused(scene.path(), &arguments, 1, &["truncated"]);
    }
}

#[test]
fn a_checkpoint_that_would_run_code() {
    let scene = scene();
    // `os.system("...")` in protocol 0, as a torch file from before zips begins.
    let pickle = b"cos\nsystem\n(S'touch owned'\ntR.";
    std::fs::write(scene.path().join("evil.ckpt"), pickle).expect("a file");
    let ways = [
        "merge --sd_model evil.ckpt --models in/lierla_r4.safetensors --ratios 1",
        "merge --models evil.ckpt in/lierla_r4.safetensors --ratios 1 1",
        "extract --model_org in/tiny_ldm.safetensors --model_tuned evil.ckpt",
        "convert --model evil.ckpt",
    ];
    for way in ways {
        let arguments = format!("{way} --save_to out.safetensors");
        refused(scene.path(), &arguments, 1, &["evil.ckpt"]);
    }
    assert!(!scene.path().join("owned").exists());
}

#[test]
fn no_space_left() {
    // A file system of a few megabytes cannot be made without rights; a limit on file sizes gives
    // the same refusal at the same place.
    let scene = scene();
    let binary = env!("CARGO_BIN_EXE_lorarun");
    let merge = "merge --sd_model in/tiny_ldm.safetensors --models in/lierla_r4.safetensors \
                 --ratios 1 --save_to out.safetensors";
    let script = format!("ulimit -f 2000; trap '' XFSZ; exec {binary} {merge}");
    let before = listing(scene.path());
    let mut shell = std::process::Command::new("bash");
    let output = shell.args(["-c", &script]).current_dir(scene.path()).output().expect("bash");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("out.safetensors") && said.contains("error: "), "{said}");
    assert_eq!(listing(scene.path()), before);
}
