//! Looks at the other ranks from outside a collective: has somebody called for a stop, has a process
//! ended, who has not come as far as this rank.
//!
//! For work that another library does between the ranks: it knows nothing of them but silence.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::liveness::Watch;
use crate::segment::{Author, JOINED, LEFT, Segment};

/// What one rank sees of the others of its host. Without others it sees nothing.
pub(crate) struct Witness {
    rank: usize,
    segment: Option<Arc<Segment>>,
    /// By rank; the own one is never looked at.
    watches: Vec<Watch>,
}

impl Witness {
    /// The ranks that have joined `segment`, seen from `rank`.
    pub(crate) fn new(rank: usize, segment: Option<Arc<Segment>>) -> Witness {
        let watches = segment.as_ref().map_or_else(Vec::new, |segment| {
            let pid = |rank: usize| segment.slot(rank).pid.load(Ordering::Relaxed);
            (0..segment.world_size()).map(|rank| Watch::on(pid(rank))).collect()
        });
        Witness { rank, segment, watches }
    }

    /// The number among all ranks of one of this host's.
    fn name(&self, rank: usize) -> usize {
        self.segment.as_ref().map_or(0, |segment| segment.first_rank()) + rank
    }

    /// Fails once a rank or the launcher has called for everyone to stop.
    pub(crate) fn check_aborted(&self) -> Result<()> {
        self.segment.as_ref().map_or(Ok(()), |segment| segment.check_aborted())
    }

    /// A rank that is gone, and how that was noticed.
    pub(crate) fn lost_peer(&self) -> Option<(usize, &'static str)> {
        let segment = self.segment.as_ref()?;
        let peers = (0..segment.world_size()).filter(|peer| *peer != self.rank);
        peers.into_iter().find_map(|peer| match segment.slot(peer).state.load(Ordering::Acquire) {
            LEFT => Some((self.name(peer), "it left the group")),
            JOINED if self.watches[peer].is_gone() => {
                Some((self.name(peer), "its process has ended"))
            }
            _ => None,
        })
    }

    /// Counts a wait that this rank begins and gives its number, from 1.
    pub(crate) fn begin_wait(&self) -> u64 {
        let Some(segment) = &self.segment else { return 1 };
        segment.slot(self.rank).waits.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits that this rank has begun.
    pub(crate) fn waits(&self) -> u64 {
        let slot = self.segment.as_ref().map(|segment| segment.slot(self.rank));
        slot.map_or(0, |slot| slot.waits.load(Ordering::Relaxed))
    }

    /// Ranks that have not begun wait number `number`.
    pub(crate) fn behind(&self, number: u64) -> Vec<usize> {
        let Some(segment) = &self.segment else { return Vec::new() };
        let waits = |rank: usize| segment.slot(rank).waits.load(Ordering::Relaxed);
        let behind = (0..segment.world_size()).filter(|rank| waits(*rank) < number);
        behind.map(|rank| self.name(rank)).collect()
    }

    /// Makes every rank's present or next collective fail.
    pub(crate) fn abort(&self, culprit: Option<usize>, reason: &str) {
        if let Some(segment) = &self.segment {
            segment.abort(Author::Rank(self.name(self.rank)), culprit, reason);
        }
    }
}
