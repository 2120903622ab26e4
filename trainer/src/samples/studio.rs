//! Makes one sample picture with the models of the training.

use std::cell::RefCell;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use engine::{DType, Device, ParamStore};
use formats::Weights;
use formats::picture_text::PictureText;
use models::pipeline::{
    Denoising, Embedding, Picture, PipelineError, Predictor, Subject, TextReader, TorchNoise,
    decode,
};
use models::prompt::Tokenizers;
use models::{ModelError, TextEncoders, Tiling, Vae, VaeConfig};
use pictures::{Pixels, encode_png};

use super::prompts::{MOST_CHUNKS, SamplePrompt};
use crate::base::Base;
use crate::latents::VaeEncoder;

/// The VAE of the base model, read from its mapped file each time it is needed.
pub struct VaeFile {
    weights: Box<dyn Weights>,
    config: VaeConfig,
    device: Device,
    dtype: DType,
}

impl VaeFile {
    /// Keeps of an opened base model what the VAE needs; the rest is closed.
    pub fn of(base: Base) -> Self {
        let Base { files, vae: config, device, vae_dtype: dtype, .. } = base;
        Self { weights: files.vae, config, device, dtype }
    }

    fn load(&self) -> Result<Vae, ModelError> {
        Vae::load(&*self.weights, &self.config, self.device, self.dtype)
    }
}

/// Where the VAE is when a picture needs it.
#[derive(Clone, Copy)]
pub enum VaeAt<'a> {
    /// The training has it, as latents are not cached.
    Training(&'a RefCell<VaeEncoder>),
    /// In its file.
    File(&'a VaeFile),
}

impl VaeAt<'_> {
    fn decode(
        self,
        latents: &[f32],
        size: [usize; 2],
        tiling: Tiling,
    ) -> Result<Vec<Picture>, PipelineError> {
        match self {
            Self::Training(encoder) => decode(encoder.borrow().vae(), latents, size, tiling),
            Self::File(file) => decode(&file.load()?, latents, size, tiling),
        }
    }
}

/// Hidden states of a prompt and of its negative prompt.
#[derive(Clone)]
pub struct Encoded {
    prompt: Embedding,
    negative: Embedding,
}

/// Reads prompts as the generation scripts do.
pub fn encode(
    (tokenizers, clip_skip): (&Tokenizers, Option<usize>),
    (encoders, params): (&TextEncoders, Option<&ParamStore>),
    prompt: &SamplePrompt,
) -> Result<Encoded> {
    let most_chunks = MOST_CHUNKS;
    // SDXL is trained with the states before the last layer, whatever the option says.
    let clip_skip = clip_skip.filter(|_| encoders.second.is_none());
    let reader = TextReader { tokenizers, encoders, params, clip_skip, most_chunks };
    let mut read = reader.read(&[&prompt.negative, &prompt.prompt])?.into_iter();
    let mut next = || read.next().context("a prompt was not encoded");
    let (negative, prompt) = (next()?, next()?);
    Ok(Encoded { prompt, negative })
}

/// What came of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// The bytes of a PNG file.
    Picture(Vec<u8>),
    /// Numbers that are none; says where they came from.
    NotFinite(String),
    /// The run was asked to stop.
    Stopped,
}

/// Makes the picture of `prompt`; `live` is called after each evaluation of the U-Net, to break ends
/// the work. `facts` are for the text in the picture.
pub fn make(
    (predictor, vae, tiling): (Predictor<'_>, VaeAt<'_>, Tiling),
    (prompt, encoded, seed): (&SamplePrompt, &Encoded, u64),
    facts: &[(&str, String)],
    live: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Made> {
    let size = prompt.size.map(|side| side / 8);
    let how = Denoising {
        size,
        sampler: prompt.sampler,
        options: prompt.options.clone(),
        guidance_scale: prompt.scale,
        sizes: None,
    };
    let mut subjects = [Subject {
        prompt: &encoded.prompt,
        negative: &encoded.negative,
        noise: TorchNoise::new(seed),
        start: None,
        mask: None,
    }];
    let latents = match predictor.denoise(&mut subjects, &how, &mut |_| live()) {
        Err(PipelineError::Stopped) => return Ok(Made::Stopped),
        latents => latents?,
    };
    if latents.iter().any(|x| !x.is_finite()) {
        return Ok(Made::NotFinite("the latents are not finite".to_owned()));
    }
    if live().is_break() {
        return Ok(Made::Stopped);
    }
    let picture = match vae.decode(&latents, size, tiling) {
        Err(error @ PipelineError::NotFinite) => return Ok(Made::NotFinite(error.to_string())),
        pictures => pictures?.pop().context("the VAE gave no picture")?,
    };
    let (width, height, data) = (picture.width, picture.height, picture.to_rgb8());
    let text = text(prompt, seed, facts).to_string();
    let pixels = Pixels { width, height, channels: 3, data };
    Ok(Made::Picture(encode_png(&pixels, &[("parameters", &text)])?))
}

fn text(prompt: &SamplePrompt, seed: u64, facts: &[(&str, String)]) -> PictureText {
    let mut text = PictureText {
        prompt: prompt.prompt.clone(),
        negative_prompt: prompt.negative.clone(),
        settings: Vec::new(),
    };
    let [width, height] = prompt.size;
    text.set("Steps", prompt.options.steps);
    text.set("Sampler", prompt.sampler.webui_label());
    text.set("CFG scale", prompt.scale);
    text.set("Seed", seed);
    text.set("Size", format_args!("{width}x{height}"));
    for (name, value) in facts {
        text.set(name, value);
    }
    text
}
