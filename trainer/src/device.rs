//! From the name of a device to the device.

use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use collectives::Env;
use engine::Device;

use crate::options::{self, Options};

/// Devices that the program was given, by name.
static REGISTERED: Mutex<Vec<(String, Device)>> = Mutex::new(Vec::new());

/// Makes `name` mean a device that is open already: an emulated card, in tests.
pub fn register(name: &str, device: Device) {
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    registered.retain(|(known, _)| known != name);
    registered.push((name.to_owned(), device));
}

fn registered(name: &str) -> Option<Device> {
    let registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    registered.iter().find(|(known, _)| known == name).map(|(_, device)| *device)
}

/// Opens the device that `name` means: `cpu`.
pub fn open(name: &str) -> Result<Device> {
    if let Some(device) = registered(name) {
        return Ok(device);
    }
    match name {
        "cpu" => Ok(Device::Cpu),
        other => bail!("there is no device of this name: {other}\nhint: use `--device cpu`"),
    }
}

/// The device of a rank of a run.
pub fn for_rank(options: &Options, env: &Env) -> Result<Device> {
    match options.device {
        options::Device::Cpu => Ok(Device::Cpu),
        options::Device::Cuda => open(&format!("cuda:{}", env.card_index())),
    }
}
