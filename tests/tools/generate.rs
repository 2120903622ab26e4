//! `lorarun generate` as a command: what it prints where, its exit codes, and that bad input leaves
//! nothing behind. What the pictures show is in `tiny_sd`, the command's rules are tested in the crate.

use std::path::Path;

use crate::harness::{lorarun, root, text};

fn generate(outdir: &Path, more: &[&str]) -> std::process::Output {
    lorarun()
        .current_dir(root())
        .args(["generate", "--ckpt", "examples/tiny-sd", "--steps", "2", "--H", "64"])
        .arg("--outdir")
        .arg(outdir)
        .args(more)
        .output()
        .expect("lorarun runs")
}

#[test]
fn stdout_names_the_pictures_and_they_say_how_they_were_made() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let prompt = "a red circle, white background --d 7";
    let arguments = ["--prompt", prompt, "--sampler", "euler_a", "--W", "64"];
    let output = generate(folder.path(), &arguments);
    assert!(output.status.success(), "{}", text(&output));
    let stdout = String::from_utf8(output.stdout).expect("text");
    let paths: Vec<&Path> = stdout.lines().map(Path::new).collect();
    let [path] = paths[..] else { panic!("one line is expected: {stdout}") };
    assert!(path.starts_with(folder.path()) && path.extension().is_some_and(|e| e == "png"));
    let picture = image::open(path).expect("a picture");
    assert_eq!((picture.width(), picture.height()), (64, 64));
    let bytes = std::fs::read(path).expect("the file");
    let bytes = String::from_utf8_lossy(&bytes);
    for part in ["parameters", "a red circle, white background", "Seed: 7", "Sampler: Euler a"] {
        assert!(bytes.contains(part), "{part} is not in the file");
    }
}

#[test]
fn bad_input_is_one_error_with_a_hint_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let outdir = folder.path().join("pictures");
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "a red circle --w 64\na blue cross --zz 3\n").expect("a file");
    let (prompts, long) = (prompts.display().to_string(), "circle ".repeat(80));
    let sd2 = "tests/data/parity-sd2/lierla/init.safetensors";
    for (arguments, code, words) in [
        (vec!["--prompt", "x", "--sampler", "eular"], 64, "did you mean `euler`"),
        (vec!["--prompt", "x", "--W", "65"], 64, "take 64 or 72"),
        (vec!["--prompt", "x", "--network_weights", sd2], 1, "Stable Diffusion 2.x"),
        (vec!["--prompt", &long], 1, "--max_embeddings_multiples"),
        (vec!["--from_file", &prompts], 64, "prompts.txt:2: unknown option of a prompt: `--zz`"),
    ] {
        let output = generate(&outdir, &arguments);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(words) && said.contains("hint: "), "{arguments:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        let left = outdir.read_dir().map_or(0, Iterator::count);
        assert_eq!(left, 0, "{arguments:?} left files");
    }
    let output = generate(Path::new("/proc/nowhere"), &["--prompt", "x"]);
    assert_eq!(output.status.code(), Some(64), "{}", text(&output));
    assert!(text(&output).contains("cannot write to `--outdir`"), "{}", text(&output));
}
