//! Training on several hosts, and what happens when one is lost.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::Scene;
use crate::jobs::{Launcher, kill, ranks_of, start_all, start_one, wait_until_empty};
use crate::lab::Lab;

/// What a line of progress holds.
const STEP: &str = "it/s";
/// For what takes long on a loaded machine.
const LONG: Duration = Duration::from_secs(180);

/// A run that would take long and shows every epoch, which is two steps.
fn endless() -> Scene {
    let mut scene = Scene::new();
    scene.set("max_train_steps", "100000").set("train_batch_size", "1");
    scene
}

fn command(config: &Path) -> [String; 2] {
    ["train".to_owned(), config.display().to_string()]
}

fn start(lab: &Lab, nodes: &str, options: &[&str], config: &Path) -> Vec<Launcher> {
    let command = command(config);
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    start_all(lab, nodes, options, &words)
}

/// The trained tensors; metadata name batch sizes.
fn trained(scene: &Scene) -> Vec<(String, Vec<u8>)> {
    let file = formats::lora_file::read(&scene.output_dir().join("small.safetensors"));
    let tensors = file.expect("a LoRA file").tensors;
    tensors.into_iter().map(|(key, tensor)| (key, tensor.data)).collect()
}

/// Two hosts with two ranks each end with the bytes of one rank of four times the batch.
#[test]
fn hosts_train_what_one_rank_trains() {
    let Some(lab) = Lab::up("hosts_train_what_one_rank_trains", 2) else { return };
    let mut alone = Scene::new();
    alone.set("reproducible", "true").set("max_train_steps", "4");
    alone.trained(&[]);
    let expected = trained(&alone);
    alone.set("train_batch_size", "1");
    std::fs::remove_dir_all(alone.output_dir()).expect("a folder");
    let config = alone.write_config();
    for launcher in start(&lab, "2", &["--nproc_per_node", "2"], &config) {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 0, "{}", end.text);
    }
    assert!(trained(&alone) == expected, "the weights differ");
    for host in [1, 2] {
        assert!(lab.processes(host).is_empty());
    }
}

/// A host that vanishes is noticed in seconds, and the others go on.
#[test]
fn a_power_cut_leaves_the_others_training() {
    let Some(lab) = Lab::up("a_power_cut_leaves_the_others_training", 3) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "1", "--rejoin_wait", "2", "--snapshot_every_n_steps", "2"];
    let mut launchers = start(&lab, "2:3", &options, &config);
    let begun = Instant::now();
    launchers[0].wait_for("epoch 3", begun, LONG);
    let cut = Instant::now();
    lab.cut_power(3);
    let (seen, line) = launchers[0].wait_for("node 2", cut, Duration::from_secs(20));
    let noticed = seen - cut;
    assert!(noticed < Duration::from_secs(4), "noticed after {noticed:?}: {line}");
    let (again, line) = launchers[0].wait_for(STEP, seen, LONG);
    // The rest is what the start and the load of a busy machine take.
    eprintln!("noticed after {noticed:?}, training again after {:?}: {line}", again - cut);
    assert!(again - cut < Duration::from_secs(40), "training again after {:?}", again - cut);
    wait_until_empty(&lab, 3, Duration::from_secs(1));
    launchers[0].signal(libc::SIGTERM);
    for launcher in launchers.drain(..2) {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 75, "{}", end.text);
    }
    for host in [1, 2] {
        wait_until_empty(&lab, host, Duration::from_secs(1));
    }
}

/// Ranks that die on all hosts at about the same time are one failure.
#[test]
fn three_ranks_killed_at_once_are_one_restart() {
    let Some(lab) = Lab::up("three_ranks_killed_at_once_are_one_restart", 3) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "1", "--snapshot_every_n_steps", "2"];
    let mut launchers = start(&lab, "3", &options, &config);
    let begun = Instant::now();
    launchers[0].wait_for("epoch 3", begun, LONG);
    for host in [2, 3, 1] {
        // One that has ended because of another is what was wanted, too.
        for (_, pid) in ranks_of(&lab, host) {
            // SAFETY: a plain system call.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    let killed = Instant::now();
    launchers[0].wait_for(STEP, killed + Duration::from_millis(500), LONG);
    assert_eq!(launchers[0].count("starting again after"), 1);
    launchers[0].signal(libc::SIGTERM);
    for launcher in launchers {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 75, "{}", end.text);
    }
}

/// Without the host that coordinates the others end soon, and say so.
#[test]
fn the_loss_of_host_0_ends_the_others() {
    let Some(lab) = Lab::up("the_loss_of_host_0_ends_the_others", 3) else { return };
    let scene = endless();
    let config = scene.write_config();
    let mut launchers = start(&lab, "2:3", &["--nproc_per_node", "1"], &config);
    let begun = Instant::now();
    launchers[0].wait_for("epoch 2", begun, LONG);
    let cut = Instant::now();
    lab.cut_power(1);
    for launcher in launchers.drain(1..) {
        let end = launcher.end(Duration::from_secs(30));
        let took = cut.elapsed();
        assert_eq!(end.code, 75, "{}", end.text);
        assert!(end.text.contains("node 0"), "{}", end.text);
        assert!(took < Duration::from_secs(10), "took {took:?}");
    }
    for host in [1, 2, 3] {
        wait_until_empty(&lab, host, Duration::from_secs(1));
    }
}

/// A job that lost the host that coordinates goes on exactly where its last state was when it is
/// started again.
#[test]
fn a_job_that_lost_host_0_is_resubmitted_and_ends_as_if_nothing_had_been() {
    let test = "a_job_that_lost_host_0_is_resubmitted_and_ends_as_if_nothing_had_been";
    let Some(lab) = Lab::up(test, 2) else { return };
    let mut scene = Scene::new();
    scene.set("reproducible", "true").set("max_train_steps", "40");
    scene.trained(&[]);
    let expected = trained(&scene);
    std::fs::remove_dir_all(scene.output_dir()).expect("a folder");
    scene.set("train_batch_size", "2").set("resume", "'auto'");
    scene.set("save_every_n_steps", "5").set("save_state", "true");
    let config = scene.write_config();
    let mut launchers = start(&lab, "2", &["--nproc_per_node", "1"], &config);
    launchers[0].wait_for("small-step00000010-state", Instant::now(), LONG);
    lab.cut_power(1);
    let end = launchers.remove(1).end(LONG);
    assert_eq!(end.code, 75, "{}", end.text);
    assert!(!scene.output_dir().join("small.safetensors").exists(), "it had ended already");
    lab.plug(1);
    let again = start(&lab, "2", &["--nproc_per_node", "1"], &config);
    let mut said = String::new();
    for launcher in again {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 0, "{}", end.text);
        said += &end.text;
    }
    assert!(said.contains("[rank 0] goes on from step"), "{said}");
    assert!(trained(&scene) == expected, "the weights differ");
}

/// A rank that is frozen is named, killed and replaced; thawed, it does not exist.
#[test]
fn a_frozen_rank_is_replaced() {
    let Some(lab) = Lab::up("a_frozen_rank_is_replaced", 2) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "1", "--snapshot_every_n_steps", "2"];
    let mut launchers = start(&lab, "2", &options, &config);
    let begun = Instant::now();
    launchers[0].wait_for("epoch 3", begun, LONG);
    let (rank, pid) = ranks_of(&lab, 2)[0];
    kill(pid, libc::SIGSTOP);
    let stopped = Instant::now();
    let (_, line) = launchers[0].wait_for("starting again", stopped, LONG);
    assert!(line.contains(&format!("rank {rank}")), "{line}");
    // SAFETY: a plain system call; the process is gone.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, -1);
    launchers[0].wait_for(STEP, Instant::now(), LONG);
    launchers[1].signal(libc::SIGTERM);
    for launcher in launchers {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 75, "{}", end.text);
    }
}

/// A host that comes back takes part again, from a snapshot on.
#[test]
fn a_host_that_returns_takes_part_again() {
    let Some(lab) = Lab::up("a_host_that_returns_takes_part_again", 2) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "1", "--rejoin_wait", "2", "--snapshot_every_n_steps", "2"];
    let mut launchers = start(&lab, "1:2", &options, &config);
    launchers[0].wait_for("epoch 2", Instant::now(), LONG);
    lab.cut_power(2);
    let cut = Instant::now();
    let (gone, _) = launchers[0].wait_for("is gone", cut, LONG);
    launchers[0].wait_for(STEP, gone, LONG);
    assert_eq!(ranks_of(&lab, 1).len(), 1);
    lab.plug(2);
    let command = command(&config);
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let back = start_one(&lab, 2, "1:2", &options, &words);
    let (again, _) = launchers[0].wait_for("node 1 is back", cut, LONG);
    let (again, _) = launchers[0].wait_for("goes on from step", again, LONG);
    launchers[0].wait_for(STEP, again, LONG);
    assert_eq!(ranks_of(&lab, 2).len(), 1, "host 2 has a rank again");
    back.signal(libc::SIGTERM);
    for launcher in [back, launchers.remove(0)] {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 75, "{}", end.text);
    }
}

/// The network breaks in one direction, for longer than anybody waits: one side goes on, and the
/// other one does not when the network is whole again.
#[test]
fn a_one_way_partition_leaves_one_side_going_on() {
    let Some(lab) = Lab::up("a_one_way_partition_leaves_one_side_going_on", 3) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "1", "--rejoin_wait", "2", "--snapshot_every_n_steps", "2"];
    let mut launchers = start(&lab, "2:3", &options, &config);
    launchers[0].wait_for("epoch 2", Instant::now(), LONG);
    let cut = Instant::now();
    lab.cut_one_way(1, 3);
    let (gone, _) = launchers[0].wait_for("node 2", cut, Duration::from_secs(30));
    launchers[0].wait_for(STEP, gone, LONG);
    // The side that cannot hear has ended its ranks.
    let start = Instant::now();
    while !ranks_of(&lab, 3).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "host 3 goes on as well");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(30).saturating_sub(cut.elapsed()));
    lab.heal(1, 3);
    launchers[0].wait_for(STEP, Instant::now(), LONG);
    launchers[0].signal(libc::SIGTERM);
    for launcher in launchers {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 75, "{}", end.text);
    }
}

/// However a launcher ends, its ranks end with it.
#[test]
fn no_rank_outlives_its_launcher() {
    let Some(lab) = Lab::up("no_rank_outlives_its_launcher", 2) else { return };
    let scene = endless();
    let config = scene.write_config();
    let options = ["--nproc_per_node", "2", "--max_restarts", "0"];
    for (host, signals) in
        [(2, &[libc::SIGKILL][..]), (1, &[libc::SIGKILL]), (1, &[libc::SIGINT, libc::SIGINT])]
    {
        let mut launchers = start(&lab, "2", &options, &config);
        launchers[0].wait_for(STEP, Instant::now(), LONG);
        for signal in signals {
            launchers[host - 1].signal(*signal);
            std::thread::sleep(Duration::from_millis(50));
        }
        wait_until_empty(&lab, host, Duration::from_secs(2));
        for launcher in launchers {
            let end = launcher.end(LONG);
            assert_ne!(end.code, 0, "{}", end.text);
        }
        wait_until_empty(&lab, 3 - host, Duration::from_secs(2));
    }
}

/// A cable that is pulled for a moment, within what a connection bears, changes nothing.
#[test]
fn a_short_silence_is_borne() {
    let Some(lab) = Lab::up("a_short_silence_is_borne", 2) else { return };
    let mut scene = Scene::new();
    scene.set("max_train_steps", "60").set("train_batch_size", "1");
    let config = scene.write_config();
    let mut launchers = start(&lab, "2", &["--nproc_per_node", "1"], &config);
    launchers[0].wait_for(STEP, Instant::now(), LONG);
    lab.unplug(2);
    std::thread::sleep(Duration::from_millis(800));
    lab.plug(2);
    for launcher in launchers {
        let end = launcher.end(LONG);
        assert_eq!(end.code, 0, "{}", end.text);
        assert!(!end.text.contains("starting again"), "{}", end.text);
    }
}
