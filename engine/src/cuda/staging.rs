//! Tensors whose place stays and whose numbers change: what a captured step reads.
//!
//! Everywhere else tensors are immutable. Whoever uses these functions owns the tensor and knows that
//! nothing reads it meanwhile: copies by the compute stream are in order with the arithmetic; those by
//! the copy stream must be ordered by [`Card::wait_for_copies`] and [`Card::copies_wait`].

use super::driver::Stream;
use super::transfer;
use crate::{DType, Device, EngineError, Ids, Result, Tensor};

use super::Card;

impl Card {
    /// Arithmetic given from now on waits for all copies by the copy stream so far.
    pub fn wait_for_copies(&self) -> Result<()> {
        self.driver().order(Stream::Copy, Stream::Compute)
    }

    /// Copies by the copy stream given from now on wait for all arithmetic so far.
    pub fn copies_wait(&self) -> Result<()> {
        self.driver().order(Stream::Compute, Stream::Copy)
    }
}

impl Tensor {
    /// Overwrites the elements of a card's tensor by the compute stream.
    pub fn refill(&self, data: &[f32]) -> Result<()> {
        let card = self.card_for("refill", data.len())?;
        card.check_outside_capture("numbers from the host")?;
        self.put(card, Stream::Compute, data)
    }

    /// Overwrites the elements of a card's tensor by the copy stream, while the card computes.
    pub fn stage(&self, data: &[f32]) -> Result<()> {
        let card = self.card_for("stage", data.len())?;
        self.put(card, Stream::Copy, data)
    }

    /// Overwrites the elements of a card's tensor with numbers that are the same each time: a capture
    /// keeps them.
    pub fn refill_constant(&self, data: &[f32]) -> Result<()> {
        let card = self.card_for("refill", data.len())?;
        self.put(card, Stream::Compute, data)
    }

    /// Overwrites the elements of a card's tensor by those of another of the same type and length, by
    /// the compute stream.
    pub fn copy_from(&self, from: &Tensor) -> Result<()> {
        let card = self.card_for("copy", from.len())?;
        if from.dtype() != self.dtype() {
            let got = format!("{:?} and {:?}", from.dtype(), self.dtype());
            return Err(EngineError::DType { op: "copy", expected: "equal types", got });
        }
        if self.dtype() == DType::F8 {
            // Their scales would stay behind.
            let got = format!("{:?}", self.dtype());
            return Err(EngineError::DType { op: "copy", expected: "no 8 bits", got });
        }
        let bytes = self.len() * self.dtype().size();
        card.driver().copy(Stream::Compute, self.address("copy")?, from.address("copy")?, bytes)
    }

    /// Sets the elements of a card's tensor to zero, by the compute stream.
    pub fn clear(&self) -> Result<()> {
        let card = self.card_for("clear", self.len())?;
        let bytes = self.len() * self.dtype().size();
        card.driver().zero(Stream::Compute, self.address("clear")?, bytes)
    }

    fn card_for(&self, op: &'static str, len: usize) -> Result<&'static Card> {
        if len != self.len() {
            let detail = format!("{len} numbers for the shape {:?}", self.shape());
            return Err(EngineError::shape(op, detail));
        }
        let got: Device = self.device();
        got.card().ok_or(EngineError::Device { op, got })
    }

    fn put(&self, card: &Card, stream: Stream, data: &[f32]) -> Result<()> {
        let to = self.address("refill")?;
        match self.dtype() {
            DType::F32 => card.driver().upload(stream, to, bytemuck::cast_slice(data)),
            dtype => {
                let bytes = transfer::bytes_of(data, dtype)?;
                card.driver().upload(stream, to, &bytes)
            }
        }
    }
}

impl Ids {
    /// Overwrites the numbers of ids on a card by the copy stream, while the card computes.
    pub fn stage(&self, ids: &[u32]) -> Result<()> {
        match self {
            Self::Card(tensor) => {
                let card = tensor.card_for("stage", ids.len())?;
                let to = tensor.address("stage")?;
                card.driver().upload(Stream::Copy, to, bytemuck::cast_slice(ids))
            }
            Self::Host(_) => Err(EngineError::Device { op: "stage", got: Device::Cpu }),
        }
    }

    /// Overwrites the numbers of ids on a card by those of others, by the compute stream.
    pub fn copy_from(&self, from: &Ids) -> Result<()> {
        match (self, from) {
            (Self::Card(to), Self::Card(from)) => to.copy_from(from),
            _ => Err(EngineError::Device { op: "copy", got: Device::Cpu }),
        }
    }
}
