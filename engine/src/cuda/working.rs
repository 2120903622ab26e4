//! Trainable values as the layers' products read them, for all adapters in one pass.

use std::ops::Range;

use super::card::Card;
use super::driver::Arg;
use crate::{DType, EngineError, Result, Tensor};

/// Threads of a block.
const BLOCK: u32 = 256;
/// Most tensors of one launch: the grid's second axis.
const TENSORS: usize = 65_535;

/// A copy of some tensors of a flat one in the compute type, each times a factor.
pub(crate) struct Working {
    copy: Tensor,
    /// Per tensor the first element, the number of elements, and the bits of the factor.
    table: Tensor,
    count: usize,
    longest: usize,
}

impl Working {
    /// Room for a copy of a flat tensor of `len` elements, of which `parts` are read.
    pub(crate) fn new(
        card: &'static Card,
        len: usize,
        dtype: DType,
        parts: &[(Range<usize>, f32)],
    ) -> Result<Self> {
        if parts.len() > TENSORS || len > u32::MAX as usize {
            let detail = format!("{} trainable tensors of {len} numbers", parts.len());
            return Err(EngineError::shape("working copy", detail));
        }
        let row = |(range, factor): &(Range<usize>, f32)| {
            [range.start as u32, range.len() as u32, factor.to_bits()]
        };
        let table: Vec<u32> = parts.iter().flat_map(row).collect();
        let longest = parts.iter().map(|(range, _)| range.len()).max().unwrap_or(0);
        let copy = Tensor::zeros(card.device(), &[len], dtype)?;
        Ok(Self { copy, table: Tensor::from_u32(card, &table)?, count: parts.len(), longest })
    }

    /// Type of the copy.
    pub(crate) fn dtype(&self) -> DType {
        self.copy.dtype()
    }

    /// Part of the copy.
    pub(crate) fn view(&self, offset: usize, shape: &[usize]) -> Result<Tensor> {
        self.copy.view(offset, shape)
    }

    /// Makes the copy that of `flat` as it is now.
    pub(crate) fn refresh(&self, card: &Card, flat: &Tensor) -> Result<()> {
        const OP: &str = "working copy";
        if self.count == 0 {
            return Ok(());
        }
        let args = [flat.address(OP)?, self.copy.address(OP)?, self.table.address(OP)?];
        let blocks = self.longest.div_ceil(BLOCK as usize * 4).max(1) as u32;
        let size = ([blocks, self.count as u32, 1], BLOCK, 0);
        card.launch(("working", "working"), self.dtype(), size, &args.map(Arg::Address))
    }
}
