//! The emulated card's memory: blocks of the host's, fenced and filled with NaN.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

use engine::cuda::Address;
use engine::{EngineError, Result};

/// Addresses are multiples of this, and so much before and after each block is watched.
const FENCE: usize = 256;
/// In the fences.
const WATCHED: u8 = 0xa5;
/// In new memory: NaN in every type.
const UNSET: u8 = 0xff;

/// Live blocks by address.
#[derive(Default)]
pub(crate) struct Blocks {
    sizes: BTreeMap<Address, usize>,
    used: usize,
}

impl Blocks {
    /// Bytes in live blocks.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// A new block of `bytes`.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let full = || EngineError::Card {
            what: "memory of the host".into(),
            why: format!("no {bytes} bytes for the emulated card"),
        };
        let layout = layout(bytes).ok_or_else(full)?;
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return Err(full());
        }
        // SAFETY: `start` has the room of both fences and `bytes` between them.
        unsafe {
            start.write_bytes(WATCHED, FENCE);
            start.add(FENCE).write_bytes(UNSET, bytes);
            start.add(FENCE + bytes).write_bytes(WATCHED, FENCE);
        }
        let address = start as Address + FENCE as Address;
        self.sizes.insert(address, bytes);
        self.used += bytes;
        Ok(address)
    }

    /// Gives a block back; what was written beside it, or that it is none, is an error.
    pub(crate) fn free(&mut self, address: Address) -> Result<()> {
        let Some(bytes) = self.sizes.remove(&address) else {
            return Err(outside("free", address, 0));
        };
        self.used -= bytes;
        let start = (address - FENCE as Address) as *mut u8;
        let intact = [0, FENCE + bytes].into_iter().all(|at| {
            // SAFETY: both fences belong to the block that `allocate` made.
            let fence = unsafe { std::slice::from_raw_parts(start.add(at), FENCE) };
            fence.iter().all(|byte| *byte == WATCHED)
        });
        if let Some(layout) = layout(bytes) {
            // SAFETY: made by `allocate` with this layout, and forgotten above.
            unsafe { dealloc(start, layout) };
        }
        if intact {
            return Ok(());
        }
        let why =
            format!("something was written beside the block at {address:#x} of {bytes} bytes");
        Err(EngineError::Card { what: "the emulated card's memory".into(), why })
    }

    /// Fails unless `bytes` from `address` on lie within one block.
    pub(crate) fn check(&self, what: &str, address: Address, bytes: usize) -> Result<()> {
        let block = self.sizes.range(..=address).next_back();
        let end = address.checked_add(bytes as Address);
        match (block, end) {
            (Some((start, size)), Some(end)) if end <= start + *size as Address => Ok(()),
            _ => Err(outside(what, address, bytes)),
        }
    }

    /// The bytes from `address` on, which [`Blocks::check`] has let pass.
    pub(crate) fn read(&self, what: &str, address: Address, bytes: usize) -> Result<&[u8]> {
        self.check(what, address, bytes)?;
        // SAFETY: within a live block, whose bytes are all initialised.
        Ok(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) })
    }

    /// The same, to be written.
    pub(crate) fn write(
        &mut self,
        what: &str,
        address: Address,
        bytes: usize,
    ) -> Result<&mut [u8]> {
        self.check(what, address, bytes)?;
        // SAFETY: within a live block; `self` is borrowed alone as long as the slice lives.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) })
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(2 * FENCE)?, FENCE).ok()
}

fn outside(what: &str, address: Address, bytes: usize) -> EngineError {
    let why = format!("{bytes} bytes at {address:#x} do not lie within an allocated block");
    EngineError::Card { what: format!("`{what}`"), why }
}
