//! The memory that the ranks of one host share: a header, a slot per rank, data areas per rank.
//!
//! It is an anonymous memory file (memfd): the launcher creates it, ranks inherit its descriptor,
//! and the kernel frees it with the last process, so that not even `kill -9` leaves anything
//! behind. Everything but the data areas consists of atomics and is reached through safe
//! references. The data areas are plain bytes behind raw pointers; `shm.rs` says who may touch
//! which of them when.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::env::{Env, SEGMENT_FD};
use crate::futex;
use crate::standing::{Standing, Words};

/// First bytes of every segment: `LORARUN` and a binary mark.
const MAGIC: u64 = u64::from_le_bytes(*b"LORARUN\xA5");
/// Layout version; another one is refused.
const VERSION: u32 = 5;
/// Most ranks of one host.
pub const MAX_RANKS: usize = 256;
/// Data buffers per rank; `shm.rs` explains why three.
pub(crate) const BUFFERS: usize = 3;
/// Bytes of one data buffer. Measured with 2 and 4 ranks on 2 cores: see `benches/allreduce`.
pub(crate) const BUFFER_BYTES: usize = 512 * 1024;
/// Longest reason of an abort and last words of a rank, in bytes.
const TEXT_BYTES: usize = 4096;
/// `Author` code of the launcher.
const LAUNCHER: u32 = u32::MAX;
/// Code of "no rank in particular".
const NOBODY: u32 = u32::MAX;

/// States of the abort record and of a text.
const EMPTY: u32 = 0;
const WRITING: u32 = 1;
const WRITTEN: u32 = 2;

/// States of a slot.
pub(crate) const ABSENT: u32 = 0;
pub(crate) const JOINED: u32 = 1;
pub(crate) const LEFT: u32 = 2;

/// Bit of a slot's `progress` that says "abort"; the count of phases is in the bits above.
pub(crate) const ABORT_BIT: u32 = 1;

/// Why a segment cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SegmentError {
    /// The operating system refused.
    #[error("cannot {what} for shared memory of {world_size} ranks: {error}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Number of ranks.
        world_size: usize,
        /// Its answer.
        error: String,
    },
    /// The descriptor does not lead to a segment of this program.
    #[error("descriptor {fd} of `{SEGMENT_FD}` is not a shared segment of this run: {why}")]
    Foreign {
        /// Descriptor.
        fd: RawFd,
        /// What differs.
        why: String,
    },
    /// More ranks than a segment holds, or none.
    #[error("ranks on one host should be 1 to {MAX_RANKS}, got: {world_size}")]
    WorldSize {
        /// Number of ranks.
        world_size: usize,
    },
}

/// Who called an abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// The process that supervises the ranks.
    Launcher,
    /// A rank.
    Rank(usize),
}

impl fmt::Display for Author {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Author::Launcher => write!(out, "the launcher"),
            Author::Rank(rank) => write!(out, "rank {rank}"),
        }
    }
}

/// What the first abort of a group said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbortRecord {
    /// Who called.
    pub by: Author,
    /// The rank at fault as far as the caller knew.
    pub culprit: Option<usize>,
    /// Its words.
    pub reason: String,
}

/// A text that one process writes once and others read.
#[repr(C)]
struct Text {
    state: AtomicU32,
    length: AtomicU32,
    bytes: [AtomicU8; TEXT_BYTES],
}

impl Text {
    /// Claims the text for this writer; false when another one was first.
    fn claim(&self) -> bool {
        self.state.compare_exchange(EMPTY, WRITING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Writes after a successful claim. Longer texts are cut at a character.
    fn write(&self, text: &str) {
        let mut end = text.len().min(TEXT_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        for (place, byte) in self.bytes.iter().zip(text[..end].bytes()) {
            place.store(byte, Ordering::Relaxed);
        }
        self.length.store(end as u32, Ordering::Relaxed);
        self.state.store(WRITTEN, Ordering::Release);
    }

    fn read(&self) -> Option<String> {
        if self.state.load(Ordering::Acquire) != WRITTEN {
            return None;
        }
        let length = (self.length.load(Ordering::Relaxed) as usize).min(TEXT_BYTES);
        let bytes: Vec<u8> =
            self.bytes[..length].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Start of the segment.
#[repr(C, align(4096))]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    world_size: AtomicU32,
    generation: AtomicU64,
    buffer_bytes: AtomicU64,
    /// Number among all ranks of this host's first one.
    first_rank: AtomicU32,
    abort_by: AtomicU32,
    abort_culprit: AtomicU32,
    abort_reason: Text,
}

/// What a rank says about the collective it is in. Two of them alternate, because a fast rank may
/// already announce the next collective while a slow one still reads this one.
#[repr(C)]
pub(crate) struct Announcement {
    /// Number of the collective, from 1.
    pub seq: AtomicU64,
    /// Kind and root: see `shm.rs`.
    pub kind: AtomicU64,
    /// Length in elements or bytes.
    pub length: AtomicU64,
}

/// What one rank tells the others.
#[repr(C, align(4096))]
pub(crate) struct Slot {
    /// Phases completed, shifted left by one; the lowest bit is the abort flag. Peers sleep on it.
    pub progress: AtomicU32,
    /// How many peers may be asleep on `progress`.
    pub sleepers: AtomicU32,
    /// `ABSENT`, `JOINED` or `LEFT`.
    pub state: AtomicU32,
    /// Process id, valid once `JOINED`.
    pub pid: AtomicU32,
    /// Waits for work of another library, begun so far (`witness.rs`).
    pub waits: AtomicU64,
    /// When it last looked after a wait for another host, in nanoseconds; 0 while it has none.
    pub across: AtomicU64,
    /// Announcements of even and odd collectives.
    pub announcements: [Announcement; 2],
    /// What it is doing.
    pub standing: Words,
    /// The message this rank ended with.
    last_words: Text,
}

/// The mapped segment. Cheap to share between threads through an `Arc`.
pub struct Segment {
    base: NonNull<u8>,
    bytes: usize,
    world_size: usize,
    fd: RawFd,
    /// Present where this process created the segment; a rank leaves the inherited one open.
    _owned: Option<OwnedFd>,
}

// SAFETY: the mapping belongs to the process, not to a thread; header and slots are atomics, and
// the data areas are only handed out as raw pointers.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// Makes a segment for `world_size` ranks. Its descriptor closes on exec; see
    /// [`fd`](Segment::fd) for passing it on.
    pub fn create(world_size: usize, generation: u64) -> Result<Segment, SegmentError> {
        Segment::create_from(0, world_size, generation)
    }

    /// As [`create`](Segment::create), for the `world_size` ranks of one host of several, whose
    /// first one is `first_rank` among all.
    pub fn create_from(
        first_rank: usize,
        world_size: usize,
        generation: u64,
    ) -> Result<Segment, SegmentError> {
        if world_size == 0 || world_size > MAX_RANKS {
            return Err(SegmentError::WorldSize { world_size });
        }
        let system = |what, error: io::Error| SegmentError::System {
            what,
            world_size,
            error: error.to_string(),
        };
        // SAFETY: the name is a NUL-terminated literal; the call returns a descriptor or -1.
        let fd = unsafe { libc::memfd_create(c"lorarun-ranks".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(system("create a memory file", io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let bytes = total_bytes(world_size);
        file.set_len(bytes as u64).map_err(|error| system("reserve memory", error))?;
        let base = map(fd, bytes).map_err(|error| system("map memory", error))?;
        let segment = Segment { base, bytes, world_size, fd, _owned: Some(file.into()) };
        let header = segment.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.world_size.store(world_size as u32, Ordering::Relaxed);
        header.generation.store(generation, Ordering::Relaxed);
        header.first_rank.store(first_rank as u32, Ordering::Relaxed);
        header.buffer_bytes.store(BUFFER_BYTES as u64, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(segment)
    }

    /// Maps the segment behind an inherited descriptor and checks that it belongs to this run.
    pub fn attach(fd: RawFd, world_size: usize, generation: u64) -> Result<Segment, SegmentError> {
        let foreign = |why: String| SegmentError::Foreign { fd, why };
        // SAFETY: a zeroed stat is a valid place to write; fstat checks the descriptor itself.
        let size = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd, &raw mut stat) != 0 {
                return Err(foreign(io::Error::last_os_error().to_string()));
            }
            stat.st_size
        };
        if world_size == 0 || world_size > MAX_RANKS {
            return Err(SegmentError::WorldSize { world_size });
        }
        let bytes = total_bytes(world_size);
        if size != bytes as libc::off_t {
            return Err(foreign(format!("it has {size} bytes instead of {bytes}")));
        }
        // SAFETY: sets a flag of the descriptor, so that programs started by this rank do not
        // inherit it.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        let base = map(fd, bytes).map_err(|error| foreign(error.to_string()))?;
        let segment = Segment { base, bytes, world_size, fd, _owned: None };
        let header = segment.header();
        let found = [
            ("mark", MAGIC, header.magic.load(Ordering::Acquire)),
            ("version", VERSION.into(), header.version.load(Ordering::Relaxed).into()),
            ("world size", world_size as u64, header.world_size.load(Ordering::Relaxed).into()),
            ("generation", generation, header.generation.load(Ordering::Relaxed)),
            ("buffer size", BUFFER_BYTES as u64, header.buffer_bytes.load(Ordering::Relaxed)),
        ];
        for (what, expected, got) in found {
            if expected != got {
                return Err(foreign(format!("its {what} is {got} instead of {expected}")));
            }
        }
        Ok(segment)
    }

    /// Descriptor of the memory file.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// Number among all ranks of this host's first one. Slots and buffers count from it.
    pub fn first_rank(&self) -> usize {
        self.header().first_rank.load(Ordering::Relaxed) as usize
    }

    /// Number of the start that it was made for.
    pub(crate) fn generation(&self) -> u64 {
        self.header().generation.load(Ordering::Relaxed)
    }

    /// Number of ranks it was made for.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Tells every rank to stop: whoever waits in a collective wakes within milliseconds. The first
    /// call is the one that ranks report; false when another one was first.
    pub fn abort(&self, by: Author, culprit: Option<usize>, reason: &str) -> bool {
        let header = self.header();
        let first = header.abort_reason.claim();
        if first {
            let code = |rank: Option<usize>| rank.map_or(NOBODY, |rank| rank as u32);
            let by = match by {
                Author::Launcher => LAUNCHER,
                Author::Rank(rank) => rank as u32,
            };
            header.abort_by.store(by, Ordering::Relaxed);
            header.abort_culprit.store(code(culprit), Ordering::Relaxed);
            header.abort_reason.write(reason);
        }
        for rank in 0..self.world_size {
            let progress = &self.slot(rank).progress;
            progress.fetch_or(ABORT_BIT, Ordering::SeqCst);
            futex::wake_all(progress);
        }
        first
    }

    /// What the first abort said, if there was one.
    pub fn abort_record(&self) -> Option<AbortRecord> {
        let header = self.header();
        let reason = header.abort_reason.read()?;
        let by = match header.abort_by.load(Ordering::Relaxed) {
            LAUNCHER => Author::Launcher,
            rank => Author::Rank(rank as usize),
        };
        let culprit = match header.abort_culprit.load(Ordering::Relaxed) {
            NOBODY => None,
            rank => Some(rank as usize),
        };
        Some(AbortRecord { by, culprit, reason })
    }

    /// The first abort as the error that a collective returns.
    pub(crate) fn check_aborted(&self) -> crate::error::Result<()> {
        match self.abort_record() {
            None => Ok(()),
            Some(AbortRecord { by, culprit, reason }) => {
                Err(crate::error::CollectiveError::Aborted { by, culprit, reason })
            }
        }
    }

    /// The record once the abort bit was seen: its writer needs a moment, or has died writing.
    pub(crate) fn await_abort_record(&self) -> AbortRecord {
        let start = Instant::now();
        loop {
            if let Some(record) = self.abort_record() {
                return record;
            }
            if start.elapsed() > Duration::from_millis(500) {
                return AbortRecord {
                    by: Author::Launcher,
                    culprit: None,
                    reason: "no reason was left".to_owned(),
                };
            }
            std::thread::yield_now();
        }
    }

    /// Leaves the message that `rank` ends with; only the first one counts.
    pub fn leave_last_words(&self, rank: usize, message: &str) {
        if rank < self.world_size && self.slot(rank).last_words.claim() {
            self.slot(rank).last_words.write(message);
        }
    }

    /// The message that `rank` ended with, if it left one.
    pub fn last_words(&self, rank: usize) -> Option<String> {
        if rank < self.world_size { self.slot(rank).last_words.read() } else { None }
    }

    /// What the rank with number `rank` on this host says of itself.
    pub fn standing(&self, rank: usize) -> Standing {
        self.slot(rank).standing.read()
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned, at least as long as a header, zero-initialised by
        // the kernel (valid for atomics) and lives as long as `self`; all fields are atomics.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    /// The slot of `rank`, which must exist.
    pub(crate) fn slot(&self, rank: usize) -> &Slot {
        assert!(rank < self.world_size, "rank {rank} of {}", self.world_size);
        let offset = size_of::<Header>() + rank * size_of::<Slot>();
        // SAFETY: `total_bytes` has room for `world_size` slots after the header, the offset is a
        // multiple of a page; the rest as for `header`.
        unsafe { self.base.add(offset).cast::<Slot>().as_ref() }
    }

    /// Start of data buffer `buffer` of `rank`: [`BUFFER_BYTES`] bytes, page-aligned. Dereferencing
    /// it is for `shm.rs`, whose phases keep readers and writers apart.
    pub(crate) fn buffer(&self, rank: usize, buffer: usize) -> *mut u8 {
        assert!(rank < self.world_size && buffer < BUFFERS, "rank {rank}, buffer {buffer}");
        let offset = slots_end(self.world_size) + (rank * BUFFERS + buffer) * BUFFER_BYTES;
        // SAFETY: `total_bytes` has room for all buffers after the slots.
        unsafe { self.base.add(offset).as_ptr() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made by `map`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Segment").field("world_size", &self.world_size).finish_non_exhaustive()
    }
}

/// Hands the message that this rank ends with to whoever prints it: the launcher, which prints a
/// message that all ranks share once, or else this process's stderr. Peers stop with this reason,
/// unless they already have another one.
pub fn report_failure(env: &Env, message: &str) {
    if let Some(fd) = env.segment_fd
        && let Ok(segment) = Segment::attach(fd, env.local_world_size, env.generation)
    {
        segment.leave_last_words(env.local_rank, message);
        segment.abort(Author::Rank(env.rank), Some(env.rank), message);
        return;
    }
    // A reader of stderr that went away leaves nobody to tell.
    drop(writeln!(io::stderr().lock(), "{message}"));
}

fn slots_end(world_size: usize) -> usize {
    size_of::<Header>() + world_size * size_of::<Slot>()
}

fn total_bytes(world_size: usize) -> usize {
    slots_end(world_size) + world_size * BUFFERS * BUFFER_BYTES
}

fn map(fd: RawFd, bytes: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh shared mapping of a descriptor at an address of the kernel's choice; failure
    // is checked below.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn another_run_is_refused() {
        let segment = Segment::create(2, 7).unwrap();
        assert!(Segment::attach(segment.fd(), 2, 7).is_ok());
        let error = Segment::attach(segment.fd(), 2, 8).unwrap_err().to_string();
        assert!(error.ends_with("its generation is 7 instead of 8"), "{error}");
        let error = Segment::attach(segment.fd(), 3, 7).unwrap_err().to_string();
        assert!(error.contains("bytes instead of"), "{error}");
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        assert!(Segment::attach(9999, 2, 0).is_err());
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(
            Segment::attach(file.as_raw_fd(), 2, 0),
            Err(SegmentError::Foreign { .. })
        ));
    }

    #[test]
    fn the_first_abort_is_the_one_that_counts() {
        let segment = Segment::create(2, 0).unwrap();
        assert_eq!(segment.abort_record(), None);
        assert!(segment.abort(Author::Rank(1), Some(0), "first"));
        assert!(!segment.abort(Author::Launcher, None, "second"));
        let record = segment.abort_record().unwrap();
        let first = "first".to_owned();
        assert_eq!(record, AbortRecord { by: Author::Rank(1), culprit: Some(0), reason: first });
    }

    #[test]
    fn a_reported_failure_stops_the_peers_with_its_words() {
        let segment = Segment::create(2, 3).unwrap();
        let env = Env {
            rank: 1,
            local_rank: 1,
            world_size: 2,
            local_world_size: 2,
            generation: 3,
            segment_fd: Some(segment.fd()),
            ..Env::single()
        };
        report_failure(&env, "error: disk full");
        assert_eq!(segment.last_words(1).unwrap(), "error: disk full");
        assert_eq!(segment.last_words(0), None);
        let record = segment.abort_record().unwrap();
        assert_eq!((record.culprit, record.reason.as_str()), (Some(1), "error: disk full"));
    }

    #[test]
    fn long_last_words_are_cut_at_a_character() {
        let segment = Segment::create(1, 0).unwrap();
        let long = "é".repeat(TEXT_BYTES) + "x";
        segment.leave_last_words(0, &format!("x{long}"));
        let words = segment.last_words(0).unwrap();
        assert_eq!(words.len(), TEXT_BYTES - 1);
        assert!(words.ends_with('é'));
    }

    #[test]
    fn no_ranks_or_too_many_are_refused() {
        assert!(matches!(Segment::create(0, 0), Err(SegmentError::WorldSize { world_size: 0 })));
        assert!(Segment::create(MAX_RANKS + 1, 0).is_err());
    }
}
