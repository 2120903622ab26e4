//! Recycles the host buffers of dropped tensors.
//!
//! A fresh multi-megabyte allocation costs a page fault every 4 KiB, more than the arithmetic of a
//! normalisation. Buffers therefore come from, and go back to, a free list keyed by element type
//! and size class. A recycled buffer holds stale but initialised numbers: kernels overwrite it whole.
//!
//! Idle buffers never make a process larger than its tensors were at their most: before a fresh buffer
//! would, idle ones go back to the system.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use half::vec::HalfBitsVecExt as _;

/// Below this many bytes the system allocator is as good.
const POOLED_FROM: usize = 16 << 10;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static IDLE: AtomicUsize = AtomicUsize::new(0);

static F32: Mutex<BTreeMap<usize, Vec<Vec<f32>>>> = Mutex::new(BTreeMap::new());
static BF16: Mutex<BTreeMap<usize, Vec<Vec<bf16>>>> = Mutex::new(BTreeMap::new());

/// Bytes handed out now, at most so far, and lying idle in the free lists.
#[derive(Clone, Copy, Debug)]
pub struct PoolStats {
    /// Bytes in use by tensors.
    pub live: usize,
    /// Largest `live` since the process started.
    pub peak: usize,
    /// Bytes kept for reuse.
    pub idle: usize,
}

/// Current figures of the pool.
pub fn pool_stats() -> PoolStats {
    PoolStats {
        live: LIVE.load(Ordering::Relaxed),
        peak: PEAK.load(Ordering::Relaxed),
        idle: IDLE.load(Ordering::Relaxed),
    }
}

/// Gives all idle buffers back to the system: after loading, and before a phase of other shapes.
pub fn release_pool() {
    let lists = std::mem::take(&mut *lock(&F32));
    let halves = std::mem::take(&mut *lock(&BF16));
    let bytes = |sizes: usize, n: usize, width: usize| sizes * n * width;
    let idle: usize = lists.iter().map(|(k, v)| bytes(*k, v.len(), 4)).sum::<usize>()
        + halves.iter().map(|(k, v)| bytes(*k, v.len(), 2)).sum::<usize>();
    IDLE.fetch_sub(idle, Ordering::Relaxed);
}

/// Forgets the largest `live`, for a measurement from now on.
pub fn reset_pool_peak() {
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// An element type that the pool keeps lists of.
pub(crate) trait Pooled: Copy + Default + Send + 'static {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<Self>>>>;

    /// A fresh buffer of zeros, whose pages the system makes when they are written.
    fn zeros(len: usize) -> Vec<Self>;
}

impl Pooled for f32 {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<f32>>>> {
        &F32
    }

    fn zeros(len: usize) -> Vec<f32> {
        vec![0.; len]
    }
}

impl Pooled for bf16 {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<bf16>>>> {
        &BF16
    }

    fn zeros(len: usize) -> Vec<bf16> {
        // Of `bf16` itself the library would write every element.
        vec![0_u16; len].reinterpret_into()
    }
}

fn lock<T>(mutex: &'static Mutex<T>) -> std::sync::MutexGuard<'static, T> {
    // A poisoned list is still a valid list: nothing is left half done while the lock is held.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A vector of `len` elements with unspecified (initialised) contents.
pub(crate) fn take<T: Pooled>(len: usize) -> Vec<T> {
    let bytes = len * size_of::<T>();
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
    if bytes >= POOLED_FROM {
        let mut lists = lock(T::lists());
        // An eighth of slack at most, so that a big idle buffer is not spent on a small tensor.
        let found = lists.range(len..=len + len / 8).find(|(_, v)| !v.is_empty()).map(|(k, _)| *k);
        if let Some(mut buffer) = found.and_then(|key| lists.get_mut(&key)).and_then(Vec::pop) {
            IDLE.fetch_sub(buffer.capacity() * size_of::<T>(), Ordering::Relaxed);
            // Shrinks or regrows within what was initialised before: capacity is the size class.
            buffer.resize(len, T::default());
            return buffer;
        }
    }
    make_room(live);
    T::zeros(len)
}

/// Frees idle buffers, the largest first, as long as they and `live` bytes in use are more than were
/// ever in use together.
fn make_room(live: usize) {
    let over = || live + IDLE.load(Ordering::Relaxed) > PEAK.load(Ordering::Relaxed);
    while over() && (drop_largest::<f32>() | drop_largest::<bf16>()) {}
}

/// Frees the largest idle buffer of a type; false if there is none.
fn drop_largest<T: Pooled>() -> bool {
    let mut lists = lock(T::lists());
    let Some(mut entry) = lists.last_entry() else { return false };
    let buffer = entry.get_mut().pop();
    if entry.get().is_empty() {
        entry.remove();
    }
    drop(lists);
    if let Some(buffer) = &buffer {
        IDLE.fetch_sub(buffer.capacity() * size_of::<T>(), Ordering::Relaxed);
    }
    true
}

/// Makes the C library give every large buffer back to the system when it is freed. Left to itself it
/// raises the size from which it does so to 32 MiB, and keeps what lies below in its heap.
pub fn return_freed_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call changes a number of the allocator under its lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Takes a buffer back.
pub(crate) fn give<T: Pooled>(buffer: Vec<T>) {
    LIVE.fetch_sub(buffer.len() * size_of::<T>(), Ordering::Relaxed);
    let bytes = buffer.capacity() * size_of::<T>();
    if bytes >= POOLED_FROM {
        IDLE.fetch_add(bytes, Ordering::Relaxed);
        lock(T::lists()).entry(buffer.capacity()).or_default().push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_the_next_tensor_of_its_size() {
        let first = take::<f32>(123_457);
        let address = first.as_ptr();
        give(first);
        let second = take::<f32>(123_457);
        assert_eq!(second.as_ptr(), address);
        give(second);
    }

    #[test]
    fn idle_buffers_leave_room_for_what_is_in_use() {
        // Other tests take and give at the same time, so sizes are large beside theirs.
        let large = take::<f32>(64 << 20);
        give(large);
        let most = pool_stats().peak;
        let other = take::<bf16>(100 << 20);
        let PoolStats { live, idle, .. } = pool_stats();
        assert!(live + idle < most + (32 << 20), "{live} + {idle} > {most}");
        give(other);
    }

    #[test]
    fn small_and_far_smaller_requests_do_not_take_a_large_buffer() {
        give(take::<bf16>(1_000_003));
        let small = take::<bf16>(500_000);
        assert!(small.capacity() < 1_000_003);
        give(small);
    }
}
