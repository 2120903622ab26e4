//! A communicator between the thread that uses it and the one that watches it.
//!
//! Constraints: no call into NCCL waits for another rank while the lock is held, so that the watchdog
//! can always come in; the handle is taken away under the lock before it is freed; the first failure
//! is the one that every later call returns. Only the watchdog aborts, since that may take long: where
//! a captured graph still holds the communicator, NCCL's abort ends what runs on the card but does not
//! return.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::library::{Api, Code, Handle};
use crate::error::{CollectiveError, Result};
use crate::witness::Witness;

/// How often the watchdog looks while a wait is under way.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A rank that has gone may have gone right after the same sums; this long they may still take here.
const LOST_GRACE: Duration = Duration::from_secs(1);
/// Pause between two questions about a call that NCCL has not finished; grows up to the second.
const POLL: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));

/// What the watchdog watches for.
#[derive(Clone, Copy, Debug)]
struct Armed {
    number: u64,
    since: Instant,
    deadline: Duration,
    lost_since: Option<Instant>,
}

struct State {
    /// Gone once the communicator is being freed.
    handle: Option<Handle>,
    failed: Option<CollectiveError>,
    armed: Option<Armed>,
    /// Nobody will use the communicator again.
    ended: bool,
    /// The watchdog has left.
    gone: bool,
}

/// See the head of this file.
pub(super) struct Lifeline {
    pub(super) api: Arc<dyn Api>,
    pub(super) rank: usize,
    witness: Witness,
    state: Mutex<State>,
    changed: Condvar,
}

impl Lifeline {
    pub(super) fn new(api: Arc<dyn Api>, rank: usize, witness: Witness) -> Lifeline {
        let state = State { handle: None, failed: None, armed: None, ended: false, gone: false };
        Lifeline { api, rank, witness, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // After a panic elsewhere the state is still what it says: each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, op: &str, code: Code) -> CollectiveError {
        self.error_of(op, self.api.describe(code))
    }

    fn error_of(&self, op: &str, why: String) -> CollectiveError {
        CollectiveError::Nccl { rank: self.rank, op: op.to_owned(), why }
    }

    /// Notes the first failure and wakes the watchdog, which aborts. Gives the failure that counts.
    fn fail(&self, state: &mut State, error: CollectiveError) -> CollectiveError {
        let first = state.failed.get_or_insert(error).clone();
        self.changed.notify_all();
        first
    }

    /// Starts `call` and waits until NCCL has done what it does on the host, at most `limit`.
    pub(super) fn run(
        &self,
        op: &str,
        limit: Duration,
        call: impl FnOnce(&mut Option<Handle>) -> Code,
    ) -> Result<()> {
        let start = Instant::now();
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let mut code = call(&mut state.handle);
        let mut pause = POLL.0;
        let mut looked = start;
        while code == Code::IN_PROGRESS {
            drop(state);
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL.1);
            state = self.state();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let Some(handle) = state.handle else { break };
            code = self.api.async_error(handle);
            if code != Code::IN_PROGRESS || looked.elapsed() < LOOK_INTERVAL {
                continue;
            }
            looked = Instant::now();
            let waited = start.elapsed();
            let trouble = self.witness.check_aborted().err().or_else(|| {
                let why = || format!("it is not done after {waited:.1?}");
                (waited >= limit).then(|| self.error_of(op, why()))
            });
            if let Some(error) = trouble {
                return Err(self.fail(&mut state, error));
            }
        }
        match code {
            Code::SUCCESS => Ok(()),
            code => {
                let error = self.explain(op, self.witness.waits(), code);
                Err(self.fail(&mut state, error))
            }
        }
    }

    /// What NCCL's answer means: a rank that is gone shows as an error of the network, too.
    fn explain(&self, op: &str, seq: u64, code: Code) -> CollectiveError {
        let lost = || {
            let (rank, how) = self.witness.lost_peer()?;
            Some(CollectiveError::PeerLost { rank, op: op.to_owned(), seq, how })
        };
        let known = self.witness.check_aborted().err().or_else(lost);
        known.unwrap_or_else(|| self.error(op, code))
    }

    /// Fails all that comes, for a reason that is not NCCL's.
    pub(super) fn give_up(&self, op: &str, why: String) -> CollectiveError {
        let error = self.error_of(op, why);
        self.fail(&mut self.state(), error)
    }

    pub(super) fn arm(&self, deadline: Duration) {
        let number = self.witness.begin_wait();
        let since = Instant::now();
        self.state().armed = Some(Armed { number, since, deadline, lost_since: None });
        self.changed.notify_all();
    }

    pub(super) fn disarm(&self) -> Result<()> {
        self.state().armed = None;
        self.check()
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.state().failed {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    /// The watchdog's thread: looks while armed, and after a failure aborts and leaves.
    pub(super) fn watch(&self) {
        let mut state = self.state();
        loop {
            if let Some(error) = &state.failed {
                self.tell_peers(error);
                let handle = state.handle.take();
                drop(state);
                if let Some(handle) = handle {
                    // Its answer changes nothing: the failure is known.
                    self.api.abort(handle);
                }
                state = self.state();
                break;
            }
            if state.ended {
                break;
            }
            let wait = match state.armed {
                Some(_) => LOOK_INTERVAL,
                None => Duration::from_secs(3600),
            };
            let woken = self.changed.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
            if let Some(error) = self.look(&mut state) {
                self.fail(&mut state, error);
            }
        }
        state.gone = true;
        drop(state);
        self.changed.notify_all();
    }

    /// What is wrong with the wait that is under way.
    fn look(&self, state: &mut State) -> Option<CollectiveError> {
        let (handle, armed) = (state.handle?, state.armed.as_mut()?);
        let op = "NCCL all-reduce";
        let code = self.api.async_error(handle);
        if code != Code::SUCCESS && code != Code::IN_PROGRESS {
            return Some(self.explain(op, armed.number, code));
        }
        if let Err(error) = self.witness.check_aborted() {
            return Some(error);
        }
        if let Some((rank, how)) = self.witness.lost_peer() {
            let lost_since = armed.lost_since.get_or_insert_with(Instant::now);
            if lost_since.elapsed() >= LOST_GRACE {
                let (op, seq) = (op.to_owned(), armed.number);
                return Some(CollectiveError::PeerLost { rank, op, seq, how });
            }
        }
        let waited = armed.since.elapsed();
        (waited >= armed.deadline).then(|| CollectiveError::Deadline {
            op: op.to_owned(),
            seq: armed.number,
            waited,
            missing_ranks: self.witness.behind(armed.number),
        })
    }

    fn tell_peers(&self, error: &CollectiveError) {
        let culprit = match error {
            CollectiveError::Aborted { .. } => return,
            CollectiveError::PeerLost { rank, .. } => Some(*rank),
            CollectiveError::Deadline { missing_ranks, .. } => missing_ranks.first().copied(),
            // An error that NCCL sees here may be another rank's; who ends first tells.
            _ => None,
        };
        self.witness.abort(culprit, &error.to_string());
    }

    /// Ends the communicator in good order, or leaves it to the watchdog, and waits for that one at
    /// most `limit`; `false` if it is still there. Peers are not told: what they wait for from this
    /// rank is done, or they are told by who failed.
    pub(super) fn end(&self, limit: Duration) -> bool {
        let mut state = self.state();
        if state.armed.is_some() && state.failed.is_none() {
            // What runs on the card will not be waited for.
            let error = self.error_of("NCCL all-reduce", "the wait for it was given up".to_owned());
            self.fail(&mut state, error);
        }
        let handle = if state.failed.is_none() { state.handle.take() } else { None };
        state.ended = true;
        drop(state);
        self.changed.notify_all();
        if let Some(handle) = handle {
            let start = Instant::now();
            let mut code = self.api.finalize(handle);
            while code == Code::IN_PROGRESS && start.elapsed() < limit {
                std::thread::sleep(POLL.1);
                code = self.api.async_error(handle);
            }
            match code {
                Code::SUCCESS => _ = self.api.destroy(handle),
                // A graph still holds it: destroying it would wait for ever.
                Code::IN_PROGRESS => (),
                _ => _ = self.api.abort(handle),
            }
        }
        let waited = self.changed.wait_timeout_while(self.state(), limit, |state| !state.gone);
        waited.unwrap_or_else(PoisonError::into_inner).0.gone
    }
}
