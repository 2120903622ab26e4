//! Alphas that stand beside the tensors: PEFT's configuration, in a safetensors header
//! (`lora_adapter_metadata`, as diffusers writes it) or in `adapter_config.json`.

use serde_json::{Map, Value};

use super::AdapterKind;
use super::names::Part;
use super::parts::{self, Found};
use crate::FormatError;
use crate::tensor_file::TensorFile;

/// The header's key.
pub(crate) const METADATA_KEY: &str = "lora_adapter_metadata";

/// Gives modules without an alpha tensor the alpha of the configuration.
///
/// # Errors
/// [`FormatError::Malformed`] for a configuration that is no JSON object.
pub(super) fn complete(file: &dyn TensorFile, modules: &mut [Found]) -> Result<(), FormatError> {
    let in_header = file.metadata().get(METADATA_KEY);
    let settings = match in_header {
        Some(text) => parse(file, text, "the header's `lora_adapter_metadata`")?,
        None => match beside(file)? {
            Some(text) => parse(file, &text, "its `adapter_config.json`")?,
            None => return Ok(()),
        },
    };
    for found in modules.iter_mut().filter(|found| found.module.alpha.is_none()) {
        let prefix = match (in_header, found.part) {
            (None, _) => "",
            (_, Part::Unet) => "unet.",
            (_, Part::Text | Part::Text1) => "text_encoder.",
            (_, Part::Text2) => "text_encoder_2.",
        };
        let get = |name: &str| settings.get(&format!("{prefix}{name}"));
        let rank = parts::rank(&found.module.kind, |key| file.shape(key).unwrap_or_default());
        let patterns = get("alpha_pattern").and_then(Value::as_object);
        let alpha = patterns
            .and_then(|patterns| {
                patterns.iter().find(|(pattern, _)| matches(pattern, &found.layer))
            })
            .map(|(_, alpha)| alpha)
            // LoHa and LoKr call it `alpha`.
            .or_else(|| get("lora_alpha").or_else(|| get("alpha")))
            .and_then(Value::as_f64);
        let Some(alpha) = alpha.map(|alpha| alpha as f32).filter(|alpha| alpha.is_finite()) else {
            continue;
        };
        // Rank-stabilised: alpha / sqrt(rank) where alpha / rank is meant elsewhere.
        let stabilised = get("use_rslora").and_then(Value::as_bool) == Some(true);
        found.module.alpha = match found.module.kind {
            AdapterKind::Full { .. } | AdapterKind::Norm { .. } => None,
            // A LoKr of two whole factors: the rank that was asked for is in no shape.
            _ if rank == 0 => {
                let asked = get("r").and_then(Value::as_f64).filter(|rank| *rank >= 1.0);
                asked.map(|rank| alpha / rank as f32)
            }
            _ if stabilised => Some(alpha * (rank as f32).sqrt()),
            _ => Some(alpha),
        };
    }
    Ok(())
}

fn parse(
    file: &dyn TensorFile,
    text: &str,
    what: &'static str,
) -> Result<Map<String, Value>, FormatError> {
    let reason = match serde_json::from_str(text) {
        Ok(Value::Object(settings)) => return Ok(settings),
        Ok(_) => format!("{what} is no object"),
        Err(error) => format!("{what} is not JSON: {error}"),
    };
    Err(FormatError::malformed(file.path(), "PEFT adapter", reason))
}

/// `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.
fn beside(file: &dyn TensorFile) -> Result<Option<String>, FormatError> {
    let path = file.path();
    if path.file_stem().is_none_or(|stem| stem != "adapter_model") {
        return Ok(None);
    }
    let config = path.with_file_name("adapter_config.json");
    match std::fs::read_to_string(&config) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FormatError::io("read", &config, error)),
    }
}

/// PEFT's patterns name the end of a layer's path; `^` and `$` may stand around them.
fn matches(pattern: &str, layer: &str) -> bool {
    let whole = pattern.starts_with('^');
    let name = pattern.trim_start_matches('^').trim_end_matches('$').replace("\\.", "_");
    let name = name.replace('.', "_");
    // Newer transformers leave the text model's outer name out.
    let bare = layer.strip_prefix("text_model_").unwrap_or(layer);
    layer == name || bare == name || (!whole && layer.ends_with(&format!("_{name}")))
}
