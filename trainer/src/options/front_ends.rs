//! Keys that programs around sd-scripts write into configs, and values as they write them.
//!
//! A key that is no option here is looked up in [`KEYS`]: it is read under another name, put into
//! `network_args` or `optimizer_args`, or ignored, and each of these is reported. sd-scripts itself
//! ignores every key that it does not know. Written down from bmaltais/kohya_ss,
//! Akegarasu/lora-scripts, hollowstrawberry/kohya-colab, Linaqruf/kohya-trainer,
//! derrian-distro/LoRA_Easy_Training_Scripts and the other trainers of kohya-ss/sd-scripts
//! (November 2026).

use super::{Kind, OptionSpec};
use toml::{Table, Value};

/// What becomes of a key that is no option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// It says nothing about the training; the text says what it is.
    Ignored(&'static str),
    /// It would say something, but sd-scripts does not read it either; the text says what to write.
    Unread(&'static str),
    /// Another name of this option.
    Named(&'static str),
    /// The key `.1` of the list option `.0`.
    Argument(&'static str, &'static str),
}

use Meaning::{Argument, Ignored, Named, Unread};

const GUI: Meaning = Ignored("they are settings of the front end itself");
const SAMPLES: Meaning = Ignored("they are settings of sample pictures");
const FULL_TRAINING: Meaning =
    Ignored("they are options of sd-scripts' trainer of whole models, not of LoRA");
const OTHER_MODELS: Meaning = Ignored("they are options for other kinds of models");
const RANKS: &str =
    "how many ranks run is said before `train`: `lorarun --num_processes N train ...`";
const SUBSET: &str = "it belongs into `[[datasets.subsets]]`";

/// Keys and what becomes of them.
const KEYS: &[(&[&str], Meaning)] = &[
    // kohya_ss
    (&["epoch"], Ignored("the GUI makes `max_train_steps` of it")),
    (&["noise_offset_type"], Ignored("the GUI chooses noise options with it")),
    (
        &["stop_text_encoder_training"],
        Unread(
            "the text encoder is trained to the end, or not at all with `network_train_unet_only`",
        ),
    ),
    (&["LoRA_type", "gpu_ids", "train_inpainting", "additional_parameters"], GUI),
    // lora-scripts
    (&["model_train_type", "enable_preview", "enable_block_weights", "enable_base_weight"], GUI),
    (&["ui_custom_params", "save_toml", "save_toml_location", "easy_name"], GUI),
    (&["positive_prompts", "negative_prompts", "randomly_choice_prompt", "prompt_file"], SAMPLES),
    (&["sample_width", "sample_height", "sample_cfg", "sample_seed", "sample_steps"], SAMPLES),
    (&["lr_restart_cycles"], Named("lr_scheduler_num_cycles")),
    (&["lycoris_algo"], Argument("network_args", "algo")),
    (&["lokr_factor"], Argument("network_args", "factor")),
    (&["dylora_unit"], Argument("network_args", "unit")),
    (&["conv_dim"], Argument("network_args", "conv_dim")),
    (&["conv_alpha"], Argument("network_args", "conv_alpha")),
    (&["down_lr_weight"], Argument("network_args", "down_lr_weight")),
    (&["mid_lr_weight"], Argument("network_args", "mid_lr_weight")),
    (&["up_lr_weight"], Argument("network_args", "up_lr_weight")),
    (&["block_lr_zero_threshold"], Argument("network_args", "block_lr_zero_threshold")),
    (&["prodigy_d0"], Argument("optimizer_args", "d0")),
    (&["prodigy_d_coef"], Argument("optimizer_args", "d_coef")),
    (&["network_args_custom"], Argument("network_args", "")),
    (&["optimizer_args_custom"], Argument("optimizer_args", "")),
    // LoRA Easy Training Scripts
    (&["train_mode", "tag_occurrence", "tag_file_location", "fa"], GUI),
    (&["warmup_ratio"], Named("lr_warmup_steps")),
    // Options of the dataset description that land in the training file.
    (
        &["batch_size"],
        Unread("here it is `train_batch_size`; `batch_size` belongs into `[[datasets]]`"),
    ),
    (
        &["num_repeats"],
        Unread("here it is `dataset_repeats`; `num_repeats` belongs into `[[datasets.subsets]]`"),
    ),
    (&["image_dir", "class_tokens", "is_reg", "custom_attributes"], Unread(SUBSET)),
    (&["metadata_file"], Unread("it belongs into `[[datasets.subsets]]`, or use `in_json`")),
    (&["network_multiplier"], Unread("it belongs into `[[datasets]]`")),
    (
        &["network_train_text_encoder", "train_text_encoder"],
        Unread("both parts are trained unless `network_train_unet_only` is set"),
    ),
    (
        &["network_train_unet", "train_unet"],
        Unread("both parts are trained unless `network_train_text_encoder_only` is set"),
    ),
    // accelerate
    (&["num_processes", "num_machines", "multi_gpu", "machine_rank"], Unread(RANKS)),
    (&["num_cpu_threads_per_process"], Unread("here it is `threads`")),
    (&["main_process_port", "main_process_ip", "extra_accelerate_launch_args"], GUI),
    (
        &[
            "dynamo_mode",
            "dynamo_use_dynamic",
            "dynamo_use_fullgraph",
            "compile",
            "compile_backend",
            "compile_mode",
            "compile_dynamic",
            "compile_fullgraph",
            "compile_cache_size_limit",
        ],
        Ignored("there is no PyTorch to compile for"),
    ),
    (
        &[
            "lowvram",
            "medvram",
            "use_cpu",
            "diffusers_xformers",
            "use_flash_attn",
            "use_sage_attn",
            "attn_mode",
            "split_attn",
            "mem_eff_save",
        ],
        Ignored("memory is managed by this program itself"),
    ),
    // Other trainers of sd-scripts
    (&["no_token_padding"], Unread("captions are always padded, as sd-scripts' LoRA trainer does")),
    (
        &["perlin_noise", "optimizer_schedulefree_wrapper", "schedulefree_wrapper_args"],
        Unread("sd-scripts' LoRA trainer does not know it either"),
    ),
    (
        &["use_safetensors"],
        Unread("here it is `save_model_as = \"safetensors\"`, which is the default"),
    ),
    (&["learning_rate_te"], Unread("here it is `text_encoder_lr`")),
    (
        &["learning_rate_te1", "learning_rate_te2"],
        Unread(
            "here it is `text_encoder_lr = [1e-5, 1e-5]`, the first text encoder's and the second's",
        ),
    ),
    (&["skip_latents_validity_check"], Named("skip_cache_check")),
    (&["learning_rate_te3", "block_lr", "fused_optimizer_groups"], FULL_TRAINING),
    (
        &[
            "ae",
            "apply_lg_attn_mask",
            "apply_t5_attn_mask",
            "blocks_to_swap",
            "byt5",
            "clip_g",
            "clip_g_dropout_rate",
            "clip_l",
            "clip_l_dropout_rate",
            "discrete_flow_shift",
            "double_blocks_to_swap",
            "enable_scaled_pos_embed",
            "fp8_scaled",
            "fp8_vl",
            "gemma2",
            "gemma2_max_token_length",
            "guidance_scale",
            "llm_adapter_path",
            "logit_mean",
            "logit_std",
            "mode_scale",
            "model_prediction_type",
            "model_type",
            "pos_emb_random_crop_rate",
            "qwen3",
            "qwen3_max_token_length",
            "qwen_image_vae_2d",
            "save_clip",
            "save_t5xxl",
            "show_timesteps",
            "show_timesteps_resolution",
            "sigmoid_scale",
            "single_blocks_to_swap",
            "split_mode",
            "split_qkv",
            "system_prompt",
            "t5_dropout_rate",
            "t5_max_token_length",
            "t5_tokenizer_path",
            "t5xxl",
            "t5xxl_device",
            "t5xxl_dtype",
            "t5xxl_max_token_length",
            "text_encoder",
            "text_encoder_cpu",
            "timestep_sampling",
            "train_t5xxl",
            "training_shift",
            "unsloth_offload_checkpointing",
            "vae_chunk_size",
            "vae_disable_cache",
            "weighting_scheme",
        ],
        OTHER_MODELS,
    ),
];

/// What becomes of `key`; `None` where nobody is known to write it.
pub(super) fn meaning_of(key: &str) -> Option<Meaning> {
    KEYS.iter().find(|(names, _)| names.contains(&key)).map(|(_, meaning)| *meaning)
}

/// Why a config is for another trainer, where `key` says so.
pub(super) fn other_trainer(key: &str, value: &Value) -> Option<String> {
    let named = value.as_str()?;
    let fits = match key {
        "model_train_type" => {
            ["sd-lora", "sdxl-lora", "lora-basic", "lora-master"].contains(&named)
        }
        "train_mode" => named == "lora",
        _ => true,
    };
    (!fits).then(|| {
        format!("`{key}` asks for another trainer: `{named}`\nhint: this program trains LoRA for Stable Diffusion")
    })
}

/// Whether a value asks for nothing: off, zero, empty, or `None` as text.
pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Boolean(on) => !on,
        Value::Integer(number) => *number == 0,
        Value::Float(number) => *number == 0.,
        Value::String(text) => is_unset(text),
        Value::Array(items) => items.iter().all(is_nothing),
        _ => false,
    }
}

/// Texts that programs write for "no value".
fn is_unset(text: &str) -> bool {
    ["", "none", "null"].iter().any(|word| text.trim().eq_ignore_ascii_case(word))
}

/// The value that is meant, or `None` where the option is not set by it.
///
/// Programs write an empty text, `None` or `false` for an option that is not set, and 1 or 0 for
/// what is on or off.
pub(super) fn meant_value(spec: &OptionSpec, value: &Value) -> Option<Value> {
    let is_text = matches!(spec.kind, Kind::Text | Kind::TextList);
    match value {
        Value::String(text) if text.trim().is_empty() => None,
        Value::String(text) if !is_text && is_unset(text) && !names_a_choice(spec.kind, text) => {
            None
        }
        Value::Boolean(false) if spec.kind != Kind::Flag => None,
        Value::Boolean(true) if spec.kind == Kind::Int => Some(Value::Integer(1)),
        Value::Integer(number) if spec.kind == Kind::Flag && *number > 1 => {
            Some(Value::Boolean(true))
        }
        Value::Array(items) if spec.kind.takes_many() => {
            let is_empty = |item: &Value| item.as_str().is_some_and(|text| text.trim().is_empty());
            Some(Value::Array(items.iter().filter(|item| !is_empty(item)).cloned().collect()))
        }
        Value::Table(table) if spec.kind == Kind::TextList => {
            Some(Value::Array(table.iter().map(|(key, value)| pair(key, value)).collect()))
        }
        other => Some(other.clone()),
    }
}

fn names_a_choice(kind: Kind, text: &str) -> bool {
    matches!(kind, Kind::Choice(words) if words.iter().any(|word| word.eq_ignore_ascii_case(text)))
}

/// `key=value` as it would stand in `network_args` or `optimizer_args`.
fn pair(key: &str, value: &Value) -> Value {
    Value::String(format!("{key}={}", plain(value)))
}

/// A value as Python's `str` would print it, lists joined by commas.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Boolean(true) => "True".to_owned(),
        Value::Boolean(false) => "False".to_owned(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Items to add to a list option for a key with [`Meaning::Argument`]: the pair `key=value`, or
/// with an empty `key` the pairs that `value` lists.
pub(super) fn argument_items(key: &str, value: &Value) -> Vec<String> {
    match value {
        _ if !key.is_empty() => vec![format!("{key}={}", plain(value))],
        Value::Array(items) => items.iter().map(plain).collect(),
        other => plain(other).split_whitespace().map(str::to_owned).collect(),
    }
}

/// Takes a file as LoRA Easy Training Scripts keeps it (`[NAME.args]`, `[NAME.dataset_args]`,
/// `[[subsets]]`) apart into sections and `[general]` with `[[datasets]]`. Other files stay.
pub(super) fn flatten_easy_scripts(table: &mut Table) {
    let holds =
        |part: &str| table.values().any(|section| section.get(part).is_some_and(Value::is_table));
    if !holds("args") && !holds("dataset_args") {
        return;
    }
    let mut general = Table::new();
    for (name, section) in table.iter_mut() {
        let Some(parts) = section.as_table_mut() else { continue };
        if let Some(Value::Table(of_dataset)) = parts.remove("dataset_args") {
            general.extend(of_dataset);
        }
        if let Some(Value::Table(mut args)) = parts.remove("args") {
            if name == "network_args" {
                name_network_module(&mut args);
            }
            parts.extend(args);
        }
    }
    let Some(Value::Array(mut subsets)) = table.remove("subsets") else { return };
    for subset in subsets.iter_mut().filter_map(Value::as_table_mut) {
        subset.remove("name");
    }
    let dataset = Table::from_iter([("subsets".to_owned(), Value::Array(subsets))]);
    table.insert("general".to_owned(), Value::Table(general));
    table.insert("datasets".to_owned(), Value::Array(vec![Value::Table(dataset)]));
}

/// That front end has no key for the module: its settings tell.
fn name_network_module(args: &mut Table) {
    let settings = args.get("network_args").and_then(Value::as_table);
    let module = match settings {
        Some(settings) if settings.contains_key("algo") => "lycoris.kohya",
        Some(settings) if settings.contains_key("unit") => "networks.dylora",
        _ => "networks.lora",
    };
    args.entry("network_module").or_insert_with(|| Value::String(module.to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{OPTIONS, find_option};

    #[test]
    fn keys_are_no_options_and_lead_to_options() {
        let mut seen = std::collections::BTreeSet::new();
        for name in KEYS.iter().flat_map(|(names, _)| names.iter()) {
            assert!(seen.insert(name), "{name} is listed twice");
            assert!(OPTIONS.iter().all(|spec| spec.name != *name), "{name} is an option");
        }
        for (_, meaning) in KEYS {
            if let Named(option) | Argument(option, _) = meaning {
                assert!(find_option(option).is_some(), "{option} is no option");
            }
        }
    }

    #[test]
    fn values_that_mean_nothing() {
        let meant = |name: &str, value: Value| meant_value(find_option(name).unwrap(), &value);
        let text = |text: &str| Value::String(text.into());
        for unset in [text(""), text(" "), text("None"), Value::Boolean(false)] {
            for name in ["seed", "learning_rate", "vae", "loss_type", "resolution"] {
                assert_eq!(meant(name, unset.clone()), None, "{name} {unset}");
            }
        }
        assert_eq!(meant("training_comment", text("None")), Some(text("None")));
        assert_eq!(meant("cache_latents", Value::Boolean(false)), Some(Value::Boolean(false)));
        assert_eq!(meant("cache_latents", Value::Integer(2)), Some(Value::Boolean(true)));
        let list = Value::Array(vec![text(""), text("a=1")]);
        assert_eq!(meant("network_args", list), Some(Value::Array(vec![text("a=1")])));
        let table: Table = "betas = [0.9, 0.99]\ndecouple = true".parse().unwrap();
        assert_eq!(
            meant("optimizer_args", Value::Table(table)),
            Some(Value::Array(vec![text("betas=0.9,0.99"), text("decouple=True")]))
        );
    }
}
