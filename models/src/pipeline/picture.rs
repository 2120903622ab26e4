//! Latents to pictures and back.

use engine::{DType, Tensor};

use super::PipelineError;
use super::noise::TorchNoise;
use super::resize::{Filter, resize};
use crate::pixel_order::nhwc_from_nchw;
use crate::{Tiling, Vae};

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
    /// A picture of eight bits per number, `[height,width,3]`.
    ///
    /// # Errors
    /// Numbers that do not fill the size.
    pub fn from_rgb8(width: usize, height: usize, rgb8: &[u8]) -> Result<Self, PipelineError> {
        let numbers = rgb8.len();
        if width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3)) != Some(numbers) {
            return Err(PipelineError::Pixels { width, height, numbers });
        }
        let rgb = rgb8.iter().map(|x| f32::from(*x) / 255.).collect();
        Ok(Self { width, height, rgb })
    }

    /// The picture in another size, as Pillow's Lanczos filter makes it.
    pub fn resized(&self, width: usize, height: usize) -> Self {
        let (from, to) = ([self.width, self.height], [width, height]);
        let mut rgb = resize(&self.rgb, 3, from, to, Filter::Lanczos);
        rgb.iter_mut().for_each(|x| *x = x.clamp(0., 1.));
        Self { width, height, rgb }
    }

    /// Eight bits per number, rounded as diffusers does.
    pub fn to_rgb8(&self) -> Vec<u8> {
        self.rgb.iter().map(|x| (x * 255.).round_ties_even() as u8).collect()
    }
}

/// Pictures of latents `[B,h,w,4]` as the U-Net knows them, `size` columns and rows of them, in tiles
/// or whole.
pub fn decode(
    vae: &Vae,
    latents: &[f32],
    [width, height]: [usize; 2],
    tiling: Tiling,
) -> Result<Vec<Picture>, PipelineError> {
    let channels = vae.config().latent_channels;
    let mut pictures = Vec::new();
    // One at a time: at 512x512 a picture takes over a gigabyte on its way.
    for one in latents.chunks(width * height * channels) {
        let unscaled: Vec<f32> = one.iter().map(|x| x / vae.config().scaling).collect();
        let shape = [1, height, width, channels];
        let latents = Tensor::from_f32(vae.device(), &shape, &unscaled, DType::F32)?;
        let pixels = vae.decode_by(&latents, tiling)?;
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

/// Latents of a picture as the U-Net knows them, `[h,w,4]`, drawn from what the VAE says of it.
pub(super) fn encode(
    vae: &Vae,
    picture: &Picture,
    noise: &mut TorchNoise,
    tiling: Tiling,
) -> Result<Vec<f32>, PipelineError> {
    let pixels: Vec<f32> = picture.rgb.iter().map(|x| 2. * x - 1.).collect();
    let shape = [1, picture.height, picture.width, 3];
    let pixels = Tensor::from_f32(vae.device(), &shape, &pixels, DType::F32)?;
    let moments = vae.encode_by(&pixels, tiling)?;
    let [_, height, width, channels] = moments.shape;
    let mut drawn = vec![0.; moments.mean.len()];
    noise.fill(&mut drawn);
    let drawn = nhwc_from_nchw(&drawn, channels, height * width);
    Ok(moments.sample(&drawn, vae.config().scaling))
}
