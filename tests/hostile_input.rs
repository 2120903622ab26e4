//! Every kind of bad input ends with one clear error, the right exit code, and no partial file.

use std::path::Path;

use crate::harness::{Scene, data, lorarun, quoted, text};

/// Exit code for bad configuration or data.
const CONFIGURATION: i32 = 78;
/// Exit code for a wrong command line.
const USAGE: i32 = 64;

/// Runs and asserts that it fails with `code`, says all of `words`, does not panic, and leaves no
/// file in the output folder.
fn refuses(scene: &Scene, more: &[&str], code: i32, words: &[&str]) {
    let output = scene.train(&[], more);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(stderr.contains(word), "`{word}` is missing in: {said}");
    }
    for forbidden in ["panicked", "RUST_BACKTRACE", "stack backtrace"] {
        assert!(!stderr.contains(forbidden), "{said}");
    }
    assert_eq!(stderr.matches("error:").count(), 1, "one error, once: {said}");
    assert_no_files(&scene.output_dir());
}

fn assert_no_files(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let names: Vec<_> = entries.filter_map(|e| Some(e.ok()?.file_name())).collect();
    assert!(names.is_empty(), "left behind: {names:?}");
}

/// A copy of the small model's folder whose U-Net file is changed by `change`.
fn broken_model(scene: &mut Scene, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let from = data("parity/model");
    let to = scene.folder.path().join("model");
    for part in ["unet", "text_encoder", "vae", "scheduler"] {
        std::fs::create_dir_all(to.join(part)).expect("a folder");
        for entry in std::fs::read_dir(from.join(part)).expect("a folder") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), to.join(part).join(entry.file_name())).expect("a copy");
        }
    }
    std::fs::copy(from.join("model_index.json"), to.join("model_index.json")).expect("a copy");
    let unet = to.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&unet).expect("the U-Net");
    std::fs::write(&unet, change(bytes)).expect("a changed U-Net");
    scene.set("pretrained_model_name_or_path", quoted(&to.display().to_string()));
}

#[test]
fn a_missing_model_file() {
    let mut scene = Scene::new();
    scene.set("pretrained_model_name_or_path", "'/nowhere/model.safetensors'");
    refuses(&scene, &[], CONFIGURATION, &["/nowhere/model.safetensors"]);
}

#[test]
fn a_warmup_longer_than_the_run() {
    let mut scene = Scene::new();
    scene.set("lr_scheduler", "'cosine'").set("lr_warmup_steps", "11");
    let said = ["`lr_warmup_steps` is longer than the run of 10 steps: 11", "hint: lower"];
    refuses(&scene, &[], CONFIGURATION, &said);
}

#[test]
fn an_image_without_its_mask() {
    let mut scene = Scene::new();
    let masks = scene.folder.path().join("masks");
    std::fs::create_dir(&masks).expect("a new folder");
    image::GrayImage::new(128, 128).save(masks.join("0.png")).expect("a saved mask");
    scene.set("masked_loss", "true");
    scene.set("conditioning_data_dir", quoted(&masks.display().to_string()));
    refuses(&scene, &[], CONFIGURATION, &["7 of 8 images have no mask", "1.png"]);
}

#[test]
fn a_truncated_safetensors() {
    let mut scene = Scene::new();
    broken_model(&mut scene, |mut bytes| {
        bytes.truncate(bytes.len() / 2);
        bytes
    });
    refuses(&scene, &[], CONFIGURATION, &["diffusion_pytorch_model.safetensors"]);
}

#[test]
fn a_tensor_of_the_wrong_shape() {
    let mut scene = Scene::new();
    broken_model(&mut scene, |bytes| {
        // Only conv_out has this shape; swapping two axes keeps the size and breaks the shape.
        let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let head = String::from_utf8(bytes[8..8 + header].to_vec()).expect("a JSON header");
        let changed = head.replacen("[4,32,3,3]", "[32,4,3,3]", 1);
        assert_ne!(head, changed);
        [&bytes[..8], changed.as_bytes(), &bytes[8 + header..]].concat()
    });
    refuses(&scene, &[], CONFIGURATION, &["conv_out.weight"]);
}

#[test]
fn a_pickle_that_would_run_code() {
    let mut scene = Scene::new();
    let path = scene.folder.path().join("evil.ckpt");
    let marker = scene.folder.path().join("ran");
    // GLOBAL 'posix system', the argument, REDUCE, STOP.
    let pickle = format!("cposix\nsystem\n(S'touch {}'\ntR.", marker.display());
    let mut archive = Vec::new();
    write_stored_zip(
        &mut archive,
        &[("archive/data.pkl", pickle.as_bytes()), ("archive/version", b"3\n")],
    );
    std::fs::write(&path, archive).expect("a file");
    scene.set("pretrained_model_name_or_path", quoted(&path.display().to_string()));
    refuses(&scene, &[], CONFIGURATION, &["evil.ckpt", "posix"]);
    assert!(!marker.exists(), "the pickle was executed");
}

#[test]
fn unknown_keys_come_with_a_suggestion() {
    let mut scene = Scene::new();
    scene.set("learning_rat", "1e-4");
    refuses(&scene, &[], CONFIGURATION, &["learning_rat", "learning_rate"]);

    let scene = Scene::new();
    refuses(&scene, &["--learning_rat", "1e-4"], USAGE, &["learning_rat", "learning_rate"]);
}

#[test]
fn unknown_keys_in_a_dataset_file_come_with_a_suggestion() {
    let scene = Scene::new();
    let path = scene.folder.path().join("dataset.toml");
    let images = scene.images().display().to_string();
    std::fs::write(
        &path,
        format!("[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeat = 3\n"),
    )
    .expect("a file");
    let config = scene.folder.path().join("plain.toml");
    let written = std::fs::read_to_string(scene.write_config()).expect("the config");
    let plain = written.split("\n[[datasets]]").next().expect("the options");
    std::fs::write(&config, plain).expect("a file");
    let output = lorarun()
        .arg("train")
        .arg(&config)
        .arg("--dataset_config")
        .arg(&path)
        .output()
        .expect("lorarun runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(CONFIGURATION), "{said}");
    assert!(said.contains("num_repeat") && said.contains("num_repeats"), "{said}");
}

#[test]
fn a_folder_without_images() {
    let scene = Scene::new();
    for entry in std::fs::read_dir(scene.images()).expect("the pictures") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("removed");
    }
    refuses(&scene, &[], CONFIGURATION, &[&scene.images().display().to_string()]);
}

#[test]
fn a_missing_caption_without_class_tokens() {
    let scene = Scene::new();
    std::fs::remove_file(scene.images().join("3.txt")).expect("removed");
    refuses(&scene, &[], CONFIGURATION, &["3.png", "class_tokens"]);
}

#[test]
fn a_corrupt_image_is_skipped_by_name_or_refused() {
    let mut scene = Scene::new();
    let path = scene.images().join("5.png");
    let mut bytes = std::fs::read(&path).expect("a picture");
    // The header stays readable, the pixels do not.
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&path, bytes).expect("a file");
    let output = scene.train(&[], &[]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("5.png"), "{said}");

    std::fs::remove_dir_all(scene.output_dir()).expect("removed");
    scene.set("strict_data", "true");
    refuses(&scene, &[], CONFIGURATION, &["5.png"]);
}

/// Changes the keys of a LoRA for the small model and trains from it.
fn with_weights(rename: impl Fn(&str) -> String) -> Scene {
    let mut scene = Scene::new();
    let mut file =
        formats::lora_file::read(&data("parity/lierla/init.safetensors")).expect("a LoRA");
    file.tensors = file.tensors.into_iter().map(|(key, tensor)| (rename(&key), tensor)).collect();
    let path = scene.folder.path().join("foreign.safetensors");
    let save_as = formats::lora_file::SaveAs::Safetensors;
    formats::lora_file::write(&path, &file.tensors, &file.metadata, save_as).expect("a file");
    scene.set("network_weights", quoted(&path.display().to_string()));
    scene
}

#[test]
fn weights_of_another_architecture() {
    // SDXL's names: not one module belongs to SD1.
    let scene = with_weights(|key| {
        let key = key.replace("lora_te_", "lora_te1_");
        key.replace("lora_unet_down_blocks", "lora_unet_input_blocks")
            .replace("lora_unet_up_blocks", "lora_unet_output_blocks")
            .replace("lora_unet_mid_block", "lora_unet_middle_block")
    });
    refuses(&scene, &[], CONFIGURATION, &["foreign.safetensors", "network_weights"]);

    // The same names with other shapes: the halves of every module swapped.
    let scene = with_weights(|key| match key.split_once(".lora_down") {
        Some((module, rest)) => format!("{module}.lora_up{rest}"),
        None => key.replace(".lora_up", ".lora_down"),
    });
    refuses(&scene, &[], CONFIGURATION, &["foreign.safetensors", "lora_down.weight"]);
}

#[test]
fn v2_that_contradicts_the_model() {
    let mut scene = Scene::new();
    scene.set("v2", "true");
    refuses(&scene, &[], CONFIGURATION, &["v2"]);
}

#[test]
fn a_config_check_lists_faults_and_loads_nothing() {
    let mut scene = Scene::new();
    let check = |scene: &Scene, more: &[&str]| {
        let output = scene.train(&[], &[&["--config-check"], more].concat());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!scene.output_dir().exists(), "{said}");
        (output.status.code(), said)
    };
    let (code, said) = check(&scene, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("0 problems") && said.contains("note: 8 images in 1 dataset"), "{said}");

    scene.set("learning_rat", "1e-4").set("vae", "'/nowhere/vae.safetensors'");
    let (code, said) = check(&scene, &["--noise_offset=1"]);
    assert_eq!(code, Some(CONFIGURATION), "{said}");
    for part in ["unknown option: `learning_rat`", "`/nowhere/vae.safetensors`", "2 problems"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(said.contains("warning: `noise_offset` washes images out"), "{said}");
    assert_eq!(check(&scene, &["--nonsense"]).0, Some(USAGE));

    scene.set("vae", "''").set("allow_unknown", "true");
    assert_eq!(check(&scene, &[]).0, Some(0));
}

#[test]
fn no_processes() {
    let scene = Scene::new();
    let output = scene.train(&["--num_processes", "0"], &[]);
    assert_eq!(output.status.code(), Some(USAGE), "{}", text(&output));
    assert!(text(&output).contains("num_processes"), "{}", text(&output));
}

#[test]
fn the_same_error_of_two_ranks_is_said_once() {
    let mut scene = Scene::new();
    scene.set("pretrained_model_name_or_path", "'/nowhere/model.safetensors'");
    let output = scene.train(&["--num_processes", "2"], &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(CONFIGURATION), "{said}");
    assert_eq!(said.matches("error:").count(), 1, "{said}");
}

/// A zip archive with stored entries, as torch writes them.
fn write_stored_zip(out: &mut Vec<u8>, entries: &[(&str, &[u8])]) {
    let mut directory = Vec::new();
    for (name, data) in entries {
        let offset = out.len() as u32;
        let size = data.len() as u32;
        let mut fields = Vec::new();
        fields.extend([20_u16, 0, 0, 0, 0].iter().flat_map(|x| x.to_le_bytes()));
        fields.extend([crc32fast::hash(data), size, size].iter().flat_map(|x| x.to_le_bytes()));
        fields.extend([name.len() as u16, 0].iter().flat_map(|x| x.to_le_bytes()));
        out.extend(b"PK\x03\x04");
        out.extend(&fields);
        out.extend(name.as_bytes());
        out.extend(*data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&fields);
        directory.extend([0_u8; 2 + 2 + 2 + 4]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = out.len() as u32;
    let count = entries.len() as u16;
    out.extend(&directory);
    out.extend(b"PK\x05\x06\x00\x00\x00\x00");
    out.extend([count, count].iter().flat_map(|x| x.to_le_bytes()));
    out.extend([directory.len() as u32, start].iter().flat_map(|x| x.to_le_bytes()));
    out.extend([0, 0]);
}
