//! Memory of a card: a limit, segments kept for reuse, and runs whose allocations are noted or placed.
//!
//! All arithmetic runs on one stream, so a block can be handed out again as soon as its tensor is
//! dropped: what still reads it was given to the card before what will write it. What a thread
//! takes while [`Card::trace`](super::Card::trace) or [`Card::within`](super::Card::within) runs on
//! it is noted or placed; what other threads take meanwhile comes from the pool.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::ThreadId;

use super::arena::ArenaBlock;
use super::driver::{Address, Driver};
use super::lifetimes::{Event, Layout, Trace};
use super::segments::Segments;
use crate::{EngineError, Result};

/// Addresses and sizes are multiples of this.
const ALIGN: usize = 256;
/// Buffers below this many bytes have segments of their own, so that they do not cut up those of the
/// large ones.
const SMALL: usize = 1 << 20;
/// Bytes of a segment of small buffers.
const SMALL_SEGMENT: usize = 8 << 20;
/// Least bytes of a segment of large ones.
const LARGE_SEGMENT: usize = 32 << 20;

/// Bytes that a buffer of `bytes` takes.
pub(super) fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

/// Bytes of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CardMemory {
    /// In use by tensors; an arena counts as a whole.
    pub live: usize,
    /// Largest `live` so far.
    pub peak: usize,
    /// Taken from the driver, in use or kept.
    pub reserved: usize,
    /// At most this much may be reserved.
    pub limit: usize,
}

/// Memory of one buffer.
pub(super) struct Block {
    pub(super) address: Address,
    size: usize,
    home: Home,
}

/// Where a block goes when its buffer is dropped.
enum Home {
    Pool {
        small: bool,
    },
    /// To the pool, and into the trace with this number as the give of this take.
    Traced {
        small: bool,
        serial: u64,
        take: usize,
    },
    Arena(Arc<ArenaBlock>),
}

/// What the allocations of a thread are part of.
enum Scope {
    Tracing { serial: u64, trace: Trace, takes: usize },
    Placing { arena: Arc<ArenaBlock>, layout: Layout, takes: usize, broken: Option<String> },
}

/// The blocks of a card.
pub(super) struct Memory {
    stats: CardMemory,
    small: Segments,
    large: Segments,
    scopes: HashMap<ThreadId, Scope>,
    /// Number of the next trace.
    serial: u64,
}

impl Memory {
    pub(super) fn new(limit: usize) -> Self {
        let stats = CardMemory { limit, ..CardMemory::default() };
        let (small, large) = (Segments::default(), Segments::default());
        Self { stats, small, large, scopes: HashMap::new(), serial: 0 }
    }

    pub(super) fn stats(&self) -> CardMemory {
        self.stats
    }

    fn scope(&mut self) -> Option<&mut Scope> {
        // Asking for the thread costs more than most runs need to know.
        if self.scopes.is_empty() {
            return None;
        }
        self.scopes.get_mut(&std::thread::current().id())
    }

    /// A block of at least `bytes`.
    pub(super) fn take(&mut self, driver: &dyn Driver, bytes: usize) -> Result<Block> {
        if let Some(scope @ Scope::Placing { .. }) = self.scope()
            && let Some(block) = scope.place(rounded(bytes))?
        {
            return Ok(block);
        }
        let mut block = self.take_pooled(driver, rounded(bytes))?;
        if let Some(Scope::Tracing { serial, trace, takes }) = self.scope() {
            trace.push(Event::Take(bytes));
            if let Home::Pool { small } = block.home {
                block.home = Home::Traced { small, serial: *serial, take: *takes };
            }
            *takes += 1;
        }
        Ok(block)
    }

    fn take_pooled(&mut self, driver: &dyn Driver, size: usize) -> Result<Block> {
        let granularity = driver.granularity();
        let shares = granularity > ALIGN;
        let small = shares && size < SMALL;
        if let Some(block) = self.take_free(size, (small, shares)) {
            return Ok(block);
        }
        let whole = size.next_multiple_of(granularity);
        // As much as many buffers need, if the limit allows; the least that will do, if it must be.
        let slab = match (shares, small) {
            (false, _) => size,
            (true, true) => SMALL_SEGMENT,
            (true, false) => whole.max(LARGE_SEGMENT),
        };
        if !self.fits(slab) {
            self.release(driver);
        }
        let bytes = [slab, whole].into_iter().find(|bytes| self.fits(*bytes)).unwrap_or(size);
        let address = self.obtain(driver, bytes)?;
        self.class(small).add(address, bytes);
        self.take_free(size, (small, shares)).ok_or_else(|| {
            EngineError::Unsupported("a new block is smaller than what was asked for".into())
        })
    }

    fn fits(&self, bytes: usize) -> bool {
        self.stats.reserved.saturating_add(bytes) <= self.stats.limit
    }

    fn class(&mut self, small: bool) -> &mut Segments {
        if small { &mut self.small } else { &mut self.large }
    }

    fn take_free(&mut self, size: usize, (small, cut): (bool, bool)) -> Option<Block> {
        let (address, size) = self.class(small).take(size, cut)?;
        self.count_taken(size);
        Some(Block { address, size, home: Home::Pool { small } })
    }

    fn count_taken(&mut self, size: usize) {
        self.stats.live += size;
        self.stats.peak = self.stats.peak.max(self.stats.live);
    }

    /// Takes `size` bytes of the driver for one use, if the limit allows.
    pub(super) fn reserve(&mut self, driver: &dyn Driver, size: usize) -> Result<Address> {
        let address = self.obtain(driver, size)?;
        self.count_taken(size);
        Ok(address)
    }

    fn obtain(&mut self, driver: &dyn Driver, size: usize) -> Result<Address> {
        if !self.fits(size) {
            self.release(driver);
        }
        if !self.fits(size) {
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

    /// Gives what [`Memory::reserve`] took back to the driver.
    pub(super) fn free(&mut self, driver: &dyn Driver, address: Address, size: usize) {
        driver.free(address);
        self.stats.live -= size;
        self.stats.reserved -= size;
    }

    /// Takes a block of the pool back.
    fn give_pooled(&mut self, address: Address, size: usize, small: bool) {
        self.stats.live -= size;
        self.class(small).give(address);
    }

    fn note_give(&mut self, of: u64, take: usize) {
        for scope in self.scopes.values_mut() {
            if let Scope::Tracing { serial, trace, .. } = scope
                && *serial == of
            {
                trace.push(Event::Give(take));
            }
        }
    }

    /// Notes where a segment of the tape begins or ends, if this thread is traced.
    pub(super) fn note_segment(&mut self, event: Event) {
        if let Some(Scope::Tracing { trace, .. }) = self.scope() {
            trace.push(event);
        }
    }

    /// Gives what no buffer uses back to the driver.
    pub(super) fn release(&mut self, driver: &dyn Driver) {
        self.stats.reserved -= self.small.release(driver) + self.large.release(driver);
    }

    /// From now on the allocations of this thread are noted.
    pub(super) fn start_trace(&mut self) -> Result<()> {
        self.serial += 1;
        let scope = Scope::Tracing { serial: self.serial, trace: Trace::default(), takes: 0 };
        self.open(scope)
    }

    /// From now on the allocations of this thread have their places in `arena`.
    pub(super) fn start_placing(&mut self, arena: Arc<ArenaBlock>, layout: Layout) -> Result<()> {
        self.open(Scope::Placing { arena, layout, takes: 0, broken: None })
    }

    fn open(&mut self, scope: Scope) -> Result<()> {
        let thread = std::thread::current().id();
        if self.scopes.contains_key(&thread) {
            return Err(EngineError::Unsupported(
                "a run whose memory is traced or placed cannot hold another".into(),
            ));
        }
        self.scopes.insert(thread, scope);
        Ok(())
    }

    /// Ends what [`Memory::start_trace`] or [`Memory::start_placing`] began; gives the trace, or
    /// why the run was not the one that was traced.
    pub(super) fn end_scope(&mut self) -> Option<std::result::Result<Trace, String>> {
        match self.scopes.remove(&std::thread::current().id())? {
            Scope::Tracing { trace, .. } => Some(Ok(trace)),
            Scope::Placing { broken: Some(why), .. } => Some(Err(why)),
            Scope::Placing { layout, takes, .. } if takes < layout.slots.len() => {
                Some(Err(format!("{takes} buffers were taken, {} were traced", layout.slots.len())))
            }
            Scope::Placing { .. } => None,
        }
    }
}

impl Scope {
    /// The place of the next buffer; `None` if it comes from the pool.
    fn place(&mut self, size: usize) -> Result<Option<Block>> {
        let Scope::Placing { arena, layout, takes, broken } = self else { return Ok(None) };
        let found = match (&broken, layout.slots.get(*takes)) {
            (Some(why), _) => Err(why.clone()),
            (None, None) => Err(format!("more than the traced {takes} buffers are taken")),
            (None, Some(slot)) if slot.size != size => {
                Err(format!("buffer {takes} takes {size} bytes, traced were {}", slot.size))
            }
            (None, Some(slot)) => match slot.place {
                None => Ok(None),
                Some(offset) if arena.claim(offset, size) => Ok(Some(offset)),
                Some(_) => Err(format!("the place of buffer {takes} is still in use")),
            },
        };
        match found {
            Ok(place) => {
                *takes += 1;
                Ok(place.map(|offset| Block {
                    address: arena.address() + offset as Address,
                    size,
                    home: Home::Arena(arena.clone()),
                }))
            }
            Err(why) => {
                *broken = Some(why.clone());
                Err(EngineError::PlanMismatch(why))
            }
        }
    }
}

impl super::Card {
    /// Takes back the memory of a dropped buffer.
    pub(super) fn take_back(&self, block: &mut Block) {
        let Block { address, size, .. } = *block;
        match std::mem::replace(&mut block.home, Home::Pool { small: false }) {
            Home::Pool { small } => self.memory().give_pooled(address, size, small),
            Home::Traced { small, serial, take } => {
                let mut memory = self.memory();
                memory.note_give(serial, take);
                memory.give_pooled(address, size, small);
            }
            // Outside the lock: the last buffer of a dropped arena frees it.
            Home::Arena(arena) => arena.give(address),
        }
    }
}
