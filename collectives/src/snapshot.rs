//! Memory for snapshots: bytes that outlive the rank that wrote them.
//!
//! An anonymous memory file (memfd) that a node's launcher holds and its first rank inherits. Two
//! places take turns: a snapshot counts once its head is written, which happens last, so that a rank
//! that is killed at any instant leaves the snapshot before. The kernel frees the memory with the
//! last process that has it open; nothing has a name in a file system.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

const MAGIC: u64 = u64::from_le_bytes(*b"lorasnp1");
/// Bytes of a head: six words and a check sum over them.
const HEAD: usize = 6 * 8 + 32;
/// Heads lie here, a page each.
const PAGE: u64 = 4096;
/// Where the contents of the places begin. The file is sparse: what was never written takes nothing.
const STRIDE: u64 = 1 << 40;

/// When a snapshot was taken.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Moment {
    /// Number of the start in which it was taken.
    pub generation: u64,
    /// Optimizer steps done.
    pub step: u64,
}

/// The memory, as its launcher or a rank holds it.
#[derive(Debug)]
pub struct Snapshots {
    file: File,
}

/// The head of a place.
#[derive(Debug, Clone, Copy)]
struct Head {
    /// Counts the snapshots of this memory.
    count: u64,
    moment: Moment,
    length: u64,
}

impl Snapshots {
    /// Makes empty memory. Its descriptor closes on exec; see [`fd`](Snapshots::fd).
    ///
    /// # Errors
    /// Those of the system.
    pub fn create() -> io::Result<Snapshots> {
        // SAFETY: the name is a NUL-terminated literal; the call returns a descriptor or -1.
        let fd = unsafe { libc::memfd_create(c"lorarun-snapshots".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Snapshots { file })
    }

    /// Opens the memory behind an inherited descriptor, which stays open.
    ///
    /// # Errors
    /// A descriptor of nothing.
    pub fn attach(fd: RawFd) -> io::Result<Snapshots> {
        // SAFETY: fcntl checks the descriptor itself and returns -1 for what is none; a duplicate is
        // owned by nobody else.
        let file = unsafe {
            let own = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
            if own < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(own)
        };
        Ok(Snapshots { file })
    }

    /// Descriptor of the memory.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Puts a snapshot in the place of the older one of two.
    ///
    /// # Errors
    /// No memory left; the snapshot before is good then.
    pub fn write(&self, moment: Moment, parts: &[&[u8]]) -> io::Result<()> {
        let heads = [self.head(0), self.head(1)];
        let count = heads.iter().flatten().map(|head| head.count).max().unwrap_or(0) + 1;
        let place = count % 2;
        self.file.write_all_at(&[0; HEAD], place * PAGE)?;
        let mut at = start_of(place);
        for part in parts {
            self.file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        let length = at - start_of(place);
        let words = [MAGIC, count, moment.generation, moment.step, length, 0];
        let mut head: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        head.extend_from_slice(&Sha256::digest(&head));
        self.file.write_all_at(&head, place * PAGE)
    }

    /// When the newest snapshot was taken; `None` where there is none.
    pub fn newest(&self) -> Option<Moment> {
        self.newest_place().map(|(_, head)| head.moment)
    }

    /// The newest snapshot.
    ///
    /// # Errors
    /// Those of the system.
    pub fn read(&self) -> io::Result<Option<(Moment, Vec<u8>)>> {
        let Some((place, head)) = self.newest_place() else { return Ok(None) };
        let length = usize::try_from(head.length).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start_of(place))?;
        Ok(Some((head.moment, bytes)))
    }

    fn newest_place(&self) -> Option<(u64, Head)> {
        let heads = [0, 1].into_iter().filter_map(|place| Some((place, self.head(place)?)));
        heads.max_by_key(|(_, head)| head.count)
    }

    fn head(&self, place: u64) -> Option<Head> {
        let mut bytes = [0; HEAD];
        self.file.read_exact_at(&mut bytes, place * PAGE).ok()?;
        let (words, sum) = bytes.split_at(6 * 8);
        let word =
            |index: usize| words[8 * index..].first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        if word(0)? != MAGIC || Sha256::digest(words)[..] != *sum {
            return None;
        }
        let moment = Moment { generation: word(2)?, step: word(3)? };
        Some(Head { count: word(1)?, moment, length: word(4)? })
    }
}

fn start_of(place: u64) -> u64 {
    2 * PAGE + place * STRIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(step: u64) -> Moment {
        Moment { generation: 1, step }
    }

    #[test]
    fn the_newest_whole_snapshot_is_read() {
        let memory = Snapshots::create().unwrap();
        assert!(memory.newest().is_none() && memory.read().unwrap().is_none());
        for step in 1..6_u64 {
            let bytes = vec![step as u8; 10_000 * step as usize];
            memory.write(moment(step), &[&bytes, b"end"]).unwrap();
            let other = Snapshots::attach(memory.fd()).unwrap();
            let (at, read) = other.read().unwrap().unwrap();
            assert_eq!((at, read.len()), (moment(step), bytes.len() + 3));
            assert!(read.ends_with(b"end") && read.starts_with(&bytes));
        }
    }

    #[test]
    fn a_snapshot_that_was_cut_short_leaves_the_one_before() {
        let memory = Snapshots::create().unwrap();
        memory.write(moment(1), &[b"first"]).unwrap();
        memory.write(moment(2), &[b"second"]).unwrap();
        // What a writer that dies between head and head leaves: the place of the first is void.
        memory.file.write_all_at(&[0; HEAD], PAGE).unwrap();
        memory.file.write_all_at(b"thi", start_of(1)).unwrap();
        assert_eq!(memory.read().unwrap().unwrap(), (moment(2), b"second".to_vec()));
        // Or in the middle of a head.
        memory.file.write_all_at(&[7; 20], PAGE).unwrap();
        assert_eq!(memory.newest(), Some(moment(2)));
    }

    #[test]
    fn something_else_is_no_snapshot() {
        assert!(Snapshots::attach(9999).is_err());
        let null = File::open("/dev/null").unwrap();
        assert!(Snapshots::attach(null.as_raw_fd()).unwrap().newest().is_none());
    }
}
