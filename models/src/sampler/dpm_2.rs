//! DPM-Solver-2 in σ, plain and ancestral (Karras et al., arXiv:2206.00364, with the middle of a step
//! at the geometric mean as in Lu et al., arXiv:2206.00927; the ancestral form is k-diffusion's). The
//! last step is Euler's.

use super::NoiseSource;
use super::euler::split;
use super::evaluation::{Evaluation, draw};
use super::level::{Level, blend};
use super::schedule::{Grid, Schedule};

/// A step: where it ends, and how much noise is added there.
#[derive(Clone, Copy, Debug)]
struct Leap {
    from: f64,
    down: f64,
    up: f64,
}

/// Latents at the start of a step, while its middle is evaluated.
#[derive(Clone, Debug)]
pub(super) struct Dpm2 {
    ancestral: bool,
    leaps: Vec<Leap>,
    begun: Option<Vec<f32>>,
}

impl Dpm2 {
    /// Between two points lies their middle.
    pub(super) fn new(grid: &Grid, ancestral: bool) -> (Schedule, Self) {
        let (mut timesteps, mut levels, mut leaps) = (Vec::new(), Vec::new(), Vec::new());
        for (timestep, ends) in grid.timesteps.iter().zip(grid.levels.windows(2)) {
            timesteps.push(*timestep as f32);
            levels.push(ends[0]);
            let (down, up) = if ancestral { split(ends[0], ends[1]) } else { (ends[1].noise, 0.) };
            leaps.push(Leap { from: ends[0].noise, down, up });
            if down > 0. {
                let middle = f64::from((ends[0].noise * down).sqrt() as f32);
                timesteps.push(grid.table.timestep(middle) as f32);
                levels.push(Level::of_sigma(middle));
            }
        }
        levels.extend(grid.levels.last());
        (
            Schedule { timesteps, levels, steps: grid.timesteps.len() },
            Self { ancestral, leaps, begun: None },
        )
    }

    pub(super) fn step(&mut self, at: &Evaluation<'_>, noise: &mut NoiseSource<'_>) -> Vec<f32> {
        let Some(start) = self.begun.take() else {
            if at.next.noise > 0. {
                self.begun = Some(at.latents.to_vec());
            }
            return at.with_unit_noise(1., at.next.noise - at.here.noise);
        };
        let leap = self.leaps[at.index / 2];
        let slope = at.unit_noise();
        let width = leap.down - leap.from;
        if !self.ancestral {
            return blend(&[(1., &start), (width, &slope)]);
        }
        let fresh = draw(noise, start.len());
        blend(&[(1., &start), (width, &slope), (leap.up, &fresh)])
    }
}
