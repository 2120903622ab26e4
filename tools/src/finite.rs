//! `--allow_nan`: weights that are not finite are named and refused, unless asked for.

use std::path::Path;

use clap::Args;

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
        if self.allow_nan {
            return Ok(());
        }
        let Some(place) = values.iter().position(|value| !value.is_finite()) else {
            return Ok(());
        };
        let count = values.iter().filter(|value| !value.is_finite()).count();
        anyhow::bail!(
            "`{}` holds {count} values that are not finite in `{name}`, the first at {place}: {}\n\
             hint: the file is damaged or its training failed; `--allow_nan` goes on all the same",
            path.display(),
            values[place]
        )
    }
}
