//! From the name of a device to the device.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use collectives::Env;
use engine::Device;
use engine::cuda::nvidia::{self, Library};

use crate::card_plan::limit_beside_context;
use crate::console;
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

/// Opens the device that `name` means: `cpu`, `cuda` (the first card), `cuda:1`, or `auto`: the first
/// card if this machine has what it needs, else the processor.
pub fn open(name: &str) -> Result<Device> {
    open_within(name, None)
}

/// The same; of a card's memory at most `limit` bytes may be used.
pub fn open_within(name: &str, limit: Option<usize>) -> Result<Device> {
    if let Some(device) = registered(name) {
        return Ok(device);
    }
    let number = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "auto" => match choice(options::Device::Auto) {
            options::Device::Cuda => Some(0),
            options::Device::Auto | options::Device::Cpu => return Ok(Device::Cpu),
        },
        None if name == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let Some(number) = number else {
        bail!(
            "there is no device of this name: {name}\n\
             hint: `cpu`, `cuda`, `cuda:1` and so on, or `auto`"
        )
    };
    open_card(number, limit)
}

/// What an option means on this machine: `auto` is `cuda` where the first card can be used.
pub fn choice(device: options::Device) -> options::Device {
    match device {
        options::Device::Auto if nvidia::usable(0).is_ok() => options::Device::Cuda,
        options::Device::Auto => options::Device::Cpu,
        chosen => chosen,
    }
}

/// The device of a rank of a run.
pub fn for_rank(options: &Options, env: &Env) -> Result<Device> {
    let limit = limit_beside_context(options);
    match options.device {
        options::Device::Cpu => Ok(Device::Cpu),
        options::Device::Cuda => open_card(env.card_index(), limit),
        options::Device::Auto => automatic(env, limit),
    }
}

/// A card for each rank of this host, or the processor for all of them.
fn automatic(env: &Env, limit: Option<usize>) -> Result<Device> {
    let cards = match nvidia::cards() {
        Ok(cards) if !cards.is_empty() => cards.len(),
        // A machine without cards is nothing to talk about.
        _ => return Ok(Device::Cpu),
    };
    let reason = if env.card.is_none() && env.local_world_size > cards {
        format!("{} ranks, cards: {cards}", env.local_world_size)
    } else {
        match nvidia::usable(env.card_index()) {
            Ok(_) => return open_card(env.card_index(), limit),
            Err(error) => error.to_string(),
        }
    };
    console::warn(&format!("the cards of this machine are not used: {reason}"));
    Ok(Device::Cpu)
}

fn open_card(number: usize, limit: Option<usize>) -> Result<Device> {
    let name = format!("cuda:{number}");
    if let Some(device) = registered(&name) {
        return Ok(device);
    }
    if let Ok(facts) = nvidia::usable(number)
        && !nvidia::all_cached(facts.capability)
    {
        console::note("compiling kernels for this card, once: it takes a minute");
    }
    let device = nvidia::open(number, limit).with_context(|| format!("cannot use `{name}`"))?;
    if let Err(missing) = nvidia::find(Library::Cudnn) {
        let (what, hint) = (missing.library.purpose(), &missing.how_to_get);
        console::warn(&format!("cuDNN is not on this machine: {what}\nhint: {hint}"));
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_nothing_are_refused() {
        for name in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains("\nhint: `cpu`, `cuda`, `cuda:1`"), "{name}: {error}");
        }
    }

    #[test]
    fn a_card_that_is_not_there_is_a_clear_error() {
        let error = format!("{:#}", open("cuda:999").unwrap_err());
        assert!(error.starts_with("cannot use `cuda:999`: "), "{error}");
        assert!(error.contains("\nhint: "), "{error}");
    }

    #[test]
    fn without_a_card_the_processor_is_taken() {
        let taken = choice(options::Device::Auto);
        assert_eq!(taken == options::Device::Cuda, nvidia::usable(0).is_ok());
        assert_eq!(choice(options::Device::Cpu), options::Device::Cpu);
        assert_eq!(open("cpu").unwrap(), Device::Cpu);
        if taken == options::Device::Cpu {
            assert_eq!(open("auto").unwrap(), Device::Cpu);
            let error = format!("{:#}", open("cuda").unwrap_err());
            assert!(error.contains("`cuda:0`") && error.contains("hint: "), "{error}");
        }
    }
}
