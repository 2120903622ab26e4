//! What a diffusers folder holds beside the components: the index, the scheduler, tokenizers.

use std::collections::BTreeMap;

use formats::clip_vocabulary::{self, BEGIN, END};
use formats::model_files::{Container, ModelFiles};
use formats::{Family, FormatError};
use serde_json::{Value, json};

use super::Prediction;
use super::shapes::VERSION;
use crate::progress::tell;

/// How noise is predicted and scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Noise {
    prediction: Prediction,
    /// The last step is noise alone.
    zero_snr: bool,
}

impl Noise {
    pub fn predicts_velocity(self) -> bool {
        self.prediction == Prediction::Velocity
    }

    pub fn title(self) -> &'static str {
        match self.prediction {
            Prediction::Epsilon => "predicts noise (epsilon)",
            Prediction::Velocity => "predicts velocity (v_prediction)",
        }
    }
}

/// What the model predicts: the user's word, the model's, or its family's.
///
/// # Errors
/// A scheduler's config that cannot be read.
pub(super) fn noise_of(
    model: &ModelFiles,
    given: Option<Prediction>,
) -> Result<Noise, FormatError> {
    let (told, zero_snr) = match model.container {
        Container::Folder => told_by_folder(model)?,
        Container::SingleFile => told_by_file(model),
    };
    let prediction = match (given, told) {
        (Some(given), _) => given,
        (None, Some(told)) => told,
        (None, None) if model.family == Family::Sd2 => {
            tell(
                "the file does not say what it predicts, `v_prediction` is assumed (SD 2.0 and 2.1 \
                 for 768 pixels)\nhint: `--prediction_type epsilon` for a base model of 512 pixels",
            );
            Prediction::Velocity
        }
        (None, None) => Prediction::Epsilon,
    };
    Ok(Noise { prediction, zero_snr })
}

fn told_by_folder(model: &ModelFiles) -> Result<(Option<Prediction>, bool), FormatError> {
    let path = model.path.join("scheduler/scheduler_config.json");
    if !path.exists() {
        return Ok((None, false));
    }
    let bytes = std::fs::read(&path).map_err(|e| FormatError::io("read", &path, e))?;
    let config: Value = serde_json::from_slice(&bytes).map_err(|error| FormatError::Malformed {
        path: path.clone(),
        format: "JSON",
        reason: error.to_string(),
    })?;
    let prediction = match config["prediction_type"].as_str() {
        Some("v_prediction") => Some(Prediction::Velocity),
        Some("epsilon") => Some(Prediction::Epsilon),
        _ => None,
    };
    Ok((prediction, config["rescale_betas_zero_snr"] == json!(true)))
}

fn told_by_file(model: &ModelFiles) -> (Option<Prediction>, bool) {
    let Some(stored) = model.files.first() else { return (None, false) };
    let file = stored.file.as_ref();
    // Empty tensors by which ComfyUI and others know such models.
    let zero_snr = file.describe("ztsnr").is_some();
    if file.describe("v_pred").is_some() {
        return (Some(Prediction::Velocity), zero_snr);
    }
    let said = |key: &str| file.metadata().get(key).map(String::as_str);
    let prediction = match said("modelspec.prediction_type") {
        Some("v") => Some(Prediction::Velocity),
        Some("epsilon") => Some(Prediction::Epsilon),
        _ => said("modelspec.architecture")
            .filter(|architecture| architecture.contains("768-v"))
            .map(|_| Prediction::Velocity),
    };
    (prediction, zero_snr)
}

/// `model_index.json`.
pub(super) fn index(family: Family) -> Value {
    let tokenizer = ["transformers", "CLIPTokenizer"];
    let mut index = json!({
        "_diffusers_version": VERSION,
        "feature_extractor": [null, null],
        "image_encoder": [null, null],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": tokenizer,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler_class(family)],
    });
    if family == Family::Sdxl {
        index["_class_name"] = json!("StableDiffusionXLPipeline");
        index["force_zeros_for_empty_prompt"] = json!(true);
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        index["tokenizer_2"] = json!(tokenizer);
    } else {
        index["_class_name"] = json!("StableDiffusionPipeline");
        index["requires_safety_checker"] = json!(false);
        index["safety_checker"] = json!([null, null]);
    }
    index
}

fn scheduler_class(family: Family) -> &'static str {
    match family {
        Family::Sd1 => "PNDMScheduler",
        Family::Sd2 => "DDIMScheduler",
        Family::Sdxl => "EulerDiscreteScheduler",
    }
}

/// `scheduler/scheduler_config.json`, of the kind that the published models have.
pub(super) fn scheduler(family: Family, noise: Noise) -> Value {
    let prediction = if noise.predicts_velocity() { "v_prediction" } else { "epsilon" };
    let mut config = json!({
        "_class_name": scheduler_class(family),
        "_diffusers_version": VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": null,
    });
    match family {
        Family::Sd1 => {
            config["set_alpha_to_one"] = json!(false);
            config["skip_prk_steps"] = json!(true);
        }
        Family::Sd2 => {
            config["clip_sample"] = json!(false);
            config["set_alpha_to_one"] = json!(false);
        }
        Family::Sdxl => {
            config["interpolation_type"] = json!("linear");
            config["use_karras_sigmas"] = json!(false);
        }
    }
    if noise.zero_snr && family != Family::Sd1 {
        config["rescale_betas_zero_snr"] = json!(true);
        config["timestep_spacing"] = json!("trailing");
    }
    config
}

/// The files of a tokenizer's folder: name -> text. `second` is SDXL's second one.
pub(super) fn tokenizer(family: Family, second: bool) -> BTreeMap<&'static str, String> {
    // What OpenCLIP's models were trained with.
    let pad = if second || family == Family::Sd2 { "!" } else { END };
    let ids: serde_json::Map<String, Value> =
        clip_vocabulary::tokens().into_iter().zip((0..).map(|id: u32| json!(id))).collect();
    let special = |token: &str, normalized: bool| {
        json!({
            "content": token, "lstrip": false, "normalized": normalized, "rstrip": false,
            "single_word": false,
        })
    };
    let map = json!({
        "bos_token": special(BEGIN, true),
        "eos_token": special(END, true),
        "pad_token": pad,
        "unk_token": special(END, true),
    });
    let config = json!({
        "add_prefix_space": false,
        "bos_token": BEGIN,
        "do_lower_case": true,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    });
    BTreeMap::from([
        ("merges.txt", format!("#version: 0.2\n{}", clip_vocabulary::MERGES)),
        ("special_tokens_map.json", format!("{map:#}\n")),
        ("tokenizer_config.json", format!("{config:#}\n")),
        ("vocab.json", Value::Object(ids).to_string()),
    ])
}
