//! A full-size Stable Diffusion 1.5 with random weights, for measurements on machines without one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use formats::atomic::write_atomic;
use formats::safetensors_file::write_safetensors;
use formats::{Dtype, OwnedTensor};
use models::{ClipConfig, ClipTextModel, TensorShape, Unet, UnetConfig, Vae, VaeConfig};

/// Writes a diffusers folder of half-precision weights, 2 GB.
pub fn write_random_model(folder: &Path) -> Result<()> {
    let parts = [
        ("unet/diffusion_pytorch_model.safetensors", Unet::tensor_shapes(&UnetConfig::sd1())?),
        ("text_encoder/model.safetensors", ClipTextModel::tensor_shapes(&ClipConfig::sd1())?),
        ("vae/diffusion_pytorch_model.safetensors", Vae::tensor_shapes(&VaeConfig::sd1())?),
    ];
    for (name, shapes) in parts {
        let path = folder.join(name);
        let context = || format!("cannot write the random model: {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(context)?;
        }
        let mut tensors = BTreeMap::new();
        for (name, shape) in shapes {
            tensors.insert(name.clone(), random_tensor(&(name, shape))?);
        }
        write_atomic(&path, |writer| write_safetensors(writer, &tensors, None))?;
    }
    Ok(())
}

/// Uniform numbers of the variance that PyTorch's layers begin with; norms 1, biases 0.
fn random_tensor((name, shape): &TensorShape) -> Result<OwnedTensor> {
    let len = shape.iter().product();
    let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
    let is_norm = shape.len() == 1 && name.ends_with(".weight");
    let bound = if shape.len() == 1 { 0. } else { fan_in.sqrt().recip() };
    let mut state = name.bytes().fold(1_u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.
    };
    let values: Vec<f32> = (0..len).map(|_| if is_norm { 1. } else { next() * bound }).collect();
    Ok(OwnedTensor::from_f32(shape, &values, Dtype::F16)?)
}
