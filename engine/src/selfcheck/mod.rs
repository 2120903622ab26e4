//! Operations of a card against the CPU's: the same numbers in, nearly the same out.
//!
//! Part of the program, so that a machine with a card can say whether its results are right. Inputs
//! are rounded to the card's element type first; the reference then computes with them in f32.

mod attention;
mod compose;
mod conv;
mod layout;
mod loss;
mod matmul;
mod norm;
mod optimizer;
mod packed;
mod pointwise;
mod segment;

use half::{bf16, f16};

use crate::{DType, Device, EngineError, Result, Tensor};

/// One operation on one element type and shape.
pub struct Check {
    /// `kind operation shape type`.
    pub name: String,
    /// The relative error of the results on a device, by [`relative_error`].
    pub run: Box<dyn Fn(Device) -> Result<f32> + Send + Sync>,
    /// Largest relative error of a right implementation.
    pub tolerance: f32,
    /// Too much work for an emulated card.
    pub big: bool,
}

impl Check {
    /// A check that every device can do.
    pub fn new(
        name: impl Into<String>,
        tolerance: f32,
        run: impl Fn(Device) -> Result<f32> + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), run: Box::new(run), tolerance, big: false }
    }

    /// The same, for real cards alone.
    pub fn big(self) -> Self {
        Self { big: true, ..self }
    }

    /// `None` if the results on `device` are right, else what is wrong with them.
    pub fn failure(&self, device: Device) -> Option<String> {
        match (self.run)(device) {
            Ok(error) if error <= self.tolerance => None,
            Ok(error) => {
                Some(format!("{}: relative error {error:.2e} > {:.0e}", self.name, self.tolerance))
            }
            Err(error) => Some(format!("{}: {error}", self.name)),
        }
    }
}

/// All checks, small and big.
pub fn all() -> Vec<Check> {
    let kinds = [
        attention::checks,
        pointwise::checks,
        layout::checks,
        matmul::checks,
        packed::checks,
        conv::checks,
        compose::checks,
        norm::checks,
        loss::checks,
        optimizer::checks,
        segment::checks,
    ];
    kinds.into_iter().flat_map(|checks| checks()).collect()
}

/// Element types of a card's arithmetic with the tolerance of an operation that rounds its result
/// once: a few units of the type's last place.
pub const TYPES: [(DType, f32); 3] = [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)];

/// The same check for each of [`TYPES`], `loosened` times as tolerant.
pub fn for_types(
    name: &str,
    loosened: f32,
    run: impl Fn(Device, DType) -> Result<f32> + Clone + Send + Sync + 'static,
) -> Vec<Check> {
    TYPES
        .into_iter()
        .map(|(dtype, tolerance)| {
            let run = run.clone();
            let name = format!("{name} {}", dtype.suffix());
            Check::new(name, loosened * tolerance, move |device| run(device, dtype))
        })
        .collect()
}

/// Reproducible numbers, nearly normal with deviation 1.
pub fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| next() + next() + next()).collect()
}

/// [`noise`] as an f32 tensor on the CPU.
pub fn random(shape: &[usize], seed: u32) -> Result<Tensor> {
    let data = noise(shape.iter().product(), seed);
    Tensor::from_f32(Device::Cpu, shape, &data, DType::F32)
}

/// The tensor on `device` as `dtype`, and what of it that type can hold, in f32 on the CPU.
pub fn on_both(device: Device, x: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
    let rounded: Vec<f32> = x.to_vec_f32()?.into_iter().map(|x| rounded(x, dtype)).collect();
    let there = Tensor::from_f32(device, x.shape(), &rounded, dtype)?;
    Ok((there, Tensor::from_f32(Device::Cpu, x.shape(), &rounded, DType::F32)?))
}

/// [`random`] numbers [`on_both`] sides.
pub fn random_on_both(
    device: Device,
    shape: &[usize],
    seed: u32,
    dtype: DType,
) -> Result<(Tensor, Tensor)> {
    on_both(device, &random(shape, seed)?, dtype)
}

/// The nearest number of a type with 16 bits or more.
pub fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Largest difference, relative to the largest number wanted; infinite if anything is not finite. The
/// shapes must be the same.
pub fn relative_error(got: &Tensor, want: &Tensor) -> Result<f32> {
    if got.shape() != want.shape() {
        let detail = format!("{:?} instead of {:?}", got.shape(), want.shape());
        return Err(EngineError::shape("selfcheck", detail));
    }
    Ok(relative_error_of(&got.to_vec_f32()?, &want.to_vec_f32()?))
}

/// [`relative_error`] of plain numbers of one length.
pub fn relative_error_of(got: &[f32], want: &[f32]) -> f32 {
    let largest = want.iter().fold(f32::MIN_POSITIVE, |max, x| max.max(x.abs()));
    let mut worst = 0_f32;
    for (got, want) in got.iter().zip(want) {
        let error = (got - want).abs() / largest;
        // Also where one of them is NaN.
        if !error.is_finite() {
            return f32::INFINITY;
        }
        worst = worst.max(error);
    }
    worst
}

/// The largest [`relative_error`] of several results.
pub fn worst_error<const N: usize>(pairs: [(&Tensor, &Tensor); N]) -> Result<f32> {
    pairs
        .into_iter()
        .try_fold(0_f32, |worst, (got, want)| Ok(worst.max(relative_error(got, want)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_largest_and_never_hide_nan() {
        assert_eq!(relative_error_of(&[1., 2.5], &[1., 2.]), 0.25);
        assert_eq!(relative_error_of(&[1., f32::NAN], &[1., 2.]), f32::INFINITY);
        assert_eq!(relative_error_of(&[0.], &[0.]), 0.);
    }

    #[test]
    fn a_check_says_what_is_wrong() {
        let check = |error: f32| Check::new("add f32", 0.1, move |_| Ok(error));
        assert_eq!(check(0.05).failure(Device::Cpu), None);
        let text = check(0.5).failure(Device::Cpu).unwrap();
        assert!(text.contains("add f32: relative error 5.00e-1"), "{text}");
        assert!(check(f32::NAN).failure(Device::Cpu).is_some());
    }
}
