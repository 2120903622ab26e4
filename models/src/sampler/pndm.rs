//! PNDM (Liu et al., arXiv:2202.09778): four evaluations for each of the first three steps
//! (Runge-Kutta), then one per step from the last four (linear multistep).
//!
//! As diffusers does it with `skip_prk_steps` off, which is what sd-scripts leaves it at: the middle
//! of a Runge-Kutta step lies half a distance above its end, and combined predictions of velocity
//! are turned into noise at the start of the step. Runs of less than four steps, which diffusers
//! does not offer, and runs that start in the middle make all but their last step this way.

use super::evaluation::Evaluation;
use super::level::{Level, blend};
use super::options::Prediction;
use super::schedule::{Grid, Schedule};

/// The share of each of the four predictions in a Runge-Kutta step.
const SHARES: [f64; 4] = [1. / 6., 1. / 3., 1. / 3., 1. / 6.];

#[derive(Clone, Debug)]
pub(super) struct Pndm {
    /// From where to where each evaluation leads.
    moves: Vec<(Level, Level)>,
    /// How many evaluations are of Runge-Kutta steps.
    runge_kutta: usize,
    /// Latents at the start of the Runge-Kutta step.
    start: Vec<f32>,
    /// What its predictions add up to so far.
    sum: Vec<f32>,
    /// Predictions at the starts of the last steps, newest last.
    predictions: Vec<Vec<f32>>,
}

impl Pndm {
    pub(super) fn new(grid: &Grid) -> (Schedule, Self) {
        let end = grid.levels.last().copied().unwrap_or(Level { signal: 1., noise: 0. });
        let level = |t: i64| grid.table.level(t, end);
        let times: Vec<i64> = grid.timesteps.iter().map(|t| *t as i64).collect();
        let half = grid.distance() / 2;
        let quartets = times.len().saturating_sub(1).min(3);
        let (mut timesteps, mut moves) = (Vec::new(), Vec::new());
        for ends in times.windows(2).take(quartets) {
            let (from, to) = (ends[0], ends[1]);
            timesteps.extend([from, to + half, to + half, to]);
            moves.extend([from - half, to + half, to, to].map(|t| (level(from), level(t))));
        }
        for time in &times[quartets..] {
            timesteps.push(*time);
            moves.push((level(*time), level(time - grid.distance())));
        }
        let mut levels: Vec<Level> = moves.first().map(|(from, _)| *from).into_iter().collect();
        levels.extend(moves.iter().map(|(_, to)| *to));
        let schedule = Schedule {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            levels,
            steps: times.len(),
        };
        let state = Self {
            moves,
            runge_kutta: quartets * 4,
            start: Vec::new(),
            sum: Vec::new(),
            predictions: Vec::new(),
        };
        (schedule, state)
    }

    pub(super) fn step(&mut self, at: &Evaluation<'_>) -> Vec<f32> {
        let (from, to) = self.moves[at.index];
        if at.index >= self.runge_kutta {
            self.remember(at.output);
            let combined = self.multistep();
            return transfer(from, to, at.prediction, at.latents, &combined);
        }
        let part = at.index % 4;
        if part == 0 {
            self.remember(at.output);
            self.start = at.latents.to_vec();
            self.sum = vec![0.; at.output.len()];
        }
        self.sum = blend(&[(1., &self.sum), (SHARES[part], at.output)]);
        let output = if part == 3 { &self.sum } else { at.output };
        transfer(from, to, at.prediction, &self.start, output)
    }

    fn remember(&mut self, output: &[f32]) {
        if self.predictions.len() == 4 {
            self.predictions.remove(0);
        }
        self.predictions.push(output.to_vec());
    }

    /// Adams and Bashforth's combination of the predictions there are.
    fn multistep(&self) -> Vec<f32> {
        let weights: &[f64] = match self.predictions.len() {
            0 | 1 => &[1.],
            2 => &[-1. / 2., 3. / 2.],
            3 => &[5. / 12., -16. / 12., 23. / 12.],
            _ => &[-9. / 24., 37. / 24., -59. / 24., 55. / 24.],
        };
        let parts: Vec<(f64, &[f32])> =
            weights.iter().copied().zip(self.predictions.iter().map(Vec::as_slice)).collect();
        blend(&parts)
    }
}

/// Equation 9 of the paper: from one level to another along the predicted noise.
fn transfer(
    from: Level,
    to: Level,
    prediction: Prediction,
    latents: &[f32],
    output: &[f32],
) -> Vec<f32> {
    let (bar, bar_to) = (from.signal.powi(2), to.signal.powi(2));
    let divisor = bar * to.noise + from.signal * from.noise * to.signal;
    let of_noise = (bar - bar_to) / divisor;
    let read = from.unit_noise(prediction);
    let of_latents = to.signal / from.signal + of_noise * read.latents;
    blend(&[(of_latents, latents), (of_noise * read.output, output)])
}
