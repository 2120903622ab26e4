//! DPM-Solver of order 2 (Lu et al., arXiv:2206.00927), DPM-Solver++ 2M (arXiv:2211.01095) and the
//! latter for the stochastic equation: multistep, with the midpoint rule. Also what the single-step
//! form shares with them.

use super::NoiseSource;
use super::evaluation::{Evaluation, draw};
use super::level::{Level, blend};

/// Runs of fewer steps end with a step of order 1, wherever they end.
const FEW: usize = 15;

/// What is integrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// The noise, exactly in λ.
    Noise,
    /// The picture, exactly in λ.
    Picture,
    /// The picture, with fresh noise in every step.
    StochasticPicture,
}

/// What a step of order 2 has to know of the one before.
#[derive(Clone, Debug)]
struct Before {
    level: Level,
    reading: Vec<f32>,
}

/// The multistep form.
#[derive(Clone, Debug)]
pub(super) struct DpmSolver {
    algorithm: Algorithm,
    of_steps: usize,
    before: Option<Before>,
}

impl DpmSolver {
    pub(super) fn new(algorithm: Algorithm, of_steps: usize) -> Self {
        Self { algorithm, of_steps, before: None }
    }

    pub(super) fn step(
        &mut self,
        at: &Evaluation<'_>,
        is_last: bool,
        noise: &mut NoiseSource<'_>,
    ) -> Vec<f32> {
        let reading = self.algorithm.read(at);
        let ends_lower = is_last && (self.of_steps < FEW || at.next.noise == 0.);
        let (from, to) = (at.here, at.next);
        let moved = match self.before.take() {
            Some(before) if !ends_lower => {
                let ratio = (from.lambda() - before.level.lambda()) / (to.lambda() - from.lambda());
                let extra = 0.5 / ratio;
                let readings = [(1. + extra, reading.as_slice()), (-extra, &before.reading)];
                self.algorithm.advance(from, to, at.latents, &readings, noise)
            }
            _ => self.algorithm.advance(from, to, at.latents, &[(1., &reading)], noise),
        };
        self.before = Some(Before { level: from, reading });
        moved
    }
}

impl Algorithm {
    /// What the algorithm integrates, as the U-Net has it.
    pub(super) fn read(self, at: &Evaluation<'_>) -> Vec<f32> {
        match self {
            Self::Noise => at.unit_noise(),
            Self::Picture | Self::StochasticPicture => at.picture(),
        }
    }

    /// From one level to another with `readings` (their sum) constant in between.
    pub(super) fn advance(
        self,
        from: Level,
        to: Level,
        latents: &[f32],
        readings: &[(f64, &[f32])],
        noise: &mut NoiseSource<'_>,
    ) -> Vec<f32> {
        let h = to.lambda() - from.lambda();
        let (of_latents, of_readings) = match self {
            Self::Noise => (to.signal / from.signal, -to.noise * h.exp_m1()),
            Self::Picture => (to.noise / from.noise, -to.signal * (-h).exp_m1()),
            Self::StochasticPicture => {
                (to.noise / from.noise * (-h).exp(), -to.signal * (-2. * h).exp_m1())
            }
        };
        let mut parts = vec![(of_latents, latents)];
        parts.extend(readings.iter().map(|(factor, values)| (of_readings * factor, *values)));
        let fresh;
        if self == Self::StochasticPicture {
            fresh = draw(noise, latents.len());
            parts.push((to.noise * (-(-2. * h).exp_m1()).sqrt(), &fresh));
        }
        blend(&parts)
    }
}
