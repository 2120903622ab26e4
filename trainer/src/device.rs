//! From the name of a device to the device.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use collectives::Env;
use engine::Device;
use engine::cuda::nvidia;

use crate::card_plan::limit_beside_context;
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

/// Opens the device that `name` means: `cpu`, `cuda` (the first card) or `cuda:1`.
pub fn open(name: &str) -> Result<Device> {
    open_within(name, None)
}

/// The same; of a card's memory at most `limit` bytes may be used.
pub fn open_within(name: &str, limit: Option<usize>) -> Result<Device> {
    if let Some(device) = registered(name) {
        return Ok(device);
    }
    let index = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", index)) => index.parse().ok(),
        _ => None,
    };
    let Some(index) = index else {
        bail!("there is no device of this name: {name}\nhint: use `cpu`, `cuda` or `cuda:1`")
    };
    nvidia::open(index, limit).with_context(|| format!("cannot open the card: {name}"))
}

/// The device of a rank of a run.
pub fn for_rank(options: &Options, env: &Env) -> Result<Device> {
    match options.device {
        options::Device::Cpu => Ok(Device::Cpu),
        options::Device::Cuda => {
            let limit = limit_beside_context(options);
            open_within(&format!("cuda:{}", env.card_index()), limit)
        }
    }
}
