//! An NCCL for tests: ranks are threads, cards are maps from addresses to numbers, and faults come on
//! demand.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::library::{Api, Code, Handle, Id};

/// How a rank's NCCL behaves.
#[derive(Clone, Default)]
pub(super) struct Faults {
    /// Questions answered by "in progress" after a call.
    pub polls: usize,
    /// The communicator never becomes ready.
    pub init_hangs: bool,
    /// Every sum is refused with this code.
    pub refuses: Option<i32>,
    /// Number of the card that is current, if not the rank's.
    pub card: Option<i32>,
    /// Ending it never ends.
    pub finalize_hangs: bool,
}

#[derive(Default)]
struct Shared {
    ids: u8,
    /// Id by rank.
    joined: HashMap<usize, Id>,
    /// Numbers at (rank, address).
    memory: HashMap<(usize, u64), Vec<f32>>,
    /// By number of the sum: (rank, address, len).
    sums: Vec<Vec<(usize, u64, usize)>>,
    /// Sums asked for, by rank.
    asked: HashMap<usize, usize>,
    polls_left: HashMap<usize, usize>,
    broken: HashMap<usize, i32>,
    aborted: HashSet<usize>,
    finalized: HashSet<usize>,
    destroyed: HashSet<usize>,
}

/// What connects the ranks.
#[derive(Default)]
pub(super) struct Net {
    world_size: usize,
    shared: Mutex<Shared>,
    changed: Condvar,
}

/// One rank's library.
pub(super) struct Fake {
    net: Arc<Net>,
    rank: usize,
    faults: Faults,
}

impl Net {
    pub(super) fn new(world_size: usize) -> Arc<Net> {
        Arc::new(Net { world_size, ..Net::default() })
    }

    pub(super) fn library(self: &Arc<Net>, rank: usize, faults: Faults) -> Arc<dyn Api> {
        Arc::new(Fake { net: self.clone(), rank, faults })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    pub(super) fn write(&self, rank: usize, address: u64, values: &[f32]) {
        self.shared().memory.insert((rank, address), values.to_vec());
    }

    pub(super) fn read(&self, rank: usize, address: u64) -> Vec<f32> {
        self.shared().memory[&(rank, address)].clone()
    }

    /// Waits for the rank's stream: until its sums are done or aborted.
    pub(super) fn synchronize(&self, rank: usize) {
        let busy = |shared: &mut Shared| {
            let asked = shared.asked.get(&rank).copied().unwrap_or(0);
            let open = |sum: &Vec<_>| sum.len() < self.world_size;
            !shared.aborted.contains(&rank) && shared.sums[..asked].iter().any(open)
        };
        drop(self.changed.wait_while(self.shared(), busy).unwrap());
    }

    /// NCCL notices an error of its own on a rank.
    pub(super) fn break_rank(&self, rank: usize, code: i32) {
        self.shared().broken.insert(rank, code);
    }

    /// Ranks that were aborted, finalized, destroyed.
    pub(super) fn ended(&self) -> [usize; 3] {
        let shared = self.shared();
        [shared.aborted.len(), shared.finalized.len(), shared.destroyed.len()]
    }

    /// The ids that ranks came with.
    pub(super) fn ids(&self) -> HashSet<Id> {
        self.shared().joined.values().copied().collect()
    }
}

impl Fake {
    /// "In progress" as often as wanted.
    fn begin(&self, shared: &mut Shared) -> Code {
        shared.polls_left.insert(self.rank, self.faults.polls);
        if self.faults.polls > 0 { Code::IN_PROGRESS } else { Code::SUCCESS }
    }
}

impl Api for Fake {
    fn version(&self) -> Result<i32, Code> {
        Ok(22_809)
    }

    fn unique_id(&self) -> Result<Id, Code> {
        let mut shared = self.net.shared();
        shared.ids += 1;
        Ok([shared.ids; 128])
    }

    fn init(&self, world_size: usize, id: &Id, rank: usize) -> (Option<Handle>, Code) {
        assert_eq!((world_size, rank), (self.net.world_size, self.rank));
        let mut shared = self.net.shared();
        shared.joined.insert(rank, *id);
        shared.polls_left.insert(rank, self.faults.polls);
        (Some(Handle(rank + 1)), Code::IN_PROGRESS)
    }

    fn async_error(&self, handle: Handle) -> Code {
        assert_eq!(handle, Handle(self.rank + 1));
        let mut shared = self.net.shared();
        assert!(!shared.aborted.contains(&self.rank), "a freed communicator was asked");
        if let Some(code) = shared.broken.get(&self.rank) {
            return Code(*code);
        }
        let hangs = if shared.finalized.contains(&self.rank) {
            self.faults.finalize_hangs
        } else {
            self.faults.init_hangs || shared.joined.len() < self.net.world_size
        };
        let left = shared.polls_left.entry(self.rank).or_default();
        *left = left.saturating_sub(1);
        if *left > 0 || hangs { Code::IN_PROGRESS } else { Code::SUCCESS }
    }

    fn card(&self, _: Handle) -> Result<i32, Code> {
        Ok(self.faults.card.unwrap_or(self.rank as i32))
    }

    fn all_reduce(&self, _: Handle, address: u64, len: usize, stream: u64) -> Code {
        assert_eq!(stream, 7);
        if let Some(code) = self.faults.refuses {
            return Code(code);
        }
        let mut shared = self.net.shared();
        assert_eq!(shared.polls_left[&self.rank], 0, "called before the last call was done");
        let asked = shared.asked.entry(self.rank).or_default();
        let number = *asked;
        *asked += 1;
        if shared.sums.len() == number {
            shared.sums.push(Vec::new());
        }
        shared.sums[number].push((self.rank, address, len));
        if shared.sums[number].len() == self.net.world_size {
            let members = shared.sums[number].clone();
            let mut sum = vec![0.; len];
            for (rank, address, _) in &members {
                let values = &shared.memory[&(*rank, *address)];
                sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
            }
            for (rank, address, _) in members {
                shared.memory.insert((rank, address), sum.clone());
            }
            self.net.changed.notify_all();
        }
        self.begin(&mut shared)
    }

    fn finalize(&self, _: Handle) -> Code {
        let mut shared = self.net.shared();
        shared.finalized.insert(self.rank);
        shared.polls_left.insert(self.rank, self.faults.polls);
        Code::IN_PROGRESS
    }

    fn destroy(&self, _: Handle) -> Code {
        let mut shared = self.net.shared();
        assert!(shared.finalized.contains(&self.rank));
        shared.destroyed.insert(self.rank);
        Code::SUCCESS
    }

    fn abort(&self, _: Handle) -> Code {
        self.net.shared().aborted.insert(self.rank);
        self.net.changed.notify_all();
        Code::SUCCESS
    }

    fn describe(&self, code: Code) -> String {
        match code.0 {
            6 => "remote process exited or there was a network error (6)".to_owned(),
            code => format!("code {code}"),
        }
    }
}
