//! Metadata against a file that sd-scripts 0.10.1 wrote.

use super::*;
use serde_json::json;
use std::path::PathBuf;

/// Metadata of a LoRA-C3Lier that the reference trained for two steps.
fn reference() -> BTreeMap<String, String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/lora/train_c3lier.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The options of that run.
fn options() -> Options {
    Options {
        network_module: Some("networks.lora".into()),
        network_dim: Some(4),
        network_args: Some(vec!["conv_dim=4".into(), "conv_alpha=1".into()]),
        learning_rate: 1e-4,
        cache_latents: true,
        output_name: Some("lora".into()),
        dataset_config: Some(PathBuf::from("d.toml")),
        ..Options::default()
    }
}

/// What that run knew, as far as its file tells.
fn facts(reference: &BTreeMap<String, String>) -> RunFacts {
    let text = |key: &str| reference[key].clone();
    RunFacts {
        session_id: text("ss_session_id").parse().unwrap(),
        started_at: text("ss_training_started_at").parse().unwrap(),
        base_model_version: "sd_v1".into(),
        seed: 42,
        network_dim: 4,
        network_alpha: 1.0,
        max_train_steps: 2,
        num_epochs: 1,
        num_train_images: 3,
        num_reg_images: 0,
        num_validation_images: 0,
        num_batches_per_epoch: 3,
        optimizer_name: "torch.optim.adamw.AdamW".into(),
        optimizer_args: String::new(),
        total_batch_size: 1,
        resolution: (512, 512),
        base_model: ModelFacts {
            name: text("ss_sd_model_name"),
            legacy_hash: Some(text("ss_sd_model_hash")),
            sha256: Some(text("ss_new_sd_model_hash")),
        },
        vae: None,
    }
}

/// The dataset's values, read back from the file's own text.
fn dataset(reference: &BTreeMap<String, String>) -> DatasetFacts {
    let value = |key: &str| serde_json::from_str(&reference[key]).unwrap();
    DatasetFacts::Config {
        datasets: value("ss_datasets"),
        tag_frequency: value("ss_tag_frequency"),
        dataset_dirs: value("ss_dataset_dirs"),
    }
}

#[test]
fn every_key_and_value_is_the_references() {
    let mut expected = reference();
    expected.retain(|key, _| !key.starts_with("sshs_"));
    let metadata = FileMetadata::new(&options(), &facts(&expected), &dataset(&expected)).unwrap();
    let finished = expected["ss_training_finished_at"].parse().unwrap();
    let mut file = metadata.at(2, 1, finished);
    // The program that wrote it, and the time of day that the reference's clock was set to.
    assert_eq!(file.remove("modelspec.implementation_version").unwrap(), "lorarun/0.1.0");
    expected.remove("modelspec.implementation_version");
    assert_eq!(file, expected);
}

#[test]
fn no_metadata_keeps_what_loaders_need() {
    let reference = reference();
    let options = Options { no_metadata: true, ..options() };
    let file = FileMetadata::new(&options, &facts(&reference), &dataset(&reference))
        .unwrap()
        .at(1, 1, 0.0);
    let keys: Vec<&str> =
        file.keys().map(String::as_str).filter(|key| key.starts_with("ss_")).collect();
    let mut expected = MINIMUM_KEYS;
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(file["modelspec.date"], "1970-01-01T00:00:00");
}

#[test]
fn folders_write_their_settings_one_by_one() {
    let folders = DatasetFacts::Folders {
        enable_bucket: false,
        bucket_no_upscale: false,
        min_bucket_reso: None,
        max_bucket_reso: None,
        dataset_dirs: json!({"10_sks dog": {"n_repeats": 10, "img_count": 3}}),
        reg_dataset_dirs: json!({}),
        tag_frequency: json!({}),
        bucket_info: Value::Null,
    };
    let run = RunFacts {
        base_model_version: "sd_v2_v".into(),
        vae: Some(ModelFacts { name: "v.pt".into(), ..ModelFacts::default() }),
        ..facts(&reference())
    };
    let options = Options {
        network_args: None,
        v_parameterization: true,
        max_timestep: Some(900),
        clip_skip: Some(2),
        metadata_author: Some("me".into()),
        text_encoder_lr: Some(vec![5e-5]),
        ..options()
    };
    let file = FileMetadata::new(&options, &run, &folders).unwrap().at(1, 1, 0.0);
    for (key, value) in [
        ("ss_resolution", "(512, 512)"),
        ("ss_min_bucket_reso", "None"),
        ("ss_dataset_dirs", r#"{"10_sks dog": {"n_repeats": 10, "img_count": 3}}"#),
        ("ss_bucket_info", "null"),
        ("ss_vae_name", "v.pt"),
        ("ss_v2", "True"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v/lora"),
        ("ss_text_encoder_lr", "[5e-05]"),
        ("modelspec.timestep_range", "0,900"),
        ("modelspec.encoder_layer", "2"),
        ("modelspec.author", "me"),
        ("modelspec.prediction_type", "v"),
    ] {
        assert_eq!(file[key], value, "{key}");
    }
    assert!(!file.contains_key("ss_datasets") && !file.contains_key("ss_network_args"));
    assert!(!file.contains_key("ss_vae_hash"));
}

#[test]
fn what_the_user_says_of_the_model_is_written() {
    let reference = reference();
    let with = |options: Options| {
        let metadata = FileMetadata::new(&options, &facts(&reference), &dataset(&reference))?;
        anyhow::Ok(metadata.at(1, 1, 0.0))
    };
    let url = "data:image/png;base64,AA==";
    let file =
        with(Options { output_name: None, metadata_thumbnail: Some(url.into()), ..options() });
    let file = file.unwrap();
    assert_eq!(file["modelspec.thumbnail"], url);
    assert_eq!(file["modelspec.resolution"], "512x512");
    assert_eq!(file["modelspec.title"], "LoRA@1795364330.3322709");
    let error = with(Options { metadata_thumbnail: Some("nowhere.png".into()), ..options() });
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("`metadata_thumbnail`") && error.contains("nowhere.png"), "{error}");
}

#[test]
fn numbers_print_as_python_does() {
    let cases = [
        (1e-4, "0.0001"),
        (5e-5, "5e-05"),
        (1.0, "1.0"),
        (0.0, "0.0"),
        (-0.1, "-0.1"),
        (1.5e-7, "1.5e-07"),
        (1e16, "1e+16"),
        (1e15, "1000000000000000.0"),
        (123456789.125, "123456789.125"),
        (1795364330.3322709, "1795364330.3322709"),
        (1e-100, "1e-100"),
        (f64::INFINITY, "inf"),
        (f64::NAN, "nan"),
    ];
    for (number, text) in cases {
        assert_eq!(python_float(number), text);
    }
    assert_eq!(["1", "0.10", "1e-6", "True"].map(python_literal), ["1", "0.1", "1e-06", "True"]);
    assert_eq!(
        python_json(&json!({"a": [1, 2.0, null, true], "b\"\n": "é😀"})),
        r#"{"a": [1, 2.0, null, true], "b\"\n": "\u00e9\ud83d\ude00"}"#
    );
}
