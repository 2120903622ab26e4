//! How far a result may be from its reference, and the line that says how far it is.

/// Which rule a comparison follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `|a-b| / |b|` over the whole tensor (or number).
    Distance(f64),
    /// The norms differ by at most this part, and the cosine is at least `1 - 1e-5`.
    Gradient(f64),
}

/// Forward results: float32 against float32 in another order of sums.
pub const FORWARD: Rule = Rule::Distance(1e-4);
/// Gradients of LoRA tensors.
pub const GRADIENT: Rule = Rule::Gradient(1e-3);
/// Norm of all gradients together.
pub const GRADIENT_NORM: Rule = Rule::Distance(1e-3);
/// Weights after optimizer steps.
pub const WEIGHTS: Rule = Rule::Distance(1e-4);

/// Smallest cosine of two gradients.
const MIN_COSINE: f64 = 0.99999;
/// A tensor whose entries all lie below this many times the reference's own rounding error (its
/// difference between f32 and f64) is compared in units of that error.
const FLOOR_FACTOR: f64 = 20.;

/// All comparisons of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Number of comparisons.
    pub compared: usize,
    /// Names of those that failed.
    pub failed: Vec<String>,
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// The relative figures of two tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    distance: f64,
    norm_error: f64,
    cosine: f64,
}

fn figures(got: &[f32], want: &[f32]) -> Figures {
    let wide = |v: &f32| f64::from(*v);
    let (a, b) = (norm(got.iter().map(wide)), norm(want.iter().map(wide)));
    let difference = norm(got.iter().zip(want).map(|(x, y)| wide(x) - wide(y)));
    let dot: f64 = got.iter().zip(want).map(|(x, y)| wide(x) * wide(y)).sum();
    if difference == 0. {
        return Figures { distance: 0., norm_error: 0., cosine: 1. };
    }
    Figures { distance: difference / b, norm_error: (a - b).abs() / b, cosine: dot / (a * b) }
}

impl Report {
    /// Compares and prints a line; `noise` is the largest rounding error of the reference's own
    /// values, 0 where unknown.
    pub fn check(&mut self, name: &str, got: &[f32], want: &[f32], rule: Rule, noise: f64) {
        self.compared += 1;
        let (holds, line) = judge(got, want, rule, noise);
        let mark = if holds { "ok  " } else { "FAIL" };
        if !holds {
            self.failed.push(name.to_owned());
        }
        crate::console::data(&format!("{mark} {name}: {line}"));
    }

    /// Notes a failure that is no comparison of numbers.
    pub fn fail(&mut self, name: &str, reason: &str) {
        self.compared += 1;
        self.failed.push(name.to_owned());
        crate::console::data(&format!("FAIL {name}: {reason}"));
    }
}

fn judge(got: &[f32], want: &[f32], rule: Rule, noise: f64) -> (bool, String) {
    if got.len() != want.len() {
        return (false, format!("{} elements, the reference has: {}", got.len(), want.len()));
    }
    if got.iter().any(|x| !x.is_finite()) {
        return (false, "not finite".to_owned());
    }
    let largest = want.iter().fold(0_f64, |m, x| m.max(f64::from(x.abs())));
    if noise > 0. && largest <= FLOOR_FACTOR * noise {
        let pairs = got.iter().zip(want);
        let error = pairs.fold(0_f64, |m, (x, y)| m.max(f64::from((x - y).abs())));
        let allowed = 2. * FLOOR_FACTOR * noise;
        return (
            error <= allowed,
            format!("largest difference {error:.1e} (rounding only, at most {allowed:.1e})"),
        );
    }
    let f = figures(got, want);
    match rule {
        Rule::Distance(limit) => (
            f.distance <= limit,
            format!("relative error {:.1e} (at most {limit:.0e})", f.distance),
        ),
        Rule::Gradient(limit) => (
            f.norm_error <= limit && f.cosine >= MIN_COSINE,
            format!(
                "norm error {:.1e} (at most {limit:.0e}), 1 - cosine {:.1e} (at most {:.0e})",
                f.norm_error,
                1. - f.cosine,
                1. - MIN_COSINE
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_number_fails() {
        let want = [1., 2., 3.];
        assert!(judge(&want, &want, FORWARD, 0.).0);
        assert!(!judge(&[1., 2., 3.001], &want, FORWARD, 0.).0);
        assert!(!judge(&[1., 2., 3.1], &want, GRADIENT, 0.).0);
        assert!(!judge(&[1., 2.], &want, GRADIENT, 0.).0);
        assert!(!judge(&[f32::NAN, 2., 3.], &want, GRADIENT, 0.).0);
        assert!(!judge(&[f32::NAN, 2., 3.], &want, FORWARD, 1.).0);
    }

    #[test]
    fn noise_is_compared_as_noise() {
        let want = [1e-9, -1e-9];
        assert!(judge(&[-1e-9, 2e-9], &want, GRADIENT, 1e-9).0);
        assert!(!judge(&[1e-6, 2e-9], &want, GRADIENT, 1e-9).0);
    }

    #[test]
    fn zero_equals_zero_only() {
        assert!(judge(&[0., 0.], &[0., 0.], GRADIENT, 0.).0);
        assert!(!judge(&[1e-9, 0.], &[0., 0.], GRADIENT, 0.).0);
    }
}
