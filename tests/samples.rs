//! Sample pictures in runs of processes: told in the plan, refused in time, ended politely. What they
//! show, and that they change nothing, is tested in `trainer/src/samples/whole_runs.rs`.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Scene, lorarun, quoted, text};
use crate::interruption::{MARK, kill, marked, wait_until};

const PROMPTS: &str = "sks circle --w 64 --h 64 --s 3 --d 7 --l 4\n\
                       a (blue:1.3) disc --w 64 --h 128 --s 2 --d 8 --ss euler_a --n grey\n\
                       no seed --w 64 --h 64 --s 1 --l 1\n";

/// A run with these prompts.
fn scene(prompts: &str) -> Scene {
    let mut scene = Scene::new();
    let path = scene.folder.path().join("prompts.txt");
    std::fs::write(&path, prompts).expect("prompts");
    scene.set("sample_prompts", quoted(&path.display().to_string()));
    scene.set("max_train_steps", "4").set("train_batch_size", "2");
    scene
}

#[test]
fn ctrl_c_while_sampling_leaves_a_state() {
    for processes in ["1", "2"] {
        // Three prompts on two ranks; each takes minutes.
        let line = "sks circle --w 128 --h 128 --s 998\n";
        let mut scene = scene(&line.repeat(3));
        scene.set("sample_at_first", "true").set("max_train_steps", "3");
        let mark = format!("samples-{}-{processes}", std::process::id());
        let child = lorarun()
            .args(["--num_processes", processes, "train"])
            .arg(scene.write_config())
            .env(MARK, &mark)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("lorarun starts");
        // The lease is taken before the models are loaded; samples begin soon after.
        let lease = scene.output_dir().join(".small.lease");
        wait_until("the start", Duration::from_secs(120), || lease.exists());
        std::thread::sleep(Duration::from_secs(4));
        kill(i32::try_from(child.id()).expect("a process id"), "-INT");
        let asked = Instant::now();
        let output = child.wait_with_output().expect("the launcher ends");
        let said = text(&output);
        assert_eq!(output.status.code(), Some(75), "{said}");
        assert!(asked.elapsed() < Duration::from_secs(15), "{said}");
        assert!(said.contains("samples after step 0: 0 in"), "{said}");
        assert!(said.contains("a signal asked to stop"), "{said}");
        assert!(scene.output_dir().join("small-step00000001-state/state.json").is_file(), "{said}");
        assert!(marked(&mark).is_empty());
        scene.set("resume", "'auto'").set("sample_at_first", "false");
        let output = scene.train(&["--num_processes", processes], &[]);
        assert!(output.status.success(), "{}", text(&output));
    }
}

#[test]
fn broken_prompts_end_the_run_before_it_begins() {
    for (prompts, part) in [
        ("a\nb --w 100\n", "prompts.txt:2: `--w` should be"),
        ("a\n\nb --ss eular\n", "prompts.txt:3: unknown sampler: `eular`"),
        ("# none\n", "the file holds no prompt"),
        (&format!("a\n{}\n", "word ".repeat(300)), "prompts.txt:2: the prompt has 300 tokens"),
    ] {
        let mut scene = scene(prompts);
        scene.set("sample_every_n_epochs", "1");
        let output = scene.train(&["--num_processes", "2"], &[]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert_eq!(said.matches(part).count(), 1, "{said}");
        assert!(!scene.output_dir().exists(), "{said}");
        let output = scene.train(&[], &["--config-check"]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert_eq!(said.matches(part).count(), 1, "{said}");
    }
    let mut scene = scene("a --w 64 --h 64 --s 1\n");
    scene.set("sample_at_first", "true");
    std::fs::create_dir_all(scene.output_dir()).expect("a folder");
    std::fs::write(scene.output_dir().join("sample"), "in the way").expect("a file");
    let said = text(&scene.train(&[], &[]));
    assert!(said.contains("cannot write to `output_dir`") && said.contains("out/sample"), "{said}");
}

#[test]
fn the_plan_tells_of_samples_and_a_run_makes_them() {
    let mut scene = scene(PROMPTS);
    scene.set("sample_every_n_steps", "2").set("max_train_steps", "2");
    let output = scene.train(&["--num_processes", "2"], &[]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("3 pictures every 2 steps, in"), "{said}");
    assert!(said.contains("between steps samples"), "{said}");
    assert!(said.contains("samples after step 2: 3 in"), "{said}");
    let files = std::fs::read_dir(scene.output_dir().join("sample")).expect("samples").count();
    assert_eq!(files, 3, "{said}");
}
