//! Holds the direction of dependencies between the crates of this workspace, and the rules that
//! keep files readable.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package has a parent").to_owned()
}

/// Who may depend on whom. Arrows point down only; a new arrow is a decision, made here.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    [
        ("launcher", vec!["trainer", "tools", "collectives", "engine"]),
        ("trainer", vec!["collectives", "models", "engine", "formats", "pictures"]),
        ("tools", vec!["formats", "pictures", "models", "engine"]),
        ("models", vec!["engine", "formats"]),
        ("bench-model", vec![]),
        ("bench-step", vec!["trainer", "models", "engine", "formats"]),
        ("engine", vec![]),
        ("emulator", vec!["engine"]),
        ("formats", vec![]),
        ("pictures", vec![]),
        ("collectives", vec![]),
    ]
    .into_iter()
    .map(|(from, to)| (from, to.into_iter().collect()))
    .collect()
}

#[test]
fn arrows_point_down_only() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let allowed = allowed();
    assert!(ours.len() >= 6, "the workspace lost its members: {ours:?}");
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let rule = allowed.get(name).unwrap_or_else(|| panic!("no rule for the crate `{name}`"));
        for dependency in package["dependencies"].as_array().expect("a list") {
            let to = dependency["name"].as_str().expect("a name");
            let normal = dependency["kind"].is_null();
            assert!(
                !ours.contains(to) || !normal || rule.contains(to),
                "`{name}` must not depend on `{to}`"
            );
        }
    }
}

fn sources() -> Vec<PathBuf> {
    let mut folders = vec![root()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "data" {
                    folders.push(path);
                }
            } else if name.ends_with(".rs") {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 50, "the sources were not found");
    files
}

#[test]
fn every_file_says_its_promise_and_stays_readable() {
    const VAGUE: [&str; 6] = ["common", "util", "utils", "helpers", "misc", "core"];
    let mut broken = Vec::new();
    for path in sources() {
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        let stem = path.file_stem().and_then(|n| n.to_str()).unwrap_or("");
        let shown = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
        if !text.starts_with("//!") {
            broken.push(format!("{shown}: does not open with `//!`"));
        }
        if VAGUE.contains(&stem) {
            broken.push(format!("{shown}: the name promises nothing"));
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("").lines().count();
        let is_test = shown.starts_with("tests/") || shown.contains("/tests");
        if code > 600 && !is_test {
            broken.push(format!("{shown}: {code} lines, 600 at most"));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
