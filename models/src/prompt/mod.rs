//! Prompts: text to the ids and weights that a text encoder takes. No arithmetic.

mod tokenizer;
mod weights;

pub use tokenizer::{CHUNK, ClipTokenizer, TokenLength, WeightedIds};
pub use weights::parse_weights;

/// A tokenizer that could not be built, or failed.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer of `{place}` cannot be used: {problem}")]
pub struct PromptError {
    /// A folder, a file, or `embedded CLIP vocabulary`.
    pub place: String,
    /// What is wrong.
    pub problem: String,
}
