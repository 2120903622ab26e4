//! What a method sees when the U-Net has answered.

use super::NoiseSource;
use super::level::{Level, blend};
use super::options::Prediction;

/// One answer of the U-Net and where it belongs.
pub(super) struct Evaluation<'a> {
    /// Which evaluation of the run.
    pub(super) index: usize,
    /// Its timestep.
    pub(super) timestep: f32,
    /// Level of the latents.
    pub(super) here: Level,
    /// Level that they should get.
    pub(super) next: Level,
    /// What the U-Net predicts.
    pub(super) prediction: Prediction,
    /// What it said.
    pub(super) output: &'a [f32],
    /// Latents as they were before they were scaled for the U-Net.
    pub(super) latents: &'a [f32],
}

impl Evaluation<'_> {
    /// The picture as the U-Net sees it.
    pub(super) fn picture(&self) -> Vec<f32> {
        self.here.picture(self.prediction).of(self.latents, self.output)
    }

    /// The noise as the U-Net sees it, of variance 1.
    pub(super) fn unit_noise(&self) -> Vec<f32> {
        self.here.unit_noise(self.prediction).of(self.latents, self.output)
    }

    /// `latents · factor of the latents + unit noise · factor of the noise`.
    pub(super) fn with_unit_noise(&self, latents: f64, noise: f64) -> Vec<f32> {
        let read = self.here.unit_noise(self.prediction);
        blend(&[(latents + noise * read.latents, self.latents), (noise * read.output, self.output)])
    }
}

/// Fresh noise for `length` values.
pub(super) fn draw(noise: &mut NoiseSource<'_>, length: usize) -> Vec<f32> {
    let mut values = vec![0.; length];
    noise(&mut values);
    values
}
