//! From prompts to pictures: tokenizer, text encoder, U-Net, sampler and VAE in one piece.
//!
//! [`Pipeline`] owns them all; [`Request`] says what is wanted. Its stages are separate ([`TextReader`],
//! [`Predictor`], [`decode`]) so that a trainer can lend its own models, with the LoRA in training.
//!
//! Pictures equal those of diffusers' pipelines on the CPU for the same seed: noise is that of PyTorch's
//! generator. LoRA files change the weights themselves: pictures take no longer with them than without.

mod denoise;
mod error;
mod loras;
mod making;
mod noise;
mod picture;
mod request;
mod resize;
#[cfg(test)]
mod tests;
mod text;
mod texts;

use engine::{DType, Device};
use formats::{BaseModel, OpenOptions, open_base_model};

pub use denoise::{Denoising, Predictor, Progress, Subject, Watch};
pub use error::PipelineError;
pub use loras::LoraHandle;
pub use noise::TorchNoise;
pub use picture::{Picture, decode};
pub use request::{HighresFix, Mask, Request, SizeHints};
pub use text::{Embedding, TextReader};

use self::loras::Loras;
use self::texts::Texts;
use crate::prompt::Tokenizers;
use crate::sampler::Prediction;
use crate::{
    ClipConfig, ClipTextModel, TextEncoders, Tiling, Unet, UnetConfig, Vae, VaeConfig, preset,
    second_text_preset,
};

/// Which models, where, and in which types.
#[derive(Clone, Debug)]
pub struct PipelineOptions {
    /// Whether it is a model of Stable Diffusion 2.x; `None` lets the model tell.
    pub v2: Option<bool>,
    /// Which variant of a diffusers folder's weights to take (`fp16`).
    pub variant: Option<String>,
    /// Another VAE than the model's: file, folder or hub id.
    pub vae: Option<String>,
    /// Whether the U-Net predicts v; `None` asks the folder's scheduler, and without one it predicts
    /// the noise. No single file tells: the 768 pixel models of Stable Diffusion 2.x need this.
    pub v_parameterization: Option<bool>,
    /// Whether the U-Net was trained with zero terminal SNR; `None` asks the folder's scheduler.
    pub zero_terminal_snr: Option<bool>,
    /// Where the arithmetic is done.
    pub device: Device,
    /// Type of the arithmetic of text encoder and U-Net.
    pub dtype: DType,
    /// Type of the VAE's.
    pub vae_dtype: DType,
    /// Whether the VAE works tile by tile.
    pub tiling: Tiling,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        Self {
            v2: None,
            variant: None,
            vae: None,
            v_parameterization: None,
            zero_terminal_snr: None,
            device: Device::Cpu,
            dtype: DType::F32,
            vae_dtype: DType::F32,
            tiling: Tiling::Auto,
        }
    }
}

/// A model that makes pictures.
pub struct Pipeline {
    /// The mapped files.
    pub files: BaseModel,
    /// Text to ids.
    pub tokenizers: Tokenizers,
    /// Ids to hidden states.
    pub text_encoders: TextEncoders,
    /// Predicts the noise.
    pub unet: Unet,
    /// Latents to pixels.
    pub vae: Vae,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// Whether it was trained with zero terminal SNR.
    pub zero_terminal_snr: bool,
    /// Whether the VAE works tile by tile.
    pub tiling: Tiling,
    dtype: DType,
    loras: Loras,
    texts: Texts,
}

impl Pipeline {
    /// Loads a model: a single file, a diffusers folder or a hub id.
    pub fn load(name: &str, options: &PipelineOptions) -> Result<Self, PipelineError> {
        let PipelineOptions { v2, variant, vae, .. } = options.clone();
        let files = open_base_model(name, &OpenOptions { v2, variant, vae })?;
        let preset = preset(files.family);
        let PipelineOptions { device, dtype, vae_dtype, tiling, .. } = *options;
        let told_v = || files.prediction_type() == Some("v_prediction");
        let is_v = options.v_parameterization.unwrap_or_else(told_v);
        let told_zero = || {
            let config = files.scheduler_config.as_ref();
            let flag = config.and_then(|config| config.get("rescale_betas_zero_snr"));
            flag.and_then(serde_json::Value::as_bool).unwrap_or(false)
        };
        let unet = UnetConfig::resolve(files.unet_config.as_ref(), &*files.unet, preset)?;
        let read = |config: Option<&serde_json::Value>, weights, preset| {
            let config = ClipConfig::resolve(config, weights, preset)?;
            ClipTextModel::load(weights, &config, device, dtype)
        };
        let first = read(files.text_encoder_config.as_ref(), &*files.text_encoder, preset)?;
        let second_preset = second_text_preset(files.family);
        let second = match files.text_encoder_2.as_deref().zip(second_preset) {
            Some((weights, preset)) => {
                Some(read(files.text_encoder_2_config.as_ref(), weights, preset)?)
            }
            None => None,
        };
        let vae = VaeConfig::resolve(files.vae_config.as_ref(), &*files.vae, preset)?;
        Ok(Self {
            tokenizers: Tokenizers::of(&files)?,
            text_encoders: TextEncoders { first, second },
            unet: Unet::load(&*files.unet, &unet, device, dtype)?,
            vae: Vae::load(&*files.vae, &vae, device, vae_dtype)?,
            prediction: if is_v { Prediction::Velocity } else { Prediction::Epsilon },
            zero_terminal_snr: options.zero_terminal_snr.unwrap_or_else(told_zero),
            tiling,
            dtype,
            loras: Loras::default(),
            texts: Texts::default(),
            files,
        })
    }
}
