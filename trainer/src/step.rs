//! One micro-step: inputs on the device in, losses and gradients out.

use std::rc::Rc;

use anyhow::Result;
use engine::{Checkpointing, Draws, EngineError, ParamId, ParamStore, Tape, Tensor, Value};
use models::lora::LoraNetwork;
use models::{TextEncoders, TextOutput, Unet, UnetInput};

use crate::inputs::{StepInputs, Text};

/// The models of a run, adapters installed.
pub struct Models {
    /// Reads the prompts; `None` where all were encoded before the training.
    pub text_encoder: Option<TextEncoders>,
    /// Predicts the noise.
    pub unet: Unet,
}

impl Models {
    /// Puts the adapters of `network` into the layers.
    pub fn install(&mut self, network: &LoraNetwork) -> Result<()> {
        match &mut self.text_encoder {
            Some(text_encoder) => Ok(network.install_all(text_encoder, &mut self.unet, 1.)?),
            None => Ok(network.install_unet(&mut self.unet, 1.)?),
        }
    }
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
    /// SDXL's `[B,P]`.
    pub pooled: Option<Tensor>,
    /// `[B,h,w,4]`.
    pub prediction: Tensor,
    /// Weighted loss of each sample, f32 `[B]`; their sum is the loss.
    pub losses: Tensor,
}

/// Runs forward and backward; `ready` gets each parameter's gradient as soon as it is final.
pub fn forward_backward(
    (models, params): (&Models, &ParamStore),
    setting: Setting,
    inputs: &StepInputs,
    ready: &mut dyn FnMut(ParamId, Tensor) -> engine::Result<()>,
) -> Result<Forward> {
    forward_backward_onto((models, params), setting, inputs, (None, ready))
}

/// The same; on a card each gradient is added to its place in a flat tensor, where one is given.
pub fn forward_backward_onto(
    (models, params): (&Models, &ParamStore),
    setting: Setting,
    inputs: &StepInputs,
    (flat, ready): (Option<&Tensor>, &mut dyn FnMut(ParamId, Tensor) -> engine::Result<()>),
) -> Result<Forward> {
    params.refresh()?;
    let random = setting.draws.is_some();
    let tape = Tape::new(params, setting.checkpointing).with_draws(setting.draws);
    let text_encoder = models.text_encoder.as_ref();
    let text = encode_text(&tape, text_encoder, setting.clip_skip, &inputs.text)?;
    let prediction = predict(&tape, &models.unet, inputs, &text)?;
    let loss = tape.loss(&prediction, &inputs.target, &inputs.loss)?;
    let forward = Forward {
        context: text.context.tensor().clone(),
        pooled: text.pooled.as_ref().map(|pooled| pooled.tensor().clone()),
        prediction: prediction.tensor().clone(),
        losses: loss.tensor().clone(),
    };
    drop((text, prediction));
    // Dropouts can leave out all that the loss depends on.
    if loss.is_tracked() || !random {
        match flat {
            Some(flat) => tape.backward_onto(&loss, flat, ready)?,
            None => tape.backward(&loss, ready)?,
        }
    }
    Ok(forward)
}

/// Forward alone: the weighted loss of each sample. Nothing is recorded for a backward pass, and
/// what is random in training adapters does not happen.
pub fn evaluate(
    (models, params): (&Models, &ParamStore),
    clip_skip: Option<usize>,
    inputs: &StepInputs,
) -> Result<Vec<f32>> {
    params.refresh()?;
    let tape = Tape::inference(Some(params));
    let text_encoder = models.text_encoder.as_ref();
    let text = encode_text(&tape, text_encoder, clip_skip, &inputs.text)?;
    let prediction = predict(&tape, &models.unet, inputs, &text)?;
    Ok(tape.loss(&prediction, &inputs.target, &inputs.loss)?.tensor().to_vec_f32()?)
}

/// What the U-Net says of `inputs`.
pub fn predict<'m>(
    tape: &Tape<'m>,
    unet: &'m Unet,
    inputs: &StepInputs,
    text: &TextOutput,
) -> engine::Result<Value> {
    let added = match (&text.pooled, &inputs.sizes) {
        (Some(pooled), Some(sizes)) => Some(unet.added(tape, pooled, sizes)?),
        _ => None,
    };
    let (latents, waves, context) = (&inputs.latents, &inputs.waves, &text.context);
    unet.forward(tape, UnetInput { latents, waves, context, added: added.as_ref() })
}

/// Hidden states of the prompts, long prompts joined, words weighted; and SDXL's pooled output.
pub fn encode_text<'m>(
    tape: &Tape<'m>,
    text_encoder: Option<&'m TextEncoders>,
    clip_skip: Option<usize>,
    text: &Text,
) -> engine::Result<TextOutput> {
    let (ids, factors) = match text {
        Text::Tokens { ids, factors } => (ids, factors),
        Text::Encoded { context, pooled } => {
            let pooled = pooled.clone().map(Value::constant);
            return Ok(TextOutput { context: Value::constant(context.clone()), pooled });
        }
    };
    let text_encoder = text_encoder
        .ok_or_else(|| EngineError::Unsupported("the text encoder was dropped".into()))?;
    let TextOutput { context, pooled } = text_encoder.encode(tape, ids, clip_skip)?;
    let context = match factors {
        Some(factors) => tape.scale_rows(&context, factors)?,
        None => context,
    };
    Ok(TextOutput { context, pooled })
}
