//! `lorarun plan`: what a run will take, before anything is loaded and without a card.

use std::path::Path;

use crate::harness::{lorarun, root, text};

fn plan(folder: &Path, more: &[&str]) -> std::process::Output {
    let output_dir = folder.join("out");
    lorarun()
        .current_dir(root())
        .args(["plan", "examples/quickstart/config.toml"])
        .arg("--output_dir")
        .arg(&output_dir)
        .args(more)
        .output()
        .expect("lorarun runs")
}

#[test]
fn a_plan_lists_what_is_on_the_card_and_writes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = plan(folder.path(), &["--vram_limit", "8GB"]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    for word in
        ["384 steps", "card memory", "arena of a step", "imagined card", "rings.safetensors"]
    {
        assert!(said.contains(word), "no `{word}` in:\n{said}");
    }
    assert_eq!(folder.path().read_dir().expect("the folder").count(), 0);
}

#[test]
fn what_cannot_fit_is_refused_with_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (limit, what, may) in [
        ("300MB", "at least 464 MiB of a card before its first tensor", "it may use: 286 MiB"),
        ("488MB", "to encode an image of 64x64", "it may use: 465 MiB"),
        ("500MB", "the run takes at least", "it may use: 477 MiB"),
    ] {
        let output = plan(folder.path(), &["--vram_limit", limit]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{limit}: {said}");
        assert!(said.contains(what) && said.contains(may), "{limit}: {said}");
        assert!(said.contains("\nhint: "), "{limit}: {said}");
    }
}
