//! Euler's method in σ, plain and ancestral (Karras et al., arXiv:2206.00364; the ancestral form is
//! that of k-diffusion, <https://github.com/crowsonkb/k-diffusion>).

use super::NoiseSource;
use super::evaluation::{Evaluation, draw};
use super::level::{Level, blend};

/// Along the slope to the next σ.
pub(super) fn step(at: &Evaluation<'_>) -> Vec<f32> {
    at.with_unit_noise(1., at.next.noise - at.here.noise)
}

/// Further down than the next σ, then up to it with fresh noise. The last step draws as well, as in
/// diffusers, though nothing of it is used.
pub(super) fn ancestral_step(at: &Evaluation<'_>, noise: &mut NoiseSource<'_>) -> Vec<f32> {
    let (down, up) = split(at.here, at.next);
    let moved = at.with_unit_noise(1., down - at.here.noise);
    let fresh = draw(noise, at.latents.len());
    blend(&[(1., &moved), (up, &fresh)])
}

/// The σ that a step goes down to, and that of the noise added after it: together the next σ.
pub(super) fn split(from: Level, to: Level) -> (f64, f64) {
    let (from, to) = (from.noise, to.noise);
    let up = to * (from * from - to * to).max(0.).sqrt() / from;
    ((to * to - up * up).max(0.).sqrt(), up)
}
