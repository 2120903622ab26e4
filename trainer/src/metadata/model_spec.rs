//! The `modelspec.*` part of the metadata: what the file is, for programs that list models.

use super::{RunFacts, python_float};
use crate::options::Options;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// The `modelspec.*` entries of ModelSpec 1.0.1, without the date.
pub(super) fn model_spec(options: &Options, run: &RunFacts) -> Result<BTreeMap<String, String>> {
    let v2 = run.base_model_version.starts_with("sd_v2");
    let architecture = match (v2, options.v_parameterization) {
        (false, _) => "stable-diffusion-v1/lora",
        (true, false) => "stable-diffusion-v2-512/lora",
        (true, true) => "stable-diffusion-v2-768-v/lora",
    };
    let title = options
        .metadata_title
        .clone()
        .or_else(|| options.output_name.clone())
        .unwrap_or_else(|| format!("LoRA@{}", python_float(run.started_at)));
    let thumbnail = options.metadata_thumbnail.as_deref().map(data_url).transpose()?;
    let timesteps = (options.min_timestep.is_some() || options.max_timestep.is_some()).then(|| {
        let low = options.min_timestep.unwrap_or(0);
        format!("{low},{}", options.max_timestep.unwrap_or(1000))
    });
    let prediction = if options.v_parameterization { "v" } else { "epsilon" };
    let version = concat!("lorarun/", env!("CARGO_PKG_VERSION"));
    let rows = [
        ("sai_model_spec", Some("1.0.1".to_owned())),
        ("architecture", Some(architecture.to_owned())),
        ("implementation", Some("diffusers".to_owned())),
        ("implementation_version", Some(version.to_owned())),
        ("prediction_type", Some(prediction.to_owned())),
        // The reference ignores the dataset config here and writes the model's default.
        ("resolution", Some(format!("{}x{}", run.resolution.0, run.resolution.1))),
        ("title", Some(title)),
        ("timestep_range", timesteps),
        ("encoder_layer", options.clip_skip.map(|layers| layers.to_string())),
        ("author", options.metadata_author.clone()),
        ("description", options.metadata_description.clone()),
        ("license", options.metadata_license.clone()),
        ("tags", options.metadata_tags.clone()),
        ("usage_hint", options.metadata_usage_hint.clone()),
        ("thumbnail", thumbnail),
        ("merged_from", options.metadata_merged_from.clone()),
        ("trigger_phrase", options.metadata_trigger_phrase.clone()),
        ("preprocessor", options.metadata_preprocessor.clone()),
        ("is_negative_embedding", options.metadata_is_negative_embedding.clone()),
    ];
    Ok(rows
        .into_iter()
        .filter_map(|(key, value)| value.map(|value| (format!("modelspec.{key}"), value)))
        .collect())
}

/// An image file as a data URL; a data URL stays as it is.
pub(super) fn data_url(picture: &str) -> Result<String> {
    if picture.starts_with("data:") {
        return Ok(picture.to_owned());
    }
    let bytes = std::fs::read(picture).with_context(|| {
        format!("cannot read the picture of `--metadata_thumbnail`: `{picture}`")
    })?;
    let suffix = picture.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let kind = match suffix.as_str() {
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        "bmp" => "image/bmp",
        _ => "application/octet-stream",
    };
    Ok(format!("data:{kind};base64,{}", base64(&bytes)))
}

/// Standard base64 with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let packed = group.iter().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte))
            << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (packed >> (18 - 6 * digit)) & 63;
            text.push(if digit <= group.len() { DIGITS[index as usize] as char } else { '=' });
        }
    }
    text
}

/// Year, month, day, hour, minute and second (UTC) of seconds since 1970.
pub fn civil_time(seconds: u64) -> [u64; 6] {
    // Howard Hinnant's civil_from_days, for dates after 1970: years begin in March.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let rest = seconds % 86_400;
    [year, month, day, rest / 3_600, rest / 60 % 60, rest % 60]
}

/// `2026-11-22T16:19:16` in UTC (the reference writes local time without saying which).
pub(super) fn iso_date(seconds: f64) -> String {
    let [year, month, day, hour, minute, second] = civil_time(seconds.max(0.0) as u64);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}
