//! The closed set of devices and their operation tables.

use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::cuda::Card;

/// Where a tensor lives and where its operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host processor: every thread of the global rayon pool.
    Cpu,
    /// A card that this process has opened ([`Card::open`]), counted from 0.
    Card(u16),
}

impl Device {
    /// The operation table of this device.
    pub fn backend(self) -> &'static dyn Backend {
        match self {
            Device::Cpu => &Cpu,
            Device::Card(index) => Card::of(index),
        }
    }

    /// The card, if it is one.
    pub fn card(self) -> Option<&'static Card> {
        match self {
            Device::Cpu => None,
            Device::Card(index) => Some(Card::of(index)),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Card(index) => f.write_str(&Card::of(*index).facts().label),
        }
    }
}
