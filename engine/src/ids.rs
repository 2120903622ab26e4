//! Row numbers for gathering, where the operation reads them.

use std::sync::Arc;

use crate::{Device, Result, Tensor};

/// Numbers of rows of a table, on the device of the table.
#[derive(Clone, Debug)]
pub enum Ids {
    /// On the host.
    Host(Arc<[u32]>),
    /// In a card's memory.
    Card(Tensor),
}

impl Ids {
    /// Copies `ids` to `device`.
    pub fn new(device: Device, ids: &[u32]) -> Result<Self> {
        match device.card() {
            None => Ok(Self::Host(ids.into())),
            Some(card) => Ok(Self::Card(Tensor::from_u32(card, ids)?)),
        }
    }

    /// Ids that are the same each time the operation runs: a capture keeps them.
    pub fn constant(device: Device, ids: &[u32]) -> Result<Self> {
        match device.card() {
            None => Ok(Self::Host(ids.into())),
            Some(card) => card.constant(|| Ok(Self::Card(Tensor::from_u32(card, ids)?))),
        }
    }

    /// The numbers, where they are on the host.
    pub(crate) fn on_host(&self) -> Option<&[u32]> {
        match self {
            Self::Host(ids) => Some(ids),
            Self::Card(_) => None,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(ids) => ids.len(),
            Self::Card(ids) => ids.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
