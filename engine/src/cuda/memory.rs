//! Memory of a card: a limit, blocks kept for reuse, and a trace of who lives when.
//!
//! All arithmetic runs on one stream, so a block can be handed out again as soon as its tensor is
//! dropped: what still reads it was given to the card before what will write it.

use std::collections::BTreeMap;

use super::driver::{Address, Driver};
use crate::{EngineError, Result};

/// Addresses and sizes are multiples of this.
const ALIGN: usize = 256;

/// Bytes of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CardMemory {
    /// In use by tensors.
    pub live: usize,
    /// Largest `live` so far.
    pub peak: usize,
    /// Taken from the driver, in use or kept.
    pub reserved: usize,
    /// At most this much may be reserved.
    pub limit: usize,
}

/// The blocks of a card.
pub(super) struct Memory {
    stats: CardMemory,
    idle: BTreeMap<usize, Vec<Address>>,
}

impl Memory {
    pub(super) fn new(limit: usize) -> Self {
        let stats = CardMemory { limit, ..CardMemory::default() };
        Self { stats, idle: BTreeMap::new() }
    }

    pub(super) fn stats(&self) -> CardMemory {
        self.stats
    }

    /// A block of at least `bytes`, and its size.
    pub(super) fn take(&mut self, driver: &dyn Driver, bytes: usize) -> Result<(Address, usize)> {
        let size = bytes.max(1).next_multiple_of(ALIGN);
        // An eighth of slack at most, so that a big idle block is not spent on a small tensor.
        let fitting = self.idle.range(size..=size + size / 8).next().map(|(size, _)| *size);
        let (address, size) = match fitting {
            Some(size) => (self.take_idle(size), size),
            None => (None, size),
        };
        let address = match address {
            Some(address) => address,
            None => self.reserve(driver, size)?,
        };
        self.stats.live += size;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        Ok((address, size))
    }

    fn take_idle(&mut self, size: usize) -> Option<Address> {
        let list = self.idle.get_mut(&size)?;
        let address = list.pop();
        if list.is_empty() {
            self.idle.remove(&size);
        }
        address
    }

    fn reserve(&mut self, driver: &dyn Driver, size: usize) -> Result<Address> {
        if self.stats.reserved + size > self.stats.limit {
            self.release(driver);
        }
        if self.stats.reserved + size > self.stats.limit {
            return Err(EngineError::OutOfMemory {
                wanted: size,
                live: self.stats.live,
                limit: self.stats.limit,
            });
        }
        let address = driver.allocate(size)?;
        self.stats.reserved += size;
        Ok(address)
    }

    /// Takes a block back.
    pub(super) fn give(&mut self, address: Address, size: usize) {
        self.stats.live -= size;
        self.idle.entry(size).or_default().push(address);
    }

    /// Gives all idle blocks back to the driver.
    pub(super) fn release(&mut self, driver: &dyn Driver) {
        for (size, addresses) in std::mem::take(&mut self.idle) {
            for address in addresses {
                driver.free(address);
                self.stats.reserved -= size;
            }
        }
    }
}
