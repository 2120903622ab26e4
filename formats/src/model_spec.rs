//! ModelSpec 1.0.1 metadata (`modelspec.*`) as sd-scripts writes it for LoRAs and checkpoints.
//!
//! <https://github.com/Stability-AI/ModelSpec>.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::{Family, FormatError};

/// What implements checkpoints in their original layout.
const STABILITY_AI: &str = "https://github.com/Stability-AI/generative-models";

/// What the ModelSpec keys of a LoRA or a checkpoint are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Of the base model.
    pub family: Family,
    /// Whether the LoRA predicts v.
    pub v_parameterization: bool,
    /// `metadata_title`, otherwise the output name.
    pub title: String,
    /// Width and height in pixels that it was made for; `None` gives the family's own.
    pub resolution: Option<(usize, usize)>,
    /// Unix seconds of the date, written as UTC (sd-scripts writes local time without an offset).
    pub timestamp: i64,
    /// Smallest and largest timestep trained, when restricted.
    pub timestep_range: Option<(usize, usize)>,
    /// `clip_skip`, when set.
    pub clip_skip: Option<usize>,
    /// Program and version: `modelspec.implementation_version`.
    pub implementation_version: String,
    /// The user's `metadata_*` options.
    pub optional: OptionalSpec,
}

/// The user's own words: `metadata_author` and so on; `None` leaves the key out.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each is the option `metadata_` + its name")]
pub struct OptionalSpec {
    pub author: Option<String>,
    pub description: Option<String>,
    pub license: Option<String>,
    pub tags: Option<String>,
    pub usage_hint: Option<String>,
    /// A data URL; see [`thumbnail_url`] for files.
    pub thumbnail: Option<String>,
    pub merged_from: Option<String>,
    pub trigger_phrase: Option<String>,
    pub preprocessor: Option<String>,
    pub is_negative_embedding: Option<String>,
}

impl ModelSpec {
    /// The `modelspec.*` keys of a LoRA.
    pub fn to_metadata(&self) -> BTreeMap<String, String> {
        let implementation = match self.family {
            Family::Sd1 | Family::Sd2 => "diffusers",
            Family::Sdxl => STABILITY_AI,
        };
        self.keys(&format!("{}/lora", self.architecture()), implementation)
    }

    /// The `modelspec.*` keys of a whole model in the layout of its first publication.
    pub fn to_checkpoint_metadata(&self) -> BTreeMap<String, String> {
        self.keys(self.architecture(), STABILITY_AI)
    }

    fn keys(&self, architecture: &str, implementation: &str) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        let mut set = |key: &str, value: String| {
            out.insert(format!("modelspec.{key}"), value);
        };
        set("sai_model_spec", "1.0.1".to_owned());
        set("architecture", architecture.to_owned());
        set("implementation", implementation.to_owned());
        set("implementation_version", self.implementation_version.clone());
        set("title", self.title.clone());
        set("date", iso_date(self.timestamp));
        let (width, height) = self.resolution.unwrap_or_else(|| self.own_resolution());
        set("resolution", format!("{width}x{height}"));
        set("prediction_type", if self.v_parameterization { "v" } else { "epsilon" }.to_owned());
        if let Some((low, high)) = self.timestep_range {
            set("timestep_range", format!("{low},{high}"));
        }
        if let Some(layers) = self.clip_skip {
            set("encoder_layer", layers.to_string());
        }
        let optional = &self.optional;
        let words = [
            ("author", &optional.author),
            ("description", &optional.description),
            ("license", &optional.license),
            ("tags", &optional.tags),
            ("usage_hint", &optional.usage_hint),
            ("thumbnail", &optional.thumbnail),
            ("merged_from", &optional.merged_from),
            ("trigger_phrase", &optional.trigger_phrase),
            ("preprocessor", &optional.preprocessor),
            ("is_negative_embedding", &optional.is_negative_embedding),
        ];
        for (key, value) in words {
            if let Some(value) = value {
                set(key, value.clone());
            }
        }
        out
    }

    fn architecture(&self) -> &'static str {
        match (self.family, self.v_parameterization) {
            (Family::Sd1, _) => "stable-diffusion-v1",
            (Family::Sd2, false) => "stable-diffusion-v2-512",
            (Family::Sd2, true) => "stable-diffusion-v2-768-v",
            (Family::Sdxl, _) => "stable-diffusion-xl-v1-base",
        }
    }

    fn own_resolution(&self) -> (usize, usize) {
        match (self.family, self.v_parameterization) {
            (Family::Sd2, true) => (768, 768),
            (Family::Sdxl, _) => (1024, 1024),
            _ => (512, 512),
        }
    }
}

/// Year, month, day, hour, minute and second (UTC) of Unix seconds.
///
/// Proleptic Gregorian calendar; days to date after Howard Hinnant,
/// <https://howardhinnant.github.io/date_algorithms.html>.
pub fn civil_time(seconds: i64) -> [i64; 6] {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March, so that a leap day ends one.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    [year, month, day, second / 3600, second / 60 % 60, second % 60]
}

/// `YYYY-MM-DDThh:mm:ss` (UTC) of Unix seconds.
pub fn iso_date(seconds: i64) -> String {
    let [year, month, day, hour, minute, second] = civil_time(seconds);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// A thumbnail as ModelSpec wants it: a data URL stays, a file is embedded.
///
/// # Errors
/// [`FormatError::Io`] when the file cannot be read.
pub fn thumbnail_url(given: &str) -> Result<String, FormatError> {
    if given.starts_with("data:") {
        return Ok(given.to_owned());
    }
    let path = Path::new(given);
    let bytes = std::fs::read(path).map_err(|e: io::Error| FormatError::io("read", path, e))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mime = match extension.to_ascii_lowercase().as_str() {
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        "gif" => "image/gif",
        "bmp" => "image/bmp",
        _ => "application/octet-stream",
    };
    Ok(format!("data:{mime};base64,{}", base64(&bytes)))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or_default());
        let group = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for at in 0..4 {
            if at <= chunk.len() {
                out.push(char::from(DIGITS[(group >> (18 - 6 * at)) as usize & 63]));
            } else {
                out.push('=');
            }
        }
    }
    out
}
