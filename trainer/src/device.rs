//! From the name of a device to the device.

use anyhow::{Result, bail};
use engine::Device;

/// Opens the device that `name` means: `cpu`.
pub fn open(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        other => bail!("there is no device of this name: {other}\nhint: use `--device cpu`"),
    }
}
