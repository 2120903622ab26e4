//! Row numbers for gathering, where the operation reads them.

use std::sync::Arc;

use crate::{Device, EngineError, Result, Tensor};

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

    /// `len` of them from place `start` on.
    ///
    /// # Errors
    /// More than there are.
    pub fn part(&self, start: usize, len: usize) -> Result<Self> {
        match self {
            Self::Host(ids) => match ids.get(start..start + len) {
                Some(part) => Ok(Self::Host(part.into())),
                None => {
                    let detail = format!("{len} ids from {start} of {}", ids.len());
                    Err(EngineError::shape("ids", detail))
                }
            },
            Self::Card(ids) => Ok(Self::Card(ids.view(start, &[len])?)),
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

/// Rows that are taken out of a table, and the way back for their gradients.
#[derive(Clone, Debug)]
pub struct RowChoice {
    pub(crate) rows: Ids,
    /// For each row of the table its place among the chosen, or their number where it was not.
    pub(crate) back: Ids,
}

impl RowChoice {
    /// `rows` of a table of `count` rows, both ways; no row twice.
    ///
    /// # Errors
    /// A row that is chosen twice or does not exist.
    pub fn numbers(rows: &[u32], count: usize) -> Result<Vec<u32>> {
        let mut back = vec![rows.len() as u32; count];
        for (to, from) in rows.iter().enumerate() {
            match back.get_mut(*from as usize) {
                Some(place) if *place == rows.len() as u32 => *place = to as u32,
                Some(_) => return Err(EngineError::Tape(format!("row {from} is gathered twice"))),
                None => {
                    return Err(EngineError::Tape(format!("row {from} of {count} is gathered")));
                }
            }
        }
        Ok(back)
    }

    /// The same rows each time the operation runs: a capture keeps them.
    pub fn constant(device: Device, rows: &[u32], count: usize) -> Result<Self> {
        let back = Self::numbers(rows, count)?;
        Ok(Self { rows: Ids::constant(device, rows)?, back: Ids::constant(device, &back)? })
    }

    /// Rows and way back ([`Self::numbers`]) that are on the table's device.
    pub fn new(rows: Ids, back: Ids) -> Self {
        Self { rows, back }
    }
}
