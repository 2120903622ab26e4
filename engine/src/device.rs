//! The closed set of devices and their operation tables.

use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::{EngineError, Result};

/// Where a tensor lives and where its operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host processor: every thread of the global rayon pool.
    Cpu,
}

impl Device {
    /// The operation table of this device.
    pub fn backend(self) -> &'static dyn Backend {
        match self {
            Device::Cpu => &Cpu,
        }
    }

    /// Parses `cpu`; other names are an error that says what exists.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Device::Cpu),
            other => Err(EngineError::Unsupported(format!(
                "this build computes on the CPU only, it has no device `{other}`\nhint: use `--device cpu`"
            ))),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
        }
    }
}
