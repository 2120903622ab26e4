//! Whatever happens to a run in the middle: the others end, the facts are told, files are complete.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Scene, lorarun, quoted, text};

/// Variable that marks the processes of one test.
pub const MARK: &str = "LORARUN_TEST_MARK";

/// Starts a run that would take long, saving every step; its processes carry `mark`.
fn start(scene: &mut Scene, processes: &str, mark: &str) -> Child {
    scene
        .set("max_train_steps", "100000")
        .set("save_every_n_steps", "1")
        .set("train_batch_size", "1");
    let config = scene.write_config();
    lorarun()
        .args(["--num_processes", processes, "train"])
        .arg(config)
        .env(MARK, mark)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("lorarun starts")
}

/// Process ids whose environment carries `mark`, launcher included.
pub fn marked(mark: &str) -> Vec<i32> {
    let wanted = format!("{MARK}={mark}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        if environment.split(|b| *b == 0).any(|v| v == wanted.as_bytes()) {
            found.push(pid);
        }
    }
    found
}

pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().map(|e| e.path()).collect()
}

/// Whether a LoRA is there.
fn saved(folder: &Path) -> bool {
    files(folder).iter().any(|path| path.extension().is_some_and(|end| end == "safetensors"))
}

/// Every file of the folder is a whole LoRA, every folder a state, under its final name.
fn assert_complete(folder: &Path) {
    for path in files(folder) {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if name == ".small.lease" {
            // What a killed rank 0 held; the next start takes it.
            continue;
        }
        if name.ends_with("-state") {
            assert!(path.join("state.json").is_file(), "not complete: {name}");
            continue;
        }
        assert!(name.ends_with(".safetensors"), "left behind: {name}");
        let file = formats::lora_file::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        file.modules().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

pub fn kill(pid: i32, signal: &str) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill runs");
    assert!(status.success());
}

#[test]
fn a_killed_rank_ends_the_run_and_every_file_is_whole() {
    for (round, victim) in [1_usize, 0].into_iter().enumerate() {
        let mut scene = Scene::new();
        let mark = format!("killed-{}-{round}", std::process::id());
        let child = start(&mut scene, "2", &mark);
        let launcher = i32::try_from(child.id()).expect("a process id");
        wait_until("the first file", Duration::from_secs(120), || saved(&scene.output_dir()));
        let mut ranks: Vec<i32> = marked(&mark).into_iter().filter(|p| *p != launcher).collect();
        ranks.sort_unstable();
        assert_eq!(ranks.len(), 2);
        kill(ranks[victim], "-KILL");
        let killed_at = Instant::now();
        wait_until("the end of the others", Duration::from_secs(20), || {
            marked(&mark).iter().all(|p| *p == launcher)
        });
        let took = killed_at.elapsed();
        let output = child.wait_with_output().expect("the launcher ends");
        let said = text(&output);
        // The bound is 2 s; the rest is for a loaded machine.
        assert!(took < Duration::from_secs(6), "took {took:?}: {said}");
        assert_eq!(output.status.code(), Some(128 + 9), "{said}");
        assert!(said.contains(&format!("rank {victim}")), "{said}");
        assert_complete(&scene.output_dir());
        assert!(marked(&mark).is_empty());
    }
}

#[test]
fn an_interrupt_saves_and_ends_cleanly() {
    for processes in ["1", "2"] {
        let mut scene = Scene::new();
        let mark = format!("interrupt-{}-{processes}", std::process::id());
        let child = start(&mut scene, processes, &mark);
        wait_until("the first file", Duration::from_secs(120), || saved(&scene.output_dir()));
        kill(i32::try_from(child.id()).expect("a process id"), "-INT");
        let output = child.wait_with_output().expect("the launcher ends");
        let said = text(&output);
        assert_eq!(output.status.code(), Some(75), "{said}");
        assert!(said.contains("saved"), "{said}");
        assert_complete(&scene.output_dir());
        assert!(marked(&mark).is_empty());
    }
}

#[test]
fn a_full_disk_is_an_error_that_loses_nothing() {
    // A file system of 64 KiB: the 400 KiB LoRA cannot fit. Needs the right to mount.
    let mut scene = Scene::new();
    let small = scene.folder.path().join("small-disk");
    std::fs::create_dir(&small).expect("a folder");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&small)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !mounted {
        // Without the right to mount, /dev/full shows that a write error is reported.
        let error = formats::atomic::write_atomic(Path::new("/dev/full/x.safetensors"), |_| Ok(()));
        assert!(error.is_err());
        return;
    }
    scene.set("output_dir", quoted(&small.display().to_string()));
    let output = scene.train(&[], &[]);
    let left = files(&small);
    let unmounted = Command::new("umount").arg(&small).status().is_ok_and(|s| s.success());
    let said = text(&output);
    assert!(unmounted);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("small.safetensors") && said.contains("space"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(left.is_empty(), "left behind: {left:?}");
}
