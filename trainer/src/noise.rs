//! The noise of a sample: a normal draw, shifted per channel (`noise_offset`), with coarser octaves
//! (`multires_noise_iterations`), and with a disturbance the model is not told of (`ip_noise_gamma`).
//!
//! sd-scripts' order: offset, then octaves with the division by the standard deviation, then the
//! disturbance. What sd-scripts draws once for a batch (random strengths, the sizes of the octaves)
//! and measures over a batch (the standard deviation) belongs to each sample here: a sample's noise
//! depends on its global index alone, not on its batch or on the number of ranks.

use crate::options::Options;
use crate::rng::{Purpose, Rng, stream};

/// How noise is shaped in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseShape {
    offset: Option<Strength>,
    adaptive_scale: Option<f32>,
    multires: Option<Multires>,
    perturbation: Option<Strength>,
}

/// A strength, or the largest of strengths that are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Strength {
    value: f32,
    random: bool,
}

/// Multi-resolution noise ("pyramid noise").
#[derive(Clone, Copy, Debug, PartialEq)]
struct Multires {
    iterations: usize,
    discount: f64,
}

/// Coarse noise, enlarged when it is added.
#[derive(Clone, Debug, PartialEq)]
pub struct Octave {
    /// Height and width.
    pub size: [usize; 2],
    /// Standard normal, `[height, width, channels]`.
    pub noise: Vec<f32>,
}

/// The random numbers of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Standard normal, as many as the sample's latents, `[h,w,c]`.
    pub noise: Vec<f32>,
    /// Standard normal, one per latent channel, for `noise_offset`.
    pub offset: Vec<f32>,
    /// In [0,1): part of `noise_offset` that counts; 1 without random strength.
    pub offset_strength: f32,
    /// From the latents' size to the coarsest; empty without `multires_noise_iterations`.
    pub octaves: Vec<Octave>,
    /// Standard normal `[h,w,c]`; empty without `ip_noise_gamma`.
    pub perturbation: Vec<f32>,
    /// In [0,1): part of `ip_noise_gamma` that counts; 1 without random strength.
    pub perturbation_strength: f32,
    /// Timestep in 0..1000.
    pub timestep: usize,
}

impl Draw {
    /// A draw for noise that is at most shifted.
    pub fn plain(noise: Vec<f32>, offset: Vec<f32>, timestep: usize) -> Self {
        Self {
            noise,
            offset,
            offset_strength: 1.,
            octaves: Vec::new(),
            perturbation: Vec::new(),
            perturbation_strength: 1.,
            timestep,
        }
    }
}

fn normals(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal()).collect()
}

impl NoiseShape {
    /// Reads the shape from a run's options.
    pub fn from_options(options: &Options) -> Self {
        let strength = |value: Option<f64>, random| {
            let value = value.map(|value| value as f32).filter(|value| *value != 0.)?;
            Some(Strength { value, random })
        };
        Self {
            offset: strength(options.noise_offset, options.noise_offset_random_strength),
            adaptive_scale: options.adaptive_noise_scale.map(|scale| scale as f32),
            multires: options.multires_noise_iterations.filter(|count| *count > 0).map(|count| {
                Multires { iterations: count, discount: options.multires_noise_discount }
            }),
            perturbation: strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength),
        }
    }

    /// The random numbers of sample `index` for latents `[h,w,c]`, with its timestep.
    pub fn draw(&self, seed: u64, index: u64, shape: [usize; 3], timestep: usize) -> Draw {
        let len = shape.iter().product();
        let keyed = |purpose, count| normals(&mut stream(seed, purpose, index, 0), count);
        let strength = |of: Option<Strength>, which| match of {
            Some(Strength { random: true, .. }) => {
                stream(seed, Purpose::NoiseStrength, index, which).uniform_f32()
            }
            _ => 1.,
        };
        let mut draw = Draw::plain(
            keyed(Purpose::Noise, len),
            keyed(Purpose::NoiseOffset, shape[2]),
            timestep,
        );
        draw.offset_strength = strength(self.offset, 0);
        if let Some(multires) = self.multires {
            draw.octaves = multires.draw(seed, index, shape);
        }
        if self.perturbation.is_some() {
            draw.perturbation = keyed(Purpose::InputPerturbation, len);
            draw.perturbation_strength = strength(self.perturbation, 1);
        }
        draw
    }

    /// The noise that the model is to find in latents `[h,w,c]`.
    pub fn noise(&self, latents: &[f32], shape: [usize; 3], draw: &Draw) -> Vec<f32> {
        let mut noise = draw.noise.clone();
        if let Some(offset) = self.offset {
            self.shift(&mut noise, latents, offset.value * draw.offset_strength, &draw.offset);
        }
        if let Some(multires) = self.multires {
            multires.add(&mut noise, shape, &draw.octaves);
        }
        noise
    }

    /// `noise` as it is mixed into the latents, where that is other than what is to be found.
    pub fn disturbed(&self, noise: &[f32], draw: &Draw) -> Option<Vec<f32>> {
        let strength = self.perturbation?.value * draw.perturbation_strength;
        Some(noise.iter().zip(&draw.perturbation).map(|(n, p)| n + strength * p).collect())
    }

    /// Whether a draw has what this shape needs.
    pub fn fits(&self, draw: &Draw, shape: [usize; 3]) -> bool {
        let len: usize = shape.iter().product();
        let octave =
            |octave: &Octave| octave.noise.len() == octave.size[0] * octave.size[1] * shape[2];
        draw.noise.len() == len
            && draw.offset.len() == shape[2]
            && (self.perturbation.is_none() || draw.perturbation.len() == len)
            && (self.multires.is_none() || !draw.octaves.is_empty())
            && draw.octaves.iter().all(octave)
    }

    /// A random shift per channel, which grows with the latents' mean under `adaptive_noise_scale`.
    fn shift(&self, noise: &mut [f32], latents: &[f32], offset: f32, normals: &[f32]) {
        let channels = normals.len();
        let pixels = (latents.len() / channels) as f64;
        for (channel, normal) in normals.iter().enumerate() {
            let mut strength = offset;
            if let Some(scale) = self.adaptive_scale {
                let sum: f64 =
                    latents[channel..].iter().step_by(channels).map(|x| f64::from(*x)).sum();
                strength = (strength + scale * (sum / pixels).abs() as f32).max(0.);
            }
            noise[channel..].iter_mut().step_by(channels).for_each(|n| *n += strength * normal);
        }
    }
}

impl Multires {
    /// Octaves of random size: octave `i` is smaller by the `i`th power of a ratio between 2 and 4,
    /// until one side is a single pixel.
    fn draw(self, seed: u64, index: u64, [height, width, channels]: [usize; 3]) -> Vec<Octave> {
        let mut octaves = Vec::new();
        for octave in 0..self.iterations {
            let mut rng = stream(seed, Purpose::MultiresNoise, index, octave as u64);
            let shrink = (2. + 2. * rng.uniform_f64()).powi(octave as i32);
            let size = [height, width].map(|side| ((side as f64 / shrink) as usize).max(1));
            let noise = normals(&mut rng, size[0] * size[1] * channels);
            octaves.push(Octave { size, noise });
            if size.contains(&1) {
                break;
            }
        }
        octaves
    }

    /// Adds the octaves, each weaker by `discount` than the one before, and brings the standard
    /// deviation of the sum back to 1.
    fn add(self, noise: &mut [f32], [height, width, channels]: [usize; 3], octaves: &[Octave]) {
        for (number, octave) in octaves.iter().enumerate() {
            let weight = self.discount.powi(number as i32) as f32;
            let (rows, columns) =
                (Taps::new(octave.size[0], height), Taps::new(octave.size[1], width));
            let row_length = octave.size[1] * channels;
            for (y, out) in noise.chunks_exact_mut(width * channels).enumerate() {
                let (top, bottom, down) = rows.at(y);
                let [top, bottom] = [top, bottom].map(|row| &octave.noise[row * row_length..]);
                for (x, out) in out.chunks_exact_mut(channels).enumerate() {
                    let (left, right, along) = columns.at(x);
                    for (channel, out) in out.iter_mut().enumerate() {
                        let across = |row: &[f32]| {
                            let [a, b] = [left, right].map(|x| row[x * channels + channel]);
                            (1. - along) * a + along * b
                        };
                        *out += weight * ((1. - down) * across(top) + down * across(bottom));
                    }
                }
            }
        }
        let deviation = standard_deviation(noise) as f32;
        if deviation > 0. {
            noise.iter_mut().for_each(|n| *n /= deviation);
        }
    }
}

/// Bilinear enlargement along one side, with pixel centres at halves as in PyTorch.
struct Taps {
    from: usize,
    scale: f32,
}

impl Taps {
    fn new(from: usize, to: usize) -> Self {
        Self { from, scale: from as f32 / to as f32 }
    }

    /// The two pixels that pixel `to` lies between, and how far along.
    fn at(&self, to: usize) -> (usize, usize, f32) {
        let place = (self.scale * (to as f32 + 0.5) - 0.5).max(0.);
        let first = (place as usize).min(self.from - 1);
        (first, (first + 1).min(self.from - 1), place - first as f32)
    }
}

/// Of a sample: divided by one less than their number.
fn standard_deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let squares: f64 = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
    (squares / (count - 1.).max(1.)).sqrt()
}

#[cfg(test)]
mod tests;
