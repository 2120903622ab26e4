//! The README's first command, on its own example, into a folder of this test.

use crate::harness::{lorarun, root, text};

#[test]
fn the_readme_names_the_quickstart_and_it_trains() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    assert!(readme.contains("train examples/quickstart/config.toml"), "the first command is gone");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = lorarun()
        .args(["--num_processes", "2", "train", "examples/quickstart/config.toml"])
        .arg("--output_dir")
        .arg(folder.path())
        .arg("--logging_dir")
        .arg(folder.path().join("logs"))
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    let trained = std::fs::read_dir(folder.path())
        .expect("the output")
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .expect("a LoRA file");
    let file = formats::lora_file::read(&trained).expect("a LoRA file");
    assert!(file.tensors.len() > 100);
    assert!(folder.path().join("logs").is_dir(), "no TensorBoard log");
}
