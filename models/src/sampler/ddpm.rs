//! The ancestral chain of training (Ho et al., arXiv:2006.11239, equation 7), with the smaller of
//! its two variances.

use super::NoiseSource;
use super::evaluation::{Evaluation, draw};
use super::level::blend;

/// One step; noise is drawn at every timestep but 0.
pub(super) fn step(at: &Evaluation<'_>, noise: &mut NoiseSource<'_>) -> Vec<f32> {
    let (bar, bar_next) = (at.here.signal.powi(2), at.next.signal.powi(2));
    let (rest, rest_next) = (at.here.noise.powi(2), at.next.noise.powi(2));
    let alpha = bar / bar_next;
    let beta = 1. - alpha;
    let of_picture = bar_next.sqrt() * beta / rest;
    let of_latents = alpha.sqrt() * rest_next / rest;
    let read = at.here.picture(at.prediction);
    let latents = of_latents + of_picture * read.latents;
    let output = of_picture * read.output;
    if at.timestep < 1. {
        return blend(&[(latents, at.latents), (output, at.output)]);
    }
    let deviation = (rest_next / rest * beta).max(1e-20).sqrt();
    let fresh = draw(noise, at.latents.len());
    blend(&[(latents, at.latents), (output, at.output), (deviation, &fresh)])
}
