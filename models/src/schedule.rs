//! The noise schedule of training (DDPM, Ho et al., arXiv:2006.11239) and what follows from it.
//!
//! Tables are rounded as PyTorch rounds them (f32 values, fused steps of `linspace`, f64 running
//! products): betas and running products of the plain schedule are its numbers bit for bit.

/// How the betas are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleSettings {
    /// Variance of the first step.
    pub beta_start: f64,
    /// Variance of the last step.
    pub beta_end: f64,
    /// Number of steps.
    pub steps: usize,
    /// Rescale so that the last step is pure noise (Lin et al., arXiv:2305.08891).
    pub zero_terminal_snr: bool,
}

impl Default for ScheduleSettings {
    /// `scaled_linear` 0.00085 to 0.012 in 1000 steps, as all Stable Diffusion models.
    fn default() -> Self {
        Self { beta_start: 0.00085, beta_end: 0.012, steps: 1000, zero_terminal_snr: false }
    }
}

/// Tables with one entry per timestep.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    /// Variances.
    pub betas: Vec<f32>,
    /// Running products of `1 - beta`: the share of the image that is left.
    pub alphas_cumprod: Vec<f32>,
    /// Signal-to-noise ratio that loss weights use: always that of the schedule before the rescale
    /// to zero terminal SNR, as in sd-scripts.
    pub snr: Vec<f32>,
}

impl NoiseSchedule {
    /// Computes the tables.
    pub fn new(settings: ScheduleSettings) -> Self {
        let mut betas = scaled_linear(settings);
        let mut alphas_cumprod = running_product(&betas);
        let snr = alphas_cumprod.iter().map(|bar| signal_to_noise(*bar)).collect();
        if settings.zero_terminal_snr {
            betas = rescale_to_zero_terminal_snr(&alphas_cumprod);
            alphas_cumprod = running_product(&betas);
        }
        Self { betas, alphas_cumprod, snr }
    }

    /// Number of timesteps.
    pub fn steps(&self) -> usize {
        self.betas.len()
    }

    /// `(√ᾱ, √(1-ᾱ))`: noisy latents are the first times the latents plus the second times the
    /// noise; the target of v-prediction is the first times the noise minus the second times the
    /// latents. `None` for a timestep outside the table.
    pub fn coefficients(&self, timestep: usize) -> Option<(f32, f32)> {
        let bar = *self.alphas_cumprod.get(timestep)?;
        Some((bar.sqrt(), (1. - bar).sqrt()))
    }

    /// `√ᾱ·latents + √(1-ᾱ)·noise` of one image; `None` for a timestep outside the table.
    pub fn add_noise(&self, latents: &[f32], noise: &[f32], timestep: usize) -> Option<Vec<f32>> {
        let (signal, sigma) = self.coefficients(timestep)?;
        Some(latents.iter().zip(noise).map(|(x, n)| signal * x + sigma * n).collect())
    }

    /// Target of v-prediction (Salimans & Ho, arXiv:2202.00512) for one image:
    /// `√ᾱ·noise - √(1-ᾱ)·latents`; `None` for a timestep outside the table.
    pub fn velocity(&self, latents: &[f32], noise: &[f32], timestep: usize) -> Option<Vec<f32>> {
        let (signal, sigma) = self.coefficients(timestep)?;
        Some(latents.iter().zip(noise).map(|(x, n)| signal * n - sigma * x).collect())
    }
}

/// Squares of equally spaced roots, spaced as `torch.linspace` does: from both ends.
fn scaled_linear(settings: ScheduleSettings) -> Vec<f32> {
    let (start, end) = (settings.beta_start.sqrt() as f32, settings.beta_end.sqrt() as f32);
    let steps = settings.steps;
    let width = (end - start) / steps.saturating_sub(1).max(1) as f32;
    let root = |i: usize| {
        if i < steps / 2 {
            width.mul_add(i as f32, start)
        } else {
            (-width).mul_add((steps - 1 - i) as f32, end)
        }
    };
    (0..steps).map(|i| root(i) * root(i)).collect()
}

fn running_product(betas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    let mut next = |beta: &f32| {
        product *= f64::from(1. - beta);
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

fn signal_to_noise(bar: f32) -> f32 {
    let ratio = bar.sqrt() / (1. - bar).sqrt();
    ratio * ratio
}

/// Shifts and scales `√ᾱ` so that its last value is 0 and its first stays; gives the betas.
fn rescale_to_zero_terminal_snr(alphas_cumprod: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas_cumprod.iter().map(|bar| bar.sqrt()).collect();
    let (Some(first), Some(last)) = (roots.first().copied(), roots.last().copied()) else {
        return Vec::new();
    };
    let factor = first / (first - last);
    let bars: Vec<f32> = roots.iter().map(|root| ((root - last) * factor).powi(2)).collect();
    let mut before = 1.;
    let mut beta = |bar: &f32| {
        let alpha = bar / before;
        before = *bar;
        1. - alpha
    };
    bars.iter().map(&mut beta).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rescaled_schedule_ends_in_pure_noise() {
        let settings = ScheduleSettings { zero_terminal_snr: true, ..Default::default() };
        let schedule = NoiseSchedule::new(settings);
        assert_eq!(schedule.coefficients(999), Some((0., 1.)));
        assert_eq!(schedule.coefficients(1000), None);
        assert_eq!(schedule.add_noise(&[2.], &[3.], 999), Some(vec![3.]));
        assert_eq!(schedule.velocity(&[2.], &[3.], 999), Some(vec![-2.]));
        assert_eq!(schedule.snr, NoiseSchedule::new(ScheduleSettings::default()).snr);
    }

    #[test]
    fn an_empty_schedule_is_empty() {
        let settings = ScheduleSettings { steps: 0, zero_terminal_snr: true, ..Default::default() };
        assert_eq!(NoiseSchedule::new(settings).steps(), 0);
    }
}
