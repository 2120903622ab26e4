//! `--allow_nan`: weights that are not finite are named and refused, unless asked for.

use std::path::Path;

use clap::Args;
use formats::{Dtype, extend_f32};

/// What to do with values that are not finite.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct FiniteRule {
    /// Go on when weights hold NaN or infinity, which are refused otherwise
    #[arg(long = "allow_nan")]
    pub allow_nan: bool,
}

impl FiniteRule {
    /// Checks the values of the tensor `name` of `path`.
    ///
    /// # Errors
    /// Names the file, the tensor, the first bad value and its place.
    pub fn check(self, path: &Path, name: &str, values: &[f32]) -> anyhow::Result<()> {
        self.check_block(path, name, 0, values)
    }

    /// Checks some values of a tensor, the first of which is the `first` of all.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_block(
        self,
        path: &Path,
        name: &str,
        first: usize,
        values: &[f32],
    ) -> anyhow::Result<()> {
        // Without a way out of the loop, so that it is done many values at a time.
        if self.allow_nan || values.iter().fold(true, |all, value| all & value.is_finite()) {
            return Ok(());
        }
        let place = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
        let count = values.iter().filter(|value| !value.is_finite()).count();
        anyhow::bail!(
            "`{}` holds {count} values that are not finite in `{name}`, the first at {}: {}\n\
             hint: the file is damaged or its training failed; `--allow_nan` goes on all the same",
            path.display(),
            first + place,
            values[place]
        )
    }

    /// As [`Self::check_block`] for values as they lie in a file.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_bytes(
        self,
        path: &Path,
        name: &str,
        first: usize,
        (dtype, bytes): (Dtype, &[u8]),
    ) -> anyhow::Result<()> {
        // All bits of the exponent are set in infinities and NaN alone.
        let halves = |exponent: u16| {
            let halves = bytes.as_chunks::<2>().0.iter();
            halves.fold(true, |all, b| all & (u16::from_le_bytes(*b) & exponent != exponent))
        };
        let finite = match dtype {
            Dtype::F16 => halves(0x7c00),
            Dtype::BF16 => halves(0x7f80),
            _ => false,
        };
        if self.allow_nan || finite {
            return Ok(());
        }
        let mut values = Vec::new();
        extend_f32(dtype, bytes, &mut values);
        self.check_block(path, name, first, &values)
    }
}

#[cfg(test)]
mod tests {
    use formats::bytes_from_f32;

    use super::*;

    #[test]
    fn the_first_bad_value_is_found_in_every_type() {
        let (good, path) = (FiniteRule::default(), Path::new("x"));
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64] {
            let mut values = vec![-60000.0_f32; 100];
            let bytes = bytes_from_f32(&values, dtype).unwrap();
            good.check_bytes(path, "w", 0, (dtype, &bytes)).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[7] = bad;
                let bytes = bytes_from_f32(&values, dtype).unwrap();
                let error = good.check_bytes(path, "w", 1000, (dtype, &bytes)).unwrap_err();
                let text = error.to_string();
                assert!(text.contains("in `w`, the first at 1007: "), "{text}");
                let rule = FiniteRule { allow_nan: true };
                rule.check_bytes(path, "w", 0, (dtype, &bytes)).unwrap();
            }
        }
    }
}
