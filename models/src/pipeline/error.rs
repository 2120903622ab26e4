//! What can go wrong on the way from a prompt to a picture.

use engine::EngineError;
use formats::FormatError;

use crate::ModelError;
use crate::prompt::PromptError;
use crate::sampler::SamplerError;

/// Errors of a pipeline.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A file could not be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A model or a LoRA could not be built.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine refused an operation.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tokenizer failed.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The sampler does not offer what was asked for.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A prompt that does not fit.
    #[error(
        "the prompt has {tokens} tokens, {most} fit: {prompt}\n\
         hint: shorten it, or give `--max_embeddings_multiples {needed}`"
    )]
    LongPrompt {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that fit.
        most: usize,
        /// Chunks that it needs.
        needed: usize,
        /// The prompt.
        prompt: String,
    },
    /// Pictures made together need prompts of the same number of chunks.
    #[error("prompts of different numbers of chunks cannot be in one batch")]
    UnequalPrompts,
    /// A side that the VAE cannot give.
    #[error("width and height must be multiples of 8 and at least 64, they are: {width}x{height}")]
    Size {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// A mask says what of a picture is made anew.
    #[error("a mask without a picture\nhint: give the picture, too (`--image_path`)")]
    MaskAlone,
    /// A first stage that is none.
    #[error(
        "the first stage of {width}x{height} would be smaller than 64 or not smaller than the picture, \
         the scale is: {scale}\nhint: 0.5 makes the first stage half as wide and half as high"
    )]
    HighresScale {
        /// Sides of the first stage by those of the picture.
        scale: f64,
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// Numbers that are not those of a picture of this size.
    #[error("a picture of {width}x{height} has three numbers per pixel, there are: {numbers}")]
    Pixels {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// How many there are.
        numbers: usize,
    },
    /// A LoRA that is in the weights for good, or of another pipeline.
    #[error(
        "the multiplier can no longer be changed, the LoRA has been merged or is of another pipeline\n\
         hint: load the pipeline again"
    )]
    NoSuchLora,
    /// The decoder gave numbers that are none.
    #[error(
        "the VAE gave numbers that are not finite\n\
         hint: it overflows in half precision: `--no_half_vae` computes it in float32"
    )]
    NotFinite,
    /// The caller stopped the work.
    #[error("stopped")]
    Stopped,
}
