//! Which of a library's algorithms to use for a shape: measured once, remembered on disk.
//!
//! Libraries guess well, not always best. On the first use of a shape outside a capture the first
//! few guesses are timed on the card, and another one than the first is taken only if it is clearly
//! faster. The choice is kept beside the compiled kernels for this card and these libraries, so that
//! later runs use the same algorithm and give the same bits; `LORARUN_AUTOTUNE=0` always takes the
//! library's first guess. All candidates sum in f32 and in a fixed order.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::context::{Context, Event, Queue};
use super::kernels::{cache_folder, read, write};
use super::libraries::{Library, find};
use crate::Result;
use crate::cuda::driver::CardFacts;

/// Set to 0, nothing is timed and nothing remembered is used.
pub const AUTOTUNE_VARIABLE: &str = "LORARUN_AUTOTUNE";

/// How many of a library's guesses are timed.
pub(super) const CANDIDATES: usize = 3;
/// Runs of each that are timed; one more before warms up.
const RUNS: usize = 3;
/// A later guess must take less than this share of the first one's time.
const CLEARLY: f32 = 0.95;

/// What a library's call on the compute stream needs.
pub(super) struct Scratch<'a> {
    pub(super) context: &'a Context,
    pub(super) stream: Queue,
    /// [`crate::cuda::driver::WORKSPACE`] bytes.
    pub(super) workspace: u64,
    pub(super) tuning: &'a Tuning,
}

/// The choices for one card.
pub(super) struct Tuning {
    on: bool,
    file: Option<PathBuf>,
    chosen: Mutex<BTreeMap<String, usize>>,
    clock: Mutex<(Event, Event)>,
}

impl Tuning {
    pub(super) fn open(context: &Context, facts: &CardFacts) -> Result<Self> {
        let on = std::env::var(AUTOTUNE_VARIABLE).map_or(true, |value| value != "0");
        let mut identity = format!("{} {:?}", facts.name, facts.capability);
        for library in [Library::CublasLt, Library::Cudnn] {
            let version = find(library).ok().and_then(|found| found.version.clone());
            identity.push_str(&format!(" {}", version.unwrap_or_default()));
        }
        let hex: String =
            Sha256::digest(&identity).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let file = cache_folder().map(|folder| folder.join(format!("choices-{hex}")));
        let known = file.as_deref().filter(|_| on).and_then(read);
        let chosen = known.and_then(|bytes| String::from_utf8(bytes).ok());
        let chosen = Mutex::new(parse(chosen.as_deref().unwrap_or("")));
        let clock = Mutex::new((context.event(true)?, context.event(true)?));
        Ok(Self { on, file, chosen, clock })
    }

    /// The number of the algorithm to use for `shape`, of `count` guesses that `run` starts. It gets
    /// the address of `spare` bytes to write to, where the true place must not be written twice
    /// (`None` if `spare` is 0), and what it leaves behind is not used. `None` where nothing can be
    /// measured now, within a capture or for want of memory: take the first one, ask again.
    pub(super) fn choose(
        &self,
        (context, stream): (&Context, Queue),
        shape: &str,
        count: usize,
        spare: usize,
        run: &dyn Fn(usize, Option<u64>) -> Result<()>,
    ) -> Result<Option<usize>> {
        if !self.on || count < 2 {
            return Ok(Some(0));
        }
        let known = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).get(shape).copied();
        if let Some(known) = known.filter(|known| *known < count) {
            return Ok(Some(known));
        }
        if context.is_capturing(stream)? {
            return Ok(None);
        }
        let place = match spare {
            0 => None,
            _ => match context.allocate(spare) {
                Ok(address) => Some(address),
                Err(_) => return Ok(None),
            },
        };
        let times = (0..count.min(CANDIDATES))
            .map(|candidate| self.time(context, stream, || run(candidate, place)))
            .collect::<Result<Vec<_>>>();
        if let Some(address) = place {
            context.synchronize(stream)?;
            context.free(address)?;
        }
        let best = fastest(&times?);
        self.remember(shape, best);
        Ok(Some(best))
    }

    /// Milliseconds of the runs; infinite if the library refuses to start it.
    fn time(&self, context: &Context, stream: Queue, run: impl Fn() -> Result<()>) -> Result<f32> {
        let (start, end) = *self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        if run().is_err() {
            return Ok(f32::INFINITY);
        }
        context.record(start, stream)?;
        for _ in 0..RUNS {
            run()?;
        }
        context.record(end, stream)?;
        context.wait(end)?;
        let mut milliseconds = 0.;
        let api = context.bind()?;
        // SAFETY: the number goes where it is told; both events were recorded and are done.
        let status = unsafe { (api.cuEventElapsedTime)(&raw mut milliseconds, start.0, end.0) };
        context.check("measuring an algorithm", status)?;
        Ok(milliseconds)
    }

    fn remember(&self, shape: &str, candidate: usize) {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        // Another process may have measured others meanwhile.
        if let Some(bytes) = self.file.as_deref().and_then(read)
            && let Ok(text) = String::from_utf8(bytes)
        {
            for (shape, candidate) in parse(&text) {
                chosen.entry(shape).or_insert(candidate);
            }
        }
        chosen.insert(shape.to_owned(), candidate);
        if let Some(file) = &self.file {
            let text: String =
                chosen.iter().map(|(shape, candidate)| format!("{candidate} {shape}\n")).collect();
            // Whoever cannot keep it measures again.
            drop(write(file, text.as_bytes()));
        }
    }
}

/// Lines of a number and a shape; others are left out.
fn parse(text: &str) -> BTreeMap<String, usize> {
    let line = |line: &str| {
        let (candidate, shape) = line.split_once(' ')?;
        Some((shape.to_owned(), candidate.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// The first, unless another one is clearly faster.
fn fastest(times: &[f32]) -> usize {
    let Some(first) = times.first() else { return 0 };
    let best = times.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
    best.filter(|(_, time)| **time < first * CLEARLY).map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clearly_faster_guess_replaces_the_first() {
        assert_eq!(fastest(&[1., 0.97, 2.]), 0);
        assert_eq!(fastest(&[1., 0.9, 0.8]), 2);
        assert_eq!(fastest(&[f32::INFINITY, 0.9]), 1);
        assert_eq!(fastest(&[f32::INFINITY, f32::INFINITY]), 0);
        assert_eq!(fastest(&[]), 0);
    }

    #[test]
    fn lines_that_mean_nothing_are_left_out() {
        let text = "1 matmul 3x4\nx matmul 5\n\n2 conv a b\n";
        let want = [("conv a b".to_owned(), 2), ("matmul 3x4".to_owned(), 1)];
        assert_eq!(parse(text), BTreeMap::from(want));
    }
}
