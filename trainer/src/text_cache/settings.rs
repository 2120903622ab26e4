//! What the outputs of text encoders depend on beside the caption, by name, so that a difference can
//! be told.

use anyhow::Result;
use formats::Weights;
use models::lora::Part;
use models::prompt::Tokenizers;
use sha2::{Digest, Sha256};

use crate::base::Base;
use crate::options::Options;

/// Bytes at the start, in the middle and at the end of each tensor that go into a hash: enough to tell
/// models apart, cheap for a file of gigabytes.
const HASHED_BYTES: usize = 4096;

/// One thing that outputs depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Key in a file's metadata; for options, their name.
    pub name: &'static str,
    /// Its value, or a hash of it.
    pub value: String,
    /// Set where the value is a hash: what is another one, in words.
    pub hashed: Option<&'static str>,
}

/// The settings of a run.
///
/// # Errors
/// A model whose tensors cannot be read.
pub fn settings_of(
    options: &Options,
    base: &Base,
    tokenizers: &Tokenizers,
) -> Result<Vec<Setting>> {
    let plain = |name, value: String| Setting { name, value, hashed: None };
    let hashed = |name, value, words| Setting { name, value, hashed: Some(words) };
    let mut definitions = Sha256::new();
    for tokenizer in [Some(&tokenizers.first), tokenizers.second.as_ref()].into_iter().flatten() {
        definitions.update(tokenizer.definition()?);
        definitions.update([0]);
    }
    // SDXL is always read before the last layer.
    let clip_skip = match &base.text_encoder_2 {
        Some(_) => None,
        None => options.clip_skip.filter(|skip| *skip > 1),
    };
    let or_none = |number: Option<usize>, none: &str| match number {
        Some(number) => number.to_string(),
        None => none.to_owned(),
    };
    Ok(vec![
        hashed("tokenizer", hex(definitions), "another tokenizer"),
        hashed("text_encoder", weights_hash(base)?, "another text encoder"),
        plain("clip_skip", or_none(clip_skip, "1")),
        plain("max_token_length", or_none(options.max_token_length, "75")),
        plain("weighted_captions", options.weighted_captions.to_string()),
        plain("precision", format!("{:?}", base.dtype).to_lowercase()),
    ])
}

/// A hash of the text encoders as they are loaded, merged files included.
fn weights_hash(base: &Base) -> Result<String> {
    let mut hasher = Sha256::new();
    for part in [Part::TextEncoder, Part::TextEncoder2] {
        let Some(weights) = base.weights(part) else { continue };
        let weights = base.merge.over(part, weights);
        for name in weights.names() {
            let tensor = weights.get(&name)?;
            let (data, len) = (&tensor.data, tensor.data.len());
            hasher.update(name.as_bytes());
            hasher.update(format!("{:?}{:?}", tensor.dtype, tensor.shape).as_bytes());
            for start in [0, len / 2, len.saturating_sub(HASHED_BYTES)] {
                hasher.update(&data[start..(start + HASHED_BYTES).min(len)]);
            }
        }
    }
    Ok(hex(hasher))
}

/// The first 16 bytes of a hash.
pub fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Says in which settings a file differs, `value` giving what it holds.
pub fn differences<'f>(
    settings: &[Setting],
    value: &dyn Fn(&str) -> Option<&'f str>,
) -> Vec<String> {
    let differing = settings.iter().filter(|setting| value(setting.name) != Some(&setting.value));
    let words = differing.map(|Setting { name, value: now, hashed }| match hashed {
        Some(other) => format!("it was made with {other}"),
        None => {
            let before = value(name).unwrap_or("nothing");
            format!("`{name}` was `{before}` when it was made, it is now: `{now}`")
        }
    });
    words.collect()
}
