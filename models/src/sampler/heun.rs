//! Heun's method in σ (Karras et al., arXiv:2206.00364, algorithm 1): Euler's step, then the same
//! step along the mean of the slopes at both ends. The last step is Euler's.

use super::evaluation::Evaluation;
use super::level::blend;
use super::schedule::{Grid, Schedule};

/// Latents and slope at the start of a step, while its end is evaluated.
#[derive(Clone, Debug, Default)]
pub(super) struct Heun {
    begun: Option<(Vec<f32>, Vec<f32>, f64)>,
}

impl Heun {
    /// Every point but the first is evaluated twice.
    pub(super) fn new(grid: &Grid) -> (Schedule, Self) {
        let mut timesteps = Vec::new();
        let mut levels = Vec::new();
        for (i, timestep) in grid.timesteps.iter().enumerate() {
            for _ in 0..if i == 0 { 1 } else { 2 } {
                timesteps.push(*timestep as f32);
                levels.push(grid.levels[i]);
            }
        }
        levels.extend(grid.levels.last());
        (Schedule { timesteps, levels, steps: grid.timesteps.len() }, Self::default())
    }

    pub(super) fn step(&mut self, at: &Evaluation<'_>) -> Vec<f32> {
        let slope = at.unit_noise();
        match self.begun.take() {
            None => {
                let width = at.next.noise - at.here.noise;
                let moved = blend(&[(1., at.latents), (width, &slope)]);
                if at.next.noise > 0. {
                    self.begun = Some((at.latents.to_vec(), slope, width));
                }
                moved
            }
            Some((start, first, width)) => {
                blend(&[(1., &start), (width / 2., &first), (width / 2., &slope)])
            }
        }
    }
}
