//! Full-size models with random weights, for measurements on machines without real ones.

use std::path::Path;

use anyhow::{Context, Result};
use formats::stream::write_tensors;
use formats::{Dtype, Family, FormatError, SaveAs, TensorSpec};
use models::{ClipConfig, ClipTextModel, TensorShape, Unet, UnetConfig, Vae, VaeConfig};

/// Writes a diffusers folder of half-precision weights: 2 GB, for SDXL 6.9 GB. Tensor by tensor: it
/// takes little memory.
pub fn write_random_model(folder: &Path, family: Family) -> Result<()> {
    for (name, shapes) in parts(family)? {
        let path = folder.join(name);
        let context = || format!("cannot write the random model: {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(context)?;
        }
        let spec = |(name, shape): &TensorShape| TensorSpec {
            name: name.clone(),
            dtype: Dtype::F16,
            shape: shape.clone(),
        };
        let specs: Vec<TensorSpec> = shapes.iter().map(spec).collect();
        write_tensors(&path, SaveAs::Safetensors, &specs, None, |index, sink| {
            sink.write_f32(&random_numbers(&shapes[index]))?;
            Ok::<(), FormatError>(())
        })
        .with_context(context)?;
    }
    Ok(())
}

/// The files of a folder with their tensors.
fn parts(family: Family) -> Result<Vec<(&'static str, Vec<TensorShape>)>> {
    let (unet, text) = match family {
        Family::Sd1 => (UnetConfig::sd1(), ClipConfig::sd1()),
        Family::Sd2 => (UnetConfig::sd2(), ClipConfig::sd2()),
        Family::Sdxl => (UnetConfig::sdxl(), ClipConfig::sd1()),
    };
    let mut parts = vec![
        ("unet/diffusion_pytorch_model.safetensors", Unet::tensor_shapes(&unet)?),
        ("text_encoder/model.safetensors", ClipTextModel::tensor_shapes(&text)?),
        ("vae/diffusion_pytorch_model.safetensors", Vae::tensor_shapes(&VaeConfig::sd1())?),
    ];
    if family == Family::Sdxl {
        let second = ClipTextModel::tensor_shapes(&ClipConfig::sdxl_second())?;
        parts.push(("text_encoder_2/model.safetensors", second));
    }
    Ok(parts)
}

/// Uniform numbers of the variance that PyTorch's layers begin with; norms 1, biases 0.
fn random_numbers((name, shape): &TensorShape) -> Vec<f32> {
    let len = shape.iter().product();
    let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
    let is_norm = shape.len() == 1 && name.ends_with(".weight");
    let bound = if shape.len() == 1 { 0. } else { fan_in.sqrt().recip() };
    let mut state = name.bytes().fold(1_u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.
    };
    (0..len).map(|_| if is_norm { 1. } else { next() * bound }).collect()
}
