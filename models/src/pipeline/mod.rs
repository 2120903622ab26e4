//! From prompts to pictures: tokenizer, text encoder, U-Net, sampler and VAE in one piece.
//!
//! [`Pipeline`] owns them all; its stages are separate ([`TextReader`], [`Predictor`], [`decode`]) so
//! that a trainer can lend its own models, with the LoRA in training.

mod denoise;
mod error;
mod noise;
mod picture;
#[cfg(test)]
mod tests;
mod text;

use engine::{DType, Device};
use formats::{BaseModel, OpenOptions, open_base_model};

pub use denoise::{Denoising, Predictor, Progress, Subject, Watch};
pub use error::PipelineError;
pub use noise::TorchNoise;
pub use picture::{Picture, decode};
pub use text::{Embedding, TextReader};

use crate::prompt::ClipTokenizer;
use crate::sampler::{SamplerKind, SamplerOptions};
use crate::{ClipConfig, ClipTextModel, Unet, UnetConfig, Vae, VaeConfig, preset};

/// Which models, where, and in which types.
#[derive(Clone, Debug)]
pub struct PipelineOptions {
    /// How the files are read.
    pub open: OpenOptions,
    /// Where the arithmetic is done.
    pub device: Device,
    /// Type of the arithmetic of text encoder and U-Net.
    pub dtype: DType,
    /// Type of the VAE's.
    pub vae_dtype: DType,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        Self {
            open: OpenOptions::default(),
            device: Device::Cpu,
            dtype: DType::F32,
            vae_dtype: DType::F32,
        }
    }
}

/// What a picture shows and how it is made.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What it shows; `(word:1.2)` weighs.
    pub prompt: String,
    /// What it does not show.
    pub negative_prompt: String,
    /// Columns, a multiple of 8.
    pub width: usize,
    /// Rows, a multiple of 8.
    pub height: usize,
    /// Of the noise: the same seed is the same picture, also in diffusers on the CPU.
    pub seed: u64,
    /// Which sampler.
    pub sampler: SamplerKind,
    /// Steps and other options of the sampler.
    pub options: SamplerOptions,
    /// Weight of the prompt over the negative prompt.
    pub guidance_scale: f32,
    /// Layers of the text encoder to leave out, as sd-scripts counts.
    pub clip_skip: Option<usize>,
    /// Chunks of 75 tokens that a prompt may have.
    pub most_chunks: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            width: 512,
            height: 512,
            seed: 0,
            sampler: SamplerKind::Ddim,
            options: SamplerOptions::new(50),
            guidance_scale: 7.5,
            clip_skip: None,
            most_chunks: 1,
        }
    }
}

/// A model that makes pictures.
pub struct Pipeline {
    /// The mapped files.
    pub files: BaseModel,
    /// Text to ids.
    pub tokenizer: ClipTokenizer,
    /// Ids to hidden states.
    pub text_encoder: ClipTextModel,
    /// Predicts the noise.
    pub unet: Unet,
    /// Latents to pixels.
    pub vae: Vae,
}

impl Pipeline {
    /// Loads a model: a single file, a diffusers folder or a hub id.
    pub fn load(name: &str, options: &PipelineOptions) -> Result<Self, PipelineError> {
        let files = open_base_model(name, &options.open)?;
        let preset = preset(files.family);
        let PipelineOptions { device, dtype, vae_dtype, .. } = *options;
        let unet = UnetConfig::resolve(files.unet_config.as_ref(), &*files.unet, preset)?;
        let text = files.text_encoder_config.as_ref();
        let text = ClipConfig::resolve(text, &*files.text_encoder, preset)?;
        let vae = VaeConfig::resolve(files.vae_config.as_ref(), &*files.vae, preset)?;
        Ok(Self {
            tokenizer: ClipTokenizer::open(files.tokenizer_dir.as_deref(), preset.pads_with_zero)?,
            text_encoder: ClipTextModel::load(&*files.text_encoder, &text, device, dtype)?,
            unet: Unet::load(&*files.unet, &unet, device, dtype)?,
            vae: Vae::load(&*files.vae, &vae, device, vae_dtype)?,
            files,
        })
    }

    /// The picture of one request.
    pub fn generate(
        &self,
        request: &Request,
        watch: &mut Watch<'_>,
    ) -> Result<Picture, PipelineError> {
        let Request { width, height, .. } = *request;
        let fits = |side: usize| side >= 64 && side.is_multiple_of(8);
        if !fits(width) || !fits(height) {
            return Err(PipelineError::Size { width, height });
        }
        let reader = TextReader {
            tokenizer: &self.tokenizer,
            encoder: &self.text_encoder,
            params: None,
            clip_skip: request.clip_skip,
            most_chunks: request.most_chunks,
        };
        let [negative, prompt] = &reader.read(&[&request.negative_prompt, &request.prompt])?[..]
        else {
            return Err(PipelineError::UnequalPrompts);
        };
        let noise = TorchNoise::new(request.seed);
        let mut subjects = [Subject { prompt, negative, noise, start: None, mask: None }];
        let how = Denoising {
            size: [width / 8, height / 8],
            sampler: request.sampler,
            options: request.options.clone(),
            guidance_scale: request.guidance_scale,
        };
        let predictor = Predictor { unet: &self.unet, params: None };
        let latents = predictor.denoise(&mut subjects, &how, watch)?;
        let mut pictures = decode(&self.vae, &latents, how.size)?;
        pictures.pop().ok_or(PipelineError::Size { width, height })
    }
}
