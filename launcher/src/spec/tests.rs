//! What is rendered is right for every size of a job, and batch scripts that are wrong are caught.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::Path;

use clap::Parser;

use super::options::Options;
use super::{faults_of, render, sbatch_rules};
use crate::site::{Asked, Site, Source};
use crate::spec::options::What;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

const SCRIPTS: [(&str, &str); 4] = [
    ("single_node", include_str!("../../../deploy/slurm/single_node.sbatch")),
    ("several_nodes", include_str!("../../../deploy/slurm/several_nodes.sbatch")),
    ("auto_requeue", include_str!("../../../deploy/slurm/auto_requeue.sbatch")),
    ("array", include_str!("../../../deploy/slurm/array.sbatch")),
];

fn config(folder: &Path) -> String {
    let path = folder.join("my config.toml");
    let data = folder.display();
    let text = format!(
        "pretrained_model_name_or_path = '{data}/model.safetensors'\noutput_dir = '{data}/out'\n\
         output_name = 'My LoRA_v2'\nnetwork_module = 'networks.lora'\nmax_train_steps = 10\n\
         [[datasets]]\n[[datasets.subsets]]\nimage_dir = '{data}/pictures'\n"
    );
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn rendered(words: &[&str]) -> anyhow::Result<String> {
    let line = Line::try_parse_from(["spec"].iter().chain(words))?;
    match &line.options.what {
        What::Slurm(asked) => render::slurm(asked),
        What::Kubernetes(asked) => render::indexed_job(asked),
        What::Jobset(asked) => render::jobset(asked),
        What::Trainjob(asked) => render::trainjob(asked),
        What::Check { .. } => panic!("nothing to render"),
    }
}

#[test]
fn every_size_of_a_job_is_right() {
    let folder = tempfile::Builder::new().prefix("spec").tempdir_in("/var/tmp").unwrap();
    let config = config(folder.path());
    for kind in ["slurm", "kubernetes", "jobset", "trainjob"] {
        for nodes in ["1", "2", "16"] {
            for gpus in ["0", "1", "8"] {
                let mut words =
                    vec![kind, &config, "--nodes", nodes, "--gpus_per_node", gpus, "--grace", "90"];
                if kind == "slurm" {
                    words.extend(["--time", "2-00", "--partition", "gpu", "--account", "me"]);
                } else {
                    words.extend([
                        "--image",
                        "localhost:5000/lorarun@sha256:0f",
                        "--namespace",
                        "night",
                    ]);
                }
                let text = rendered(&words).unwrap_or_else(|error| panic!("{words:?}: {error:#}"));
                assert_eq!(faults_of(&text).unwrap(), Vec::<String>::new(), "{words:?}\n{text}");
                assert!(text.contains("my-lora-v2") && text.contains("my config.toml"), "{text}");
                assert!(
                    !text.contains("namespace: default") && !text.contains("example"),
                    "{text}"
                );
                assert_eq!(
                    text.contains("gpu:") || text.contains("gpus-per-node"),
                    gpus != "0",
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn claims_hold_every_path_of_the_config() {
    let folder = tempfile::Builder::new().prefix("spec").tempdir_in("/var/tmp").unwrap();
    let config = config(folder.path());
    let data = folder.path().display().to_string();
    let line = |more: &[&str]| {
        let words = ["kubernetes", &config, "--image", "a:1"];
        rendered(&words.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let text = line(&[]).unwrap();
    assert!(text.contains(&format!("mountPath: \"{data}\"")), "{text}");
    let inside = format!("models:{data}");
    let text = line(&["--pvc", &inside, "--pvc", "more:/more"]).unwrap();
    for wanted in ["claimName: models", "claimName: more", "mountPath: \"/more\""] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert_eq!(faults_of(&text).unwrap(), Vec::<String>::new(), "{text}");
    let outside = line(&["--pvc", "data:/elsewhere"]).unwrap_err().to_string();
    assert!(outside.contains("lies outside of what is mounted (/elsewhere)"), "{outside}");
    let without = line(&["--pvc", "a", "--pvc", "b:/c"]).unwrap_err().to_string();
    assert!(without.contains("need their folders"), "{without}");
}

#[test]
fn words_that_could_mean_more_are_refused() {
    for (option, value) in [
        ("--image", "a b"),
        ("--image", "a:1\nprivileged"),
        ("--name", "A"),
        ("--namespace", "a/b"),
        ("--pvc", "data:../x"),
        ("--pvc", "data:/tmp"),
        ("--nodes", "0"),
        ("--grace", "10"),
        ("--gpus_per_node", "-1"),
    ] {
        let words = ["kubernetes", "none.toml", "--image", "a:1", option, value];
        let image = ["kubernetes", "none.toml", option, value];
        let words: &[&str] = if option == "--image" { &image } else { &words };
        let refused = rendered(words).is_err_and(|error| error.is::<clap::Error>());
        assert!(refused, "{option} {value}");
    }
    for (option, value) in
        [("--time", "0"), ("--time", "soon"), ("--partition", "a b"), ("--qos", "-x")]
    {
        assert!(rendered(&["slurm", "none.toml", option, value]).is_err(), "{option} {value}");
    }
}

#[test]
fn the_scripts_are_right() {
    for (name, script) in SCRIPTS {
        assert_eq!(sbatch_rules::faults_of(script), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn a_script_that_is_wrong_is_caught() {
    let script = SCRIPTS[2].1;
    for (from, to, said) in [
        ("--ntasks-per-node=1", "--ntasks-per-node=4", "one launcher starts a node's processes"),
        ("--gpus-per-node=4", "--gpus-per-task=4", "hides GPUs from the launcher"),
        ("--nodes=1", "--nodes=0", "a number from 1, got: 0"),
        ("--nodes=1", "--node=1", "did you mean `--nodes`?"),
        ("--time=08:00:00", "--time=00:00:00", "no time limit"),
        ("#SBATCH --time=08:00:00\n", "", "`--time` is missing"),
        ("USR1@120", "B:USR1@120", "leave `B:` out"),
        ("USR1@120", "KILL@120", "got: KILL"),
        ("USR1@120", "USR1@5", "60 to 65535 seconds before the end, got: 5"),
        ("#SBATCH --signal=USR1@120\n", "", "would come without warning"),
        ("#SBATCH --open-mode=append\n", "", "would empty the log"),
        ("#SBATCH --requeue\n", "", "would be refused"),
        ("#SBATCH --requeue", "#SBATCH --no-requeue", "the first preemption"),
        ("#SBATCH --requeue", "#SBATCH -R", "write it as `--name=value`"),
        ("code=$?", "code=$?\n#SBATCH --mem=1G", "no directive after the first command"),
        (" --resume auto", "", "would begin anew"),
        ("--kill-on-bad-exit=0", "--kill-on-bad-exit=1", "hides exit codes"),
        ("--resume auto\n", "--resume auto | tee log\n", "the exit code of `srun` is lost"),
        ("srun --kill", "exec srun --kill", "is never reached"),
        ("srun --kill", "mpirun --kill", "no `srun`"),
        ("-eq 75", "-ne 0", "only exit code 75"),
        ("JobState=", "State=", "ask for its state"),
    ] {
        assert!(script.contains(from), "nothing to change: {from}");
        let faults = sbatch_rules::faults_of(&script.replacen(from, to, 1));
        assert!(faults.iter().any(|fault| fault.contains(said)), "{from} -> {to}: {faults:?}");
    }
}

/// Where the launcher stands in a pod of a manifest, with what Kubernetes adds by itself.
fn site_of(manifest: &str, place: &str, added: &[(&str, &str)]) -> Site {
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(manifest).unwrap();
    let pod = documents.iter().find_map(|document| document.pointer(place)).unwrap();
    let written = pod["containers"][0]["env"].as_array().unwrap().iter();
    let written = written.filter_map(|v| Some((v["name"].as_str()?, v["value"].as_str()?)));
    let variables: HashMap<&str, &str> = written.chain(added.iter().copied()).collect();
    Site::find(&Asked::default(), |name| variables.get(name).map(OsString::from)).unwrap()
}

#[test]
fn the_launcher_understands_what_the_manifests_say() {
    let job = include_str!("../../../deploy/kubernetes/indexed_job.yaml");
    let index = ("JOB_COMPLETION_INDEX", "1");
    let site = site_of(job, "/spec/template/spec", &[index]);
    assert_eq!((site.source, site.node, site.nodes), (Source::Kubernetes, 1, (2, 2)));
    assert_eq!((site.address.as_str(), site.port), ("lorarun-0.lorarun-nodes", 29500));
    let jobset = include_str!("../../../deploy/kubernetes/jobset.yaml");
    let place = "/spec/replicatedJobs/0/template/spec/template/spec";
    let site = site_of(jobset, place, &[index]);
    assert_eq!((site.source, site.node, site.nodes), (Source::Kubernetes, 1, (2, 2)));
    assert_eq!((site.address.as_str(), site.port), ("lorarun-nodes-0-0.lorarun-nodes", 29500));
    // What Kubeflow's torch policy sets.
    let runtime = include_str!("../../../deploy/kubernetes/kubeflow_trainjob.yaml");
    let place = "/spec/template/spec/replicatedJobs/0/template/spec/template/spec";
    let torch = [
        index,
        ("PET_NNODES", "2"),
        ("PET_NPROC_PER_NODE", "4"),
        ("PET_NODE_RANK", "1"),
        ("PET_MASTER_ADDR", "lorarun-node-0-0.lorarun"),
        ("PET_MASTER_PORT", "29500"),
    ];
    let site = site_of(runtime, place, &torch);
    assert_eq!((site.source, site.node, site.nodes), (Source::Torchrun, 1, (2, 2)));
    assert_eq!((site.address.as_str(), site.processes), ("lorarun-node-0-0.lorarun", Some(4)));
}
