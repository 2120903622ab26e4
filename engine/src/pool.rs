//! Recycles the host buffers of dropped tensors.
//!
//! A fresh multi-megabyte allocation costs a page fault every 4 KiB, more than the arithmetic of a
//! normalisation. Buffers therefore come from, and go back to, a free list keyed by element type
//! and size class. A recycled buffer holds stale but initialised numbers: kernels overwrite it whole.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;

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

/// An element type that the pool keeps lists of.
pub(crate) trait Pooled: Copy + Default + Send + 'static {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<Self>>>>;
}

impl Pooled for f32 {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<f32>>>> {
        &F32
    }
}

impl Pooled for bf16 {
    fn lists() -> &'static Mutex<BTreeMap<usize, Vec<Vec<bf16>>>> {
        &BF16
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
    vec![T::default(); len]
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
    fn small_and_far_smaller_requests_do_not_take_a_large_buffer() {
        give(take::<bf16>(1_000_003));
        let small = take::<bf16>(500_000);
        assert!(small.capacity() < 1_000_003);
        give(small);
    }
}
