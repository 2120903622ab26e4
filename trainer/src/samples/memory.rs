//! What a sample picture takes in memory, measured on a card that only records.

use anyhow::{Context, Result};
use engine::cuda::driver::CardFacts;
use engine::cuda::recorder;
use engine::{DType, Tape, Tensor, Value};
use models::prompt::CHUNK;
use models::{Tiling, Unet, UnetInput};

use super::SamplePlan;
use crate::base::Base;
use crate::card_plan::{Parts, VaeRecording, imagined_card};

/// Most bytes that a picture takes beside the models of the training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PictureBytes {
    /// While the U-Net takes the noise away.
    pub denoising: usize,
    /// While the VAE makes pixels of the latents, its weights included.
    pub decoding: usize,
    /// The same in tiles.
    pub decoding_in_tiles: usize,
    /// Columns and rows of the largest picture.
    pub size: [usize; 2],
}

impl PictureBytes {
    /// The larger of both: they come one after the other.
    pub fn most(&self) -> usize {
        self.denoising.max(self.decoding)
    }

    /// The same with the VAE at work in tiles.
    pub fn most_in_tiles(&self) -> usize {
        self.denoising.max(self.decoding_in_tiles)
    }
}

/// Measures the largest picture of `plan` on a card like `facts`; types are those of the arithmetic,
/// of the U-Net's stored weights and of the VAE's arithmetic. Kernels' scratch on the CPU is not in it.
pub fn picture_bytes(
    plan: &SamplePlan,
    parts: Parts<'_>,
    (dtype, stored, vae_dtype): (DType, DType, DType),
    facts: &CardFacts,
) -> Result<PictureBytes> {
    let area = |size: &[usize; 2]| size[0] * size[1];
    let Some(size) = plan.prompts.iter().map(|prompt| prompt.size).max_by_key(area) else {
        return Ok(PictureBytes::default());
    };
    let device = recorder::open(facts.clone(), usize::MAX)?;
    let card = device.card().context("a recording card is a card")?;
    let [width, height] = size.map(|side| side / 8);
    let guided = plan.prompts.iter().any(|prompt| prompt.scale != 1.);
    let batch = if guided { 2 } else { 1 };
    let (config, weights) = parts.unet;
    let unet = Unet::load_stored(weights, config, device, (dtype, stored))?;
    let context_width = config.context_width;
    let (trace, ()) = card.trace(|| {
        let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::F32);
        let latents = zeros(&[batch, height, width, config.in_channels])?;
        let waves = unet.waves(device, &vec![1.; batch])?;
        let context = Value::constant(zeros(&[batch, CHUNK, context_width])?);
        let added = config.added.map(|width| zeros(&[batch, width])).transpose()?;
        let added = added.map(Value::constant);
        let tape = Tape::inference(None);
        let (context, added) = (&context, added.as_ref());
        let input = UnetInput { latents: &latents, waves: &waves, context, added };
        unet.forward(&tape, input).map(drop)
    })?;
    let denoising = trace.peak();
    drop(unet);
    let vae = VaeRecording::new(parts.vae, facts, vae_dtype)?;
    let decoding = vae.decode([height, width], Tiling::Never)?;
    let decoding_in_tiles = vae.decode([height, width], Tiling::Always)?;
    Ok(PictureBytes { denoising, decoding, decoding_in_tiles, size })
}

/// About what the largest picture takes on the CPU beside the models of the training.
pub fn bytes_on_cpu(plan: &SamplePlan, base: &Base) -> Result<usize> {
    let files = &base.files;
    let parts = Parts {
        unet: (&base.unet, &*files.unet),
        text_encoder: (&base.text_encoder, &*files.text_encoder),
        text_encoder_2: base.text_encoder_2.as_ref().zip(files.text_encoder_2.as_deref()),
        vae: (&base.vae, &*files.vae),
    };
    // What is counted are the tensors, which are those of a card.
    let card = imagined_card(usize::MAX);
    Ok(picture_bytes(plan, parts, (base.dtype, base.dtype, base.vae_dtype), &card)?.most())
}
