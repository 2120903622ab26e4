//! Training under a real Slurm: stops and requeues at any time, tasks of every shape, a node that
//! loses its power.

use std::process::Child;
use std::time::{Duration, SystemTime};

use crate::harness::Scene;
use crate::slurm_lab::{Job, JobFiles, Slurm};

/// Two processes a node, on one core each.
const TWO: &str = "--nproc_per_node 2 --num_cpu_threads_per_process 1";
/// Said once by every start, just before its first step.
const BEGINS: &str = "latents of";

/// A run whose result does not depend on the number of processes, four pictures a step.
fn scene(steps: usize) -> Scene {
    let mut scene = Scene::new();
    scene.set("reproducible", "true").set("train_batch_size", "1").set("device", "'cpu'");
    scene.set("max_train_steps", steps.to_string());
    scene
}

fn lora(scene: &Scene) -> Vec<u8> {
    std::fs::read(scene.output_dir().join("small.safetensors")).expect("a LoRA file")
}

/// The bytes of four processes on one machine that nobody stops.
fn undisturbed(scene: &Scene) -> Vec<u8> {
    scene.trained(&["--num_processes", "4", "--num_cpu_threads_per_process", "1"]);
    let bytes = lora(scene);
    std::fs::remove_dir_all(scene.output_dir()).expect("a folder");
    bytes
}

/// Steps that stand behind some words in a log.
fn steps_after(log: &str, words: &str) -> Vec<usize> {
    let numbers = log.split(words).skip(1);
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    numbers.map(|text| digits(text).parse().expect("a step")).collect()
}

/// Milliseconds from 200 to 2000, other ones at each run.
fn random_pause() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
    Duration::from_millis(200 + u64::from(now.subsec_micros()) % 1800)
}

fn stop(slurm: &Slurm, job: &Job<'_>, round: usize) {
    match round % 3 {
        0 => slurm.says("scancel", &["--signal=USR1", &job.id]),
        1 => slurm.says("scancel", &["--signal=TERM", &job.id]),
        _ => slurm.says("scontrol", &["requeue", &job.id]),
    };
}

/// Announcements, terminations and requeues at random times: the same bytes in the end, and every
/// time all ranks have stopped at the same step. `LORARUN_REQUEUES` sets how many.
#[test]
fn requeues_train_the_undisturbed_bytes() {
    let Some(slurm) = Slurm::up("requeues_train_the_undisturbed_bytes", false) else { return };
    let rounds =
        std::env::var("LORARUN_REQUEUES").map_or(4, |text| text.parse().expect("a number"));
    let scene = scene(40 * (rounds + 1));
    let expected = undisturbed(&scene);
    let files = JobFiles::new(scene.folder.path(), scene.write_config(), TWO);
    let job = slurm.submit("auto_requeue.sbatch", &["--nodes=2"], &files);
    for round in 0..rounds {
        job.wait_for(BEGINS, round + 1);
        std::thread::sleep(random_pause());
        stop(&slurm, &job, round);
        slurm.wait("the next start", || job.fact("Restarts") == (round + 1).to_string());
    }
    job.wait_until("COMPLETED");
    let log = job.log();
    assert_eq!(
        (job.fact("Restarts"), job.fact("ExitCode")),
        (rounds.to_string(), "0:0".to_owned())
    );
    // Every start goes on from where the one before has stopped, and that is one step for all ranks.
    let stopped = steps_after(&log, "stopped on request after step ");
    assert_eq!(stopped.len(), rounds, "{log}");
    assert_eq!(steps_after(&log, "goes on from step "), stopped, "{log}");
    assert!(stopped.is_sorted_by(|one, next| one < next), "{stopped:?}");
    let states = std::fs::read_dir(scene.output_dir()).expect("a folder").flatten();
    let states: Vec<String> = states
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with("-state"))
        .collect();
    assert_eq!(states.len(), rounds, "{states:?}");
    for step in &stopped {
        assert!(states.contains(&format!("small-step{step:08}-state")), "{states:?}");
    }
    assert!(lora(&scene) == expected, "other bytes than undisturbed, stops at {stopped:?}");
    for rank in 0..4 {
        let folder =
            std::fs::read_dir(&files.logs).expect("logs").next().expect("a folder").expect("it");
        assert!(folder.path().join(format!("rank{rank}.log")).is_file(), "no log of rank {rank}");
    }
    eprintln!("{rounds} requeues, stopped at {stopped:?}");
}

/// A job that is cancelled saves, and does not come back.
#[test]
fn a_cancelled_job_saves_and_stays_away() {
    let Some(slurm) = Slurm::up("a_cancelled_job_saves_and_stays_away", false) else { return };
    let scene = scene(100_000);
    let files = JobFiles::new(scene.folder.path(), scene.write_config(), TWO);
    let job = slurm.submit("auto_requeue.sbatch", &["--nodes=2"], &files);
    job.wait_for(BEGINS, 1);
    std::thread::sleep(random_pause());
    slurm.says("scancel", &[&job.id]);
    job.wait_until("CANCELLED");
    job.wait_for("saved; not requeued", 1);
    assert_eq!(job.fact("Restarts"), "0");
    assert_eq!(steps_after(&job.log(), "stopped on request after step ").len(), 1, "{}", job.log());
}

fn end_of(mut step: Child) -> i32 {
    step.wait().expect("srun ends").code().expect("an exit code")
}

/// `srun lorarun train config.toml` needs nothing else, with one task a node or one for each process;
/// tasks that start nothing stay, and take no part in the exit code.
#[test]
fn srun_alone_is_enough() {
    let Some(slurm) = Slurm::up("srun_alone_is_enough", true) else { return };
    let scene = scene(8);
    let expected = undisturbed(&scene);
    let config = scene.write_config().display().to_string();
    let log = scene.folder.path().join("srun.log");
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let train = ["train", config.as_str()];
    // Two nodes of one process each: half as many pictures a step, so other bytes.
    let code = end_of(slurm.step(&["--nodes=2"], &train, &log));
    assert_eq!(code, 0, "{}", said());
    assert!(said().contains("2 ranks"), "{}", said());
    std::fs::remove_dir_all(scene.output_dir()).expect("a folder");
    // A site that ends a step a second after its first task has ended.
    let shape = ["--nodes=2", "--ntasks-per-node=2", "--wait=1"];
    let code = end_of(slurm.step(&shape, &train, &log));
    assert_eq!(code, 0, "{}", said());
    assert!(said().contains("4 ranks"), "{}", said());
    assert!(lora(&scene) == expected, "other bytes than four processes on one machine");
    // Every task gets the signal.
    let long = ["train", config.as_str(), "--max_train_steps", "100000"];
    let step = slurm.step(&shape, &long, &log);
    slurm.wait("the first step", || said().contains(BEGINS));
    std::thread::sleep(random_pause());
    for signal in ["--signal=USR1", "--signal=TERM"] {
        let id = slurm.says("squeue", &["-h", "-o", "%i"]);
        slurm.says("scancel", &[signal, &id]);
    }
    assert_eq!(end_of(step), 75, "{}", said());
    assert_eq!(steps_after(&said(), "stopped on request after step ").len(), 1, "{}", said());
}

/// A node loses its power: Slurm takes it out and starts the job again on others, which goes on from
/// the newest state on disk.
#[test]
fn a_power_cut_requeues_on_other_nodes() {
    let Some(slurm) = Slurm::up("a_power_cut_requeues_on_other_nodes", true) else { return };
    let mut scene = scene(120);
    let expected = undisturbed(&scene);
    scene.set("save_every_n_steps", "5").set("save_state", "true");
    let files = JobFiles::new(scene.folder.path(), scene.write_config(), TWO);
    let job = slurm.submit("auto_requeue.sbatch", &["--nodes=2"], &files);
    job.wait_for("-state", 2);
    assert_eq!(job.fact("NodeList"), "h[1-2]");
    let cut = std::time::Instant::now();
    slurm.cut_power(2);
    job.wait_for("is gone", 1);
    eprintln!("the launcher noticed after {:?}", cut.elapsed());
    job.wait_for(BEGINS, 2);
    eprintln!("running again after {:?}", cut.elapsed());
    assert_eq!((job.fact("Restarts").as_str(), job.fact("NodeList").as_str()), ("1", "h[1,3]"));
    job.wait_until("COMPLETED");
    assert_eq!(steps_after(&job.log(), "goes on from step ").len(), 1, "{}", job.log());
    let tensors = |bytes: Vec<u8>| {
        let path = scene.folder.path().join("compared.safetensors");
        std::fs::write(&path, bytes).expect("a file");
        let tensors = formats::lora_file::read(&path).expect("a LoRA file").tensors;
        tensors.into_iter().map(|(key, tensor)| (key, tensor.data)).collect::<Vec<_>>()
    };
    assert!(tensors(lora(&scene)) == tensors(expected), "other weights than undisturbed");
}
