//! One rank's membership in the group of its host: joining, passing phases in lockstep, agreeing on
//! what is called, and noticing that a peer is late, lost or calls for a stop.
//!
//! Work proceeds in numbered *phases* that all ranks pass together. A rank finishes a phase by adding
//! one to its `progress` word, and may then wait until every peer has finished it too. What is done
//! in a phase is the business of `shm.rs`. No wait is without a deadline, and none is deaf.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::{CollectiveError, Result};
use crate::futex;
use crate::liveness::Watch;
use crate::mesh::{Label, Mesh, Wait};
use crate::recorder::Recorder;
use crate::segment::{ABORT_BIT, ABSENT, Author, BUFFERS, JOINED, LEFT, Segment};
use crate::sums::Order;

/// How often a waiting rank looks whether its peers still live.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(100);
/// How often a rank that waits for its host looks after what travels between hosts.
const WORK_INTERVAL: Duration = Duration::from_micros(300);

/// A rank that has looked after its wait for another host so lately is still at it.
const FRESH: Duration = Duration::from_millis(500);

/// What can be done while a rank waits.
pub(crate) type Work<'w> = &'w mut dyn FnMut(&mut Group, &Call) -> Result<()>;

/// What a rank calls; equal on all ranks, or the call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// First meeting of all ranks of the host.
    Connect,
    /// Bytes to the counterparts of the other hosts, before a collective within the host.
    Counterparts,
    Barrier,
    /// Lengths must be equal.
    AllReduce(Order),
    /// From this rank; the others learn the length.
    Broadcast(usize),
    /// Lengths may differ.
    AllGather,
}

impl Op {
    /// What is announced: the kind in the low byte, the root above.
    pub(crate) fn code(self) -> u64 {
        match self {
            Op::Connect => 1,
            Op::Counterparts => 7,
            Op::Barrier => 2,
            Op::AllReduce(Order::Ranks) => 3,
            Op::AllReduce(Order::Pairs) => 6,
            Op::AllGather => 4,
            Op::Broadcast(root) => 5 | (root as u64) << 8,
        }
    }

    /// Words for an announcement, also for one that this rank did not make.
    pub(crate) fn describe(code: u64, length: u64) -> String {
        match code & 0xff {
            1 => "connect".to_owned(),
            7 => "exchange of bytes between hosts".to_owned(),
            2 => "barrier".to_owned(),
            3 => format!("all_reduce of {length} floats"),
            6 => format!("all_reduce of {length} floats in pairs"),
            4 => "all_gather".to_owned(),
            5 => format!("broadcast from rank {}", code >> 8),
            _ => format!("unknown collective {code}"),
        }
    }
}

/// One collective under way.
pub(crate) struct Call {
    op: Op,
    seq: u64,
    start: Instant,
    deadline: Duration,
    agreed: bool,
}

/// One rank's end of the group of its host. Used by one thread at a time. Ranks are counted from the
/// host's first one here; what leaves this crate names them among all.
pub(crate) struct Group {
    pub(crate) segment: Arc<Segment>,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// The way to the other hosts, where there are any.
    pub(crate) mesh: Option<Mesh>,
    /// Notes what is called, where a folder for it was given.
    pub(crate) recorder: Option<Recorder>,
    generation: u64,
    /// Phases finished.
    phase: u64,
    /// Collectives begun.
    seq: u64,
    watches: Vec<Option<Watch>>,
    last_look: Instant,
    spins: u32,
    failed: Option<CollectiveError>,
}

impl Group {
    /// Joins the group of the host as its rank `rank` and waits until all of it have joined.
    pub(crate) fn join(segment: Arc<Segment>, rank: usize, deadline: Duration) -> Result<Group> {
        let generation = segment.generation();
        let world_size = segment.world_size();
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let slot = segment.slot(rank);
        slot.pid.store(std::process::id(), Ordering::Relaxed);
        slot.state.store(JOINED, Ordering::Release);
        let mut group = Group {
            rank,
            world_size,
            mesh: None,
            recorder: None,
            generation,
            phase: 0,
            seq: 0,
            watches: (0..world_size).map(|_| None).collect(),
            last_look: Instant::now(),
            // Spinning pays only where every rank has a core to itself.
            spins: if world_size <= cores { 2000 } else { 20 },
            failed: None,
            segment,
        };
        group.call(Op::Connect, 0, deadline, Group::meet)?;
        Ok(group)
    }

    /// Runs one collective: announces it, and on failure tells the peers and closes the group.
    pub(crate) fn call<T>(
        &mut self,
        op: Op,
        length: usize,
        deadline: Duration,
        run: impl FnOnce(&mut Group, &mut Call) -> Result<T>,
    ) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.seq += 1;
        let announcement = &self.segment.slot(self.rank).announcements[(self.seq % 2) as usize];
        announcement.seq.store(self.seq, Ordering::Relaxed);
        announcement.kind.store(op.code(), Ordering::Relaxed);
        announcement.length.store(length as u64, Ordering::Relaxed);
        if let Some(recorder) = &self.recorder {
            recorder.enter(self.seq, op.code(), length as u64);
        }
        self.segment.slot(self.rank).standing.enter(self.seq);
        let mut call = Call { op, seq: self.seq, start: Instant::now(), deadline, agreed: false };
        let result = run(self, &mut call);
        if let Some(recorder) = &self.recorder {
            recorder.leave(self.seq, result.is_ok());
        }
        self.segment.slot(self.rank).standing.leave(self.seq, call.start.elapsed());
        result.inspect_err(|error| {
            let culprit = match error {
                CollectiveError::PeerLost { rank, .. } => Some(*rank),
                CollectiveError::Deadline { missing_ranks, .. } => missing_ranks.first().copied(),
                _ => None,
            };
            match error {
                // Perhaps by another host, and this one does not know yet.
                CollectiveError::Aborted { by, culprit, reason } => {
                    self.segment.abort(*by, *culprit, reason)
                }
                _ => {
                    let by = Author::Rank(self.name(self.rank));
                    self.segment.abort(by, culprit, &error.to_string())
                }
            };
            self.leave_hosts();
            self.failed = Some(error.clone());
        })
    }

    /// Ends the connections to the other hosts; where this one was called to stop, they are told why.
    fn leave_hosts(&self) {
        if let Some(mesh) = &self.mesh {
            mesh.close(self.segment.abort_record().as_ref());
        }
    }

    /// The number among all ranks of one of this host's.
    pub(crate) fn name(&self, rank: usize) -> usize {
        self.segment.first_rank() + rank
    }

    /// Runs a part of a collective that goes to the other hosts; there must be some.
    pub(crate) fn across_hosts<T>(
        &mut self,
        call: &Call,
        run: impl FnOnce(&mut Mesh, &Wait<'_>) -> Result<T>,
    ) -> Result<Option<T>> {
        let Some(mut mesh) = self.mesh.take() else { return Ok(None) };
        let slot = self.segment.slot(self.rank);
        let wait = Wait {
            label: self.label(call),
            op: self.describe(call),
            start: call.start,
            deadline: call.deadline,
            watch: &|| {
                slot.across.store(monotonic_now(), Ordering::Relaxed);
                self.segment.check_aborted()
            },
            describe: &|theirs: Label| Op::describe(theirs.kind, theirs.length),
        };
        let result = run(&mut mesh, &wait);
        slot.across.store(0, Ordering::Relaxed);
        self.mesh = Some(mesh);
        result.map(Some)
    }

    /// What messages between hosts are marked with.
    pub(crate) fn label(&self, call: &Call) -> Label {
        let length = match call.op {
            Op::AllReduce(_) => self.announced_length(call, self.rank) as u64,
            _ => 0,
        };
        let (generation, kind) = (self.generation, call.op.code());
        Label { generation, seq: call.seq, kind, length }
    }

    /// Finishes this rank's phase and waits for the peers to finish theirs.
    pub(crate) fn meet(&mut self, call: &mut Call) -> Result<()> {
        self.meet_while(call, None)
    }

    /// As [`meet`](Group::meet); while waiting, `work` is done again and again.
    pub(crate) fn meet_while(&mut self, call: &mut Call, mut work: Option<Work<'_>>) -> Result<()> {
        self.phase += 1;
        let slot = self.segment.slot(self.rank);
        slot.progress.fetch_add(ABORT_BIT << 1, Ordering::SeqCst);
        // Either the sleeper sees the new count before it sleeps, or it is counted here.
        if slot.sleepers.load(Ordering::SeqCst) > 0 {
            futex::wake_all(&slot.progress);
        }
        for peer in 0..self.world_size {
            self.wait_for(peer, call, &mut work)?;
        }
        if !call.agreed {
            self.check_agreement(call)?;
            call.agreed = true;
        }
        Ok(())
    }

    /// Waits until `peer` has finished the phase that this rank has finished last.
    fn wait_for(&mut self, peer: usize, call: &Call, work: &mut Option<Work<'_>>) -> Result<()> {
        let segment = self.segment.clone();
        let slot = segment.slot(peer);
        for _ in 0..self.spins {
            if self.has_arrived(peer)? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let nap = if work.is_some() { WORK_INTERVAL } else { LIVENESS_INTERVAL };
        loop {
            slot.sleepers.fetch_add(1, Ordering::SeqCst);
            let seen = slot.progress.load(Ordering::SeqCst);
            let arrived = self.has_arrived(peer);
            let waited = call.start.elapsed();
            if let Ok(false) = arrived {
                let left = call.deadline.saturating_sub(waited);
                futex::wait(&slot.progress, seen, left.min(nap));
            }
            slot.sleepers.fetch_sub(1, Ordering::SeqCst);
            if arrived? || self.has_arrived(peer)? {
                return Ok(());
            }
            self.look_for_lost_peers(call)?;
            if waited >= call.deadline {
                self.name_who_keeps_us(call, waited)?;
            }
            if let Some(work) = work {
                work(self, call)?;
            }
        }
    }

    /// Whether `peer` has come as far as this rank; an abort is an error.
    fn has_arrived(&self, peer: usize) -> Result<bool> {
        let word = self.segment.slot(peer).progress.load(Ordering::SeqCst);
        if word & ABORT_BIT != 0 {
            let record = self.segment.await_abort_record();
            return Err(CollectiveError::Aborted {
                by: record.by,
                culprit: record.culprit,
                reason: record.reason,
            });
        }
        let own = (self.phase as u32) << 1;
        Ok(word.wrapping_sub(own) as i32 >= 0)
    }

    /// Ranks that have not come as far as this one; an abort is an error, since from then on the
    /// counts tell nothing.
    fn missing_ranks(&self) -> Result<Vec<usize>> {
        let mut missing = Vec::new();
        for peer in 0..self.world_size {
            if !self.has_arrived(peer)? {
                missing.push(peer);
            }
        }
        Ok(missing)
    }

    /// The deadline has passed: fails with the ranks that are missing. Those that wait for another host
    /// are not at fault; they know who is, and have a little longer to say so.
    fn name_who_keeps_us(&self, call: &Call, waited: Duration) -> Result<()> {
        let missing = self.missing_ranks()?;
        let now = monotonic_now();
        let waits_elsewhere = |rank: &usize| {
            let looked = self.segment.slot(*rank).across.load(Ordering::Relaxed);
            looked != 0 && now.saturating_sub(looked) < FRESH.as_nanos() as u64
        };
        let (waiting, stuck): (Vec<usize>, Vec<usize>) =
            missing.into_iter().partition(waits_elsewhere);
        if stuck.is_empty() && waited < call.deadline + 2 * FRESH {
            return Ok(());
        }
        let named = if stuck.is_empty() { waiting } else { stuck };
        let missing_ranks = named.into_iter().map(|rank| self.name(rank)).collect();
        let op = self.describe(call);
        Err(CollectiveError::Deadline { op, seq: call.seq, waited, missing_ranks })
    }

    /// Fails when a rank that is still missing will never arrive.
    fn look_for_lost_peers(&mut self, call: &Call) -> Result<()> {
        if self.last_look.elapsed() < LIVENESS_INTERVAL {
            return Ok(());
        }
        self.last_look = Instant::now();
        for peer in self.missing_ranks()? {
            let slot = self.segment.slot(peer);
            let how = match slot.state.load(Ordering::Acquire) {
                ABSENT => continue,
                LEFT => "it left the group",
                _ => {
                    let pid = slot.pid.load(Ordering::Relaxed);
                    if !self.watches[peer].get_or_insert_with(|| Watch::on(pid)).is_gone() {
                        continue;
                    }
                    "its process has ended"
                }
            };
            // It may have finished this phase before it went.
            if !self.has_arrived(peer)? {
                let op = self.describe(call);
                let rank = self.name(peer);
                return Err(CollectiveError::PeerLost { rank, op, seq: call.seq, how });
            }
        }
        Ok(())
    }

    /// Checks that all ranks have announced this collective.
    fn check_agreement(&self, call: &Call) -> Result<()> {
        let announced = |rank: usize| {
            let announcement = &self.segment.slot(rank).announcements[(call.seq % 2) as usize];
            let kind = announcement.kind.load(Ordering::Relaxed);
            // Only a sum needs equal lengths.
            let length = match kind {
                3 | 6 => announcement.length.load(Ordering::Relaxed),
                _ => 0,
            };
            (announcement.seq.load(Ordering::Relaxed), kind, length)
        };
        let ours = announced(self.rank);
        for peer in 0..self.world_size {
            let theirs = announced(peer);
            if theirs != ours {
                return Err(CollectiveError::Mismatch {
                    seq: call.seq,
                    rank: self.name(self.rank),
                    ours: self.describe(call),
                    peer: self.name(peer),
                    theirs: Op::describe(theirs.1, theirs.2),
                });
            }
        }
        Ok(())
    }

    /// Words for the collective under way.
    fn describe(&self, call: &Call) -> String {
        Op::describe(call.op.code(), self.announced_length(call, self.rank) as u64)
    }

    /// The length that `rank` has announced for the collective under way.
    pub(crate) fn announced_length(&self, call: &Call, rank: usize) -> usize {
        let announcement = &self.segment.slot(rank).announcements[(call.seq % 2) as usize];
        announcement.length.load(Ordering::Relaxed) as usize
    }

    /// The buffer that this rank writes in the phase it is in.
    pub(crate) fn writable_buffer(&self) -> usize {
        (self.phase % BUFFERS as u64) as usize
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.leave_hosts();
        let slot = self.segment.slot(self.rank);
        slot.state.store(LEFT, Ordering::Release);
        futex::wake_all(&slot.progress);
    }
}

/// Nanoseconds of the clock that all processes of a host share.
fn monotonic_now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one valid place to write.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
