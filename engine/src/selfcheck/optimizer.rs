//! Sums into a flat gradient, its norm and clipping, and AdamW over flat buffers.
//!
//! Moved weights are held to 1e-6 of the largest: kernels round every operation as the CPU does, so
//! that they are equal unless a compiler changes that. A code of an 8-bit moment may then differ only
//! where a value lies on the middle between two, which moves a later step by little.

use super::{Check, noise, on_both, random, relative_error, relative_error_of, worst_error};
use crate::backend::AdamWStep;
use crate::blockwise::{BLOCK, Code, Signs};
use crate::cuda::flat::{AdamWRule, FlatAdamW, FlatTensor, HostMoment, Moments, clip_factor};
use crate::{DType, Device, Result, Tensor};

/// All checks of this kind.
pub fn checks() -> Vec<Check> {
    let mut all = vec![
        Check::new("optimizer add_at", 1e-6, add_at),
        Check::new("optimizer adamw over a range", 1e-6, range),
        Check::new("optimizer adamw with a low first rate", 1e-6, |device| {
            full(device, (0.4, 0.99), false)
        }),
        Check::new("optimizer flat adamw, full moments", 1e-6, |device| {
            full(device, (0.9, 0.999), false)
        }),
        Check::new("optimizer flat adamw after a resume", 1e-6, |device| {
            full(device, (0.9, 0.999), true)
        }),
        Check::new("optimizer flat adamw, 8-bit moments", 1e-6, |device| eight(device, false)),
        Check::new("optimizer flat adamw, 8-bit moments after a resume", 1e-6, |device| {
            eight(device, true)
        }),
        Check::new("optimizer flat adamw stays at a gradient that is not finite", 0., stays),
        Check::new("optimizer clip_factor of what is not finite", 0., not_finite),
    ];
    for (len, max) in [(1, 1.), (77, 1.), (5000, 0.), (300_001, 0.5), (64, 1e9)] {
        let name = format!("optimizer clip_factor {len} to {max}");
        all.push(Check::new(name, 1e-6, move |device| clip(device, len, max)));
    }
    let name = "optimizer clip_factor 30000003 to 1";
    all.push(Check::new(name, 1e-6, |device| clip(device, 30_000_003, 1.)).big());
    all
}

fn floats(device: Device, data: &[f32]) -> Result<Tensor> {
    Tensor::from_f32(device, &[data.len()], data, DType::F32)
}

fn add_at(device: Device) -> Result<f32> {
    let (mut flat, mut reference) = on_both(device, &random(&[5000], 30)?, DType::F32)?;
    // Aligned and not, whole fours and tails, one number, and all of it.
    for (offset, len) in [(0, 5000), (4, 1024), (3, 77), (4999, 1), (8, 5), (100, 0)] {
        let (x, here) = on_both(device, &random(&[len], 31)?, DType::F32)?;
        device.backend().add_at(&mut flat, offset, &x)?;
        Device::Cpu.backend().add_at(&mut reference, offset, &here)?;
    }
    let past = device.backend().add_at(&mut flat, 4999, &floats(device, &[1., 2.])?);
    if past.is_ok() {
        return Ok(f32::INFINITY);
    }
    relative_error(&flat, &reference)
}

fn range(device: Device) -> Result<f32> {
    let mut sides = Vec::new();
    for side in [device, Device::Cpu] {
        let mut param = floats(side, &noise(3001, 40))?;
        let mut moments = (floats(side, &[0.; 3001])?, floats(side, &[0.; 3001])?);
        for step in 1..4 {
            let gradient = floats(side, &noise(3001, 40 + step))?;
            let p = AdamWStep {
                range: 5..2977,
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.01,
                step,
            };
            let pair = (&mut moments.0, &mut moments.1);
            side.backend().adamw(&p, &mut param, &gradient, pair)?;
        }
        sides.push((param, moments));
    }
    let [(got, (m, v)), (want, (want_m, want_v))] = &sides[..] else {
        return Ok(f32::INFINITY);
    };
    worst_error([(got, want), (m, want_m), (v, want_v)])
}

fn clip(device: Device, len: usize, max: f32) -> Result<f32> {
    let (gradient, reference) = on_both(device, &random(&[len], 50)?, DType::F32)?;
    let scale = [1. / 1024.];
    let got = clip_factor(&gradient, &floats(device, &scale)?, max)?.to_vec_f32()?;
    let squares = reference.to_vec_f32()?.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let norm = squares.sqrt() / 1024.;
    let factor = if max > 0. { (f64::from(max) / (norm + 1e-6)).min(1.) } else { 1. };
    let factor = relative_error_of(&got[..1], &[(factor / 1024.) as f32]);
    Ok(factor.max(relative_error_of(&got[1..], &[norm as f32])))
}

/// The factor must be NaN wherever the one bad number lies; squares beyond f32 are no harm.
fn not_finite(device: Device) -> Result<f32> {
    let one = floats(device, &[1.])?;
    for (place, bad) in [(0, f32::NAN), (2999, f32::INFINITY), (1500, f32::NEG_INFINITY)] {
        let mut data = noise(3000, 51);
        data[place] = bad;
        for max in [0., 1.] {
            let got = clip_factor(&floats(device, &data)?, &one, max)?.to_vec_f32()?;
            if !got[0].is_nan() || got[1].is_finite() {
                return Ok(f32::INFINITY);
            }
        }
    }
    let large = clip_factor(&floats(device, &[1e25])?, &one, 0.)?.to_vec_f32()?;
    Ok(relative_error_of(&large, &[1., 1e25]))
}

/// Tensors of all kinds: large and small, at odd places, kernels, and one number.
fn tensors() -> Vec<FlatTensor> {
    let mut start = 0;
    let sizes =
        [(5120, 1, 1), (4 * 9 * 130, 130, 9), (7, 1, 1), (4099, 1, 1), (90, 5, 9), (1, 1, 1)];
    let place = |(len, inner, window)| {
        start += len;
        FlatTensor { range: start - len..start, inner, window }
    };
    sizes.into_iter().map(place).collect()
}

/// What the steps of a check are made from, the same on both sides.
struct Course {
    tensors: Vec<FlatTensor>,
    len: usize,
    rule: AdamWRule,
    /// What the card multiplies the gradient by.
    factor: f32,
}

const STEPS: u32 = 5;

impl Course {
    fn new(betas: (f64, f64), moments: Moments) -> Self {
        let tensors = tensors();
        let len = tensors.iter().map(|tensor| tensor.range.end).max().unwrap_or(0) + 3;
        let rule = AdamWRule { betas, eps: 1e-8, weight_decay: 0.05, moments };
        Self { tensors, len, rule, factor: 0.37 }
    }

    /// Large and small numbers.
    fn gradient(&self, step: u32) -> Vec<f32> {
        let noise = noise(self.len, 60 + step).into_iter().enumerate();
        noise.map(|(i, x)| if i % 3 == 0 { x } else { x * x * x * 1e-3 }).collect()
    }

    fn weights(&self) -> Vec<f32> {
        noise(self.len, 59).iter().map(|x| x * 0.05).collect()
    }

    fn lr(&self, tensor: usize) -> f32 {
        1e-3 * (1 + tensor % 2) as f32
    }

    /// A tensor misses every third step, each another.
    fn touches(&self, step: u32, tensor: usize) -> bool {
        !(step as usize + tensor).is_multiple_of(3)
    }

    /// Steps of a tensor up to this one.
    fn count(&self, step: u32, tensor: usize) -> u32 {
        (0..=step).filter(|step| self.touches(*step, tensor)).count() as u32
    }

    /// The weights after all steps; with `resume`, half-way the moments go to another optimizer.
    fn on_card(&self, device: Device, resume: bool) -> Result<Vec<f32>> {
        let mut optimizer = FlatAdamW::new(device, &self.tensors, self.rule)?;
        let mut weights = floats(device, &self.weights())?;
        let clip = floats(device, &[self.factor, 0.])?;
        for step in 0..STEPS {
            if resume && step == STEPS / 2 {
                let moments = optimizer.moments()?;
                optimizer = FlatAdamW::new(device, &self.tensors, self.rule)?;
                optimizer.set_moments(&moments)?;
                if optimizer.moments()? != moments || !self.kept_well(&moments) {
                    return Ok(vec![f32::NAN; self.len]);
                }
            }
            let of = |tensor| (self.lr(tensor), self.count(step, tensor));
            optimizer.set_step(&(0..self.tensors.len()).map(of).collect::<Vec<_>>())?;
            let touched = |tensor| f32::from(self.touches(step, tensor));
            let touched: Vec<f32> = (0..self.tensors.len()).map(touched).collect();
            let gradient = floats(device, &self.gradient(step))?;
            optimizer.step(&mut weights, &gradient, &floats(device, &touched)?, &clip)?;
        }
        weights.to_vec_f32()
    }

    /// Whether moments are in 8 bits just where they should be.
    fn kept_well(&self, moments: &[(HostMoment, HostMoment)]) -> bool {
        let eight = |len: usize| match self.rule.moments {
            Moments::Full => false,
            Moments::Eight { min_size } => len >= min_size,
        };
        self.tensors.iter().zip(moments).all(|(tensor, (first, second))| {
            [first, second].into_iter().all(|moment| match moment {
                HostMoment::Full(values) => {
                    !eight(tensor.range.len()) && values.len() == tensor.range.len()
                }
                HostMoment::Blocks { codes, scales } => {
                    eight(tensor.range.len())
                        && codes.len() == tensor.range.len()
                        && scales.len() == codes.len().div_ceil(BLOCK)
                }
            })
        })
    }
}

/// Beside the CPU's kernel, tensor by tensor.
fn full(device: Device, betas: (f64, f64), resume: bool) -> Result<f32> {
    let course = Course::new(betas, Moments::Full);
    let got = course.on_card(device, resume)?;
    let mut want = floats(Device::Cpu, &course.weights())?;
    let zeros = vec![0.; course.len];
    let (mut m, mut v) = (floats(Device::Cpu, &zeros)?, floats(Device::Cpu, &zeros)?);
    for step in 0..STEPS {
        let scaled: Vec<f32> = course.gradient(step).iter().map(|x| x * course.factor).collect();
        let gradient = floats(Device::Cpu, &scaled)?;
        for (index, tensor) in course.tensors.iter().enumerate() {
            if !course.touches(step, index) {
                continue;
            }
            let p = AdamWStep {
                range: tensor.range.clone(),
                lr: course.lr(index),
                beta1: betas.0,
                beta2: betas.1,
                eps: 1e-8,
                weight_decay: 0.05,
                step: course.count(step, index),
            };
            Device::Cpu.backend().adamw(&p, &mut want, &gradient, (&mut m, &mut v))?;
        }
    }
    Ok(relative_error_of(&got, &want.to_vec_f32()?))
}

/// A moment as bitsandbytes keeps it, in the order of files.
struct Kept {
    values: Vec<f32>,
    signs: Option<Signs>,
}

impl Kept {
    /// Rounds a block as the optimizer leaves it between steps.
    fn store(&mut self, block: std::ops::Range<usize>) {
        let Some(signs) = self.signs else { return };
        let (code, values) = (Code::of(signs), &mut self.values[block]);
        let mut codes = vec![0; values.len()];
        let scale = code.encode(values, &mut codes);
        code.decode(&codes, scale, values);
    }
}

/// Beside the same steps written down plainly: `m = b1·m + (1-b1)·g` and so on, each block of 256
/// rounded to codes after it.
fn eight(device: Device, resume: bool) -> Result<f32> {
    let min_size = 4096;
    let course = Course::new((0.9, 0.999), Moments::Eight { min_size });
    let got = course.on_card(device, resume)?;
    let mut want = course.weights();
    for (index, tensor) in course.tensors.iter().enumerate() {
        let len = tensor.range.len();
        let kept =
            |signs| Kept { values: vec![0.; len], signs: (len >= min_size).then_some(signs) };
        let mut moments = (kept(Signs::Both), kept(Signs::Positive));
        for step in 0..STEPS {
            if course.touches(step, index) {
                let gradient = course.gradient(step);
                let rates = (course.lr(index), course.count(step, index));
                step_eight(&course, tensor, rates, &gradient, (&mut want, &mut moments));
            }
        }
    }
    Ok(relative_error_of(&got, &want))
}

fn step_eight(
    course: &Course,
    tensor: &FlatTensor,
    (lr, step): (f32, u32),
    gradient: &[f32],
    (weights, (first, second)): (&mut [f32], &mut (Kept, Kept)),
) {
    let (beta1, beta2) = course.rule.betas;
    let (lr, correction) = (f64::from(lr), |beta: f64| 1. - beta.powi(step as i32));
    let (step_size, root) = ((lr / correction(beta1)) as f32, correction(beta2).sqrt() as f32);
    let keep = (1. - lr * course.rule.weight_decay) as f32;
    let matrix = tensor.inner * tensor.window;
    for in_file in 0..tensor.range.len() {
        let (row, rest) = (in_file / matrix, in_file % matrix);
        let (channel, pixel) = (rest / tensor.window, rest % tensor.window);
        let at = tensor.range.start + row * matrix + pixel * tensor.inner + channel;
        let g = gradient[at] * course.factor;
        let (m, v) = (&mut first.values[in_file], &mut second.values[in_file]);
        *m = *m * beta1 as f32 + (1. - beta1) as f32 * g;
        *v = *v * beta2 as f32 + (1. - beta2) as f32 * g * g;
        weights[at] = weights[at] * keep - step_size * *m / (v.sqrt() / root + 1e-8);
    }
    for start in (0..tensor.range.len()).step_by(BLOCK) {
        let block = start..(start + BLOCK).min(tensor.range.len());
        first.store(block.clone());
        second.store(block);
    }
}

/// Weights and moments must be the same bits after a step with a NaN factor.
fn stays(device: Device) -> Result<f32> {
    for moments in [Moments::Full, Moments::Eight { min_size: 4096 }] {
        let course = Course::new((0.9, 0.999), moments);
        let mut optimizer = FlatAdamW::new(device, &course.tensors, course.rule)?;
        let mut weights = floats(device, &course.weights())?;
        let touched = floats(device, &vec![1.; course.tensors.len()])?;
        optimizer.set_step(&vec![(1e-3, 1); course.tensors.len()])?;
        let gradient = floats(device, &course.gradient(0))?;
        let one = floats(device, &[1., 1.])?;
        optimizer.step(&mut weights, &gradient, &touched, &one)?;
        let before = (weights.to_vec_f32()?, optimizer.moments()?);
        let mut bad = course.gradient(1);
        bad[4000] = f32::NAN;
        let bad = floats(device, &bad)?;
        let clip = clip_factor(&bad, &floats(device, &[1.])?, 1.)?;
        optimizer.step(&mut weights, &bad, &touched, &clip)?;
        let after = (weights.to_vec_f32()?, optimizer.moments()?);
        if before.0 == course.weights() || before != after {
            return Ok(f32::INFINITY);
        }
    }
    Ok(0.)
}
