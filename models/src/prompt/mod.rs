//! Prompts: text to the ids and weights that a text encoder takes. No arithmetic.

mod tokenizer;
mod weights;

use formats::BaseModel;

pub use tokenizer::{CHUNK, ClipTokenizer, TokenLength, WeightedIds};
pub use weights::parse_weights;

use crate::{preset, second_text_preset};

/// A tokenizer that could not be built, or failed.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer of `{place}` cannot be used: {problem}")]
pub struct PromptError {
    /// A folder, a file, or `embedded CLIP vocabulary`.
    pub place: String,
    /// What is wrong.
    pub problem: String,
}

/// The tokenizers of a model: one, or with SDXL's second, which pads otherwise.
#[derive(Clone, Debug)]
pub struct Tokenizers {
    /// For the text encoder.
    pub first: ClipTokenizer,
    /// For SDXL's second.
    pub second: Option<ClipTokenizer>,
}

impl Tokenizers {
    /// Those of an opened model: its own, or CLIP's.
    ///
    /// # Errors
    /// A tokenizer in the model's folder that cannot be read.
    pub fn of(files: &BaseModel) -> Result<Self, PromptError> {
        let pads_with_zero = preset(files.family).pads_with_zero;
        let second = second_text_preset(files.family).map(|preset| {
            ClipTokenizer::open(files.tokenizer_2_dir.as_deref(), preset.pads_with_zero)
        });
        Ok(Self {
            first: ClipTokenizer::open(files.tokenizer_dir.as_deref(), pads_with_zero)?,
            second: second.transpose()?,
        })
    }
}
