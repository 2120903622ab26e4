//! What a micro-step reads on its device: noised latents, target, prompts, and how the error counts.
//!
//! The numbers are made on the host ([`MicroBatch`]), in one order ([`MicroBatch::arrays`]), so that
//! they can be put into tensors of their own or into one buffer that stays where it is.

use anyhow::{Context, Result};
use engine::{DType, Device, Ids, LossSpec, Tensor};
use models::{Unet, timestep_embedding, token_factors};

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
}

/// A micro-step's input as plain numbers on the host.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Latents and how the error counts.
    pub noised: Noised,
    /// The prompts.
    pub prompts: Prompts,
    /// The prompts encoded before the training, `[B,T,C]`: they are not encoded again.
    pub encoded: Option<(Vec<usize>, Vec<f32>)>,
}

/// The prompts on the device.
pub enum Text {
    /// To be encoded.
    Tokens {
        /// `[B·chunks·77]`.
        ids: Ids,
        /// f32, one per token of the joined prompts.
        factors: Option<Tensor>,
        /// Chunks of each prompt.
        chunks: usize,
    },
    /// `[B,T,C]`.
    Encoded(Tensor),
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
    /// How the prediction is judged.
    pub loss: LossSpec,
}

/// An array of a micro-step: shape and numbers.
pub type Array = (Vec<usize>, Vec<f32>);

impl MicroBatch {
    /// Its f32 arrays: latents, target, waves, delta, weight; then, where there are such, mask, token
    /// factors and encoded prompts.
    pub fn arrays(&self, unet: &Unet) -> Result<Vec<Array>> {
        let noised = &self.noised;
        let (shape, list) = (noised.shape.to_vec(), vec![noised.shape[0]]);
        let width = unet.config().channels[0];
        let mut arrays = vec![
            (shape.clone(), noised.noisy.clone()),
            (shape.clone(), noised.target.clone()),
            (vec![shape[0], width], timestep_embedding(&noised.timesteps, width)),
            (list.clone(), noised.delta.clone()),
            (list, noised.weight.clone()),
        ];
        arrays.extend(noised.mask.iter().map(|mask| (shape.clone(), mask.clone())));
        match (&self.encoded, &self.prompts.weights) {
            (Some(encoded), _) => arrays.push(encoded.clone()),
            (None, Some(weights)) => {
                let factors = token_factors(weights, noised.shape[0], self.prompts.chunks)?;
                arrays.push((vec![factors.len()], factors));
            }
            (None, None) => {}
        }
        Ok(arrays)
    }

    /// The inputs from the tensors of [`MicroBatch::arrays`] and of the ids.
    pub fn assemble(&self, tensors: Vec<Tensor>, ids: Option<Ids>) -> Result<StepInputs> {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().context("an input of the step is missing");
        let (latents, target, waves) = (next()?, next()?, next()?);
        let (delta, weight) = (next()?, next()?);
        let mask = self.noised.mask.as_ref().map(|_| next()).transpose()?;
        let text = match &self.encoded {
            Some(_) => Text::Encoded(next()?),
            None => Text::Tokens {
                ids: ids.context("the prompts are missing")?,
                factors: self.prompts.weights.as_ref().map(|_| next()).transpose()?,
                chunks: self.prompts.chunks,
            },
        };
        let gradient_weight = weight.clone();
        let element = self.noised.element;
        let loss = LossSpec { element, delta, weight, gradient_weight, mask };
        Ok(StepInputs { latents, target, waves, text, loss })
    }
}

impl StepInputs {
    /// Copies `micro` to `device`, into tensors of its own.
    pub fn new(device: Device, unet: &Unet, micro: &MicroBatch) -> Result<Self> {
        let copy = |(shape, data): &Array| Tensor::from_f32(device, shape, data, DType::F32);
        let tensors = micro.arrays(unet)?.iter().map(copy).collect::<engine::Result<_>>()?;
        let ids = match &micro.encoded {
            Some(_) => None,
            None => Some(Ids::new(device, &micro.prompts.ids)?),
        };
        micro.assemble(tensors, ids)
    }
}
