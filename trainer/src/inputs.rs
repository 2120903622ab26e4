//! What a micro-step reads on its device: noised latents, target, prompts, and how the error counts.
//!
//! The numbers are made on the host ([`MicroBatch`]), in one order ([`MicroBatch::arrays`]), so that
//! they can be put into tensors of their own or into one buffer that stays where it is.

use anyhow::{Context, Result};
use engine::{DType, Device, Ids, LossSpec, RowChoice, Tensor};
use models::{
    SecondIds, SizeIds, TextIds, UnetConfig, end_rows, timestep_embedding, token_factors,
};

use crate::objective::Noised;

/// Tokens of a chunk: start, 75 of the caption, end.
pub const CHUNK: usize = 77;

/// The prompts of a batch.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// `[B,chunks,77]`, row-major.
    pub ids: Vec<u32>,
    /// One per id (`weighted_captions`).
    pub weights: Option<Vec<f32>>,
    /// Chunks of each prompt: 1, 2 or 3.
    pub chunks: usize,
    /// What SDXL reads beside that.
    pub second: Option<SecondPrompts>,
}

/// SDXL's part of the prompts of a batch.
#[derive(Clone, Debug)]
pub struct SecondPrompts {
    /// Ids for the second text encoder, `[B,chunks,77]`, row-major.
    pub ids: Vec<u32>,
    /// Width of the pooled output.
    pub pooled: usize,
    /// One per sample.
    pub sizes: Vec<SizeIds>,
}

impl Prompts {
    /// All ids of a batch in one list, as they lie on a card: those of the encoder; with a second one
    /// its ids, the rows of the pooled outputs, and the way back for their gradients.
    pub fn id_list(&self) -> Result<Vec<u32>> {
        let mut list = self.ids.clone();
        if let Some(second) = &self.second {
            let rows = end_rows(&second.ids, self.chunks, CHUNK);
            let back = RowChoice::numbers(&rows, second.ids.len())?;
            list.extend(second.ids.iter().chain(&rows).chain(&back));
        }
        Ok(list)
    }

    /// [`Self::id_list`] on its device, taken apart.
    pub fn text_ids(&self, list: &Ids) -> Result<TextIds> {
        let (count, chunks) = (self.ids.len(), self.chunks);
        let rows = count / (chunks * CHUNK).max(1);
        let mut at = 0;
        let mut next = |len: usize| {
            at += len;
            list.part(at - len, len)
        };
        let ids = next(count)?;
        let second = match &self.second {
            None => None,
            Some(_) => {
                let (ids, rows, back) = (next(count)?, next(rows)?, next(count)?);
                Some(SecondIds { ids, ends: RowChoice::new(rows, back) })
            }
        };
        Ok(TextIds { ids, second, chunks, length: CHUNK })
    }
}

/// Prompts that were encoded before the training.
#[derive(Clone, Debug)]
pub struct EncodedPrompts {
    /// Hidden states `[B,T,C]`.
    pub context: Array,
    /// SDXL's pooled outputs `[B,P]`.
    pub pooled: Option<Array>,
}

/// A micro-step's input as plain numbers on the host.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Latents and how the error counts.
    pub noised: Noised,
    /// The prompts.
    pub prompts: Prompts,
    /// The prompts where they were encoded before the training: they are not encoded again.
    pub encoded: Option<EncodedPrompts>,
}

/// The prompts on the device.
pub enum Text {
    /// To be encoded.
    Tokens {
        /// Sequences of 77.
        ids: TextIds,
        /// f32, one per token of the joined prompts.
        factors: Option<Tensor>,
    },
    /// Already encoded.
    Encoded {
        /// `[B,T,C]`.
        context: Tensor,
        /// `[B,P]`.
        pooled: Option<Tensor>,
    },
}

/// A micro-step's input on its device.
pub struct StepInputs {
    /// f32 `[B,h,w,4]`.
    pub latents: Tensor,
    /// f32 `[B,h,w,4]`.
    pub target: Tensor,
    /// f32 `[B,width]`: the sinusoids of the timesteps.
    pub waves: Tensor,
    /// The prompts.
    pub text: Text,
    /// SDXL's embedded sizes, f32 `[B,S]`.
    pub sizes: Option<Tensor>,
    /// How the prediction is judged.
    pub loss: LossSpec,
}

/// An array of a micro-step: shape and numbers.
pub type Array = (Vec<usize>, Vec<f32>);

impl MicroBatch {
    /// Its f32 arrays: latents, target, waves, delta, weight; then, where there are such, mask, sizes,
    /// token factors or encoded prompts.
    pub fn arrays(&self, unet: &UnetConfig) -> Result<Vec<Array>> {
        let noised = &self.noised;
        let (shape, list) = (noised.shape.to_vec(), vec![noised.shape[0]]);
        let width = unet.channels[0];
        let mut arrays = vec![
            (shape.clone(), noised.noisy.clone()),
            (shape.clone(), noised.target.clone()),
            (vec![shape[0], width], timestep_embedding(&noised.timesteps, width)),
            (list.clone(), noised.delta.clone()),
            (list, noised.weight.clone()),
        ];
        arrays.extend(noised.mask.iter().map(|mask| (shape.clone(), mask.clone())));
        if let Some(second) = &self.prompts.second {
            let waves = unet.size_waves(second.pooled, &second.sizes)?;
            arrays.push((vec![shape[0], waves.len() / shape[0].max(1)], waves));
        }
        match (&self.encoded, &self.prompts.weights) {
            (Some(encoded), _) => {
                arrays.push(encoded.context.clone());
                arrays.extend(encoded.pooled.clone());
            }
            (None, Some(weights)) => {
                let factors = token_factors(weights, noised.shape[0], self.prompts.chunks)?;
                arrays.push((vec![factors.len()], factors));
            }
            (None, None) => {}
        }
        Ok(arrays)
    }

    /// The inputs from the tensors of [`MicroBatch::arrays`] and of [`Prompts::id_list`].
    pub fn assemble(&self, tensors: Vec<Tensor>, ids: Option<Ids>) -> Result<StepInputs> {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().context("an input of the step is missing");
        let (latents, target, waves) = (next()?, next()?, next()?);
        let (delta, weight) = (next()?, next()?);
        let mask = self.noised.mask.as_ref().map(|_| next()).transpose()?;
        let sizes = self.prompts.second.as_ref().map(|_| next()).transpose()?;
        let text = match &self.encoded {
            Some(encoded) => Text::Encoded {
                context: next()?,
                pooled: encoded.pooled.as_ref().map(|_| next()).transpose()?,
            },
            None => Text::Tokens {
                ids: self.prompts.text_ids(&ids.context("the prompts are missing")?)?,
                factors: self.prompts.weights.as_ref().map(|_| next()).transpose()?,
            },
        };
        let gradient_weight = weight.clone();
        let element = self.noised.element;
        let loss = LossSpec { element, delta, weight, gradient_weight, mask };
        Ok(StepInputs { latents, target, waves, text, sizes, loss })
    }
}

impl StepInputs {
    /// Copies `micro` to `device`, into tensors of its own.
    pub fn new(device: Device, unet: &UnetConfig, micro: &MicroBatch) -> Result<Self> {
        let copy = |(shape, data): &Array| Tensor::from_f32(device, shape, data, DType::F32);
        let tensors = micro.arrays(unet)?.iter().map(copy).collect::<engine::Result<_>>()?;
        let ids = match &micro.encoded {
            Some(_) => None,
            None => Some(Ids::new(device, &micro.prompts.id_list()?)?),
        };
        micro.assemble(tensors, ids)
    }
}
