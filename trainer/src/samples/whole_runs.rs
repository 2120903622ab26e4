//! Whole runs with samples, in this process: what is trained stays the same, and what pictures show.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use collectives::{Env, ReduceWay, Segment};
use formats::picture_text::PictureText;
use models::pipeline::{Pipeline, PipelineOptions, Request};
use models::sampler::{SamplerKind, SamplerOptions};

use crate::options::parse;
use crate::run::Run;
use crate::train::Ending;

const PROMPTS: &str = "sks circle --w 64 --h 64 --s 3 --d 7 --l 4\n\
                       a (blue:1.3) disc --w 64 --h 128 --s 2 --d 8 --ss euler_a --n grey\n\
                       no seed --w 64 --h 64 --s 1 --l 1\n";

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

/// A folder with four pictures and these prompts.
struct Scene {
    folder: tempfile::TempDir,
    words: Vec<String>,
}

impl Scene {
    fn new(prompts: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images/2_sks circle");
        std::fs::create_dir_all(&images).unwrap();
        for index in 0..4_u8 {
            let picture = image::RgbImage::from_fn(64, 64, |x, y| {
                let inside = x.abs_diff(32).pow(2) + y.abs_diff(32).pow(2) < 300;
                let shade = if inside { 200 } else { index * 40 };
                image::Rgb([shade, (y * 2) as u8, 90])
            });
            picture.save(images.join(format!("{index}.png"))).unwrap();
        }
        let at = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(at("prompts.txt"), prompts).unwrap();
        let model = data("parity/model").display().to_string();
        let mut words: Vec<String> = [
            ("pretrained_model_name_or_path", model),
            ("train_data_dir", at("images")),
            ("output_dir", at("out")),
            ("output_name", "small".to_owned()),
            ("sample_prompts", at("prompts.txt")),
        ]
        .map(|(name, value)| format!("--{name}={value}"))
        .into();
        for word in [
            "--network_module=networks.lora",
            "--network_dim=4",
            "--learning_rate=1e-3",
            "--resolution=64",
            "--seed=42",
            "--cache_latents",
            "--max_train_steps=4",
            "--train_batch_size=2",
            "--max_data_loader_n_workers=1",
        ]
        .iter()
        .chain(more)
        {
            words.push((*word).to_owned());
        }
        Self { folder, words }
    }

    /// Trains on so many ranks; bytes of the trained file.
    fn train(&self, ranks: usize, more: &[&str]) -> Vec<u8> {
        // The folder of cached latents is that of the process.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _held = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let words: Vec<std::ffi::OsString> = self
            .words
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .map(Into::into)
            .collect();
        let train = |env: &Env| {
            let parsed = parse(&words).unwrap_or_else(|error| panic!("{error:#}"));
            let run = Run::prepare(&parsed, env).unwrap_or_else(|error| panic!("{error:#}"));
            let ending = run.train(env).unwrap_or_else(|error| panic!("{error:#}"));
            assert_eq!(ending, Ending::Complete);
        };
        if ranks == 1 {
            train(&Env::single());
        } else {
            let segment = Segment::create(ranks, 0).unwrap();
            let env = |rank: usize| Env {
                rank,
                local_rank: rank,
                world_size: ranks,
                local_world_size: ranks,
                segment_fd: Some(segment.fd()),
                reduce: ReduceWay::Staged,
                ..Env::single()
            };
            let train = &train;
            std::thread::scope(|scope| {
                (0..ranks).map(env).for_each(|env| drop(scope.spawn(move || train(&env))));
            });
        }
        std::fs::read(self.folder.path().join("out/small.safetensors")).unwrap()
    }

    fn samples(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.folder.path().join("out/sample")) else {
            return Vec::new();
        };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        files
    }

    /// Names of the samples without the time.
    fn names(&self) -> Vec<String> {
        let name = |path: PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let mut parts: Vec<&str> = name.strip_suffix(".png").unwrap().split('_').collect();
            let time = parts.remove(3);
            assert!(time.len() == 14 && time.starts_with("20"), "{name}");
            parts.join("_")
        };
        self.samples().into_iter().map(name).collect()
    }
}

fn pixels(path: &PathBuf) -> image::RgbImage {
    image::open(path).unwrap().to_rgb8()
}

/// The text of a PNG's `parameters` chunk.
fn parameters(png: &[u8]) -> PictureText {
    let key = b"tEXtparameters\0";
    let at = png.windows(key.len()).position(|part| part == key).unwrap();
    let length = u32::from_be_bytes(png[at - 4..at].try_into().unwrap()) as usize;
    let text = png[at + key.len()..at + 4 + length].iter().map(|byte| char::from(*byte));
    PictureText::parse(&text.collect::<String>())
}

/// Trains with and without samples; all files that are trained are the same bytes.
fn assert_unchanged(scene: &Scene, ranks: usize) {
    let average = scene.folder.path().join("out/small-ema.safetensors");
    let (plain, plain_average) = (scene.train(ranks, &[]), std::fs::read(&average).ok());
    assert!(scene.samples().is_empty(), "nothing is due");
    let sampled = scene.train(ranks, &["--sample_at_first", "--sample_every_n_steps=3"]);
    let same = sampled == plain && std::fs::read(average).ok() == plain_average;
    assert!(same, "{ranks} ranks: samples changed the training");
}

#[test]
fn a_run_with_samples_trains_the_same_bytes() {
    let random = [
        "--network_dropout=0.3",
        "--network_args",
        "rank_dropout=0.2",
        "--caption_dropout_rate=0.2",
        "--ema_decay=0.9",
    ];
    for ranks in [1, 2] {
        let scene = Scene::new(PROMPTS, &random);
        assert_unchanged(&scene, ranks);
        let expected = [
            "000003_00_7",
            "000003_01_8",
            "000003_02",
            "e000000_00_7",
            "e000000_01_8",
            "e000000_02",
        ];
        assert_eq!(scene.names(), expected.map(|name| format!("small_{name}")));
        let files = scene.samples();
        assert_ne!(pixels(&files[0]), pixels(&files[3]), "three steps show");
        let sizes: Vec<(u32, u32)> = files.iter().map(|file| pixels(file).dimensions()).collect();
        assert_eq!(sizes[..3], [(64, 64), (64, 128), (64, 64)]);
    }
    // Samples show the weights that would be saved, and it goes on with those of the training.
    assert_unchanged(&Scene::new(PROMPTS, &["--optimizer_type=AdamWScheduleFree"]), 1);
}

#[test]
fn samples_before_the_first_step_are_the_base_models_pictures() {
    let more = ["--sample_at_first", "--max_train_steps=1", "--clip_skip=2"];
    let made = |ranks: usize, more: &[&str]| {
        // Prompts are encoded each time or before the training; the VAE is the training's or read.
        let mut scene = Scene::new(PROMPTS, more);
        if ranks == 1 {
            scene.words.retain(|word| word != "--cache_latents");
        } else {
            scene.words.push("--network_train_unet_only".to_owned());
        }
        scene.train(ranks, &[]);
        scene.samples().iter().map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>()
    };
    let (one, two) = (made(1, &more), made(2, &more));
    assert_eq!((one.len(), two.len()), (3, 3));
    assert!(one[..2] == two[..2], "any number of ranks makes the same pictures");
    let text = parameters(&one[1]);
    assert_eq!((&*text.prompt, &*text.negative_prompt), ("a (blue:1.3) disc", "grey"));
    assert_eq!((text.size(), text.get("Sampler")), (Some((64, 128)), Some("Euler a")));
    for (name, value) in [("Steps", "2"), ("CFG scale", "7.5"), ("Seed", "8"), ("Clip skip", "2")] {
        assert_eq!(text.get(name), Some(value), "{name}");
    }
    assert!(parameters(&one[2]).get("Seed").is_some_and(|seed| seed.parse::<u64>().is_ok()));
    let model = data("parity/model").display().to_string();
    let pipeline = Pipeline::load(&model, &PipelineOptions::default()).unwrap();
    let request = Request {
        prompt: text.prompt,
        negative_prompt: text.negative_prompt,
        width: 64,
        height: 128,
        seed: 8,
        sampler: SamplerKind::EulerAncestral,
        options: SamplerOptions::new(2),
        guidance_scale: 7.5,
        clip_skip: Some(2),
        ..Request::default()
    };
    let expected = pipeline.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
    let ours = image::load_from_memory(&one[1]).unwrap().to_rgb8().into_raw();
    assert_eq!(ours, expected.to_rgb8(), "a LoRA that has learnt nothing changes nothing");
}

#[test]
fn a_resumed_run_goes_on_with_its_samples() {
    let scene = Scene::new(PROMPTS, &["--max_train_steps=10", "--ema_decay=0.9"]);
    let begins = |length: usize| -> Vec<String> {
        scene.names().iter().map(|name| name[6..6 + length].to_owned()).collect()
    };
    let plain = scene.train(1, &[]);
    // Four steps an epoch: the run ends its third one early.
    let sampled = scene.train(1, &["--sample_at_first", "--sample_every_n_epochs=1"]);
    assert!(sampled == plain);
    let epochs = ["e000000", "e000001", "e000002", "e000003"];
    assert_eq!(begins(7), epochs.iter().flat_map(|name| [*name; 3]).collect::<Vec<_>>());
    std::fs::remove_dir_all(scene.folder.path().join("out")).unwrap();
    scene.train(1, &["--max_train_steps=6", "--save_state"]);
    let more = ["--save_state", "--resume=auto", "--sample_at_first", "--sample_every_n_steps=5"];
    assert!(scene.train(1, &more) == plain, "samples changed a resumed training");
    assert_eq!(begins(6), ["000010"; 3], "the first step is long over");
}

#[test]
fn pictures_that_are_no_numbers_are_left_out() {
    let scene = Scene::new("sks circle --w 64 --h 64 --s 1 --d 3\n", &["--learning_rate=1e30"]);
    scene.train(2, &["--sample_every_n_steps=1", "--max_train_steps=1"]);
    assert!(scene.samples().is_empty());
}

#[test]
fn logs_hold_the_pictures() {
    let scene = Scene::new(PROMPTS, &["--sample_every_n_steps=2", "--max_train_steps=2"]);
    let logs = scene.folder.path().join("logs");
    scene.train(2, &[&format!("--logging_dir={}", logs.display()), "--log_with=all"]);
    let entries = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect()
    };
    let run = entries(&logs).remove(0);
    let events = std::fs::read(&entries(&run.join("network_train"))[0]).unwrap();
    let offline = entries(&run.join("wandb")).remove(0);
    let media: Vec<Vec<u8>> = entries(&offline.join("files/media/images"))
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let files = scene.samples();
    assert_eq!((files.len(), media.len()), (3, 3));
    for (number, file) in files.iter().enumerate() {
        let png = std::fs::read(file).unwrap();
        assert!(media.contains(&png), "{}", file.display());
        for part in [&png[..], format!("sample_{number}").as_bytes()] {
            assert!(events.windows(part.len()).any(|window| window == part), "{number}");
        }
    }
}
