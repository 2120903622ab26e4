//! Which number types a run computes in and keeps its weights in.

use anyhow::Result;
use engine::{DType, Device, ParamStore};
use formats::Family;
use half::{bf16, f16};

use crate::options::{MixedPrecision, Options};

/// Type of the U-Net's and the text encoder's arithmetic. The CPU computes fp16 in f32.
pub fn compute_type(options: &Options, device: Device) -> DType {
    match (options.mixed_precision, device) {
        (MixedPrecision::Bf16, _) => DType::BF16,
        (MixedPrecision::Fp16, Device::Card(_)) => DType::F16,
        (MixedPrecision::No | MixedPrecision::Fp16, _) => DType::F32,
    }
}

/// Type of the VAE's arithmetic: f32 on the CPU and with `no_half_vae`, else that of the others, as
/// in sd-scripts. SDXL's own VAE exceeds the range of f16 and is computed in f32 there; one that the
/// user gives (`vae`) is taken to be made for f16.
pub fn vae_type(options: &Options, device: Device, family: Family) -> DType {
    match (device, compute_type(options, device)) {
        (Device::Cpu, _) => DType::F32,
        _ if options.no_half_vae => DType::F32,
        (_, DType::F16) if family == Family::Sdxl && options.vae.is_none() => DType::F32,
        (_, dtype) => dtype,
    }
}

/// What trained weights are rounded to after each step, with `full_fp16` and `full_bf16`. Gradients
/// and the optimizer's state stay f32.
pub fn weights_type(options: &Options) -> Option<DType> {
    match (options.full_bf16, options.full_fp16) {
        (true, _) => Some(DType::BF16),
        (false, true) => Some(DType::F16),
        (false, false) => None,
    }
}

/// Rounds all parameters to numbers of `dtype`.
pub fn round_weights(params: &mut ParamStore, dtype: DType) -> Result<()> {
    let round: fn(f32) -> f32 = match dtype {
        DType::BF16 => |x| bf16::from_f32(x).to_f32(),
        DType::F16 => |x| f16::from_f32(x).to_f32(),
        _ => return Ok(()),
    };
    Ok(params.update(|flat| flat.iter_mut().for_each(|x| *x = round(*x)))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_rounded_to_the_nearest() {
        let start = vec![1. + 1. / 512., 1e-8, -3.];
        for (dtype, want) in [
            (DType::BF16, vec![1., bf16::from_f32(1e-8).to_f32(), -3.]),
            (DType::F16, vec![1. + 1. / 512., 0., -3.]),
            (DType::F32, start.clone()),
        ] {
            let mut params = ParamStore::new(Device::Cpu, &[(vec![3], start.clone())]).unwrap();
            round_weights(&mut params, dtype).unwrap();
            assert_eq!(params.flat().to_vec_f32().unwrap(), want, "{dtype:?}");
        }
    }

    #[test]
    fn the_cpu_computes_fp16_in_f32() {
        let options = Options { mixed_precision: MixedPrecision::Fp16, ..Options::default() };
        assert_eq!(compute_type(&options, Device::Cpu), DType::F32);
        assert_eq!(compute_type(&options, Device::Card(0)), DType::F16);
        assert_eq!(vae_type(&options, Device::Card(0), Family::Sd1), DType::F16);
        let plain = Options { no_half_vae: true, ..options };
        assert_eq!(vae_type(&plain, Device::Card(0), Family::Sd1), DType::F32);
    }

    #[test]
    fn the_vae_of_sdxl_is_not_computed_in_fp16() {
        let half = Options { mixed_precision: MixedPrecision::Fp16, ..Options::default() };
        let bfloat = Options { mixed_precision: MixedPrecision::Bf16, ..Options::default() };
        let own = Options { vae: Some("fixed.safetensors".into()), ..half.clone() };
        let card = Device::Card(0);
        assert_eq!(vae_type(&half, card, Family::Sdxl), DType::F32);
        assert_eq!(vae_type(&own, card, Family::Sdxl), DType::F16);
        assert_eq!(vae_type(&bfloat, card, Family::Sdxl), DType::BF16);
        assert_eq!(vae_type(&half, Device::Cpu, Family::Sdxl), DType::F32);
    }
}
