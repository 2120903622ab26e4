//! Work done ahead by background threads and handed out in order.
//!
//! Threads take job numbers one after the other, at most `ahead` beyond what has been handed out, so
//! memory is bounded. A panic in a job becomes the answer of that job. Dropping stops the threads
//! after the job each is at.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

struct State<T> {
    /// The next job that no thread has taken.
    next_job: u64,
    /// How many results were handed out.
    handed_out: u64,
    /// Results that wait for their turn; an error is the message of a panic.
    done: BTreeMap<u64, Result<T, String>>,
    stopped: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    jobs: u64,
    ahead: u64,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while it holds the lock, and the state is sound at every moment anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Results of jobs `0..jobs` in order, computed ahead.
pub(crate) struct Ordered<T> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Ordered<T> {
    /// Starts `workers` threads (at least one) that compute `work(job)` for all jobs.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(crate) fn start(
        jobs: u64,
        workers: usize,
        ahead: usize,
        work: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let state = State { next_job: 0, handed_out: 0, done: BTreeMap::new(), stopped: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            jobs,
            ahead: ahead.max(1) as u64,
        });
        let work = Arc::new(work);
        let mut ordered = Self { shared, threads: Vec::new() };
        for number in 0..workers.max(1) {
            let (shared, work) = (ordered.shared.clone(), work.clone());
            let thread = std::thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(move || run(&shared, &*work))?;
            ordered.threads.push(thread);
        }
        Ok(ordered)
    }

    /// The next result, waiting for it; `None` after the last job. An error is a panic's message.
    pub(crate) fn next(&mut self) -> Option<Result<T, String>> {
        let mut state = self.shared.lock();
        let job = state.handed_out;
        if job >= self.shared.jobs {
            return None;
        }
        loop {
            if let Some(result) = state.done.remove(&job) {
                state.handed_out += 1;
                drop(state);
                self.shared.changed.notify_all();
                return Some(result);
            }
            state = self.shared.wait(state);
        }
    }
}

fn run<T>(shared: &Shared<T>, work: &impl Fn(u64) -> T) {
    loop {
        let mut state = shared.lock();
        while !state.stopped
            && state.next_job < shared.jobs
            && state.next_job >= state.handed_out + shared.ahead
        {
            state = shared.wait(state);
        }
        if state.stopped || state.next_job >= shared.jobs {
            return;
        }
        let job = state.next_job;
        state.next_job += 1;
        drop(state);
        let result = catch_unwind(AssertUnwindSafe(|| work(job))).map_err(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            text.or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "it panicked without a message".into())
        });
        shared.lock().done.insert(job, result);
        shared.changed.notify_all();
    }
}

impl<T> Drop for Ordered<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread cannot have panicked: jobs are caught.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn results_come_in_order_and_bounded() {
        let started = Arc::new(AtomicU64::new(0));
        let counter = started.clone();
        let mut ordered = Ordered::start(50, 4, 6, move |job| {
            counter.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(if job % 7 == 0 { 900 } else { 50 }));
            job * job
        })
        .unwrap();
        for job in 0..50 {
            assert!(started.load(Ordering::SeqCst) <= job + 6);
            assert_eq!(ordered.next(), Some(Ok(job * job)));
        }
        assert_eq!(ordered.next(), None);
    }

    #[test]
    fn a_panic_is_the_answer_of_its_job_alone() {
        let mut ordered = Ordered::start(3, 2, 2, |job| {
            assert!(job != 1, "job {job} is bad");
            job
        })
        .unwrap();
        assert_eq!(ordered.next(), Some(Ok(0)));
        assert!(ordered.next().unwrap().unwrap_err().contains("job 1 is bad"));
        assert_eq!(ordered.next(), Some(Ok(2)));
    }

    #[test]
    fn dropping_early_ends_the_threads() {
        let alive = Arc::new(());
        let held = alive.clone();
        let mut ordered = Ordered::start(u64::MAX, 3, 4, move |job| {
            let _ = &held;
            job
        })
        .unwrap();
        assert_eq!(ordered.next(), Some(Ok(0)));
        drop(ordered);
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
