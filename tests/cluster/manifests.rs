//! The manifests and scripts of `deploy/`, and what `lorarun spec` renders: right by Kubernetes' own
//! schema, by shellcheck, by our rules, and where there is a cluster, by its server.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness::{Scene, lorarun, root, text};

/// Validates documents by the schema of several releases. A JobSet and a runtime of Kubeflow have none
/// of their own here: the Job within is validated.
const VALIDATE: &str = r#"
import sys, yaml, kubernetes_validate as validator
for path in sys.argv[1:]:
    for body in yaml.safe_load_all(open(path)):
        kind = body["kind"]
        if kind == "TrainJob":
            continue
        if kind in ("JobSet", "TrainingRuntime", "ClusterTrainingRuntime"):
            spec = body["spec"] if kind == "JobSet" else body["spec"]["template"]["spec"]
            job = spec["replicatedJobs"][0]["template"]
            body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": job["spec"]}
        for version in ("1.31", "1.34", "1.37"):
            validator.validate(body, version, strict=True)
        print(path, kind)
"#;

/// Where `.ci/run` puts Python packages; `None`, said loudly, where there is none.
fn python(test: &str, package: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LORARUN_PYTHON_ENV").map(PathBuf::from);
    let found = folder.filter(|folder| folder.join(package).exists());
    if found.is_none() {
        let required = std::env::var_os("LORARUN_REQUIRE_KUBERNETES_VALIDATE").is_some();
        assert!(!required, "{test} needs `{package}` below LORARUN_PYTHON_ENV");
        eprintln!("SKIPPED {test}: no `{package}` below LORARUN_PYTHON_ENV (.ci/run installs it)");
    }
    found
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("deploy").join(folder)).expect("a folder");
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|have| have == ending)).collect()
}

/// One of each kind, as small and as large as it gets.
fn rendered(folder: &Path) -> Vec<PathBuf> {
    std::fs::write(folder.join("relative.toml"), RELATIVE).expect("a config");
    let mut paths = Vec::new();
    for kind in ["kubernetes", "jobset", "trainjob"] {
        for (nodes, gpus) in [("1", "0"), ("4", "8")] {
            let path = folder.join(format!("{kind}-{nodes}.yaml"));
            let output = lorarun()
                .current_dir(folder)
                .args(["spec", kind, "relative.toml", "--nodes", nodes, "--gpus_per_node", gpus])
                .args([
                    "--image",
                    "lorarun:0.1.0",
                    "--pvc",
                    "models:/models",
                    "--pvc",
                    "runs:/runs",
                ])
                .arg("-o")
                .arg(&path)
                .output()
                .expect("lorarun runs");
            assert!(output.status.success(), "{}", text(&output));
            paths.push(path);
        }
    }
    paths
}

/// Paths that no claim holds are refused by name, and nothing is written.
#[test]
fn paths_that_are_not_mounted_are_refused() {
    let scene = Scene::new();
    let path = scene.folder.path().join("job.yaml");
    let output = lorarun()
        .args(["spec", "kubernetes"])
        .arg(scene.write_config())
        .args(["--image", "lorarun:0.1.0", "--pvc", "runs:/runs", "-o"])
        .arg(&path)
        .output()
        .expect("lorarun runs");
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("lies outside of what is mounted (/runs)"), "{}", text(&output));
    assert!(!path.exists());
}

const RELATIVE: &str = "pretrained_model_name_or_path = 'model.safetensors'\n\
    output_dir = 'out'\noutput_name = 'night'\nnetwork_module = 'networks.lora'\n\
    max_train_steps = 10\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\n";

fn validate(python: &Path, paths: &[PathBuf]) -> Output {
    let mut command = Command::new("python3");
    command.args(["-c", VALIDATE]).args(paths).env("PYTHONPATH", python);
    command.output().expect("python3 runs")
}

#[test]
fn manifests_follow_the_schema() {
    let Some(python) = python("manifests_follow_the_schema", "kubernetes_validate") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut paths = files("kubernetes", "yaml");
    assert_eq!(paths.len(), 3);
    paths.extend(rendered(folder.path()));
    let output = validate(&python, &paths);
    assert!(output.status.success(), "{}", text(&output));
    // Services and Jobs, JobSets, runtimes: three files each, of which the TrainJobs are passed over.
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 12, "{}", text(&output));
    // It does look: a misspelt field is refused.
    let wrong = folder.path().join("wrong.yaml");
    let manifest = std::fs::read_to_string(&paths[0]).expect("a manifest");
    assert!(manifest.contains("restartPolicy"));
    std::fs::write(&wrong, manifest.replace("restartPolicy", "restartPolice")).expect("a file");
    assert!(!validate(&python, &[wrong]).status.success());
}

#[test]
fn what_is_deployed_passes_our_rules() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut paths = files("kubernetes", "yaml");
    paths.extend(files("slurm", "sbatch"));
    assert_eq!(paths.len(), 7);
    paths.extend(rendered(folder.path()));
    let output = lorarun().args(["spec", "check"]).args(&paths).output().expect("lorarun runs");
    assert!(output.status.success() && output.stdout.is_empty(), "{}", text(&output));
    // What the schema lets through.
    let wrong = folder.path().join("wrong.yaml");
    let manifest = root().join("deploy/kubernetes/indexed_job.yaml");
    let manifest = std::fs::read_to_string(manifest).expect("a manifest");
    let changed = manifest
        .replace("completionMode: Indexed", "completionMode: indexd")
        .replace("ttlSecondsAfterFinished: 86400", "activeDeadlineSeconds: -5");
    std::fs::write(&wrong, changed).expect("a file");
    let output = lorarun().args(["spec", "check"]).arg(&wrong).output().expect("lorarun runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(78), "{said}");
    for words in ["should be Indexed", "from 1, got: -5", "error: 2 faults"] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn scripts_are_sound() {
    let test = "scripts_are_sound";
    let Some(python) = python(test, "bin/shellcheck") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let rendered = folder.path().join("night.sbatch");
    std::fs::write(folder.path().join("it's.toml"), RELATIVE).expect("a config");
    let output = lorarun()
        .current_dir(folder.path())
        .args(["spec", "slurm", "it's.toml", "--nodes", "4", "--gpus_per_node", "8"])
        .args(["--partition", "gpu", "--time", "2-12", "-o"])
        .arg(&rendered)
        .output()
        .expect("lorarun runs");
    assert!(output.status.success(), "{}", text(&output));
    let scripts = files("slurm", "sbatch");
    let output = Command::new(python.join("bin/shellcheck"))
        .args(&scripts)
        .arg(&rendered)
        .output()
        .expect("shellcheck runs");
    assert!(output.status.success(), "{}", text(&output));
}

/// The config's own faults are told as `train` tells them, and nothing is written.
#[test]
fn a_config_that_is_wrong_makes_no_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("config.toml");
    std::fs::write(&config, RELATIVE.replace("output_name", "output_nam")).expect("a config");
    let path = folder.path().join("job.sbatch");
    let output = lorarun()
        .args(["spec", "slurm"])
        .arg(&config)
        .arg("-o")
        .arg(&path)
        .output()
        .expect("lorarun runs");
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("unknown option: `output_nam`"), "{}", text(&output));
    assert!(!path.exists());
}

/// The server of a cluster, where there is one, takes the Indexed Job.
#[test]
fn a_server_takes_the_job() {
    if std::env::var_os("KUBECONFIG").is_none() {
        eprintln!("SKIPPED a_server_takes_the_job: no KUBECONFIG");
        return;
    }
    let output = Command::new("kubectl")
        .args(["apply", "--dry-run=server", "-f", "deploy/kubernetes/indexed_job.yaml"])
        .current_dir(root())
        .output()
        .expect("kubectl runs");
    assert!(output.status.success(), "{}", text(&output));
}
