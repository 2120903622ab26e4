//! The example configs run as they are, into a folder of the test, and leave what they promise.

use std::path::PathBuf;

use formats::lora_file::LoraFile;

use crate::harness::{lorarun, root, text};

/// Runs `examples/NAME/config.toml`; gives its folder and its last file.
fn run(name: &str, file: &str) -> (tempfile::TempDir, LoraFile) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = format!("examples/{name}/config.toml");
    let check =
        lorarun().args(["train", "--config-check", &config]).output().expect("lorarun runs");
    assert!(check.status.success(), "{}", text(&check));
    let output = lorarun()
        .args(["train", &config, "--output_dir"])
        .arg(folder.path())
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    let trained = formats::lora_file::read(&folder.path().join(file)).expect("a LoRA file");
    (folder, trained)
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path()).expect("the output");
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn every_example_is_listed_and_named() {
    let readme = std::fs::read_to_string(root().join("examples/README.md")).expect("README.md");
    let folders: Vec<PathBuf> = std::fs::read_dir(root().join("examples"))
        .expect("the examples")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && !path.ends_with("tiny-sd"))
        .collect();
    assert_eq!(folders.len(), 6);
    assert!(readme.contains("| `tiny-sd` |"));
    for folder in folders {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(readme.contains(&format!("| `{name}` |")), "{name} is not in examples/README.md");
        assert!(folder.join("config.toml").is_file(), "{name} has no config.toml");
    }
}

#[test]
fn character() {
    let (folder, file) = run("character", "character.safetensors");
    assert_eq!(names(&folder), ["character-000001.safetensors", "character.safetensors"]);
    assert!(file.metadata["ss_optimizer"].contains("AdamW8bit"));
    assert_eq!(file.metadata["ss_clip_skip"], "2");
    assert!(file.tensors.keys().any(|key| key.starts_with("lora_te_")));
}

#[test]
fn style_for_sd2_v() {
    let (folder, file) = run("style-sd2v", "style.safetensors");
    assert_eq!(names(&folder), ["style-step00000016.safetensors", "style.safetensors"]);
    assert_eq!(file.metadata["ss_base_model_version"], "sd_v2_v");
    assert!(file.tensors.keys().all(|key| key.starts_with("lora_unet_")));
}

#[test]
fn c3lier() {
    let (_folder, file) = run("c3lier", "c3lier.safetensors");
    let down = "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight";
    assert_eq!(file.tensors[down].shape[0], 8);
    assert!(file.metadata["ss_network_args"].contains("conv_dim"));
}

#[test]
fn dylora() {
    let (_folder, file) = run("dylora", "dylora.safetensors");
    assert_eq!(file.metadata["ss_network_module"], "networks.dylora");
    assert_eq!(file.metadata["ss_network_dim"], "16");
    let down = "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight";
    assert_eq!(file.tensors[down].shape[0], 16);
}

#[test]
fn regularization() {
    let (folder, file) = run("regularization", "sks-shape.safetensors");
    assert_eq!(names(&folder), ["sks-shape-step00000016.safetensors", "sks-shape.safetensors"]);
    assert!(file.metadata["ss_reg_dataset_dirs"].contains("1_shape"));
}
