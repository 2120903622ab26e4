//! Ranks that are killed at any moment and started again by their launchers go on from memory, to the
//! bytes of a run that nobody disturbed; a start that has lost its names to another writes nothing.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use collectives::Snapshots;

use crate::harness::{Scene, lorarun, quoted, root, text};
use crate::interruption::{MARK, kill, marked, wait_until};
use crate::resume::{Moments, newest_step};

/// Longest wait for anything, on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// As many kills as `LORARUN_KILLS` says.
fn kills() -> u64 {
    std::env::var("LORARUN_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

/// Several steps, files and states on the way, a log, everything that is carried from step to step.
fn scene(steps: u64) -> Scene {
    let mut scene = Scene::new();
    let logs = scene.folder.path().join("logs").display().to_string();
    scene
        .set("max_train_steps", steps.to_string())
        .set("train_batch_size", "2")
        .set("lr_scheduler", "'cosine'")
        .set("ema_decay", "0.9")
        .set("save_every_n_steps", "1")
        .set("save_last_n_steps", "2")
        .set("logging_dir", quoted(&logs));
    scene
}

/// Two launchers that take each other for hosts, a rank each.
fn start_nodes(scene: &Scene, mark: &str) -> [Child; 2] {
    let config = scene.write_config();
    let port = free_port().to_string();
    ["0", "1"].map(|node| {
        lorarun()
            .args(["--nnodes", "2", "--node_rank", node, "--nproc_per_node", "1"])
            .args(["--master_addr", "127.0.0.1", "--master_port", &port])
            .args(["--max_restarts", "1000", "--snapshot_every_n_steps", "1", "train"])
            .arg(&config)
            .env(MARK, mark)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("lorarun starts")
    })
}

/// What both said, read while they run: a pipe that nobody reads would stop them.
fn ended(nodes: [Child; 2]) -> [Output; 2] {
    let threads = nodes.map(|node| std::thread::spawn(|| node.wait_with_output().expect("ended")));
    threads.map(|thread| thread.join().expect("a thread"))
}

/// Every LoRA in the folder, and whatever else has a name there.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let read = |path: PathBuf| std::fs::read(path).expect("a file");
    entries.map(|e| (e.file_name().to_string_lossy().into_owned(), read(e.path()))).collect()
}

/// The losses of all steps by the log, without times.
fn logged(scene: &Scene) -> Vec<(u64, String)> {
    let runs = std::fs::read_dir(scene.folder.path().join("logs")).expect("logs").flatten();
    let files: Vec<PathBuf> = runs.map(|run| run.path().join("steps.jsonl")).collect();
    assert_eq!(files.len(), 1, "the log goes on in its folder: {files:?}");
    let text = std::fs::read_to_string(&files[0]).expect("a log");
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let step = line["step"].as_u64().expect("a step");
        (step, format!("{} {} {}", line["loss"], line["average"], line["lr"]))
    };
    text.lines().map(line).collect()
}

#[test]
fn ranks_killed_at_any_moment_leave_no_trace() {
    let kills = kills();
    let steps = 5 * (kills + 1);
    let scene = scene(steps);
    let mark = format!("restarts-{}", std::process::id());
    let outputs = ended(start_nodes(&scene, &mark));
    assert!(outputs.iter().all(|output| output.status.success()), "{}", text(&outputs[0]));
    let (expected, losses) = (contents(&scene.output_dir()), logged(&scene));
    assert_eq!(losses.len() as u64, steps);
    for folder in [scene.output_dir(), scene.folder.path().join("logs")] {
        std::fs::remove_dir_all(folder).expect("removed");
    }

    let seed = std::time::UNIX_EPOCH.elapsed().expect("a clock").as_nanos() as u64;
    println!("seed of the kills: {seed}");
    let mut moments = Moments(seed);
    let nodes = start_nodes(&scene, &mark);
    let launchers = [0, 1].map(|node: usize| nodes[node].id() as i32);
    let reading = std::thread::spawn(move || ended(nodes));
    let ranks = || -> Vec<i32> {
        marked(&mark).into_iter().filter(|pid| !launchers.contains(pid)).collect()
    };
    let mut before = Vec::new();
    for round in 0..kills {
        wait_until("a start of both ranks", LONG, || {
            let now = ranks();
            now.len() == 2 && now.iter().all(|pid| !before.contains(pid)) || reading.is_finished()
        });
        before = ranks();
        // While it starts, or while it trains; the first one after a file is there.
        let wanted = match round > 0 && moments.below(3) == 0 {
            true => 0,
            false => 5 * round + 2 + moments.below(3),
        };
        wait_until("the step of the kill", LONG, || {
            newest_step(&scene.output_dir()) >= wanted || reading.is_finished()
        });
        std::thread::sleep(Duration::from_micros(moments.below(200_000)));
        assert!(
            !reading.is_finished(),
            "seed {seed}: {}",
            text(&reading.join().expect("ended")[0])
        );
        kill(before[moments.below(2) as usize], "-KILL");
    }
    let outputs = reading.join().expect("both ended");
    let said = text(&outputs[0]);
    assert!(outputs.iter().all(|output| output.status.success()), "seed {seed}: {said}");
    let restarts = said.matches("starting again after").count() as u64;
    assert_eq!(restarts, kills, "seed {seed}: {said}");
    assert!(said.contains(", kept in memory"), "seed {seed}: {said}");
    let found = contents(&scene.output_dir());
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>(),
        "seed {seed}: {said}"
    );
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "seed {seed}: {name} differs: {said}");
    }
    assert_eq!(logged(&scene), losses, "seed {seed}");
    assert!(marked(&mark).is_empty());
}

/// A rank that is a host of its own, with this memory for snapshots.
fn rank_with_memory(scene: &Scene, rank: usize, port: u16, memory: &Snapshots) -> Child {
    // The shell opens the memory anew: an inherited descriptor would need unsafe code here.
    let opened = format!("/proc/{}/fd/{}", std::process::id(), memory.fd().as_raw_fd());
    let mut command = Command::new("bash");
    command.args(["-c", "exec 9<>\"$1\"; shift; exec \"$@\"", "bash", &opened]);
    command.arg(env!("CARGO_BIN_EXE_lorarun")).arg("train").arg(scene.write_config());
    let variables = [
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", "0".to_owned()),
        ("WORLD_SIZE", "2".to_owned()),
        ("LOCAL_WORLD_SIZE", "1".to_owned()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        ("LORARUN_GENERATION", "1".to_owned()),
        ("LORARUN_SNAPSHOT_FD", "9".to_owned()),
        ("LORARUN_SNAPSHOT_EVERY", "2".to_owned()),
    ];
    // Hosts do not see each other's temporary folders.
    let own = scene.folder.path().join(format!("tmp-{rank}"));
    std::fs::create_dir_all(&own).expect("a folder");
    command.envs(variables).env("TMPDIR", own).current_dir(root());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("bash runs")
}

#[test]
fn the_snapshots_of_all_hosts_are_the_same() {
    let mut scene = scene(3);
    // More that is carried, and a state whose saving is followed by a snapshot.
    scene.set("optimizer_type", "'AdamW8bit'").set("save_state", "true");
    scene.set("save_every_n_steps", "3");
    let memories = [0, 1].map(|_| Snapshots::create().expect("memory"));
    let port = free_port();
    let ranks = [0, 1].map(|rank| rank_with_memory(&scene, rank, port, &memories[rank]));
    for output in ended(ranks) {
        assert!(output.status.success(), "{}", text(&output));
    }
    let [first, second] = memories.map(|memory| memory.read().expect("memory").expect("one"));
    assert_eq!((first.0.generation, first.0.step), (1, 3));
    assert!(first == second, "{} and {} bytes", first.1.len(), second.1.len());
    let holds = |name: &[u8]| first.1.windows(name.len()).any(|part| part == name);
    for name in ["facts.json", "weights.safetensors", "ema.safetensors", "\"log/run\""] {
        assert!(holds(name.as_bytes()), "no {name}");
    }
}

#[test]
fn a_job_that_a_cluster_starts_again_resumes_by_itself() {
    let mut scene = scene(4);
    scene.set("save_state", "true");
    let expected = scene.trained(&[]);
    std::fs::remove_file(scene.output_dir().join("small.safetensors")).expect("removed");
    std::fs::remove_dir_all(scene.output_dir().join("small-state")).expect("removed");
    std::fs::remove_dir_all(scene.output_dir().join("small-step00000004-state")).expect("removed");
    let config = scene.write_config();
    let again = |arguments: &[&str]| {
        let mut command = lorarun();
        command.arg("train").arg(&config).args(arguments).env("LORARUN_RESTARTED", "1");
        command.output().expect("lorarun runs")
    };
    let said = text(&again(&[]));
    assert!(said.contains("taken as `resume = \"auto\"`"), "{said}");
    assert!(said.contains("goes on from step 3: "), "{said}");
    let file = scene.output_dir().join("small.safetensors");
    let resumed = formats::lora_file::read(&file).expect("a LoRA file");
    assert!(resumed.tensors == expected.tensors, "{said}");
    let absent = again(&["--resume", "/nonexistent"]);
    assert!(text(&absent).contains("`resume` is no folder"), "{}", text(&absent));
}

fn start_alone(scene: &Scene) -> Child {
    let mut command = lorarun();
    command.arg("train").arg(scene.write_config());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("lorarun starts")
}

#[test]
fn a_stopped_run_that_comes_back_writes_nothing() {
    let mut scene = scene(400);
    scene.set("logging_dir", "''").set("save_last_n_steps", "1000").set("save_state", "true");
    let first = start_alone(&scene);
    let pid = first.id() as i32;
    wait_until("a step", LONG, || newest_step(&scene.output_dir()) >= 2);
    let rival = scene.train(&[], &[]);
    assert_eq!(rival.status.code(), Some(78), "{}", text(&rival));
    let said = text(&rival);
    assert!(said.contains("another run is writing") && said.contains(&format!("process {pid} ")));
    kill(pid, "-STOP");
    std::fs::remove_dir_all(scene.output_dir().join("small-step00000002-state")).expect("removed");
    scene.set("max_train_steps", "3");
    let second = scene.train(&[], &[]);
    let said = text(&second);
    assert!(second.status.success(), "{said}");
    assert!(said.contains("takes the place of another run of this name"), "{said}");
    let after = names(&scene.output_dir());
    let bytes = std::fs::read(scene.output_dir().join("small.safetensors")).expect("a file");
    let continued = Instant::now();
    kill(pid, "-CONT");
    let output = first.wait_with_output().expect("ended");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("nothing was written, the files of this name belong to"), "{said}");
    assert!(said.contains("process ") && said.contains("on host `"), "{said}");
    assert!(continued.elapsed() < LONG);
    assert_eq!(names(&scene.output_dir()), after, "{said}");
    let left = std::fs::read(scene.output_dir().join("small.safetensors")).expect("a file");
    assert!(left == bytes, "{said}");
}

/// Names in a folder and what they hold, hidden ones too.
fn names(folder: &Path) -> BTreeMap<String, u64> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let changed = |path: PathBuf| {
        let time = std::fs::metadata(path).and_then(|facts| facts.modified()).expect("a time");
        time.duration_since(std::time::UNIX_EPOCH).expect("since 1970").as_nanos() as u64
    };
    entries.map(|e| (e.file_name().to_string_lossy().into_owned(), changed(e.path()))).collect()
}
