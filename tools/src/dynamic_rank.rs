//! Ranks chosen by singular values, with the rules of sd-scripts' `resize_lora.py`.

use clap::ValueEnum;

use crate::Usage;

/// Below this a matrix counts as zero and keeps rank 1.
const SMALLEST: f64 = 1e-6;

/// What a rank is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DynamicMethod {
    /// Keep the singular values above the largest divided by `dynamic_param`
    #[value(name = "sv_ratio")]
    Ratio,
    /// Keep this share of the Frobenius norm
    #[value(name = "sv_fro")]
    Frobenius,
    /// Keep this share of the sum of the singular values
    #[value(name = "sv_cumulative")]
    Cumulative,
}

impl DynamicMethod {
    /// As it is spelt in options and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ratio => "sv_ratio",
            Self::Frobenius => "sv_fro",
            Self::Cumulative => "sv_cumulative",
        }
    }
}

/// `--dynamic_method` with its `--dynamic_param`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rule {
    /// What counts.
    pub method: DynamicMethod,
    /// How much of it.
    pub target: f64,
}

impl Rule {
    /// From the two options; `None` without a method.
    ///
    /// # Errors
    /// A [`Usage`] when the number is missing or cannot be meant.
    pub fn from_options(
        method: Option<DynamicMethod>,
        target: Option<f64>,
    ) -> Result<Option<Self>, Usage> {
        let Some(method) = method else {
            return match target {
                None => Ok(None),
                Some(target) => Err(Usage(format!(
                    "`dynamic_param` is given without `dynamic_method`: {target}\nhint: add \
                     `--dynamic_method sv_ratio`, `sv_fro` or `sv_cumulative`"
                ))),
            };
        };
        let (range, meant) = match method {
            DynamicMethod::Ratio => ("1 or more", 1.0..=f64::MAX),
            DynamicMethod::Frobenius | DynamicMethod::Cumulative => {
                ("above 0 and at most 1", f64::MIN_POSITIVE..=1.0)
            }
        };
        let name = method.name();
        match target {
            Some(target) if meant.contains(&target) => Ok(Some(Self { method, target })),
            Some(target) => Err(Usage(format!(
                "`dynamic_param` of `{name}` should be {range}, it is: {target}"
            ))),
            None => Err(Usage(format!(
                "`dynamic_method` needs `dynamic_param`, which is missing: `{name}`\nhint: for \
                 `{name}` it is a number {range}"
            ))),
        }
    }

    /// The rank that the rule alone wants, for a matrix whose smaller side is `length`.
    fn rank(self, spectrum: &Spectrum<'_>) -> usize {
        let leading = spectrum.leading;
        let place_of = |value: fn(f64) -> f64, whole: f64, share: f64| {
            let mut sum = 0.0;
            let reached = leading.iter().position(|s| {
                sum += value(*s);
                sum / whole >= share
            });
            reached.unwrap_or(spectrum.length) + 1
        };
        let index = match self.method {
            DynamicMethod::Ratio => {
                let least = leading.first().copied().unwrap_or(0.0) / self.target;
                leading.iter().filter(|s| **s > least).count()
            }
            DynamicMethod::Frobenius => {
                place_of(|s| s * s, spectrum.energy, self.target * self.target)
            }
            DynamicMethod::Cumulative => place_of(|s| s, spectrum.sum, self.target),
        };
        // sd-scripts holds the index within the matrix, then adds 1 to it.
        index.min(spectrum.length - 1).max(1) + 1
    }
}

/// What is known of a matrix's singular values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spectrum<'a> {
    /// The largest, falling; those after them are 0 or too small to matter for the rule.
    pub leading: &'a [f64],
    /// How many there are in all: the matrix's smaller side.
    pub length: usize,
    /// Sum of all squares.
    pub energy: f64,
    /// Sum of all.
    pub sum: f64,
}

impl Spectrum<'_> {
    /// The rank that is kept: by `rule`, or `most` without one; `most` at most, 1 for a zero matrix.
    pub fn rank(&self, rule: Option<Rule>, most: usize) -> usize {
        let most = most.min(self.length);
        if self.leading.first().is_none_or(|s| *s <= SMALLEST) {
            return 1.min(most);
        }
        rule.map_or(most, |rule| rule.rank(self).min(most))
    }

    /// (share of the sum, share of the norm, largest value beside the last kept) of `rank` values.
    pub fn kept(&self, rank: usize) -> (f64, f64, f64) {
        let kept = &self.leading[..rank.min(self.leading.len())];
        let squares: f64 = kept.iter().map(|s| s * s).sum();
        let first = self.leading.first().copied().unwrap_or(0.0);
        let last = self.leading.get(rank.saturating_sub(1)).copied().unwrap_or(0.0);
        (kept.iter().sum::<f64>() / self.sum, (squares / self.energy).sqrt(), first / last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(values: &[f64], length: usize, method: DynamicMethod, target: f64) -> usize {
        let spectrum = Spectrum {
            leading: values,
            length,
            energy: values.iter().map(|s| s * s).sum(),
            sum: values.iter().sum(),
        };
        let rule = Rule::from_options(Some(method), Some(target)).unwrap();
        spectrum.rank(rule, 6)
    }

    #[test]
    fn ranks_are_those_of_the_reference() {
        // Values of resize_lora.py's index functions on these spectra, plus one.
        let falling = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0];
        use DynamicMethod::{Cumulative, Frobenius, Ratio};
        for (method, target, expected) in [
            (Ratio, 2.0, 2),
            (Ratio, 5.0, 4),
            (Ratio, 100.0, 6),
            (Frobenius, 0.85, 2),
            (Frobenius, 0.9, 3),
            (Frobenius, 0.99, 4),
            (Cumulative, 0.5, 2),
            (Cumulative, 0.75, 3),
            (Cumulative, 0.95, 5),
        ] {
            assert_eq!(rank(&falling, 8, method, target), expected, "{method:?} {target}");
        }
        // The index stays below the smaller side.
        assert_eq!(rank(&[1.0, 1.0], 2, Frobenius, 1.0), 2);
        assert_eq!(rank(&[1.0], 1, Frobenius, 1.0), 1);
        // A matrix of nothing keeps one rank.
        assert_eq!(rank(&[1e-7, 1e-8], 9, Ratio, 100.0), 1);
        assert_eq!(rank(&[0.0, 0.0], 9, Cumulative, 0.9), 1);
    }

    #[test]
    fn what_is_kept_is_told() {
        let spectrum = Spectrum { leading: &[3.0, 1.0], length: 4, energy: 10.0, sum: 4.0 };
        let (sum, norm, ratio) = spectrum.kept(1);
        assert_eq!((sum, ratio), (0.75, 1.0));
        assert!((norm - 0.9_f64.sqrt()).abs() < 1e-12);
        assert_eq!(spectrum.kept(3).2, f64::INFINITY);
    }

    #[test]
    fn options_that_cannot_be_meant_are_refused() {
        use DynamicMethod::{Frobenius, Ratio};
        for (method, target, word) in [
            (Some(Ratio), None, "dynamic_param"),
            (Some(Ratio), Some(0.5), "0.5"),
            (Some(Frobenius), Some(1.5), "1.5"),
            (Some(Frobenius), Some(0.0), "0"),
            (None, Some(0.5), "dynamic_method"),
        ] {
            let error = Rule::from_options(method, target).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(Rule::from_options(None, None).unwrap(), None);
    }
}
