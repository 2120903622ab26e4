//! DDIM without noise of its own (Song et al., arXiv:2010.02502, equation 12 with η = 0).

use super::evaluation::Evaluation;
use super::level::{Level, blend};
use super::schedule::Grid;

/// The levels that steps lead to. They lie one distance below each timestep, also where the spacing
/// of the timesteps is another one.
#[derive(Clone, Debug)]
pub(super) struct Ddim {
    targets: Vec<Level>,
}

impl Ddim {
    pub(super) fn new(grid: &Grid) -> Self {
        let clean = Level { signal: 1., noise: 0. };
        let target = |t: &f64| grid.table.level(*t as i64 - grid.distance(), clean);
        Self { targets: grid.timesteps.iter().map(target).collect() }
    }

    pub(super) fn step(&self, at: &Evaluation<'_>) -> Vec<f32> {
        let target = self.targets[at.index];
        let picture = at.here.picture(at.prediction);
        let noise = at.here.unit_noise(at.prediction);
        let latents = target.signal * picture.latents + target.noise * noise.latents;
        let output = target.signal * picture.output + target.noise * noise.output;
        blend(&[(latents, at.latents), (output, at.output)])
    }
}
