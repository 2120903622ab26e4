//! What can be chosen about a sampler.

/// More steps would leave the timesteps of training with some spacing of some sampler.
pub const MOST_STEPS: usize = 998;

/// What the U-Net predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise in the latents.
    Epsilon,
    /// `√ᾱ·noise - √(1-ᾱ)·picture` (Salimans & Ho, arXiv:2202.00512): `--v_parameterization`.
    Velocity,
}

/// How timesteps are picked from the 1000 of training (Lin et al., arXiv:2305.08891, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// From the last timestep to the first, equally far apart.
    Linspace,
    /// Multiples of a whole distance, plus one (`steps_offset`); the last timestep is not reached.
    Leading,
    /// Starts at the last timestep.
    Trailing,
}

/// A run of a sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Steps from pure noise to the picture, 1 to [`MOST_STEPS`].
    pub steps: usize,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// Noise levels as Karras et al. space them (arXiv:2206.00364, equation 5, ρ = 7).
    pub karras: bool,
    /// The model was trained with zero terminal SNR.
    pub zero_terminal_snr: bool,
    /// Another spacing than the sampler's own.
    pub spacing: Option<Spacing>,
    /// Of a given picture, this share of the steps is made anew (img2img); `None` starts at noise.
    pub strength: Option<f64>,
}

impl SamplerOptions {
    /// `steps` steps from noise for a model that predicts noise, nothing else chosen.
    pub fn new(steps: usize) -> Self {
        Self {
            steps,
            prediction: Prediction::Epsilon,
            karras: false,
            zero_terminal_snr: false,
            spacing: None,
            strength: None,
        }
    }
}
