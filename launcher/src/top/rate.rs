//! How fast the steps follow each other, from when their number was seen to grow.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Changes that are kept: the rate is that of the last ones.
const KEPT: usize = 20;

/// The last changes of a step count.
#[derive(Default)]
pub struct Rate {
    generation: u64,
    seen: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// Notes the step of a start at a moment.
    pub fn note(&mut self, now: Instant, generation: u64, step: u64) {
        let last = self.seen.back().map(|(_, step)| *step);
        if generation != self.generation || last.is_some_and(|last| step < last) {
            self.seen.clear();
            self.generation = generation;
        }
        if last == Some(step) && !self.seen.is_empty() {
            return;
        }
        if self.seen.len() == KEPT {
            self.seen.pop_front();
        }
        self.seen.push_back((now, step));
    }

    /// Steps a second. It falls when the next step is later than the last ones were.
    pub fn steps_per_second(&self, now: Instant) -> Option<f64> {
        // When the first step was seen says nothing of how long it took.
        let (first, last) = (self.seen.front()?, self.seen.back()?);
        let steps = last.1.checked_sub(first.1).filter(|steps| *steps > 0)? as f64;
        let took = last.0.duration_since(first.0).max(Duration::from_millis(1));
        let rate = steps / took.as_secs_f64();
        let quiet = now.duration_since(last.0).as_secs_f64();
        Some(if quiet * rate > 2.0 { (steps + 1.0) / (took.as_secs_f64() + quiet) } else { rate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_steps() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut rate = Rate::default();
        assert_eq!(rate.steps_per_second(at(0.0)), None);
        for half in 0..120 {
            // Two steps a second, then one every two seconds.
            let seconds = f64::from(half) / 2.0;
            let step = if seconds <= 10.0 { 2.0 * seconds } else { 20.0 + (seconds - 10.0) / 2.0 };
            rate.note(at(seconds), 1, step as u64);
            if half == 20 {
                let two = rate.steps_per_second(at(seconds)).unwrap();
                assert!((two - 2.0).abs() < 0.2, "{two}");
            }
        }
        let half = rate.steps_per_second(at(60.0)).unwrap();
        assert!((half - 0.5).abs() < 0.05, "{half}");
        // Nothing more comes: it falls.
        assert!(rate.steps_per_second(at(160.0)).unwrap() < 0.2);
        // Another start goes on from an earlier step.
        rate.note(at(170.0), 2, 30);
        assert_eq!(rate.steps_per_second(at(171.0)), None);
    }
}
