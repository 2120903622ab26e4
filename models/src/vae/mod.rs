//! The autoencoder between images and latents (diffusers' `AutoencoderKL`), never trained.
//!
//! At 512x512 one feature map of the top level is 128 MiB: values are dropped as soon as the next
//! one stands.

mod config;
mod halves;
#[cfg(test)]
mod tests;
mod tiles;

use engine::{DType, Device, EngineError, Linear, Result as EngineResult, Tape, Tensor, Value};
use formats::Weights;

pub use self::config::VaeConfig;
use self::halves::{Decoder, Encoder};
pub use self::tiles::Tiling;
use crate::Result;
use crate::reader::{Reader, TensorShape};

/// Bounds of the logarithm of the variance.
const LOGVAR_RANGE: (f32, f32) = (-30., 20.);

/// An autoencoder on one device.
pub struct Vae {
    config: VaeConfig,
    device: Device,
    dtype: DType,
    encoder: Encoder,
    quant_conv: Option<Linear>,
    post_quant_conv: Option<Linear>,
    decoder: Decoder,
}

/// Mean and logarithm of the variance of an image's latents, each f32 `[B,h,w,C]` row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// `[B,h,w,C]`.
    pub shape: [usize; 4],
    /// Means.
    pub mean: Vec<f32>,
    /// Logarithms of the variances, within -30..20.
    pub logvar: Vec<f32>,
}

impl Moments {
    /// `(mean + exp(logvar/2)·noise)·scaling`; `noise` has the shape of the mean.
    pub fn sample(&self, noise: &[f32], scaling: f32) -> Vec<f32> {
        let moments = self.mean.iter().zip(&self.logvar);
        moments.zip(noise).map(|((m, l), n)| (m + (l / 2.).exp() * n) * scaling).collect()
    }
}

impl Vae {
    /// Reads an autoencoder; `dtype` is the type of its arithmetic.
    pub fn load(
        weights: &dyn Weights,
        config: &VaeConfig,
        device: Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::read(&Reader::new(weights, device, dtype), config, dtype)
    }

    /// Names and shapes of all tensors of an autoencoder of this config.
    pub fn tensor_shapes(config: &VaeConfig) -> Result<Vec<TensorShape>> {
        let reader = Reader::listing();
        Self::read(&reader, config, DType::F32)?;
        Ok(reader.into_list())
    }

    fn read(reader: &Reader, config: &VaeConfig, dtype: DType) -> Result<Self> {
        let latent = config.latent_channels;
        let square = |name, channels, wanted: bool| {
            wanted.then(|| reader.projection(name, (channels, channels), true)).transpose()
        };
        Ok(Self {
            encoder: Encoder::load(reader, config)?,
            quant_conv: square("quant_conv", 2 * latent, config.quant_conv)?,
            post_quant_conv: square("post_quant_conv", latent, config.post_quant_conv)?,
            decoder: Decoder::load(reader, config)?,
            config: config.clone(),
            device: reader.device(),
            dtype,
        })
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its sizes and its scaling factor.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Moments of images `[B,H,W,3]` in -1..1, for latents `[B,H/8,W/8,4]`. Sides that are no
    /// multiple of 8 lose the rest.
    pub fn encode(&self, images: &Tensor) -> EngineResult<Moments> {
        check_channels("vae encode", images, self.config.image_channels)?;
        let tape = Tape::inference(None);
        let mut h = self.encoder.forward(&tape, images.to_dtype(self.dtype)?)?;
        if let Some(conv) = &self.quant_conv {
            h = conv.forward(&tape, &h)?;
        }
        let channels = self.config.latent_channels;
        let [batch, height, width, _] = *h.shape() else {
            return Err(EngineError::shape("vae encode", format!("moments are {:?}", h.shape())));
        };
        let (mut mean, mut logvar) = (Vec::new(), Vec::new());
        for pixel in h.tensor().to_vec_f32()?.chunks(2 * channels) {
            let (left, right) = pixel.split_at(channels);
            mean.extend_from_slice(left);
            logvar.extend(right.iter().map(|x| x.clamp(LOGVAR_RANGE.0, LOGVAR_RANGE.1)));
        }
        Ok(Moments { shape: [batch, height, width, channels], mean, logvar })
    }

    /// Images `[B,8h,8w,3]` of unscaled latents `[B,h,w,4]` (divide by the scaling factor first).
    pub fn decode(&self, latents: &Tensor) -> EngineResult<Tensor> {
        check_channels("vae decode", latents, self.config.latent_channels)?;
        let tape = Tape::inference(None);
        let mut h = Value::constant(latents.to_dtype(self.dtype)?);
        if let Some(conv) = &self.post_quant_conv {
            h = conv.forward(&tape, &h)?;
        }
        Ok(self.decoder.forward(&tape, h)?.tensor().clone())
    }
}

fn check_channels(op: &'static str, x: &Tensor, channels: usize) -> EngineResult<()> {
    if x.shape().len() == 4 && x.last_dim() == channels {
        return Ok(());
    }
    Err(EngineError::shape(op, format!("{:?}, [B,H,W,{channels}] is needed", x.shape())))
}
