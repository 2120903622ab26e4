//! The flight recorder: the last collectives of a rank, in a mapped file that outlives the process.
//!
//! A rank writes when it enters a collective and when it leaves it; the kernel keeps the pages of a
//! killed process. Who reads the files of all ranks sees which of them never entered what the others
//! wait in. Every entry is written in an order that lets a reader at any instant, or after a kill at
//! any instruction, take it or leave it: an entry counts once its `seq` is there.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memmap2::{MmapOptions, MmapRaw};

use crate::group::Op;

/// Collectives kept.
const KEPT: usize = 256;
const MAGIC: u64 = u64::from_le_bytes(*b"lorafly1");

/// One collective; all words little endian.
#[repr(C)]
#[derive(Default)]
struct Slot {
    /// From 1; 0 while the slot is being written.
    seq: AtomicU64,
    kind: AtomicU64,
    length: AtomicU64,
    /// Nanoseconds since 1970.
    entered: AtomicU64,
    /// 0 while it is under way.
    left: AtomicU64,
    /// 1 when it succeeded.
    succeeded: AtomicU64,
}

#[repr(C)]
struct Layout {
    magic: AtomicU64,
    rank: AtomicU64,
    world_size: AtomicU64,
    generation: AtomicU64,
    process: AtomicU64,
    slots: [Slot; KEPT],
}

/// A rank's end: writes.
pub(crate) struct Recorder {
    map: MmapRaw,
}

impl Recorder {
    /// Makes the file of `rank` in `folder`, over an earlier one.
    pub fn create(
        folder: &Path,
        rank: usize,
        world_size: usize,
        generation: u64,
    ) -> io::Result<Recorder> {
        std::fs::create_dir_all(folder)?;
        let path = path_of(folder, rank);
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let file = open?;
        file.set_len(size_of::<Layout>() as u64)?;
        let map = MmapOptions::new().map_raw(&file)?;
        let recorder = Recorder { map };
        let layout = recorder.layout();
        for (word, value) in [
            (&layout.rank, rank as u64),
            (&layout.world_size, world_size as u64),
            (&layout.generation, generation),
            (&layout.process, u64::from(std::process::id())),
        ] {
            word.store(value, Ordering::Relaxed);
        }
        layout.magic.store(MAGIC, Ordering::Release);
        Ok(recorder)
    }

    fn layout(&self) -> &Layout {
        // SAFETY: the map is page-aligned, as long as a layout (set when the file was made), and all
        // fields are atomics, for which every bit pattern is valid.
        unsafe { &*self.map.as_ptr().cast::<Layout>() }
    }

    fn slot(&self, seq: u64) -> &Slot {
        &self.layout().slots[(seq % KEPT as u64) as usize]
    }

    /// Notes that this rank enters collective number `seq`.
    pub fn enter(&self, seq: u64, kind: u64, length: u64) {
        let slot = self.slot(seq);
        slot.seq.store(0, Ordering::Release);
        slot.kind.store(kind, Ordering::Relaxed);
        slot.length.store(length, Ordering::Relaxed);
        slot.entered.store(now(), Ordering::Relaxed);
        slot.left.store(0, Ordering::Relaxed);
        slot.succeeded.store(0, Ordering::Relaxed);
        slot.seq.store(seq, Ordering::Release);
    }

    /// Notes that it leaves it.
    pub fn leave(&self, seq: u64, succeeded: bool) {
        let slot = self.slot(seq);
        slot.succeeded.store(u64::from(succeeded), Ordering::Relaxed);
        slot.left.store(now(), Ordering::Release);
    }
}

/// One collective as a reader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flight {
    /// Number since the start, from 1.
    pub seq: u64,
    /// `all_reduce of 5 floats`.
    pub op: String,
    /// When the rank entered it.
    pub entered: SystemTime,
    /// When it left it, and whether it succeeded; `None` while it is under way.
    pub left: Option<(SystemTime, bool)>,
}

/// What one rank recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Which rank.
    pub rank: usize,
    /// Of how many.
    pub world_size: usize,
    /// Of which start.
    pub generation: u64,
    /// Number of its process on its host.
    pub process: u32,
    /// The last collectives, oldest first.
    pub flights: Vec<Flight>,
}

impl Recording {
    /// Reads the file of `rank` in `folder`.
    ///
    /// # Errors
    /// A file that is not there or is none of this program.
    pub fn read(folder: &Path, rank: usize) -> io::Result<Recording> {
        let file = File::open(path_of(folder, rank))?;
        if file.metadata()?.len() != size_of::<Layout>() as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it has another length"));
        }
        let map = MmapOptions::new().map_raw_read_only(&file)?;
        // SAFETY: as in `Recorder::layout`; a writer in another process stores whole words only.
        let layout = unsafe { &*map.as_ptr().cast::<Layout>() };
        if layout.magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no flight recording"));
        }
        let mut flights: Vec<Flight> = layout.slots.iter().filter_map(read_slot).collect();
        flights.sort_by_key(|flight| flight.seq);
        Ok(Recording {
            rank: layout.rank.load(Ordering::Relaxed) as usize,
            world_size: layout.world_size.load(Ordering::Relaxed) as usize,
            generation: layout.generation.load(Ordering::Relaxed),
            process: layout.process.load(Ordering::Relaxed) as u32,
            flights,
        })
    }

    /// The number of the last collective that it entered; 0 before the first.
    pub fn last_entered(&self) -> u64 {
        self.flights.last().map_or(0, |flight| flight.seq)
    }
}

/// Who keeps whom waiting: a line for each rank that has not entered what others are in, with since
/// when these wait; the rank that is farthest behind first. Empty when no rank waits.
pub fn who_is_missing(recordings: &[Recording], now: SystemTime) -> Vec<String> {
    let waiting = recordings.iter().filter_map(|recording| {
        let flight = recording.flights.last()?;
        flight.left.is_none().then_some((recording.rank, flight))
    });
    let Some((_, first)) = waiting.clone().min_by_key(|(_, flight)| (flight.seq, flight.entered))
    else {
        return Vec::new();
    };
    let since = now.duration_since(first.entered).unwrap_or(Duration::ZERO);
    let waiting = waiting.filter(|(_, flight)| flight.seq == first.seq).count();
    let mut behind: Vec<&Recording> =
        recordings.iter().filter(|recording| recording.last_entered() < first.seq).collect();
    behind.sort_by_key(|recording| (recording.last_entered(), recording.rank));
    let line = |recording: &Recording| {
        let before = recording.flights.last().map_or("none yet".to_owned(), |flight| {
            format!("`{}` number {}", flight.op, flight.seq)
        });
        format!(
            "rank {} never entered `{}` number {}, in which {waiting} wait since {:.1} s; its last \
             was {before}",
            recording.rank,
            first.op,
            first.seq,
            since.as_secs_f64()
        )
    };
    behind.into_iter().map(line).collect()
}

fn path_of(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("flight-rank{rank}.bin"))
}

/// An entry that was not being written while it was read.
fn read_slot(slot: &Slot) -> Option<Flight> {
    let seq = slot.seq.load(Ordering::Acquire);
    let (kind, length) = (slot.kind.load(Ordering::Relaxed), slot.length.load(Ordering::Relaxed));
    let entered = slot.entered.load(Ordering::Relaxed);
    let left = slot.left.load(Ordering::Acquire);
    let succeeded = slot.succeeded.load(Ordering::Relaxed) == 1;
    if seq == 0 || slot.seq.load(Ordering::Acquire) != seq {
        return None;
    }
    let time = |nanoseconds: u64| UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    Some(Flight {
        seq,
        op: Op::describe(kind, length),
        entered: time(entered),
        left: (left != 0).then(|| (time(left), succeeded)),
    })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        use std::sync::atomic::AtomicU32;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        std::env::temp_dir().join(format!("lorarun-flight-{}-{count}", std::process::id()))
    }

    #[test]
    fn the_last_collectives_are_read_back_in_order() {
        let folder = folder();
        let recorder = Recorder::create(&folder, 1, 2, 7).unwrap();
        for seq in 1..=300 {
            recorder.enter(seq, 3, 10 * seq);
            if seq < 300 {
                recorder.leave(seq, seq != 299);
            }
        }
        let recording = Recording::read(&folder, 1).unwrap();
        assert_eq!((recording.rank, recording.world_size, recording.generation), (1, 2, 7));
        assert_eq!(recording.process, std::process::id());
        assert_eq!(recording.flights.len(), KEPT);
        assert_eq!(recording.flights[0].seq, 45);
        let [.., before, last] = &recording.flights[..] else { panic!("two flights") };
        assert_eq!((last.seq, last.op.as_str()), (300, "all_reduce of 3000 floats"));
        assert_eq!(last.left, None);
        assert!(matches!(before.left, Some((left, false)) if left >= before.entered));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_a_killed_process_wrote_is_there() {
        let folder = folder();
        std::fs::create_dir_all(&folder).unwrap();
        // SAFETY: the child touches the file and kills itself; it never returns into the test.
        let child = unsafe { libc::fork() };
        if child == 0 {
            if let Ok(recorder) = Recorder::create(&folder, 0, 1, 1) {
                recorder.enter(1, 2, 0);
            }
            // SAFETY: ends this process.
            unsafe {
                libc::kill(libc::getpid(), libc::SIGKILL);
                libc::_exit(1);
            }
        }
        let mut status = 0;
        // SAFETY: waits for the child that was just made.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        let recording = Recording::read(&folder, 0).unwrap();
        assert_eq!(recording.process, child as u32);
        assert_eq!(recording.flights[0].op, "barrier");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn who_has_not_come_is_told_with_what_it_did_last() {
        let folder = folder();
        let recorders: Vec<Recorder> =
            (0..3).map(|rank| Recorder::create(&folder, rank, 3, 1).unwrap()).collect();
        for (rank, recorder) in recorders.iter().enumerate() {
            recorder.enter(1, 2, 0);
            recorder.leave(1, true);
            if rank != 2 {
                recorder.enter(2, 3, 50);
            }
        }
        let recordings: Vec<Recording> =
            (0..3).map(|rank| Recording::read(&folder, rank).unwrap()).collect();
        let said = who_is_missing(&recordings, SystemTime::now() + Duration::from_secs(12));
        assert_eq!(said.len(), 1);
        let expected = "rank 2 never entered `all_reduce of 50 floats` number 2, in which 2 wait";
        assert!(said[0].starts_with(expected), "{}", said[0]);
        assert!(said[0].ends_with("its last was `barrier` number 1"), "{}", said[0]);
        recorders[2].enter(2, 3, 50);
        let recordings: Vec<Recording> =
            (0..3).map(|rank| Recording::read(&folder, rank).unwrap()).collect();
        assert_eq!(who_is_missing(&recordings, SystemTime::now()), Vec::<String>::new());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn other_files_are_refused() {
        let folder = folder();
        std::fs::create_dir_all(&folder).unwrap();
        assert!(Recording::read(&folder, 0).is_err());
        std::fs::write(path_of(&folder, 0), b"short").unwrap();
        assert!(Recording::read(&folder, 0).is_err());
        std::fs::write(path_of(&folder, 0), vec![1; size_of::<Layout>()]).unwrap();
        let text = Recording::read(&folder, 0).unwrap_err().to_string();
        assert_eq!(text, "it is no flight recording");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
