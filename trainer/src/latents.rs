//! The VAE's side of the latents: makes moments of images, for the cache or for a batch.

use anyhow::{Context, Result};
use engine::{DType, Device, Tensor};
use models::Vae;
use sha2::{Digest, Sha256};

use crate::base::Base;
use crate::dataset::latent_cache::LatentEncoder;

/// Values per latent pixel: mean and log-variance of four channels.
pub const MOMENTS: usize = 8;

/// A loaded VAE.
pub struct VaeEncoder {
    vae: Vae,
    device: Device,
}

impl VaeEncoder {
    /// Loads the VAE of the base model.
    pub fn load(base: &Base) -> Result<Self> {
        Ok(Self { vae: base.load_vae()?, device: base.device })
    }

    /// The VAE itself.
    pub fn vae(&self) -> &Vae {
        &self.vae
    }
}

impl LatentEncoder for VaeEncoder {
    fn encode(&mut self, images: &[f32], shape: [usize; 4]) -> Result<Vec<f32>> {
        let images = Tensor::from_f32(self.device, &shape, images, DType::F32)?;
        let moments = self.vae.encode(&images).context("encode images")?;
        let channels = moments.shape[3];
        let pixels = moments.mean.chunks(channels).zip(moments.logvar.chunks(channels));
        Ok(pixels.flat_map(|(mean, logvar)| mean.iter().chain(logvar)).copied().collect())
    }
}

/// How a type is named in the fingerprint of a cache.
fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

/// A name for the VAE that changes when its weights do: of all shapes and of the start of every
/// tensor's bytes, so that it is cheap for a large file.
pub fn vae_fingerprint(base: &Base) -> Result<String> {
    let weights = &*base.files.vae;
    let mut hasher = Sha256::new();
    for name in weights.names() {
        let tensor = weights.get(&name)?;
        hasher.update(name.as_bytes());
        hasher.update(format!("{:?}{:?}", tensor.dtype, tensor.shape).as_bytes());
        hasher.update(&tensor.data[..tensor.data.len().min(4096)]);
    }
    let digest: String = hasher.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
    Ok(format!("{digest}-{}", type_name(base.vae_dtype)))
}
