//! `lorarun selftest` holds on every reference folder, and notices one changed number.

use std::path::Path;

use crate::harness::{data, lorarun, text};

fn selftest(case: &Path, base: &Path, more: &[&str]) -> std::process::Output {
    lorarun()
        .arg("selftest")
        .arg("--reference")
        .arg(case)
        .arg("--base")
        .arg(base)
        .args(more)
        .output()
        .expect("lorarun runs")
}

#[test]
fn every_reference_folder_holds_with_and_without_checkpointing() {
    for (base, case) in [
        ("parity", "lierla"),
        ("parity", "c3lier"),
        ("parity-sd2", "lierla"),
        ("parity-sdxl", "lierla"),
    ] {
        for more in [&[][..], &["--gradient_checkpointing"]] {
            let output = selftest(&data(base).join(case), &data(base), more);
            assert!(output.status.success(), "{base}/{case} {more:?}: {}", text(&output));
        }
    }
}

#[test]
fn the_embedded_set_holds() {
    let output = lorarun().arg("selftest").output().expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn one_changed_reference_value_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = data("parity/lierla");
    for entry in std::fs::read_dir(&case).expect("the case").flatten() {
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    let path = folder.path().join("ref.safetensors");
    let mut bytes = std::fs::read(&path).expect("the reference");
    let name = "grad/lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight";
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let head: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let start = head[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    let at = 8 + header + start;
    let value = f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    bytes[at..at + 4].copy_from_slice(&(value * 3. + 1e-3).to_le_bytes());
    std::fs::write(&path, bytes).expect("a changed reference");
    let output = selftest(folder.path(), &data("parity"), &[]);
    assert!(!output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(name), "{}", text(&output));
}

#[test]
fn operations_are_those_of_a_card() {
    let output = lorarun().args(["selftest", "--operations"]).output().expect("lorarun runs");
    assert!(!output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("only a card's operations are compared"), "{}", text(&output));
}
