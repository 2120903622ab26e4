//! DPM-Solver++ 2S (Lu et al., arXiv:2211.01095) and its form for the stochastic equation: steps of
//! order 1 and 2 in turn, where each of order 2 starts again from the latents before the one of
//! order 1.

use super::NoiseSource;
use super::dpm_solver::Algorithm;
use super::evaluation::Evaluation;
use super::level::Level;
use super::schedule::Grid;

/// The state before a step of order 1.
#[derive(Clone, Debug)]
struct Start {
    level: Level,
    latents: Vec<f32>,
    reading: Vec<f32>,
}

#[derive(Clone, Debug)]
pub(super) struct DpmSingle {
    algorithm: Algorithm,
    of_steps: usize,
    skipped: usize,
    start: Option<Start>,
}

impl DpmSingle {
    pub(super) fn new(algorithm: Algorithm, grid: &Grid) -> Self {
        Self { algorithm, of_steps: grid.of_steps, skipped: grid.skipped, start: None }
    }

    pub(super) fn step(&mut self, at: &Evaluation<'_>, noise: &mut NoiseSource<'_>) -> Vec<f32> {
        let reading = self.algorithm.read(at);
        // Odd steps are of order 2, the last never. A run that starts at an odd one has nothing to
        // start again from.
        let step = self.skipped + at.index;
        let is_second = step % 2 == 1 && step + 1 < self.of_steps;
        match self.start.take() {
            Some(start) if is_second => {
                let whole = at.next.lambda() - start.level.lambda();
                let ratio = (at.here.lambda() - start.level.lambda()) / whole;
                let extra = 0.5 / ratio;
                let readings = [(1. - extra, start.reading.as_slice()), (extra, &reading)];
                self.algorithm.advance(start.level, at.next, &start.latents, &readings, noise)
            }
            _ => {
                let readings = [(1., reading.as_slice())];
                let moved = self.algorithm.advance(at.here, at.next, at.latents, &readings, noise);
                self.start = Some(Start { level: at.here, latents: at.latents.to_vec(), reading });
                moved
            }
        }
    }
}
