//! The operations of a card against the CPU's, one by one.

use anyhow::{Result, bail};
use engine::{Device, selfcheck};

use super::Report;

/// Runs every check of the engine on `device`, those that are too much for an emulated card as well;
/// the report says what failed and how.
pub fn run_operations(device: Device) -> Result<Report> {
    let Some(card) = device.card() else {
        bail!(
            "only a card's operations are compared, with the CPU's, not those of the device: {device}"
        );
    };
    if !card.facts().computes {
        bail!("`{device}` computes nothing that could be compared");
    }
    let checks = selfcheck::all();
    let failed = checks.iter().filter_map(|check| check.failure(device)).collect();
    Ok(Report { compared: checks.len(), failed })
}
