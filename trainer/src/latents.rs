//! The VAE's side of the latents: makes moments of images, for the cache or for a batch.

use std::path::{Path, PathBuf};

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
    dtype: DType,
    /// Its file or folder.
    path: PathBuf,
}

impl VaeEncoder {
    /// Loads the VAE of the base model.
    pub fn load(base: &Base) -> Result<Self> {
        let path = match &base.files.vae_identity {
            Some(own) => own.path.clone(),
            None => base.files.path.clone(),
        };
        Ok(Self { vae: base.load_vae()?, device: base.device, dtype: base.vae_dtype, path })
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

    fn blame(&self) -> String {
        blame(&self.path, self.dtype)
    }
}

/// What to say where a VAE gives values that are no numbers.
fn blame(path: &Path, dtype: DType) -> String {
    let advice = match dtype {
        DType::F32 => "its file is damaged or holds too large weights: name another one as `vae`",
        _ => {
            "set `no_half_vae = true`, which computes it in float32, or name another one as `vae` \
             that is made for half precision"
        }
    };
    let precision = type_name(dtype);
    format!("what the VAE gives in {precision} is not finite: {}\nhint: {advice}", path.display())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_no_numbers_are_blamed_with_what_helps() {
        let half = blame(Path::new("xl.safetensors"), DType::F16);
        assert!(half.contains("in f16 is not finite: xl.safetensors\nhint: set `no_half_vae"));
        let single = blame(Path::new("xl.safetensors"), DType::F32);
        assert!(!single.contains("no_half_vae") && single.contains("`vae`"), "{single}");
    }
}
