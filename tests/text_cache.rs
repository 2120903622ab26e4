//! `cache_text_encoder_outputs`: what is trained is the same to the bit, files beside images are used
//! again, and those of something else are refused by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use formats::safetensors_file::{SafetensorsFile, write_safetensors};
use formats::{Dtype, OwnedTensor, TensorFile};

use crate::harness::{Scene, data, lorarun, quoted, text};

fn scene(model: &Path, batch: usize) -> Scene {
    let mut scene = Scene::new();
    for (key, value) in [
        ("pretrained_model_name_or_path", quoted(&model.display().to_string())),
        ("train_batch_size", batch.to_string()),
        ("network_train_unet_only", "true".to_owned()),
        ("max_train_steps", "3".to_owned()),
    ] {
        scene.set(key, value);
    }
    scene
}

fn sdxl() -> PathBuf {
    data("parity-sdxl/model")
}

/// Trains and gives the file's tensors and what was said.
fn train(scene: &Scene, ranks: usize) -> (BTreeMap<String, OwnedTensor>, String) {
    let ranks = ranks.to_string();
    let output = scene.train(&["--num_processes", &ranks], &[]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let file = formats::lora_file::read(&scene.output_dir().join("small.safetensors"));
    (file.expect("a LoRA").tensors, said)
}

/// Trains and gives what was said when that was refused.
fn refused(scene: &Scene) -> String {
    let output = scene.train(&["--num_processes", "1"], &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(!scene.output_dir().join("small.safetensors").exists(), "{said}");
    said
}

/// Files of the text cache with the time of their last change.
fn cached(scene: &Scene) -> BTreeMap<PathBuf, SystemTime> {
    let Ok(entries) = scene.images().join(".lorarun-cache").read_dir() else {
        return BTreeMap::new();
    };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let ours = paths.filter(|path| path.display().to_string().ends_with("_te_outputs.safetensors"));
    let time = |path: &PathBuf| path.metadata().and_then(|m| m.modified()).expect("a time");
    ours.map(|path| (path.clone(), time(&path))).collect()
}

/// A copy of a model's folder.
fn copy_of(model: &Path, folder: &Path) -> PathBuf {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).expect("a folder");
        for entry in from.read_dir().expect("a folder") {
            let from = entry.expect("an entry").path();
            let to = to.join(from.file_name().expect("a name"));
            if from.is_dir() {
                copy(&from, &to);
            } else {
                std::fs::copy(&from, &to).expect("a copy");
            }
        }
    }
    let copied = folder.join("model");
    copy(model, &copied);
    copied
}

/// Multiplies a tensor of a file.
fn scale(path: &Path, name: &str, factor: f32) {
    let file = SafetensorsFile::open(path).expect("a file");
    let mut tensors: BTreeMap<String, OwnedTensor> = file
        .names()
        .into_iter()
        .map(|name| (name.to_owned(), file.view(name).expect("a tensor").to_owned_tensor()))
        .collect();
    let view = file.view(name).expect("a tensor");
    let scaled: Vec<f32> = view.to_f32().iter().map(|x| x * factor).collect();
    let scaled = OwnedTensor::from_f32(&view.shape, &scaled, Dtype::F32).expect("a tensor");
    tensors.insert(name.to_owned(), scaled);
    drop(view);
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &tensors, None).expect("bytes");
    drop(file);
    std::fs::write(path, bytes).expect("a written file");
}

#[test]
fn in_memory_and_on_disk_the_same_is_trained_to_the_bit() {
    // 3 captions to a batch of the cache, 2 or 4 to one of the training.
    for ranks in [1, 2] {
        let plain = scene(&sdxl(), 4 / ranks);
        let (wanted, _) = train(&plain, ranks);
        let mut cache = scene(&sdxl(), 4 / ranks);
        cache.set("cache_text_encoder_outputs", "true").set("text_encoder_batch_size", "3");
        let (in_memory, said) = train(&cache, ranks);
        assert!(in_memory == wanted, "in memory, {ranks} ranks");
        assert!(said.contains("8 captions are encoded"), "{said}");
        assert!(cached(&cache).is_empty());
        cache.set("cache_text_encoder_outputs_to_disk", "true");
        let (on_disk, said) = train(&cache, ranks);
        assert!(on_disk == wanted, "on disk, {ranks} ranks");
        assert!(said.contains("of 8 images are on disk, 0 of them from earlier runs"), "{said}");
        let files = cached(&cache);
        assert_eq!(files.len(), 8);
        // The other number of ranks reads the same files.
        let (again, said) = train(&cache, ranks);
        assert!(again == wanted, "from disk, {ranks} ranks");
        assert!(said.contains("of 8 images are on disk, 8 of them from earlier runs"), "{said}");
        assert_eq!(cached(&cache), files, "written again");
    }
}

#[test]
fn a_run_with_samples_validation_long_and_weighted_captions_is_the_same() {
    let run = |cache: bool| {
        let mut scene = scene(&sdxl(), 2);
        let prompts = scene.folder.path().join("prompts.txt");
        std::fs::write(&prompts, "sks circle --w 64 --h 64 --s 1 --d 1\n").expect("a file");
        scene.set("sample_prompts", quoted(&prompts.display().to_string()));
        let first = scene.images().join("0.txt");
        std::fs::write(first, "a (bright:1.3) sks circle, ".repeat(12)).expect("a caption");
        for (key, value) in [
            ("sample_at_first", "true"),
            ("max_token_length", "150"),
            ("weighted_captions", "true"),
            ("validation_split", "0.25"),
            ("validate_every_n_steps", "2"),
            ("cache_text_encoder_outputs_to_disk", if cache { "true" } else { "false" }),
        ] {
            scene.set(key, value);
        }
        let trained = train(&scene, 1).0;
        let samples = scene.output_dir().join("sample").read_dir().expect("samples");
        let pictures: Vec<Vec<u8>> = samples
            .map(|entry| std::fs::read(entry.expect("an entry").path()).expect("it"))
            .collect();
        (trained, pictures, cached(&scene).len())
    };
    let (plain, cached) = (run(false), run(true));
    assert!(plain.0 == cached.0, "the LoRA");
    assert!(plain.1 == cached.1 && plain.1.len() == 1, "the sample");
    assert_eq!((plain.2, cached.2), (0, 8), "also of images held out");
}

#[test]
fn sd1_trains_the_same_with_the_cache_and_its_layers_are_told_apart() {
    let model = data("parity/model");
    let mut scene = scene(&model, 2);
    scene.set("clip_skip", "2");
    let (wanted, _) = train(&scene, 1);
    scene.set("cache_text_encoder_outputs_to_disk", "true");
    assert!(train(&scene, 1).0 == wanted);
    std::fs::remove_file(scene.output_dir().join("small.safetensors")).expect("the LoRA");
    scene.set("clip_skip", "1");
    let said = refused(&scene);
    assert!(said.contains("of 8 of 8 images are for something else"), "{said}");
    assert!(said.contains("`clip_skip` was `2` when it was made, it is now: `1`"), "{said}");
}

#[test]
fn files_of_something_else_are_refused_by_name_and_damaged_ones_made_anew() {
    let home = tempfile::tempdir().expect("a folder");
    let model = copy_of(&sdxl(), home.path());
    let mut scene = scene(&model, 2);
    scene.set("cache_text_encoder_outputs_to_disk", "true").set("max_train_steps", "1");
    let (wanted, _) = train(&scene, 1);
    let lora = scene.output_dir().join("small.safetensors");
    let files = cached(&scene);
    let damaged = files.keys().nth(3).expect("a file").clone();
    let whole = std::fs::read(&damaged).expect("it");
    std::fs::write(&damaged, &whole[..whole.len() / 2]).expect("a cut file");
    let (again, said) = train(&scene, 1);
    assert!(again == wanted);
    assert!(said.contains("7 of them from earlier runs"), "{said}");
    assert_eq!(std::fs::read(&damaged).expect("it"), whole);
    std::fs::remove_file(&lora).expect("the LoRA");

    let caption = scene.images().join("5.txt");
    let before = std::fs::read_to_string(&caption).expect("a caption");
    std::fs::write(&caption, "a square").expect("a caption");
    let said = refused(&scene);
    for words in [
        "of 1 of 8 images are for something else",
        "5.png_te_outputs.safetensors",
        "was made for the caption `sks circle, size 5`, which is now: `a square`",
        "hint: if that was changed on purpose, remove the files",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    std::fs::write(&caption, before).expect("a caption");

    // The vocabulary's last merge is gone: no caption here is read otherwise.
    let tokenizer = model.join("tokenizer_2");
    std::fs::create_dir(&tokenizer).expect("a folder");
    let tokens = formats::clip_vocabulary::tokens().into_iter().zip(0_u32..);
    let vocabulary: BTreeMap<String, u32> = tokens.collect();
    let vocabulary = serde_json::to_string(&vocabulary).expect("JSON");
    std::fs::write(tokenizer.join("vocab.json"), vocabulary).expect("a vocabulary");
    let mut merges: Vec<String> =
        formats::clip_vocabulary::merges().map(|(a, b)| format!("{a} {b}")).collect();
    merges.pop();
    std::fs::write(tokenizer.join("merges.txt"), merges.join("\n")).expect("merges");
    let said = refused(&scene);
    assert!(said.contains("of 8 of 8 images") && said.contains("another tokenizer"), "{said}");
    std::fs::remove_dir_all(&tokenizer).expect("the folder");

    let weights = model.join("text_encoder_2/model.safetensors");
    scale(&weights, "text_model.encoder.layers.0.mlp.fc1.weight", 1.5);
    let said = refused(&scene);
    assert!(said.contains("of 8 of 8 images") && said.contains("another text encoder"), "{said}");
    // Who asks not to look gets what is there.
    scene.set("skip_cache_check", "true");
    assert!(train(&scene, 1).0 == wanted, "other outputs than those of the files");
}

#[test]
fn what_the_cache_excludes_is_refused_with_its_place() {
    for (key, value, words) in [
        ("shuffle_caption", "true", "does not go with `shuffle_caption` in dataset 1, subset 1"),
        ("caption_tag_dropout_rate", "0.1", "`caption_tag_dropout_rate` in dataset 1, subset 1"),
        ("caption_dropout_every_n_epochs", "3", "`caption_dropout_every_n_epochs`"),
        ("token_warmup_step", "4", "`token_warmup_step`"),
        ("enable_wildcard", "true", "`enable_wildcard`"),
        ("network_train_unet_only", "false", "add `network_train_unet_only`"),
    ] {
        let mut scene = scene(&sdxl(), 2);
        scene.set("cache_text_encoder_outputs", "true").set(key, value);
        let said = refused(&scene);
        assert!(said.contains(words), "{key}: {said}");
    }
    let mut scene = scene(&data("parity/model"), 2);
    scene.set("sdxl", "true");
    let said = refused(&scene);
    assert!(said.contains("`sdxl = true` contradicts the model") && said.contains("parity/model"));
    scene.set("pretrained_model_name_or_path", quoted(&sdxl().display().to_string()));
    scene.set("enable_bucket", "true").set("bucket_reso_steps", "8");
    let said = refused(&scene);
    assert!(said.contains("`bucket_reso_steps` is not a multiple of 32: 8"), "{said}");
}

#[test]
fn a_config_as_it_is_usual_for_sdxl_is_accepted() {
    let mut scene = scene(&sdxl(), 1);
    for (key, value) in [
        ("sdxl", "true"),
        ("cache_latents_to_disk", "true"),
        ("cache_text_encoder_outputs", "true"),
        ("cache_text_encoder_outputs_to_disk", "true"),
        ("no_half_vae", "true"),
        ("mixed_precision", "'bf16'"),
        ("enable_bucket", "true"),
        ("bucket_reso_steps", "32"),
        ("min_bucket_reso", "64"),
        ("gradient_checkpointing", "true"),
        ("disable_mmap_load_safetensors", "true"),
        ("skip_latents_validity_check", "true"),
        ("fused_optimizer_groups", "0"),
        ("xformers", "true"),
        ("clip_skip", "2"),
        ("unet_lr", "1e-4"),
        ("text_encoder_lr", "0"),
    ] {
        scene.set(key, value);
    }
    let output = lorarun().arg("plan").arg(scene.write_config()).output().expect("lorarun runs");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for words in [
        "`clip_skip` has no effect on SDXL",
        "`skip_latents_validity_check` is read as `skip_cache_check`",
        "small.safetensors",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn latents_that_are_no_numbers_name_the_image_the_vae_and_what_helps() {
    let home = tempfile::tempdir().expect("a folder");
    let model = copy_of(&sdxl(), home.path());
    let weights = model.join("vae/diffusion_pytorch_model.safetensors");
    scale(&weights, "encoder.conv_in.weight", f32::INFINITY);
    for caches in ["true", "false"] {
        let mut scene = scene(&model, 2);
        scene.set("cache_latents", caches);
        let output = scene.train(&["--num_processes", "1"], &[]);
        let said = text(&output);
        assert!(!output.status.success(), "{said}");
        let place = home.path().join("model").display().to_string();
        for words in [".png`: what the VAE gives in f32 is not finite: ", &place, "as `vae`"] {
            assert!(said.contains(words), "{caches}, {words}: {said}");
        }
        assert!(!scene.output_dir().join("small.safetensors").exists());
    }
}
