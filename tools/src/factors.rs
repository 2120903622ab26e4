//! The two factors of a module as tools make them, and how they become tensors of a LoRA file.

use formats::lora_file::Tensors;
use formats::{Dtype, OwnedTensor};

use crate::Usage;
use crate::linalg::Svd;
use crate::matrix::Matrix;

/// `up * down`, with what the product is multiplied by.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    /// `[out, rank]`
    pub up: Matrix,
    /// `[rank, in*kh*kw]`
    pub down: Matrix,
    /// The product is multiplied by `alpha / rank`.
    pub alpha: f32,
}

impl Factors {
    /// `U * S` and `V^T` of the first `rank` values.
    pub fn of_svd(svd: &Svd, rank: usize, alpha: f32) -> Self {
        Self { up: svd.up(rank), down: svd.down(rank), alpha }
    }

    /// Cuts off the values of both factors beyond their common `quantile`.
    ///
    /// sd-scripts takes the quantile of the values with their signs, which singular vectors have at
    /// random: the same difference gives limits that differ by percents. Here it is that of the
    /// values and their negatives, the mean over all choices of signs; 1 cuts nothing off.
    pub fn clamp(&mut self, quantile: Quantile) {
        let magnitudes = self.up.values.iter().chain(&self.down.values).map(|value| value.abs());
        let limit = quantile.of_symmetric(magnitudes.collect());
        for value in self.up.values.iter_mut().chain(&mut self.down.values) {
            *value = value.clamp(-limit, limit);
        }
    }

    /// Puts the three tensors of the module `name` into `tensors`, rounded to `dtype`. `layer` is
    /// the layer's shape, `[out, in]` or `[out, in, kh, kw]`.
    ///
    /// # Errors
    /// A `dtype` that is no float.
    pub fn insert_into(
        &self,
        tensors: &mut Tensors,
        name: &str,
        layer: &[usize],
        dtype: Dtype,
    ) -> anyhow::Result<()> {
        let rank = self.down.rows;
        let (mut up, mut down) = (vec![self.up.rows, rank], vec![rank]);
        down.extend(&layer[1..]);
        up.resize(layer.len(), 1);
        let parts = [
            ("lora_up.weight", up, self.up.values.as_slice()),
            ("lora_down.weight", down, self.down.values.as_slice()),
            ("alpha", Vec::new(), &[self.alpha]),
        ];
        for (ending, shape, values) in parts {
            let tensor = OwnedTensor::from_f32(&shape, values, dtype)?;
            tensors.insert(format!("{name}.{ending}"), tensor);
        }
        Ok(())
    }
}

/// `--clamp_quantile`: above 0.5, at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quantile(f64);

impl Quantile {
    /// Checks the option.
    ///
    /// # Errors
    /// A [`Usage`] for a value outside of its range.
    pub fn new(value: f64) -> Result<Self, Usage> {
        if value > 0.5 && value <= 1.0 {
            return Ok(Self(value));
        }
        Err(Usage(format!(
            "`clamp_quantile` should be above 0.5 and at most 1, it is: {value}\nhint: 0.99 cuts off \
             the outermost hundredth of the values, 1 cuts off nothing"
        )))
    }

    /// The quantile of numbers of these magnitudes and their negatives, interpolated as
    /// `torch.quantile` does.
    fn of_symmetric(self, mut magnitudes: Vec<f32>) -> f32 {
        let count = magnitudes.len();
        if count == 0 {
            return 0.0;
        }
        // Of 2n sorted numbers the magnitudes are the upper n.
        let place = self.0 * (2 * count - 1) as f64 - count as f64;
        let lower = place.floor();
        // Below the smallest magnitude lies its negative: only 0.5 or one number lead there.
        let lower_at = lower.max(0.0) as usize;
        let (_, low, above) = magnitudes.select_nth_unstable_by(lower_at, f32::total_cmp);
        let low = if lower < 0.0 { -*low } else { *low };
        let high = if lower < 0.0 {
            -low
        } else {
            above.iter().copied().fold(f32::INFINITY, f32::min).min(f32::MAX)
        };
        let share = (place - lower) as f32;
        if share == 0.0 { low } else { low + share * (high - low) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_is_that_of_values_and_negatives() {
        // torch.quantile of [-4, -3, -2, -1, 1, 2, 3, 4].
        let magnitudes = || vec![3.0, 1.0, 4.0, 2.0];
        for (quantile, expected) in [(0.99, 3.93), (0.8, 2.6), (1.0, 4.0), (0.55, 0.7)] {
            let found = Quantile::new(quantile).unwrap().of_symmetric(magnitudes());
            assert!((found - expected).abs() < 1e-5, "{quantile}: {found} {expected}");
        }
        assert!((Quantile::new(0.9).unwrap().of_symmetric(vec![2.0]) - 1.6).abs() < 1e-6);
        for bad in [0.0, 0.5, 1.01, f64::NAN] {
            assert!(Quantile::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn factors_are_cut_off_at_one_limit_on_both_sides() {
        let up = Matrix::new(2, 1, vec![-4.0, 1.0]);
        let down = Matrix::new(1, 2, vec![3.0, 2.0]);
        let mut factors = Factors { up, down, alpha: 1.0 };
        factors.clamp(Quantile::new(1.0).unwrap());
        assert_eq!(factors.up.values, [-4.0, 1.0]);
        factors.clamp(Quantile::new(0.8).unwrap());
        assert!(
            (factors.up.values[0] + 2.6).abs() < 1e-6
                && (factors.down.values[0] - 2.6).abs() < 1e-6
        );
        assert_eq!((factors.up.values[1], factors.down.values[1]), (1.0, 2.0));
    }

    #[test]
    fn shapes_follow_the_layer() {
        let shapes = |layer: &[usize], inputs: usize| {
            let up = Matrix::zeros(6, 2);
            let factors = Factors { up, down: Matrix::zeros(2, inputs), alpha: 2.0 };
            let mut tensors = Tensors::new();
            factors.insert_into(&mut tensors, "m", layer, Dtype::F16).unwrap();
            assert_eq!(tensors["m.alpha"].shape, [0_usize; 0]);
            let shape = |key: &str| tensors[key].shape.clone();
            (shape("m.lora_up.weight"), shape("m.lora_down.weight"))
        };
        assert_eq!(shapes(&[6, 4], 4), (vec![6, 2], vec![2, 4]));
        assert_eq!(shapes(&[6, 4, 3, 3], 36), (vec![6, 2, 1, 1], vec![2, 4, 3, 3]));
    }
}
