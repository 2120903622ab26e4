//! exp, the normal distribution and the activations made of them, without branches so that loops
//! over them become vector code.
//!
//! Measured against f64 in the tests below: [`exp`] within 2 ulp, [`gelu`]'s distribution function
//! within 2e-7 absolute and 4e-6 relative far into the lower tail.

use std::f32::consts::LOG2_E;

/// Arguments below give 0, which also keeps the power of two a normal number.
const EXP_MIN: f32 = -87.;
/// Arguments above are treated as this.
const EXP_MAX: f32 = 88.;
/// Adding it to a small number rounds that to an integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.;
/// ln 2 in two parts; the first has few enough bits that multiples of it are exact.
const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);

/// `e^x`, to 2 ulp: reduction to `±ln2/2` and the polynomial of Cephes' `expf`.
///
/// Below -87 the result is 0, above 88 it stays at `e^88`; not-a-number stays so.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let limited = if x > EXP_MAX { EXP_MAX } else { x };
    let shifted = limited.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2.1, n.mul_add(-LN2.0, limited));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_66);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < EXP_MIN { 0. } else { p * power }
}

/// `2^x` for `x` up to 127, to 2 ulp: a minimax polynomial (9.2e-8 relative) on `±1/2`.
///
/// Below -126 the result is 0; not-a-number stays so. For a softmax, whose arguments are not
/// positive and have the base folded into their scale.
#[inline(always)]
#[expect(clippy::approx_constant, reason = "a coefficient of the fit, near ln 2 but not it")]
pub(super) fn exp2(x: f32) -> f32 {
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let p = 1.326_469_8e-3f32;
    let p = p.mul_add(r, 9.671_534e-3);
    let p = p.mul_add(r, 5.550_734e-2);
    let p = p.mul_add(r, 0.240_222_42);
    let p = p.mul_add(r, 0.693_147);
    let p = p.mul_add(r, 1.);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -126. { 0. } else { p * power }
}

/// `1/(1+e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1. / (1. + exp(-x))
}

/// `x·sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Derivative of [`silu`].
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1. + x * (1. - s))
}

/// `x·sigmoid(1.702x)`.
#[inline(always)]
pub(super) fn quick_gelu(x: f32) -> f32 {
    x * sigmoid(1.702 * x)
}

/// Derivative of [`quick_gelu`].
#[inline(always)]
pub(super) fn quick_gelu_slope(x: f32) -> f32 {
    let s = sigmoid(1.702 * x);
    s * (1. + 1.702 * x * (1. - s))
}

/// Coefficients of `t` to `t^10` in `Φ(-u)·e^(u²/2)` with `t = 1/(1+0.24u)`, `u >= 0`.
///
/// A minimax fit of the relative error (3.1e-9 in exact arithmetic) by weighted least squares on
/// 400 Chebyshev points for `u` up to 13.5.
const TAIL: [f32; 10] = [
    0.095_742_87,
    0.095_843_315,
    0.089_039_66,
    0.087_313_49,
    0.029_347_223,
    0.139_396_98,
    -0.141_971_41,
    0.203_864_8,
    -0.123_990_156,
    0.025_413_234,
];

/// `Φ(x)` of the normal distribution, and `e^(-x²/2)`.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let u = x.abs();
    let t = 1. / u.mul_add(0.24, 1.);
    let mut p = TAIL[9];
    for i in (0..9).rev() {
        p = p.mul_add(t, TAIL[i]);
    }
    let bell = exp(-0.5 * u * u);
    let tail = p * t * bell;
    (if x > 0. { 1. - tail } else { tail }, bell)
}

/// `x·Φ(x)`.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * normal(x).0
}

/// [`gelu`] and its derivative.
#[inline(always)]
pub(super) fn gelu_and_slope(x: f32) -> (f32, f32) {
    /// `1/√(2π)`.
    const DENSITY: f32 = 0.398_942_3;
    let (phi, bell) = normal(x);
    (x * phi, (x * DENSITY).mul_add(bell, phi))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points() -> impl Iterator<Item = f32> {
        (-40_000..=40_000).map(|i| i as f32 * 0.000_5)
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for x in points().map(|x| 4.3 * x) {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            if x < EXP_MIN {
                assert_eq!(got, 0.);
            } else if x <= EXP_MAX {
                assert!(
                    (got / want - 1.).abs() < 2. * f64::from(f32::EPSILON),
                    "{x}: {got} {want}"
                );
            }
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.);
        assert_eq!(exp(0.), 1.);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_two_ulp() {
        for x in points().map(|x| 6.4 * x).filter(|x| *x < 127.) {
            let (got, want) = (f64::from(exp2(x)), f64::from(x).exp2());
            if x < -126. {
                assert_eq!(got, 0.);
            } else {
                assert!(
                    (got / want - 1.).abs() < 2. * f64::from(f32::EPSILON),
                    "{x}: {got} {want}"
                );
            }
        }
        assert_eq!(exp2(f32::NEG_INFINITY), 0.);
        assert_eq!(exp2(0.), 1.);
        assert!(exp2(f32::NAN).is_nan());
    }

    /// `Φ(x)` in f64 by the series of erf near 0 and the continued fraction of erfc far out.
    fn reference_normal(x: f64) -> f64 {
        let z = x.abs() / std::f64::consts::SQRT_2;
        let upper = if z < 3. {
            let (mut term, mut sum) = (z, z);
            for n in 1..120 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            1. - 2. / std::f64::consts::PI.sqrt() * sum
        } else {
            let fraction = (1..200).rev().fold(0., |f, n| f64::from(n) / 2. / (z + f));
            (-z * z).exp() / std::f64::consts::PI.sqrt() / (z + fraction)
        };
        if x < 0. { 0.5 * upper } else { 1. - 0.5 * upper }
    }

    #[test]
    fn the_normal_distribution_holds_to_single_precision() {
        for x in points() {
            let (got, want) = (f64::from(normal(x).0), reference_normal(f64::from(x)));
            assert!((got - want).abs() < 2e-7, "{x}: {got} {want}");
            if x > -12. {
                assert!((got / want - 1.).abs() < 8e-6, "{x}: {got} {want}");
            }
        }
    }

    #[test]
    fn slopes_match_differences() {
        let step = 1e-3f64;
        type Pair = (fn(f64) -> f64, fn(f32) -> f32);
        let pairs: [Pair; 3] = [
            (|x| x / (1. + (-x).exp()), silu_slope),
            (|x| x / (1. + (-1.702 * x).exp()), quick_gelu_slope),
            (|x| x * reference_normal(x), |x| gelu_and_slope(x).1),
        ];
        for (f, slope) in pairs {
            for x in (-60..=60).map(|i| f64::from(i) * 0.1) {
                let want = (f(x + step) - f(x - step)) / (2. * step);
                let got = f64::from(slope(x as f32));
                assert!((got - want).abs() < 2e-6, "{x}: {got} {want}");
            }
        }
    }
}
