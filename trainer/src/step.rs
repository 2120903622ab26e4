//! One micro-step: prompts and noised latents in, loss and gradients out.

use std::rc::Rc;

use anyhow::Result;
use engine::{Checkpointing, DType, Draws, Ids, ParamId, ParamStore, Tape, Tensor};
use models::{ClipTextModel, Unet, UnetInput, join_chunks, token_factors};

use crate::objective::Noised;

/// Tokens of a chunk: start, 75 of the caption, end.
pub const CHUNK: usize = 77;

/// The models of a run, adapters installed.
pub struct Models {
    /// Reads the prompts.
    pub text_encoder: ClipTextModel,
    /// Predicts the noise.
    pub unet: Unet,
}

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

/// How the models are run.
#[derive(Clone)]
pub struct Setting {
    /// Layers of the text encoder to leave out.
    pub clip_skip: Option<usize>,
    /// Keep only the inputs of blocks and compute their insides again.
    pub checkpointing: Checkpointing,
    /// What the adapters leave out of this micro-step.
    pub draws: Option<Rc<dyn Draws>>,
}

/// What a forward pass gives.
pub struct Forward {
    /// `[B,T,C]`.
    pub context: Tensor,
    /// `[B,h,w,4]`.
    pub prediction: Tensor,
    /// Weighted loss of each sample; their sum is the loss.
    pub losses: Vec<f32>,
}

/// Runs forward and backward; `ready` gets each parameter's gradient as soon as it is final.
pub fn forward_backward(
    (models, params): (&Models, &ParamStore),
    setting: Setting,
    prompts: &Prompts,
    batch: &Noised,
    ready: &mut dyn FnMut(ParamId, Tensor) -> engine::Result<()>,
) -> Result<Forward> {
    let random = setting.draws.is_some();
    let tape = Tape::new(params, setting.checkpointing).with_draws(setting.draws);
    let context = encode_prompts(&tape, &models.text_encoder, setting.clip_skip, prompts)?;
    let waves = models.unet.waves(batch.noisy.device(), &batch.timesteps)?;
    let prediction = models
        .unet
        .forward(&tape, UnetInput { latents: &batch.noisy, waves: &waves, context: &context })?;
    let loss = tape.loss(&prediction, &batch.target, &batch.loss)?;
    let losses = loss.tensor().to_vec_f32()?;
    let forward = Forward {
        context: context.tensor().clone(),
        prediction: prediction.tensor().clone(),
        losses,
    };
    drop((context, prediction));
    // Dropouts can leave out all that the loss depends on.
    if loss.is_tracked() || !random {
        tape.backward(&loss, ready)?;
    }
    Ok(forward)
}

/// Forward alone: the weighted loss of each sample. Nothing is recorded for a backward pass, and
/// what is random in training adapters does not happen.
pub fn evaluate(
    (models, params): (&Models, &ParamStore),
    clip_skip: Option<usize>,
    prompts: &Prompts,
    batch: &Noised,
) -> Result<Vec<f32>> {
    let tape = Tape::inference(Some(params));
    let context = encode_prompts(&tape, &models.text_encoder, clip_skip, prompts)?;
    let waves = models.unet.waves(batch.noisy.device(), &batch.timesteps)?;
    let prediction = models
        .unet
        .forward(&tape, UnetInput { latents: &batch.noisy, waves: &waves, context: &context })?;
    Ok(tape.loss(&prediction, &batch.target, &batch.loss)?.tensor().to_vec_f32()?)
}

/// Hidden states of the prompts, `[B,T,C]`, long prompts joined, words weighted.
pub fn encode_prompts<'m>(
    tape: &Tape<'m>,
    text_encoder: &'m ClipTextModel,
    clip_skip: Option<usize>,
    prompts: &Prompts,
) -> engine::Result<engine::Value> {
    let device = text_encoder.device();
    let ids = Ids::new(device, &prompts.ids)?;
    let hidden = text_encoder.forward(tape, &ids, CHUNK, clip_skip)?;
    let joined = join_chunks(tape, &hidden, prompts.chunks)?;
    match &prompts.weights {
        Some(weights) => {
            let factors = token_factors(weights, joined.shape()[0], prompts.chunks)?;
            let factors = Tensor::from_f32(device, &[factors.len()], &factors, DType::F32)?;
            tape.scale_rows(&joined, &factors)
        }
        None => Ok(joined),
    }
}
