//! How much picture and how much noise latents hold, and what a prediction says at such a level.
//!
//! One description serves both families of samplers: those of DDIM and DPM-Solver keep the variance
//! (`signal² + noise² = 1`), those of Karras et al. keep the picture (`signal = 1`, `noise = σ`).
//! Coefficients are f64, latents f32: a step rounds once.

use super::options::Prediction;

/// Latents at this level are `signal · picture + noise · unit noise`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// Factor of the picture's latents.
    pub signal: f64,
    /// Factor of the noise.
    pub noise: f64,
}

/// What is read off latents and prediction: `latents · self.latents + prediction · self.output`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) latents: f64,
    pub(super) output: f64,
}

impl Level {
    /// Keeps the variance; `bar` is `ᾱ` of the timestep.
    pub(super) fn of_bar(bar: f32) -> Self {
        let bar = f64::from(bar);
        Self { signal: bar.sqrt(), noise: (1. - bar).sqrt() }
    }

    /// Keeps the picture.
    pub(super) fn of_sigma(sigma: f64) -> Self {
        Self { signal: 1., noise: sigma }
    }

    /// Keeps the variance at the ratio `sigma` of noise to picture.
    pub(super) fn of_ratio(sigma: f64) -> Self {
        let signal = 1. / (sigma * sigma + 1.).sqrt();
        Self { signal, noise: sigma * signal }
    }

    fn size(self) -> f64 {
        self.signal.hypot(self.noise)
    }

    /// Factor that gives the latents the variance that the U-Net was trained on.
    pub fn input_scale(self) -> f64 {
        1. / self.size()
    }

    /// Half the logarithm of the signal-to-noise ratio; infinite without noise.
    pub(super) fn lambda(self) -> f64 {
        (self.signal / self.noise).ln()
    }

    /// The picture, as the prediction has it.
    pub(super) fn picture(self, prediction: Prediction) -> Reading {
        match prediction {
            Prediction::Epsilon => {
                Reading { latents: 1. / self.signal, output: -self.noise / self.signal }
            }
            Prediction::Velocity => {
                let size = self.size();
                Reading { latents: self.signal / (size * size), output: -self.noise / size }
            }
        }
    }

    /// The unit noise, as the prediction has it. With [`Level::of_sigma`] this is the slope of the
    /// latents over σ.
    pub(super) fn unit_noise(self, prediction: Prediction) -> Reading {
        match prediction {
            Prediction::Epsilon => Reading { latents: 0., output: 1. },
            Prediction::Velocity => {
                let size = self.size();
                Reading { latents: self.noise / (size * size), output: self.signal / size }
            }
        }
    }
}

impl Reading {
    /// Reads the values off.
    pub(super) fn of(self, latents: &[f32], output: &[f32]) -> Vec<f32> {
        blend(&[(self.latents, latents), (self.output, output)])
    }
}

/// The sum of all parts, each times its factor. Parts have one length.
pub(super) fn blend(parts: &[(f64, &[f32])]) -> Vec<f32> {
    let length = parts.first().map_or(0, |(_, values)| values.len());
    let sum = |i: usize| parts.iter().map(|(factor, values)| factor * f64::from(values[i])).sum();
    let round = |value: f64| value as f32;
    (0..length).map(sum).map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From picture and noise to latents and a prediction, and back.
    #[test]
    fn a_right_prediction_gives_picture_and_noise_back() {
        let (picture, noise) = (0.7f64, -1.3f64);
        for level in [Level::of_bar(0.3), Level::of_sigma(2.5), Level::of_ratio(2.5)] {
            let latents = [(level.signal * picture + level.noise * noise) as f32];
            let size = level.signal.hypot(level.noise);
            let velocity = (level.signal * noise - level.noise * picture) / size;
            for (prediction, output) in
                [(Prediction::Epsilon, noise), (Prediction::Velocity, velocity)]
            {
                let output = [output as f32];
                let found = level.picture(prediction).of(&latents, &output)[0];
                assert!((f64::from(found) - picture).abs() < 1e-6, "{level:?} {prediction:?}");
                let found = level.unit_noise(prediction).of(&latents, &output)[0];
                assert!((f64::from(found) - noise).abs() < 1e-6, "{level:?} {prediction:?}");
            }
        }
    }

    #[test]
    fn both_forms_of_a_ratio_agree() {
        let (exploding, preserving) = (Level::of_sigma(3.), Level::of_ratio(3.));
        assert!((exploding.lambda() - preserving.lambda()).abs() < 1e-12);
        assert!((preserving.input_scale() - 1.).abs() < 1e-12);
        assert!((exploding.input_scale() - 1. / 10f64.sqrt()).abs() < 1e-12);
        assert_eq!(Level::of_bar(1.).lambda(), f64::INFINITY);
    }
}
