//! The text encoders of a model as one: that of Stable Diffusion 1.x and 2.x, or both of SDXL.

use engine::{EngineError, Ids, Result as EngineResult, RowChoice, Tape, Value};

use crate::clip::{ClipTextModel, join_chunks};

/// One text encoder, or SDXL's two.
pub struct TextEncoders {
    /// CLIP ViT-L, or OpenCLIP-H.
    pub first: ClipTextModel,
    /// SDXL's OpenCLIP bigG.
    pub second: Option<ClipTextModel>,
}

/// The prompts of a batch as the text encoders read them, on their device.
#[derive(Clone, Debug)]
pub struct TextIds {
    /// `[B·chunks·length]`.
    pub ids: Ids,
    /// The same prompts for SDXL's second encoder, which pads otherwise.
    pub second: Option<SecondIds>,
    /// Sequences of each prompt.
    pub chunks: usize,
    /// Tokens of a sequence.
    pub length: usize,
}

/// Prompts for SDXL's second text encoder.
#[derive(Clone, Debug)]
pub struct SecondIds {
    /// `[B·chunks·length]`.
    pub ids: Ids,
    /// Rows of the pooled outputs: [`crate::end_rows`].
    pub ends: RowChoice,
}

/// What text encoders say of prompts.
#[derive(Clone)]
pub struct TextOutput {
    /// Hidden states `[B,T,C]`, chunks joined; SDXL's two encoders side by side.
    pub context: Value,
    /// SDXL's pooled output `[B,P]`.
    pub pooled: Option<Value>,
}

impl TextEncoders {
    /// Hidden states of prompts. SDXL's are those before the last layer, whatever `clip_skip` says,
    /// as in sd-scripts.
    ///
    /// # Errors
    /// Ids for another number of encoders; else as [`ClipTextModel::forward`].
    pub fn encode<'m>(
        &'m self,
        tape: &Tape<'m>,
        text: &TextIds,
        clip_skip: Option<usize>,
    ) -> EngineResult<TextOutput> {
        let TextIds { ids, second, chunks, length } = text;
        let joined = |hidden: &Value| join_chunks(tape, hidden, *chunks);
        match (&self.second, second) {
            (None, None) => {
                let hidden = self.first.forward(tape, ids, *length, clip_skip)?;
                Ok(TextOutput { context: joined(&hidden)?, pooled: None })
            }
            (Some(encoder), Some(second)) => {
                let left = joined(&self.first.penultimate(tape, ids, *length)?)?;
                let hidden = encoder.penultimate(tape, &second.ids, *length)?;
                let pooled = encoder.pooled(tape, &hidden, &second.ends)?;
                let context = tape.concat_last(&left, &joined(&hidden)?)?;
                Ok(TextOutput { context, pooled: Some(pooled) })
            }
            _ => Err(EngineError::Unsupported(
                "the prompts were made for another number of text encoders".to_owned(),
            )),
        }
    }

    /// Width of the hidden states.
    pub fn width(&self) -> usize {
        self.first.config().width + self.second.as_ref().map_or(0, |second| second.config().width)
    }

    /// Width of the pooled output, where there is one.
    pub fn pooled_width(&self) -> Option<usize> {
        self.second.as_ref()?.config().pooled
    }

    /// Where their weights are.
    pub fn device(&self) -> engine::Device {
        self.first.device()
    }
}
