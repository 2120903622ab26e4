//! Latents to pictures and back.

use engine::{DType, Tensor};

use super::PipelineError;
use crate::Vae;

/// An RGB picture, rows from the top, numbers in 0..1.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height,width,3]`, within 0..1.
    pub rgb: Vec<f32>,
}

impl Picture {
    /// Eight bits per number, rounded as diffusers does.
    pub fn to_rgb8(&self) -> Vec<u8> {
        self.rgb.iter().map(|x| (x * 255.).round_ties_even() as u8).collect()
    }
}

/// Pictures of latents `[B,h,w,4]` as the U-Net knows them, `size` columns and rows of them.
pub fn decode(
    vae: &Vae,
    latents: &[f32],
    [width, height]: [usize; 2],
) -> Result<Vec<Picture>, PipelineError> {
    let channels = vae.config().latent_channels;
    let mut pictures = Vec::new();
    // One at a time: at 512x512 a picture takes over a gigabyte on its way.
    for one in latents.chunks(width * height * channels) {
        let unscaled: Vec<f32> = one.iter().map(|x| x / vae.config().scaling).collect();
        let shape = [1, height, width, channels];
        let latents = Tensor::from_f32(vae.device(), &shape, &unscaled, DType::F32)?;
        let pixels = vae.decode(&latents)?;
        let (height, width) = (pixels.dim(1), pixels.dim(2));
        let rgb = pixels.to_vec_f32()?;
        if rgb.iter().any(|x| !x.is_finite()) {
            return Err(PipelineError::NotFinite);
        }
        let rgb = rgb.iter().map(|x| (x / 2. + 0.5).clamp(0., 1.)).collect();
        pictures.push(Picture { width, height, rgb });
    }
    Ok(pictures)
}
