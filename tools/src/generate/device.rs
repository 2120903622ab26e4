//! Where pictures are computed, and in which numbers.

use anyhow::Context;
use engine::cuda::nvidia;
use engine::{DType, Device};

use super::options::MachineOptions;
use crate::Usage;
use crate::progress::tell;

/// Opens the device of `--device`.
///
/// # Errors
/// A name that means none, a card that cannot be used.
pub(super) fn open(name: &str) -> anyhow::Result<Device> {
    let number = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "auto" => match nvidia::usable(0) {
            Ok(_) => Some(0),
            Err(_) => return Ok(Device::Cpu),
        },
        None if name == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let Some(number) = number else {
        let hint = "hint: `cpu`, `cuda`, `cuda:1` and so on, or `auto`";
        return Err(Usage(format!("`--device` means no device: `{name}`\n{hint}")).into());
    };
    if nvidia::usable(number).is_ok_and(|facts| !nvidia::all_cached(facts.capability)) {
        tell("compiling kernels for this card, once: it takes a minute");
    }
    nvidia::open(number, None).with_context(|| format!("cannot use `cuda:{number}`"))
}

/// Types of the arithmetic of text encoder and U-Net, and of the VAE. The CPU computes fp16, and the
/// VAE, in float32.
pub(super) fn types(options: &MachineOptions, device: Device) -> (DType, DType) {
    let on_card = device.card().is_some();
    let dtype = match (options.bf16, options.fp16) {
        (true, _) => DType::BF16,
        (_, true) if on_card => DType::F16,
        (_, true) => {
            tell("`--fp16` on the CPU: computed in float32 (`--bf16` is faster where it can)");
            DType::F32
        }
        _ => DType::F32,
    };
    (dtype, if on_card && !options.no_half_vae { dtype } else { DType::F32 })
}
