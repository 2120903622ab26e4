//! The handle through which a rank talks to the others.
//!
//! Every rank calls the same collectives in the same order; a rank that does not is told so. Calls
//! run one after the other: those started with [`Comm::all_reduce_start`] on a thread of their own,
//! the others on the caller's thread once the started ones are done.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::env::{DEFAULT_TIMEOUT, Env};
use crate::error::{CollectiveError, Result};
use crate::group::Group;
use crate::mesh::{self, Meeting, Mesh, Seat};
use crate::mpi::World;
use crate::recorder::Recorder;
use crate::segment::{Author, Segment};
use crate::standing::Phase;
use crate::sums::Order;
use crate::witness::Witness;

/// This rank's membership in the group of all ranks of a run. Dropping it leaves the group; peers
/// that still wait for this rank then fail.
pub struct Comm {
    rank: usize,
    world_size: usize,
    /// Deadline of a collective, in nanoseconds.
    deadline: AtomicU64,
    link: Link,
    /// Where a launcher reads what this rank does, with its number there.
    watched: Option<(Arc<Segment>, usize)>,
}

/// How this rank reaches the others.
enum Link {
    /// There are no others.
    Alone,
    /// Through shared memory to those of this host, and from there to the other hosts.
    Shared(Shared),
    /// Over MPI, which has started this process.
    Mpi(Mutex<World>),
}

/// A link through shared memory, with the thread that runs started collectives.
struct Shared {
    segment: Arc<Segment>,
    lane: Arc<Lane>,
    /// Taken while a call is queued or run, so that the order of calls is the order of collectives.
    queue: Mutex<Option<Sender<Job>>>,
    thread: Option<JoinHandle<()>>,
}

/// What caller and communication thread share.
struct Lane {
    group: Mutex<Group>,
    /// Started collectives that have not ended.
    outstanding: Mutex<usize>,
    idle: Condvar,
}

/// One started all-reduce.
struct Job {
    values: Vec<f32>,
    deadline: Duration,
    answer: Sender<Result<Vec<f32>>>,
}

/// An all-reduce under way.
#[derive(Debug)]
#[must_use = "the sum is lost, and a failure unnoticed, unless it is waited for"]
pub struct Pending(State);

#[derive(Debug)]
enum State {
    Done(Result<Vec<f32>>),
    Running { rank: usize, answer: Receiver<Result<Vec<f32>>> },
}

impl Pending {
    /// Waits for the sum. The memory is the one that was handed in. Ends at the latest when the
    /// deadlines of this collective and of those started before it have passed.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {
            State::Done(result) => result,
            State::Running { rank, answer } => answer.recv().unwrap_or_else(|_| {
                let why = "it ended before it answered".to_owned();
                Err(CollectiveError::Thread { rank, why })
            }),
        }
    }
}

impl Comm {
    /// A group of one: every collective returns at once.
    pub fn single() -> Comm {
        Comm::new(0, 1, DEFAULT_TIMEOUT, Link::Alone)
    }

    /// Joins the group that the environment describes, and waits until all ranks have joined.
    pub fn connect(env: &Env) -> Result<Comm> {
        if env.world_size == 1 {
            let mut alone = Comm::new(0, 1, env.collective_timeout, Link::Alone);
            if let Some(fd) = env.segment_fd {
                alone.watched = Some((Arc::new(Segment::attach(fd, 1, env.generation)?), 0));
            }
            return Ok(alone);
        }
        if env.by_mpi {
            let world = World::join(env.rank, env.world_size)?;
            let link = Link::Mpi(Mutex::new(world));
            return Ok(Comm::new(env.rank, env.world_size, env.collective_timeout, link));
        }
        let segment = match env.segment_fd {
            Some(fd) => Segment::attach(fd, env.local_world_size, env.generation)?,
            // A rank that has its host to itself needs no launcher to share memory with.
            None if env.local_world_size == 1 => Segment::create_from(env.rank, 1, env.generation)?,
            None => {
                return Err(CollectiveError::Unsupported {
                    what: format!(
                        "the launcher has passed no shared memory to the ranks, got: {} ranks",
                        env.local_world_size
                    ),
                    hint: "start ranks with `lorarun --num_processes N`",
                });
            }
        };
        let segment = Arc::new(segment);
        let mut group = Group::join(segment.clone(), env.local_rank, env.collective_timeout)?;
        if let Some(folder) = &env.flight_dir {
            let recorder = Recorder::create(folder, env.rank, env.world_size, env.generation);
            group.recorder = Some(recorder.map_err(|error| CollectiveError::Recorder {
                folder: folder.display().to_string(),
                why: error.to_string(),
            })?);
        }
        if env.local_world_size != env.world_size {
            group.mesh = Some(Comm::reach_hosts(env, &segment)?);
        }
        Comm::over(segment, group, env.collective_timeout)
    }

    /// Connects this rank to those of its number on the other hosts.
    fn reach_hosts(env: &Env, segment: &Arc<Segment>) -> Result<Mesh> {
        let first_of_host = env.rank.checked_sub(env.local_rank);
        let even = env.world_size.is_multiple_of(env.local_world_size)
            && first_of_host.is_some_and(|first| first.is_multiple_of(env.local_world_size));
        if !even {
            return Err(CollectiveError::Unsupported {
                what: format!(
                    "hosts should have the same number of ranks, in order, got: rank {} of {} as \
                     rank {} of {} on its host",
                    env.rank, env.world_size, env.local_rank, env.local_world_size
                ),
                hint: "start the same number of processes on every host",
            });
        }
        let seat = Seat {
            rank: env.rank,
            world_size: env.world_size,
            ranks_per_host: env.local_world_size,
            generation: env.generation,
            token: env.token.clone(),
        };
        let meeting = Meeting {
            address: (&env.master_addr, env.master_port),
            listener: env.meeting_listener(),
            deadline: env.collective_timeout,
            watch: &|| segment.check_aborted(),
        };
        mesh::meet(&seat, meeting).inspect_err(|error| {
            // The other ranks of this host wait in vain then.
            segment.abort(Author::Rank(env.rank), None, &error.to_string());
        })
    }

    /// A group whose ranks are threads of this process, for tests and tools: one handle per rank.
    pub fn local_group(world_size: usize) -> Result<Vec<Comm>> {
        if world_size == 1 {
            return Ok(vec![Comm::single()]);
        }
        let segment = Arc::new(Segment::create(world_size, 0)?);
        // Joining waits for all ranks, so each needs a thread of its own.
        std::thread::scope(|scope| {
            let joining: Vec<_> = (0..world_size)
                .map(|rank| {
                    let segment = segment.clone();
                    scope.spawn(move || {
                        let group = Group::join(segment.clone(), rank, DEFAULT_TIMEOUT)?;
                        Comm::over(segment, group, DEFAULT_TIMEOUT)
                    })
                })
                .collect();
            joining
                .into_iter()
                .enumerate()
                .map(|(rank, thread)| {
                    thread.join().unwrap_or_else(|_| {
                        let why = "it panicked while joining".to_owned();
                        Err(CollectiveError::Thread { rank, why })
                    })
                })
                .collect()
        })
    }

    fn over(segment: Arc<Segment>, group: Group, deadline: Duration) -> Result<Comm> {
        let (rank, world_size) = (group.name(group.rank), group.ranks_of_all_hosts());
        let watched = Some((segment.clone(), group.rank));
        let lane = Arc::new(Lane {
            group: Mutex::new(group),
            outstanding: Mutex::new(0),
            idle: Condvar::new(),
        });
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("collectives-{rank}"))
            .spawn({
                let lane = lane.clone();
                move || lane.serve(&receiver)
            })
            .map_err(|error| CollectiveError::Thread { rank, why: error.to_string() })?;
        let queue = Mutex::new(Some(sender));
        let shared = Shared { segment, lane, queue, thread: Some(thread) };
        let mut comm = Comm::new(rank, world_size, deadline, Link::Shared(shared));
        comm.watched = watched;
        Ok(comm)
    }

    fn new(rank: usize, world_size: usize, deadline: Duration, link: Link) -> Comm {
        let deadline = AtomicU64::new(nanoseconds(deadline));
        Comm { rank, world_size, deadline, link, watched: None }
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Deadline of the collectives called from now on; returns the one before. A phase in which one
    /// rank works long while the others wait needs a longer one.
    pub fn set_deadline(&self, deadline: Duration) -> Duration {
        Duration::from_nanos(self.deadline.swap(nanoseconds(deadline), Ordering::Relaxed))
    }

    /// Deadline of the collectives called from now on.
    pub fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline.load(Ordering::Relaxed))
    }

    /// Starts the sum of `values` over all ranks and returns at once. Started sums run in the order
    /// of their starts. Every rank gets identical bits: rank 0 + rank 1 + ..., in `f32`.
    pub fn all_reduce_start(&self, values: Vec<f32>) -> Pending {
        let shared = match &self.link {
            Link::Alone => return Pending(State::Done(Ok(values))),
            Link::Shared(shared) => shared,
            Link::Mpi(_) => {
                let mut values = values;
                return Pending(State::Done(self.all_reduce(&mut values).map(|()| values)));
            }
        };
        let (answer, receiver) = channel();
        let queue = locked(&shared.queue);
        *locked(&shared.lane.outstanding) += 1;
        let job = Job { values, deadline: self.deadline(), answer };
        let sent = queue.as_ref().is_some_and(|sender| sender.send(job).is_ok());
        if !sent {
            // The thread is gone; `wait` says so, since the answer's sender was dropped.
            *locked(&shared.lane.outstanding) -= 1;
        }
        Pending(State::Running { rank: self.rank, answer: receiver })
    }

    /// Replaces `values` with the sum over all ranks. Every rank gets identical bits.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        match &self.link {
            Link::Alone => Ok(()),
            Link::Shared(shared) => {
                shared.run(|group| group.all_reduce(values, Order::Ranks, self.deadline()))
            }
            Link::Mpi(world) => locked(world).all_reduce(values, Order::Ranks, self.deadline()),
        }
    }

    /// Replaces `values` with the sum over all ranks, added in pairs: ((0 + 1) + (2 + 3)) +
    /// ..., as halving the ranks gives. Every rank gets identical bits.
    pub fn all_reduce_in_pairs(&self, values: &mut [f32]) -> Result<()> {
        match &self.link {
            Link::Alone => Ok(()),
            Link::Shared(shared) => {
                shared.run(|group| group.all_reduce(values, Order::Pairs, self.deadline()))
            }
            Link::Mpi(world) => locked(world).all_reduce(values, Order::Pairs, self.deadline()),
        }
    }

    /// Waits until every rank has called it.
    pub fn barrier(&self) -> Result<()> {
        match &self.link {
            Link::Alone => Ok(()),
            Link::Shared(shared) => shared.run(|group| group.barrier(self.deadline())),
            Link::Mpi(world) => locked(world).barrier(self.deadline()),
        }
    }

    /// Gives every rank the bytes of `root`. The other ranks' bytes are dropped: pass an empty one.
    pub fn broadcast(&self, root: usize, bytes: Vec<u8>) -> Result<Vec<u8>> {
        match &self.link {
            Link::Alone if root == 0 => Ok(bytes),
            Link::Alone => Err(CollectiveError::NoSuchRoot { root, world_size: 1 }),
            Link::Shared(shared) => {
                shared.run(|group| group.broadcast(root, bytes, self.deadline()))
            }
            Link::Mpi(world) => locked(world).broadcast(root, bytes, self.deadline()),
        }
    }

    /// The bytes of all ranks, by rank. Lengths may differ.
    pub fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match &self.link {
            Link::Alone => Ok(vec![bytes.to_vec()]),
            Link::Shared(shared) => shared.run(|group| group.all_gather(bytes, self.deadline())),
            Link::Mpi(world) => locked(world).all_gather(bytes, self.deadline()),
        }
    }

    /// Makes every rank's present or next collective fail, within milliseconds, with this reason. Over
    /// MPI it is the end of this process that ends the others.
    pub fn abort(&self, reason: &str) {
        if let Link::Shared(shared) = &self.link {
            shared.segment.abort(Author::Rank(self.rank), Some(self.rank), reason);
        }
    }

    /// The abort that some rank or the launcher has called, as the error that the next collective
    /// would return. For work that takes long without a collective.
    pub fn check_aborted(&self) -> Result<()> {
        self.watched.as_ref().map_or(Ok(()), |(segment, _)| segment.check_aborted())
    }

    /// Tells who watches this rank that it begins something else.
    pub fn enter_phase(&self, phase: Phase) {
        if let Some((segment, rank)) = &self.watched {
            segment.slot(*rank).standing.enter_phase(phase);
        }
    }

    /// Tells who watches this rank that `step` of `steps` is done, with its loss and the images a
    /// second of all ranks.
    pub fn finish_step(&self, (step, steps): (usize, usize), loss: f32, images_per_second: f32) {
        if let Some((segment, rank)) = &self.watched {
            let count = (step as u64, steps as u64);
            segment.slot(*rank).standing.finish_step(count, loss, images_per_second);
        }
    }

    /// A sign of life in work that takes long without steps and collectives.
    pub fn live(&self) {
        if let Some((segment, rank)) = &self.watched {
            segment.slot(*rank).standing.live();
        }
    }

    /// A look at the other ranks for a thread that must not call collectives.
    pub(crate) fn witness(&self) -> Witness {
        let segment = match &self.link {
            Link::Alone | Link::Mpi(_) => None,
            Link::Shared(shared) => Some(shared.segment.clone()),
        };
        let first = segment.as_ref().map_or(0, |segment| segment.first_rank());
        Witness::new(self.rank - first, segment)
    }
}

impl Shared {
    /// Runs a collective on this thread, after all started ones.
    fn run<T>(&self, collective: impl FnOnce(&mut Group) -> Result<T>) -> Result<T> {
        let _order = locked(&self.queue);
        let mut outstanding = locked(&self.lane.outstanding);
        while *outstanding > 0 {
            outstanding = self.lane.idle.wait(outstanding).unwrap_or_else(PoisonError::into_inner);
        }
        drop(outstanding);
        collective(&mut locked(&self.lane.group))
    }
}

impl Lane {
    /// The communication thread: runs started collectives in order until the handle is dropped.
    fn serve(&self, jobs: &Receiver<Job>) {
        while let Ok(Job { mut values, deadline, answer }) = jobs.recv() {
            let result = locked(&self.group).all_reduce(&mut values, Order::Ranks, deadline);
            *locked(&self.outstanding) -= 1;
            self.idle.notify_all();
            // A dropped `Pending` wants no answer.
            drop(answer.send(result.map(|()| values)));
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("it panicked");
        }
        if let Link::Shared(shared) = &mut self.link {
            *locked(&shared.queue) = None;
            if let Some(thread) = shared.thread.take() {
                // It cannot have panicked: its loop has no panicking call; nothing to report.
                drop(thread.join());
            }
        }
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Comm(rank {} of {})", self.rank, self.world_size)
    }
}

/// Locks even after a panic elsewhere: the data are a queue, a count and a group that marks itself
/// as failed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
