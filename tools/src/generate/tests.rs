//! Whole runs on the small model: what is written, what is read back, what is refused.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use clap::Parser;
use formats::picture_text::PictureText;

use super::*;

/// A command line of `generate`.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name);
    path.canonicalize().expect("test data").display().to_string()
}

/// Runs `generate` with words; gives what it says if it fails.
fn attempt(words: &[&str]) -> Result<(), String> {
    let line = Line::try_parse_from(std::iter::once(&"generate").chain(words));
    run(&line.map_err(|error| error.to_string())?.options).map_err(|error| format!("{error:#}"))
}

/// A folder to write to, and the words that all runs have.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    /// The files that a run writes, in the order of their names.
    fn run(&self, outdir: &str, words: &[&str]) -> Vec<PathBuf> {
        self.attempt(outdir, words).unwrap_or_else(|error| panic!("{words:?}: {error}"));
        self.files(outdir)
    }

    fn attempt(&self, outdir: &str, words: &[&str]) -> Result<(), String> {
        let outdir = self.folder.path().join(outdir).display().to_string();
        let model = data("parity/model");
        let mut all = vec!["--outdir", &outdir, "--device", "cpu", "--sequential_file_name"];
        // A later one wins over none: `--ckpt` is given once.
        if !words.contains(&"--ckpt") {
            all.extend(["--ckpt", &model]);
        }
        all.extend(words);
        attempt(&all)
    }

    fn files(&self, outdir: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.folder.path().join(outdir)) else {
            return Vec::new();
        };
        let mut files: Vec<PathBuf> =
            entries.map(|entry| entry.expect("an entry").path()).collect();
        files.sort();
        files
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    }
}

/// Size, pixels and texts of a PNG, by the `png` crate.
fn read(path: &Path) -> ([u32; 2], Vec<u8>, Vec<(String, String)>) {
    let bytes = std::fs::read(path).expect("a file");
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut pixels).expect("pixels");
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|t| (t.keyword.clone(), t.text.clone()));
    let utf8 = info.utf8_text.iter();
    let utf8 = utf8.map(|t| (t.keyword.clone(), t.get_text().expect("a text")));
    ([info.width, info.height], pixels, latin.chain(utf8).collect())
}

fn pixels(path: &Path) -> Vec<u8> {
    read(path).1
}

fn text(path: &Path, key: &str) -> String {
    let texts = read(path).2;
    let found = texts.iter().find(|(known, _)| known == key);
    found.unwrap_or_else(|| panic!("no {key}: {texts:?}")).1.clone()
}

const QUICK: [&str; 6] = ["--W", "64", "--H", "64", "--steps", "2"];

/// [`QUICK`] and more words.
fn quick<'a>(more: &[&'a str]) -> Vec<&'a str> {
    QUICK.iter().chain(more).copied().collect()
}

#[test]
fn a_picture_is_made_again_from_its_text() {
    let scene = Scene::new();
    let (ring, disc) = (data("lora/lierla_r4.safetensors"), data("tools/in/lierla_r8.safetensors"));
    let networks = ["--network_weights", &ring, &disc];
    let first = scene.run(
        "first",
        &[
            &["--prompt", "a (red:1.2) caf\u{e9} \u{8f2a} --n blurred, two: \"x\" --l 5.5"][..],
            &["--W", "64", "--H", "96", "--steps", "3", "--sampler", "dpmsolver++", "--karras"],
            &["--seed", "7", "--clip_skip", "2", "--network_mul", "0.6", "-0.4"],
            &networks,
        ]
        .concat(),
    );
    assert_eq!(first.len(), 1);
    assert!(first[0].ends_with("im_000001.png"));
    let parameters = text(&first[0], "parameters");
    let expected = "a (red:1.2) caf\u{e9} \u{8f2a} <lora:lierla_r4:0.6> <lora:lierla_r8:-0.4>\nNegative prompt: \
         blurred, two: \"x\"\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, \
         Seed: 7, Size: 64x96, Model: model, Clip skip: 2, RNG: CPU, Lora hashes: \"lierla_r4: ";
    assert!(parameters.starts_with(expected), "{parameters}");
    assert_eq!(text(&first[0], "negative-prompt"), "blurred, two: \"x\"");
    // The command that the text tells, and nothing else.
    let told = PictureText::parse(&parameters);
    let get = |name: &str| told.get(name).expect("a setting").to_owned();
    let (width, height) = told.size().expect("a size");
    let mut words = vec!["--prompt".to_owned(), told.prompt.clone()];
    let settings = [
        ("--negative_prompt", told.negative_prompt.clone()),
        ("--steps", get("Steps")),
        ("--sampler", get("Sampler")),
        ("--scale", get("CFG scale")),
        ("--seed", get("Seed")),
        ("--clip_skip", get("Clip skip")),
        ("--W", width.to_string()),
        ("--H", height.to_string()),
    ];
    words.extend(settings.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    words.extend((get("Schedule type") == "Karras").then(|| "--karras".to_owned()));
    let words: Vec<&str> = words.iter().map(String::as_str).chain(networks).collect();
    let again = scene.run("again", &words);
    assert_eq!(
        std::fs::read(&first[0]).expect("a file"),
        std::fs::read(&again[0]).expect("a file"),
        "the same file, byte for byte"
    );
}

#[test]
fn multipliers_act_and_zero_is_the_base() {
    let scene = Scene::new();
    let file = data("lora/lierla_r4.safetensors");
    let prompts = scene
        .write("p.txt", "# comment\na ring --d 5 --am 0\na ring --d 5\na ring --d 5 --am 0.5\n");
    let lora = ["--network_weights", &file, "--network_module", "networks.lora"];
    let with = scene.run("with", &quick(&[&["--from_file", &prompts][..], &lora].concat()));
    let plain = scene.run("plain", &quick(&["--prompt", "a ring --d 5"]));
    let seen: Vec<Vec<u8>> = with.iter().map(|path| pixels(path)).collect();
    assert_eq!(seen.len(), 3);
    assert!(seen[0] == pixels(&plain[0]), "0 is the base model's picture");
    assert!(seen[1] != seen[0] && seen[2] != seen[0] && seen[1] != seen[2]);
    assert!(text(&with[0], "parameters").starts_with("a ring <lora:lierla_r4:0>\nSteps"));
    let merged = ["--prompt", "a ring --d 5", "--network_merge", "--network_mul", "0.5"];
    let merged = scene.run("merged", &quick(&[&merged[..], &lora].concat()));
    assert!(pixels(&merged[0]) == seen[2], "merged is as applied");
    assert_eq!(text(&merged[0], "parameters"), text(&with[2], "parameters"));
}

#[test]
fn prompts_seeds_and_batches() {
    let scene = Scene::new();
    let prompts =
        scene.write("p.txt", "a ring --d 5,6 --f mine\na disc --s 3 --h 96 --ss euler_a\n");
    let words = ["--from_file", &prompts, "--images_per_prompt", "2", "--seed", "1"];
    let one = scene.run("one", &quick(&words));
    let names: Vec<String> = one.iter().map(|path| networks::name_of(path)).collect();
    assert_eq!(names, ["im_000002", "im_000003", "im_000004", "mine"]);
    let seeds: Vec<String> = one.iter().map(|path| text(path, "seed")).collect();
    // The first two numbers of Python's `random.Random(1)`.
    assert_eq!(seeds, ["6", "3280387012", "1095513148", "5"]);
    assert_eq!(read(&one[1]).0, [64, 96]);
    assert_eq!((text(&one[1], "steps"), text(&one[1], "sampler")), ("3".into(), "euler_a".into()));
    let two = scene.run("two", &quick(&[&words[..], &["--batch_size", "4"]].concat()));
    for (one, two) in one.iter().zip(&two) {
        let far = pixels(one).iter().zip(pixels(two)).map(|(a, b)| a.abs_diff(b)).max();
        assert!(far <= Some(1), "{}: {far:?}", one.display());
    }
}

#[test]
fn a_sheet_has_a_column_for_each_file() {
    let scene = Scene::new();
    let files = [data("lora/lierla_r4.safetensors"), data("tools/in/lierla_r8.safetensors")];
    let words = [
        &["--prompt", "a ring --d 5,6", "--images_per_prompt", "2", "--grid"][..],
        &["--network_weights", &files[0], &files[1], "--network_mul", "0.5", "1"],
    ];
    let written = scene.run("out", &quick(&words.concat()));
    // Two seeds, each without a LoRA and with two files at two multipliers; the sheet.
    assert_eq!(written.len(), 2 * (1 + 2 * 2) + 1);
    assert!(written[0].ends_with("grid.png"));
    let (size, sheet, _) = read(&written[0]);
    let cell = 256;
    assert!(size[0] > 3 * cell && size[1] > 4 * cell, "three columns, four rows: {size:?}");
    // The pictures are in the sheet, four times as large.
    let row = |path: &Path| -> Vec<u8> {
        pixels(path)[..64 * 3].chunks(3).flat_map(|rgb| rgb.repeat(4)).collect()
    };
    for path in &written[1..] {
        let row = row(path);
        assert!(sheet.windows(row.len()).any(|part| part == row), "{}", path.display());
    }
}

#[test]
fn a_picture_of_a_picture() {
    let scene = Scene::new();
    let drawn = Pixels {
        width: 100,
        height: 70,
        channels: 3,
        data: (0..100 * 70 * 3).map(|at| (at / 3 % 100 * 2) as u8).collect(),
    };
    let png = encode_png(&drawn, &[]).expect("a PNG");
    let path = scene.folder.path().join("drawn.png");
    std::fs::write(&path, png).expect("written");
    let path = path.display().to_string();
    let words = ["--prompt", "a ring --d 5", "--image_path", &path, "--strength", "0.5"];
    let words = [&words[..], &["--steps", "4", "--use_original_file_name"]].concat();
    let written = scene.run("out", &[&words[..], &["--images_per_prompt", "2"]].concat());
    let names: Vec<String> = written.iter().map(|path| networks::name_of(path)).collect();
    assert_eq!(names, ["drawn-2", "drawn"]);
    assert_eq!(read(&written[0]).0, [96, 64], "cut to multiples of 32");
    assert!(text(&written[0], "parameters").contains("Denoising strength: 0.5"));
    // A black mask keeps what was there, whatever the prompt.
    let black = Pixels { data: vec![0; drawn.data.len()], ..drawn };
    let mask = scene.folder.path().join("mask.png");
    std::fs::write(&mask, encode_png(&black, &[]).expect("a PNG")).expect("written");
    let mask = mask.display().to_string();
    let kept = |prompt: &str| {
        let words = ["--prompt", prompt, "--image_path", &path, "--mask_path", &mask];
        let written = scene.run(prompt, &[&words[..], &["--seed", "5", "--steps", "4"]].concat());
        pixels(&written[0])
    };
    assert!(kept("a ring") == kept("a disc"));
}

#[test]
fn highres_fix_writes_both_stages() {
    let scene = Scene::new();
    let words = ["--prompt", "a ring --d 5", "--W", "128", "--H", "128", "--steps", "4"];
    let more = ["--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--highres_fix_save_1st"];
    let written = scene.run("out", &[&words[..], &more].concat());
    let names: Vec<String> = written.iter().map(|path| networks::name_of(path)).collect();
    assert_eq!(names, ["im_0000001", "im_1000001"]);
    assert_eq!((read(&written[0]).0, read(&written[1]).0), ([64, 64], [128, 128]));
    let alone = scene.run("alone", &quick(&["--prompt", "a ring --d 5"]));
    assert!(pixels(&written[0]) == pixels(&alone[0]), "the first stage is a picture by itself");
    let told = text(&written[1], "parameters");
    assert!(told.contains("Size: 64x64") && told.contains("Hires resize: 128x128"), "{told}");
    assert!(told.contains("Steps: 2,") && told.contains("Hires steps: 4"), "{told}");
}

#[test]
fn models_that_predict_v() {
    let scene = Scene::new();
    let model = data("parity-sd2/model");
    let words = ["--ckpt", &model, "--prompt", "a ring --d 5", "--v2", "--v_parameterization"];
    let v = scene.run("v", &quick(&words));
    assert_eq!(read(&v[0]).0, [64, 64]);
    let said = scene.attempt("v1", &quick(&["--prompt", "a ring", "--v2"])).expect_err("it is 1.x");
    assert!(said.contains("`v2 = true` contradicts the model"), "{said}");
}

#[test]
fn bad_input_is_one_clear_error_and_writes_nothing() {
    let scene = Scene::new();
    let other = data("parity-sd2/lierla/init.safetensors");
    let lora = data("lora/lierla_r4.safetensors");
    let file = scene.write("p.txt", "a ring\n\na disc --steps 4\n");
    let late = scene.write("late.txt", "a ring\na disc --ss eular\n");
    let long = "word ".repeat(80);
    let ring = ["--prompt", "a ring"];
    let cases: [(&[&str], &[&str]); 24] = [
        (&["--sampler", "eular_a"], &["unknown sampler: `eular_a`", "did you mean `euler_a`"]),
        (&["--network_weights", &other], &["Stable Diffusion 2", "init.safetensors"]),
        (&["--W", "500"], &["`--W`", "it is: 500", "hint: take 496 or 504"]),
        (&["--H", "8"], &["`--H`", "hint: take 64"]),
        (&["--prompt", &long], &["80 tokens, 75 fit", "--max_embeddings_multiples 2"]),
        (&["--from_file", &file], &["p.txt:3: unknown option", "did you mean `--s`?"]),
        (&["--from_file", &late], &["late.txt:2: `--ss`: unknown sampler", "`euler`"]),
        (&["--from_file", "/nowhere"], &["/nowhere: the file of prompts cannot be read"]),
        (&["--prompt", "a --zz 1"], &["`--prompt`: unknown option of a prompt: `--zz`"]),
        (&["--prompt", "a {red|blue} ring"], &["choices in braces", "{red|blue}"]),
        (&["--prompt", "a <lora:ring:1>"], &["not applied: `<lora:ring:1>`"]),
        (&["--prompt", "a --am 1"], &["`--am` gives 1 multipliers", "applied: 0"]),
        (&["--network_weights", &lora, "--network_mul", "1", "0.5"], &["1 files", "gives: 2"]),
        (&["--network_weights", "/nowhere.safetensors"], &["/nowhere.safetensors"]),
        (&["--network_weights", &lora, "--network_module", "networks.loha"], &["another kind"]),
        (&["--network_mul", "1"], &["`--network_mul` is given without `--network_weights`"]),
        (&["--network_weights", &lora, "--network_merge", "--grid"], &["leave one of the two out"]),
        (&["--control_net_models", "x"], &["`--control_net_models` cannot be done: ControlNet"]),
        (&["--clip_guidance_scale", "-1"], &["`--clip_guidance_scale` cannot be done"]),
        (&["--sampler", "ddim", "--karras"], &["no Karras spacing: `ddim`"]),
        (&["--steps", "0"], &["between 1 and 998, it is: 0"]),
        (&["--image_path", "/nowhere.png"], &["`/nowhere.png` cannot be used"]),
        (&["--highres_fix_scale", "0.05"], &["`--highres_fix_scale 0.05`", "first stage"]),
        (&["--device", "gpu"], &["`--device` means no device: `gpu`"]),
    ];
    for (words, parts) in cases {
        let has_prompt = words.contains(&"--prompt") || words.contains(&"--from_file");
        let all = if has_prompt { words.to_vec() } else { [&ring[..], words].concat() };
        // The device is given once.
        let said = match words.contains(&"--device") {
            true => attempt(&[&["--ckpt", &data("parity/model")], &all[..]].concat()),
            false => scene.attempt("out", &all),
        };
        let said = said.expect_err("a refusal");
        for part in parts {
            assert!(said.contains(part), "{words:?} lacks {part}:\n{said}");
        }
        assert!(scene.files("out").is_empty(), "{words:?}");
    }
    let outdir = scene.write("file", "");
    let said = attempt(&["--ckpt", "/nowhere", "--prompt", "a", "--outdir", &outdir]);
    let said = said.expect_err("a file is no folder");
    assert!(said.contains("cannot write to `--outdir`, it is not a folder"), "{said}");
    let said = attempt(&[]).expect_err("no model");
    assert!(said.contains("`--ckpt` is missing\nhint: `lorarun generate --ckpt"), "{said}");
    let said = attempt(&["--ckpt", "x"]).expect_err("no prompt");
    assert!(said.contains("`--prompt`, `--from_file` or `--interactive` is missing"), "{said}");
}
