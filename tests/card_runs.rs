//! Whole runs on an emulated card beside the CPU's: weights, captures, resuming, ranks, fp16.
//!
//! They run within this process, one at a time, as a card that captures takes no other work.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use collectives::{Env, ReduceWay, Segment};
use engine::Device;
use formats::lora_file::{self, LoraFile};
use trainer::options;
use trainer::run::Run;
use trainer::train::Ending;

use crate::harness::{Scene, quoted};

/// Bytes of an emulated card.
const MEMORY: usize = 2 << 30;

/// The cards of ranks 0 and 1, for one test at a time.
fn cards() -> MutexGuard<'static, Vec<Device>> {
    static CARDS: OnceLock<Mutex<Vec<Device>>> = OnceLock::new();
    let cards = CARDS.get_or_init(|| {
        let open = |rank: usize| {
            let device = emulator::open(MEMORY).expect("an emulated card");
            trainer::device::register(&format!("cuda:{rank}"), device);
            device
        };
        Mutex::new((0..2).map(open).collect())
    });
    cards.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run of two samples a step on the small model and two pictures, whose latents the CPU has cached:
/// the VAE would take an emulated card longer than the training.
fn scene() -> Scene {
    let mut scene = Scene::new();
    for index in 2..8 {
        for kind in ["png", "txt"] {
            let path = scene.images().join(format!("{index}.{kind}"));
            std::fs::remove_file(path).expect("a removed picture");
        }
    }
    scene.set("train_batch_size", "2").set("max_train_steps", "1");
    // The emulator takes most of a minute for a step of 128 pixels.
    scene.set("resolution", "'64,64'").set("network_train_unet_only", "true");
    scene.set("cache_latents_to_disk", "true").set("no_half_vae", "true");
    // At this size the self-attention of one pixel has no gradient but rounding. AdamW's own eps
    // would make weights of that, as large as any; with this one steps follow the gradient. They are
    // small, so that what rounding does to one step is not what the next one starts from.
    scene.set("optimizer_args", "['eps=1e-3']").set("learning_rate", "1e-4");
    on_cpu(&scene);
    std::fs::remove_dir_all(scene.output_dir()).expect("the file of the CPU is removed");
    scene.set("max_train_steps", "3");
    scene
}

/// Trains as the rank that `env` says, on its card or on the CPU.
fn train(config: &Path, device: &str, env: &Env) {
    let words = [config.as_os_str().to_owned(), "--device".into(), device.into()];
    let parsed = options::parse(&words).unwrap_or_else(|error| panic!("{error:#}"));
    let run = Run::prepare(&parsed, env).unwrap_or_else(|error| panic!("{error:#}"));
    let ending = run.train(env).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(ending, Ending::Complete);
}

fn trained(scene: &Scene, device: &str) -> LoraFile {
    train(&scene.write_config(), device, &Env::single());
    read(&scene.output_dir())
}

fn read(folder: &Path) -> LoraFile {
    lora_file::read(&folder.join("small.safetensors")).expect("a LoRA file")
}

fn on_card(scene: &Scene) -> LoraFile {
    trained(scene, "cuda")
}

fn on_cpu(scene: &Scene) -> LoraFile {
    trained(scene, "cpu")
}

/// The trained file's bytes.
fn bytes(scene: &Scene) -> Vec<u8> {
    std::fs::read(scene.output_dir().join("small.safetensors")).expect("a file")
}

/// Cosine of the angle between the ways that two files went from zero, in the upper half of the
/// U-Net. Gradients of the lower half come through the group norms of one pixel at the lowest level,
/// which multiply rounding by a hundred and more: at this size they agree to a hundredth only.
fn cosine(a: &LoraFile, b: &LoraFile) -> f64 {
    let (mut dot, mut of_a, mut of_b) = (0., 0., 0.);
    let compared = |key: &&String| key.ends_with("lora_up.weight") && key.contains("_up_blocks_");
    for key in a.tensors.keys().filter(compared) {
        let values = |file: &LoraFile| {
            let mut out = Vec::new();
            let tensor = &file.tensors[key];
            formats::extend_f32(tensor.dtype, &tensor.data, &mut out);
            out
        };
        for (x, y) in values(a).into_iter().zip(values(b)) {
            let (x, y) = (f64::from(x), f64::from(y));
            (dot, of_a, of_b) = (dot + x * y, of_a + x * x, of_b + y * y);
        }
    }
    dot / (of_a * of_b).sqrt()
}

#[test]
#[ignore = "minutes on an emulated card"]
fn the_embedded_reference_holds_on_a_card() {
    let cards = cards();
    let report = trainer::selftest::run_embedded(cards[0], false).expect("a selftest");
    assert!(report.compared > 100, "{}", report.compared);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
}

#[test]
fn steps_on_a_card_are_those_of_the_cpu_captured_or_not() {
    let _cards = cards();
    let mut scene = scene();
    // The second step is captured, the third is its replay.
    let card = on_card(&scene);
    let captured = bytes(&scene);
    let cosine = cosine(&card, &on_cpu(&scene));
    println!("cosine {cosine:.6}");
    assert!(cosine > 0.9999, "{cosine}");
    scene.set("no_cuda_graph", "true");
    on_card(&scene);
    assert!(captured == bytes(&scene), "captured steps differ");
}

#[test]
#[ignore = "minutes on an emulated card"]
fn half_precision_on_a_card_learns_the_same_direction() {
    let _cards = cards();
    let plain = on_cpu(&scene());
    for precision in ["bf16", "fp16"] {
        let mut scene = scene();
        scene.set("mixed_precision", quoted(precision));
        let cosine = cosine(&on_card(&scene), &plain);
        println!("{precision}: cosine {cosine:.4}");
        // Eight bits of fraction through a hundred small layers: 0.97 was seen.
        assert!(cosine > 0.95, "{precision}: {cosine}");
    }
}

#[test]
#[ignore = "minutes on an emulated card"]
fn captured_steps_are_those_that_are_not_to_the_bit() {
    let _cards = cards();
    let mut scene = scene();
    // Two image sizes take turns: each has a capture of its own, in the same memory.
    let tall = image::RgbImage::from_fn(64, 192, |x, y| image::Rgb([x as u8 * 3, y as u8, 90]));
    for index in 0..2 {
        tall.save(scene.images().join(format!("tall{index}.png"))).expect("a saved picture");
        let caption = scene.images().join(format!("tall{index}.txt"));
        std::fs::write(caption, "sks stripes").expect("a saved caption");
    }
    for (key, value) in [
        ("enable_bucket", "true"),
        ("min_bucket_reso", "64"),
        ("max_bucket_reso", "256"),
        ("max_train_steps", "8"),
    ] {
        scene.set(key, value);
    }
    // Their latents, too, are the CPU's.
    on_cpu(&scene);
    on_card(&scene);
    let captured = bytes(&scene);
    scene.set("no_cuda_graph", "true");
    on_card(&scene);
    assert!(captured == bytes(&scene), "captured steps differ");
}

#[test]
#[ignore = "minutes on an emulated card"]
fn accumulated_and_host_optimised_steps_are_those_of_the_cpu() {
    let _cards = cards();
    for (key, value) in [
        ("gradient_accumulation_steps", "2"),
        ("optimizer_type", "'SGDNesterov'"),
        ("optimizer_type", "'AdamW8bit'"),
        ("network_dropout", "0.2"),
    ] {
        let mut scene = scene();
        scene.set(key, value);
        if value == "'SGDNesterov'" {
            scene.set("optimizer_args", "['momentum=0.9']");
        }
        let cosine = cosine(&on_card(&scene), &on_cpu(&scene));
        println!("{key} {value}: cosine {cosine:.6}");
        assert!(cosine > 0.999, "{key} {value}: {cosine}");
    }
}

#[test]
#[ignore = "minutes on an emulated card"]
fn samples_on_a_card_are_those_of_the_cpu_and_change_nothing() {
    let _cards = cards();
    let mut scene = scene();
    on_card(&scene);
    let without = bytes(&scene);
    let prompts = scene.folder.path().join("prompts.txt");
    std::fs::write(&prompts, "sks circle --w 64 --h 64 --s 2 --d 3\n").expect("prompts");
    scene.set("sample_prompts", quoted(&prompts.display().to_string()));
    // Before the first step, and between a captured step and its replay.
    scene.set("sample_at_first", "true").set("sample_every_n_steps", "2");
    on_card(&scene);
    assert!(bytes(&scene) == without, "samples changed the training");
    let pictures = |scene: &Scene| -> Vec<image::RgbImage> {
        let folder = scene.output_dir().join("sample");
        let mut files: Vec<_> =
            std::fs::read_dir(&folder).expect("samples").flatten().map(|e| e.path()).collect();
        files.sort();
        let read = |path: std::path::PathBuf| image::open(path).expect("a picture").to_rgb8();
        let pictures = files.into_iter().map(read).collect();
        std::fs::remove_dir_all(folder).expect("removed");
        pictures
    };
    let card = pictures(&scene);
    on_cpu(&scene);
    let cpu = pictures(&scene);
    assert_eq!((card.len(), cpu.len()), (2, 2));
    for (card, cpu) in card.iter().zip(&cpu) {
        let apart: u64 = card.iter().zip(cpu.iter()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        let mean = apart as f64 / card.len() as f64;
        println!("mean difference {mean:.3} of 255");
        assert!(mean < 1., "{mean}");
    }
}

#[test]
#[ignore = "minutes on an emulated card"]
fn a_run_resumed_on_a_card_never_stopped() {
    let _cards = cards();
    for optimizer in ["AdamW", "AdamW8bit"] {
        let mut scene = scene();
        scene
            .set("optimizer_type", quoted(optimizer))
            .set("save_every_n_steps", "2")
            .set("save_state", "true")
            .set("network_train_unet_only", "true");
        on_card(&scene);
        let whole = bytes(&scene);
        std::fs::remove_file(scene.output_dir().join("small.safetensors")).expect("removed");
        let state = scene.output_dir().join("small-step00000002-state");
        scene.set("resume", quoted(&state.display().to_string()));
        on_card(&scene);
        assert!(whole == bytes(&scene), "{optimizer}: resumed on the card");
        // What a card saved is what the CPU saves: it goes on from there.
        let card = read(&scene.output_dir());
        let cosine = cosine(&on_cpu(&scene), &card);
        assert!(cosine > 0.9999, "{optimizer} resumed on the CPU: {cosine}");
    }
}

#[test]
#[ignore = "minutes on an emulated card"]
fn two_ranks_with_a_card_each_are_one_with_twice_the_batch() {
    let _cards = cards();
    let one = on_card(&scene());
    // Sums after the captured work of a step, and sums while its backward pass goes on.
    for no_graph in ["false", "true"] {
        let mut scene = scene();
        scene.set("train_batch_size", "1").set("no_cuda_graph", no_graph);
        two_ranks(&scene);
        let cosine = cosine(&read(&scene.output_dir()), &one);
        println!("two ranks: cosine {cosine:.6}");
        assert!(cosine > 0.9999, "{cosine}");
    }
}

#[test]
#[ignore = "minutes on an emulated card"]
fn one_rank_in_place_of_two_takes_two_micro_steps_to_the_same_lora() {
    let _cards = cards();
    let whole = on_card(&scene());
    let mut scene = scene();
    scene.set("train_batch_size", "1");
    let env = Env { full_world_size: Some(2), ..Env::single() };
    train(&scene.write_config(), "cuda", &env);
    let cosine = cosine(&read(&scene.output_dir()), &whole);
    println!("one rank in place of two: cosine {cosine:.6}");
    assert!(cosine > 0.9999, "{cosine}");
}

fn two_ranks(scene: &Scene) {
    let segment = Segment::create(2, 0).expect("a segment");
    let env = |rank: usize| Env {
        rank,
        local_rank: rank,
        world_size: 2,
        local_world_size: 2,
        segment_fd: Some(segment.fd()),
        reduce: ReduceWay::Staged,
        ..Env::single()
    };
    let config = scene.write_config();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (config, env) = (&config, env(rank));
            scope.spawn(move || train(config, "cuda", &env));
        }
    });
}

#[test]
#[ignore = "minutes on an emulated card"]
fn an_overflow_of_fp16_halves_the_scale_and_is_no_failure() {
    let _cards = cards();
    let mut scene = scene();
    let logs = scene.folder.path().join("logs");
    for (key, value) in [
        ("mixed_precision", "'fp16'".to_owned()),
        // Losses a hundred times as large: at the first scale their gradients overflow.
        ("v_pred_like_loss", "100.0".to_owned()),
        ("max_train_steps", "12".to_owned()),
        ("max_skipped_steps", "0".to_owned()),
        ("logging_dir", quoted(&logs.display().to_string())),
    ] {
        scene.set(key, value);
    }
    let file = on_card(&scene);
    let run = std::fs::read_dir(&logs).expect("logs").flatten().next().expect("a run's folder");
    let text = std::fs::read_to_string(run.path().join("steps.jsonl")).expect("the steps");
    let scales: Vec<f64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
        .map(|line| line["loss_scale"].as_f64().expect("a scale"))
        .collect();
    println!("{scales:?}");
    assert_eq!(scales[..2], [65536., 32768.], "{text}");
    assert!(scales.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] / 2.), "{text}");
    assert_eq!(scales[10], scales[11], "it has found a scale that holds: {text}");
    let moved = |key: &&String| key.ends_with("lora_up.weight");
    let values = file.tensors.keys().filter(moved).flat_map(|key| &file.tensors[key].data);
    assert!(values.into_iter().any(|byte| *byte != 0), "nothing was learned");
}

#[test]
#[ignore = "minutes on an emulated card"]
fn weights_of_half_precision_are_rounded_on_both_devices() {
    let _cards = cards();
    let mut scene = scene();
    scene.set("mixed_precision", "'bf16'").set("full_bf16", "true");
    for file in [on_card(&scene), on_cpu(&scene)] {
        for (key, tensor) in file.tensors.iter().filter(|(key, _)| key.ends_with(".weight")) {
            let mut values = Vec::new();
            formats::extend_f32(tensor.dtype, &tensor.data, &mut values);
            let exact = values.iter().all(|x| x.to_bits() & 0xffff == 0);
            assert!(exact, "{key} is not bf16");
        }
    }
}
