//! Configs as front ends write them are read as they were meant, and what is ignored is said.

use super::*;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/options/front_ends").join(name)
}

/// Reads a sample without refusing anything.
fn check(name: &str, more: &[&str]) -> Parsed {
    let mut words = vec![OsString::from("--config-check"), sample(name).into_os_string()];
    words.extend(more.iter().map(OsString::from));
    parse(&words).unwrap()
}

#[test]
fn every_sample_is_read_without_a_fault() {
    let dataset = format!("--dataset_config={}", sample("colab_dataset.toml").display());
    for name in [
        "kohya_ss.toml",
        "lora_scripts.toml",
        "lora_scripts_old.toml",
        "colab.toml",
        "kohya_trainer.toml",
        "easy_training_scripts.toml",
    ] {
        let needs_data = ["colab.toml", "kohya_trainer.toml"].contains(&name);
        let more = [dataset.as_str()];
        let parsed = check(name, if needs_data { &more } else { &[] });
        assert_eq!(parsed.problems, Vec::<String>::new(), "{name}");
        assert!(parsed.options.pretrained_model_name_or_path.is_some(), "{name}");
    }
}

#[test]
fn kohya_ss() {
    let parsed = check("kohya_ss.toml", &[]);
    let o = &parsed.options;
    assert_eq!((o.max_token_length, o.clip_skip, o.max_timestep), (None, Some(1), Some(1000)));
    assert_eq!(o.mixed_precision, MixedPrecision::No);
    assert!(o.persistent_data_loader_workers && o.network_args.is_none());
    let notes = parsed.notes.join("\n");
    for part in [
        "ignored: `epoch`; the GUI makes `max_train_steps` of it",
        "`noise_offset_type`",
        "`stop_text_encoder_training` is ignored: the text encoder is trained to the end",
        "is computed in float32 on the CPU",
        "`dynamo_backend` has no effect",
    ] {
        assert!(notes.contains(part), "{part}\n{notes}");
    }
}

#[test]
fn lora_scripts() {
    let parsed = check("lora_scripts.toml", &[]);
    let o = &parsed.options;
    assert_eq!((o.learning_rate, o.unet_lr), (1e-4, Some(1e-4)));
    assert_eq!(o.text_encoder_lr, Some(vec![1e-5]));
    assert_eq!((o.max_token_length, o.clip_skip), (Some(225), None));
    assert_eq!(
        (&o.vae, &o.resume, &o.network_weights, &o.reg_data_dir),
        (&None, &None, &None, &None)
    );
    assert_eq!((o.min_snr_gamma, o.noise_offset, o.network_dropout), (None, None, None));
    assert_eq!(o.network_args, Some(vec!["conv_dim=4".into(), "conv_alpha=1".into()]));
    let notes = parsed.notes.join("\n");
    assert!(notes.contains("`network_args_custom` is read as a part of `network_args`"), "{notes}");
    assert!(notes.contains("`positive_prompts`, `negative_prompts`, `sample_width`"), "{notes}");
    assert!(notes.contains("ignored: `model_train_type`, `enable_preview`"), "{notes}");

    let old = check("lora_scripts_old.toml", &[]);
    assert_eq!(old.options.lr_scheduler_num_cycles, 1);
    assert_eq!((old.options.save_n_epoch_ratio, old.options.save_last_n_epochs), (None, Some(499)));
    assert!(old.notes.iter().any(|n| n.contains("`lr_restart_cycles` is read as")));
}

#[test]
fn easy_training_scripts() {
    let parsed = check("easy_training_scripts.toml", &[]);
    let o = &parsed.options;
    assert_eq!(o.network_args, Some(vec!["conv_dim=8".into(), "conv_alpha=4.0".into()]));
    assert_eq!(o.network_module.as_deref(), Some("networks.lora"));
    assert_eq!(o.lr_warmup_steps, IntOrFloat::Share(0.05));
    assert!(o.choose_optimizer().unwrap().python_text.contains("betas=(0.9, 0.99)"));
    let datasets = parsed.datasets.unwrap();
    assert_eq!(datasets["general"]["batch_size"].as_integer(), Some(2));
    let subset = &datasets["datasets"][0]["subsets"][0];
    assert_eq!(subset["num_repeats"].as_integer(), Some(10));
    assert!(subset.get("name").is_none());
}

fn with_text(case: &str, text: &str) -> Parsed {
    let dir = std::env::temp_dir().join(format!("lorarun-fronts-{}-{case}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("config.toml");
    std::fs::write(&path, text).unwrap();
    let words = [OsString::from("--config-check"), path.into_os_string()];
    let parsed = parse(&words);
    std::fs::remove_dir_all(&dir).unwrap();
    parsed.unwrap()
}

#[test]
fn what_is_for_another_trainer_is_refused() {
    let parsed = with_text("flux", "model_train_type = 'flux-lora'\n");
    let text = parsed.problems.join("\n");
    assert!(text.contains("`model_train_type` asks for another trainer: `flux-lora`"), "{text}");
}

#[test]
fn keys_that_would_say_something_are_warned_about() {
    let parsed = with_text("unread", "batch_size = 4\nnum_processes = 2\nwhatever = 3\n");
    let notes = parsed.notes.join("\n");
    assert!(
        notes.contains("config.toml:1: `batch_size` is ignored: here it is `train_batch_size`")
    );
    assert!(
        notes.contains("`num_processes` is ignored: how many ranks run is said before `train`")
    );
    assert!(parsed.problems.iter().any(|text| text.contains("unknown option: `whatever`")));
}

#[test]
fn unknown_names_can_be_allowed() {
    let parsed = with_text("allowed", "allow_unknown = true\nwhatever = 3\n");
    assert!(!parsed.problems.join("\n").contains("whatever"));
    let warned = "config.toml:2: unknown option, ignored: `whatever`";
    assert!(parsed.notes.iter().any(|note| note.contains(warned)), "{:?}", parsed.notes);
    let words = ["--config-check", "--allow_unknown", "--future", "1", "2", "--seed=3"];
    let parsed = parse(&words.map(OsString::from)).unwrap();
    assert_eq!(parsed.options.seed, Some(3));
    assert!(parsed.notes.contains(&"warning: unknown option, ignored: `--future`".to_owned()));
}

#[test]
fn a_dataset_file_in_place_of_the_config() {
    let fault = parse(&[sample("colab_dataset.toml").into_os_string()]).unwrap_err().to_string();
    assert!(fault.contains("describes a dataset alone") && fault.contains("as `dataset_config`"));
    let fault = parse(&[]).unwrap_err().to_string();
    assert!(fault.contains("hint: `lorarun train config.toml`"), "{fault}");
}

#[test]
fn settings_of_a_gui_in_json_are_told_apart() {
    let path = std::env::temp_dir().join(format!("lorarun-gui-{}.json", std::process::id()));
    std::fs::write(&path, "{}").unwrap();
    let fault = parse(&[path.clone().into_os_string()]).unwrap_err().to_string();
    std::fs::remove_file(&path).unwrap();
    assert!(fault.contains("is not TOML") && fault.contains("the TOML file that the GUI writes"));
}
