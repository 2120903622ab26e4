//! Numbers between host and card, by way of page-locked memory.
//!
//! A copy from ordinary memory would make the host wait. What is uploaded is first put into blocks
//! that are used in turn; a block is used again when the copies from it are done. Copies noted in a
//! graph get memory of their own, which lives as long as the graph.

use super::context::{Context, Event, Pinned, Queue};
use crate::Result;

/// Bytes of a block; bigger uploads go in pieces, so that filling one block and sending another
/// happen at the same time.
const BLOCK: usize = 4 << 20;
/// Blocks of a ring.
const BLOCKS: usize = 4;
/// Where pieces begin.
const ALIGN: usize = 256;

/// Blocks for the uploads of one stream, used in turn.
#[derive(Default)]
pub(super) struct Ring {
    blocks: Vec<(Pinned, Event)>,
    /// The block in use, and how much of it is.
    at: usize,
    used: usize,
}

impl Ring {
    /// Copies bytes to the card; returns when `from` may be changed.
    pub(super) fn upload(
        &mut self,
        context: &Context,
        stream: Queue,
        mut to: u64,
        from: &[u8],
    ) -> Result<()> {
        for piece in from.chunks(BLOCK) {
            let place = self.place(context, stream, piece.len())?;
            // SAFETY: `place` is room for the piece, which no copy reads any more.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), place, piece.len()) };
            send(context, stream, to, place, piece.len())?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    /// Room for `bytes` in the current block, or in the next one when its copies are done.
    fn place(&mut self, context: &Context, stream: Queue, bytes: usize) -> Result<*mut u8> {
        if self.blocks.is_empty() || self.used + bytes > BLOCK {
            if let Some((_, event)) = self.blocks.get(self.at) {
                context.record(*event, stream)?;
            }
            if self.blocks.len() < BLOCKS {
                self.blocks.push((context.pinned(BLOCK)?, context.event(false)?));
                self.at = self.blocks.len() - 1;
            } else {
                self.at = (self.at + 1) % BLOCKS;
                context.wait(self.blocks[self.at].1)?;
            }
            self.used = 0;
        }
        let start = self.used;
        self.used = (start + bytes).next_multiple_of(ALIGN);
        // SAFETY: `start + bytes` is at most the block's size.
        Ok(unsafe { self.blocks[self.at].0.address.add(start) })
    }
}

/// Memory of what a graph copies to the card.
#[derive(Default)]
pub(super) struct Kept {
    blocks: Vec<Pinned>,
    used: usize,
}

impl Kept {
    /// Notes a copy of bytes that are kept here.
    pub(super) fn upload(
        &mut self,
        context: &Context,
        stream: Queue,
        to: u64,
        from: &[u8],
    ) -> Result<()> {
        let fits = self.blocks.last().is_some_and(|block| self.used + from.len() <= block.bytes);
        if !fits {
            self.blocks.push(context.pinned(from.len().max(BLOCK / 16))?);
            self.used = 0;
        }
        let Some(block) = self.blocks.last() else { return Ok(()) };
        // SAFETY: the block has room for `from` behind what is used.
        let place = unsafe { block.address.add(self.used) };
        // SAFETY: as above; nothing reads there before the graph is started.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len()) };
        self.used = (self.used + from.len()).next_multiple_of(ALIGN);
        send(context, stream, to, place, from.len())
    }

    /// Gives all of it back, when the graph will not be started again and is done.
    pub(super) fn release(self, context: &Context) {
        for block in &self.blocks {
            // Nobody can do anything about a failure, and a card that stopped says so elsewhere.
            drop(context.release(block));
        }
    }
}

/// A block for downloads, made at the first one.
#[derive(Default)]
pub(super) struct Landing {
    block: Option<Pinned>,
}

impl Landing {
    /// Copies from the card when the stream's work is done.
    pub(super) fn download(
        &mut self,
        context: &Context,
        stream: Queue,
        to: &mut [u8],
        mut from: u64,
    ) -> Result<()> {
        let block = match &self.block {
            Some(block) => block,
            None => self.block.insert(context.pinned(BLOCK)?),
        };
        for piece in to.chunks_mut(BLOCK) {
            let api = context.bind()?;
            // SAFETY: the block is big enough and used by nobody else while this is locked; the
            // caller's tensor has these bytes.
            let status = unsafe {
                (api.cuMemcpyDtoHAsync_v2)(block.address.cast(), from, piece.len(), stream.0)
            };
            context.check("copying from the card", status)?;
            context.synchronize(stream)?;
            // SAFETY: the copy is done and filled this much of the block.
            unsafe {
                std::ptr::copy_nonoverlapping(block.address, piece.as_mut_ptr(), piece.len());
            }
            from += piece.len() as u64;
        }
        Ok(())
    }
}

/// Gives the stream a copy from page-locked memory.
fn send(context: &Context, stream: Queue, to: u64, from: *const u8, bytes: usize) -> Result<()> {
    let api = context.bind()?;
    // SAFETY: `from` stays as it is until the copy is done; the caller's tensor has these bytes.
    let status = unsafe { (api.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, stream.0) };
    context.check("copying to the card", status)
}
