//! The emulated card's memory: addresses of one region, with a count of what belongs to a tensor.
//!
//! New memory, and memory that a tensor gets anew, is NaN. What lies beside tensors, or belonged to
//! one that is gone, can neither be read nor written: by the host's calls nor by kernels
//! (watch.cpp).

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use engine::cuda::Address;
use engine::{EngineError, Result};

/// Addresses are multiples of this, and so much after each block is nobody's.
const GRANULE: usize = 256;
/// Addresses that all emulated cards of a process share; memory is taken when it is touched.
const REGION: usize = 1 << 36;
/// In new memory: NaN in every type.
const UNSET: u8 = 0xff;
/// A block that is freed gives whole pages of at least so much back.
const LARGE: usize = 1 << 16;

unsafe extern "C" {
    fn emulated_watch(start: usize, bytes: usize, counts: *const u16);
}

/// All addresses.
struct Region {
    start: usize,
    /// For each granule, how many of its bytes belong to a tensor, from the first on.
    counts: usize,
    /// Parts that no block has, by start; neighbours are joined.
    idle: Mutex<BTreeMap<usize, usize>>,
}

static REGIONS: OnceLock<Option<Region>> = OnceLock::new();

impl Region {
    fn new() -> Option<Self> {
        let counts = REGION / GRANULE * size_of::<u16>();
        let (start, counts) = (reserve(REGION)?, reserve(counts)?);
        // SAFETY: both stay reserved until the process ends.
        unsafe { emulated_watch(start, REGION, counts as *const u16) };
        Some(Self { start, counts, idle: Mutex::new(BTreeMap::from([(start, REGION)])) })
    }

    fn of_process() -> Result<&'static Self> {
        REGIONS.get_or_init(Self::new).as_ref().ok_or_else(|| full(REGION))
    }

    fn take(&self, bytes: usize) -> Result<usize> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let found = idle.iter().find(|(_, size)| **size >= bytes).map(|(at, size)| (*at, *size));
        let (at, size) = found.ok_or_else(|| full(bytes))?;
        idle.remove(&at);
        if size > bytes {
            idle.insert(at + bytes, size - bytes);
        }
        Ok(at)
    }

    fn give(&self, mut at: usize, mut bytes: usize) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(size) = idle.remove(&(at + bytes)) {
            bytes += size;
        }
        if let Some((before, size)) = idle.range(..at).next_back().map(|(at, size)| (*at, *size))
            && before + size == at
        {
            at = before;
            bytes += size;
        }
        idle.insert(at, bytes);
    }

    /// The first and the number of the granules that `bytes` from `address` on lie in.
    fn granules(&self, address: usize, bytes: usize) -> (usize, usize) {
        let first = (address - self.start) / GRANULE;
        (first, (address - self.start + bytes).div_ceil(GRANULE) - first)
    }

    /// Says that the first `held` of `bytes` from `address`, the start of a granule, are a tensor's.
    fn mark(&self, address: usize, bytes: usize, held: usize) {
        let (first, len) = self.granules(address, bytes);
        for i in 0..len {
            let count = held.saturating_sub(i * GRANULE).min(GRANULE) as u16;
            // SAFETY: reserved for the whole region. Granules of a block are only looked at by its
            // card, under the lock of the card's state.
            unsafe { (self.counts as *mut u16).add(first + i).write(count) };
        }
    }

    /// Whether all of `bytes` from `address` on are a tensor's.
    fn holds(&self, address: usize, bytes: usize) -> bool {
        let end = address.checked_add(bytes);
        if address < self.start || end.is_none_or(|end| end > self.start + REGION) {
            return false;
        }
        let (first, len) = self.granules(address, bytes);
        // SAFETY: as in `mark`.
        let counts =
            unsafe { std::slice::from_raw_parts((self.counts as *const u16).add(first), len) };
        let Some((last, before)) = counts.split_last() else { return false };
        let rest = (address + bytes - 1) % GRANULE;
        before.iter().all(|count| usize::from(*count) == GRANULE) && usize::from(*last) > rest
    }
}

/// Addresses without memory behind them yet.
fn reserve(bytes: usize) -> Option<usize> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    // SAFETY: a new mapping that replaces none.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    (at != libc::MAP_FAILED).then_some(at as usize)
}

fn full(bytes: usize) -> EngineError {
    let why = format!("no {bytes} bytes for the emulated card");
    EngineError::Card { what: "memory of the host".into(), why }
}

/// Live blocks of one card by address.
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

    /// A new block of `bytes`, all of which belong to one tensor until told otherwise.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let region = Region::of_process()?;
        let start = region.take(with_fence(bytes).ok_or_else(|| full(bytes))?)?;
        let address = start as Address;
        self.sizes.insert(address, bytes);
        self.used += bytes;
        self.begin(address, bytes)?;
        Ok(address)
    }

    /// Gives a block back.
    pub(crate) fn free(&mut self, address: Address) -> Result<()> {
        let Some(bytes) = self.sizes.remove(&address) else {
            return Err(outside("free", address, 0));
        };
        self.used -= bytes;
        let (region, start) = (Region::of_process()?, address as usize);
        region.mark(start, bytes, 0);
        let (first, last) = (start.next_multiple_of(4096), (start + bytes) / 4096 * 4096);
        if last > first && last - first >= LARGE {
            // SAFETY: whole pages of a block that nobody has any more.
            unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_DONTNEED) };
        }
        if let Some(size) = with_fence(bytes) {
            region.give(start, size);
        }
        Ok(())
    }

    /// From now on `bytes` from `address` on are a tensor.
    pub(crate) fn claim(&mut self, address: Address, bytes: usize) -> Result<()> {
        self.check_block("begin_tensor", address, bytes)?;
        Region::of_process()?.mark(address as usize, bytes, bytes);
        Ok(())
    }

    /// The same, and what was in them is lost.
    pub(crate) fn begin(&mut self, address: Address, bytes: usize) -> Result<()> {
        self.claim(address, bytes)?;
        self.write("begin_tensor", address, bytes)?.fill(UNSET);
        Ok(())
    }

    /// From now on they are nobody's.
    pub(crate) fn end(&mut self, address: Address, bytes: usize) -> Result<()> {
        self.check_block("end_tensor", address, bytes)?;
        Region::of_process()?.mark(address as usize, bytes, 0);
        Ok(())
    }

    /// Fails unless `bytes` from `address` on lie in one block and begin a granule.
    fn check_block(&self, what: &str, address: Address, bytes: usize) -> Result<()> {
        let block = self.sizes.range(..=address).next_back();
        let end = address.checked_add(bytes as Address);
        match (block, end) {
            (Some((start, size)), Some(end))
                if end <= start + *size as Address
                    && address.is_multiple_of(GRANULE as Address) =>
            {
                Ok(())
            }
            _ => Err(outside(what, address, bytes)),
        }
    }

    /// Fails unless `bytes` from `address` on belong to a tensor.
    pub(crate) fn check(&self, what: &str, address: Address, bytes: usize) -> Result<()> {
        let block = self.sizes.range(..=address).next_back();
        let own = block.is_some_and(|(start, size)| address <= start + *size as Address);
        if own && (bytes == 0 || Region::of_process()?.holds(address as usize, bytes)) {
            return Ok(());
        }
        Err(outside(what, address, bytes))
    }

    /// The bytes from `address` on.
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

/// What a block of `bytes` takes of the region.
fn with_fence(bytes: usize) -> Option<usize> {
    bytes.checked_add(GRANULE)?.checked_next_multiple_of(GRANULE)
}

fn outside(what: &str, address: Address, bytes: usize) -> EngineError {
    let why = format!("{bytes} bytes at {address:#x} do not lie within a tensor");
    EngineError::Card { what: format!("`{what}`"), why }
}
