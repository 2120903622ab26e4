//! One block for all that a step takes: a run is traced once, laid out, and then repeated in place.
//!
//! Repeating a run in its places gives the same addresses each time, as a captured graph needs, and
//! takes no more than the layout says. A run that asks for something else than the trace is stopped
//! before anything is overwritten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Card;
use super::driver::Address;
use super::lifetimes::{Event, Layout, Trace};
use super::memory::rounded;
use crate::{EngineError, Result};

/// The memory of an arena; lives as long as a buffer in it.
pub(super) struct ArenaBlock {
    card: &'static Card,
    address: Address,
    size: usize,
    /// Places in use: offset and end.
    live: Mutex<BTreeMap<usize, usize>>,
}

impl ArenaBlock {
    pub(super) fn address(&self) -> Address {
        self.address
    }

    fn live<T>(&self, look: impl FnOnce(&mut BTreeMap<usize, usize>) -> T) -> T {
        look(&mut self.live.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Marks a place as used; `false` if something in it lives or it lies outside.
    pub(super) fn claim(&self, offset: usize, size: usize) -> bool {
        let end = offset + size;
        self.live(|live| {
            let before = live.range(..end).next_back();
            let free = end <= self.size && before.is_none_or(|(_, before)| *before <= offset);
            if free {
                live.insert(offset, end);
            }
            free
        })
    }

    /// Marks the place at `address` as free.
    pub(super) fn give(&self, address: Address) {
        self.live(|live| live.remove(&((address - self.address) as usize)));
    }
}

impl Drop for ArenaBlock {
    fn drop(&mut self) {
        self.card.memory().free(self.card.driver(), self.address, self.size);
    }
}

/// One block of a card's memory, shared by all runs that are laid out in it, one at a time.
///
/// Graphs captured over it must not be replayed once it is dropped.
pub struct Arena {
    block: Arc<ArenaBlock>,
}

impl Arena {
    /// Takes `bytes` of the card's memory; an error if its limit does not allow that.
    pub fn new(card: &'static Card, bytes: usize) -> Result<Self> {
        let size = rounded(bytes);
        let address = card.memory().reserve(card.driver(), size)?;
        let live = Mutex::default();
        Ok(Self { block: Arc::new(ArenaBlock { card, address, size, live }) })
    }

    /// Bytes of the block.
    pub fn bytes(&self) -> usize {
        self.block.size
    }
}

/// Ends the scope of this thread even if the run panics.
struct Ending<'c>(Option<&'c Card>);

impl Ending<'_> {
    fn now(mut self) -> Option<std::result::Result<Trace, String>> {
        self.0.take().and_then(|card| card.memory().end_scope())
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Some(card) = self.0 {
            card.memory().end_scope();
        }
    }
}

impl Card {
    /// Runs `run` and notes, in order, what this thread takes of the card's memory and gives back.
    /// What still lives at the end, in the result or elsewhere, is noted as outliving the run.
    pub fn trace<T>(&'static self, run: impl FnOnce() -> Result<T>) -> Result<(Trace, T)> {
        self.memory().start_trace()?;
        let ending = Ending(Some(self));
        let value = run()?;
        match ending.now() {
            Some(Ok(trace)) => Ok((trace, value)),
            _ => Err(EngineError::Unsupported("the trace of a run was ended within it".into())),
        }
    }

    /// Runs `run` with its buffers in the places of `layout` in `arena`. What outlived the traced run
    /// comes from the pool. A run that takes other sizes, more or fewer buffers, or keeps a buffer
    /// for longer than traced ends with [`EngineError::PlanMismatch`]; nothing is overwritten that
    /// still lives, and the run can be done again without the arena.
    pub fn within<T>(
        &'static self,
        arena: &Arena,
        layout: &Layout,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !std::ptr::eq(arena.block.card, self) {
            return Err(EngineError::Unsupported("the arena is on another card".into()));
        }
        if layout.total() > arena.bytes() {
            let (needs, has) = (layout.total(), arena.bytes());
            let why = format!("the run needs {needs} bytes of an arena of {has}");
            return Err(EngineError::PlanMismatch(why));
        }
        if !arena.block.live(|live| live.is_empty()) {
            let why = "another run, or a result of one, still uses the arena".to_owned();
            return Err(EngineError::PlanMismatch(why));
        }
        self.memory().start_placing(arena.block.clone(), layout.clone())?;
        let ending = Ending(Some(self));
        let value = run()?;
        if let Some(Err(why)) = ending.now() {
            return Err(EngineError::PlanMismatch(why));
        }
        let left = arena.block.live(|live| live.len());
        if left > 0 {
            // `value` is dropped here; what is kept elsewhere blocks the arena until it is dropped.
            let why = format!("{left} buffers outlive the run, in its trace they did not");
            return Err(EngineError::PlanMismatch(why));
        }
        Ok(value)
    }

    /// Notes in a trace that a segment of the tape begins whose inside is kept.
    pub(crate) fn enter_segment(&self) {
        self.memory().note_segment(Event::Enter);
    }

    /// Notes in a trace that it ends, with an output of `bytes`.
    pub(crate) fn leave_segment(&self, bytes: usize) {
        self.memory().note_segment(Event::Leave(bytes));
    }
}
