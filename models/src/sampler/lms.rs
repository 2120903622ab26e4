//! Linear multistep of order 4 in σ (Adams-Bashforth with unequal steps, as in k-diffusion).
//!
//! A run that starts in the middle begins with order 1. diffusers would take the coefficients of
//! order 4 there for slopes that it does not have.

use std::collections::VecDeque;

use super::evaluation::Evaluation;
use super::level::{Level, blend};

const ORDER: usize = 4;

/// The last slopes, newest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Lms {
    slopes: VecDeque<Vec<f32>>,
}

impl Lms {
    pub(super) fn step(&mut self, at: &Evaluation<'_>, levels: &[Level]) -> Vec<f32> {
        self.slopes.push_front(at.unit_noise());
        self.slopes.truncate(ORDER);
        let nodes: Vec<f64> =
            (0..self.slopes.len()).map(|back| levels[at.index - back].noise).collect();
        let mut parts = vec![(1., at.latents)];
        for (node, slope) in self.slopes.iter().enumerate() {
            parts.push((integral(&nodes, node, at.here.noise, at.next.noise), slope));
        }
        blend(&parts)
    }
}

/// Integral from `from` to `to` of the polynomial that is 1 at one node and 0 at the others. Gauss
/// and Legendre's two points are exact to degree 3, which four nodes have.
fn integral(nodes: &[f64], node: usize, from: f64, to: f64) -> f64 {
    let (middle, half) = (f64::midpoint(from, to), (to - from) / 2.);
    let value = |x: f64| -> f64 {
        let others = nodes.iter().enumerate().filter(|(other, _)| *other != node);
        others.map(|(_, other)| (x - other) / (nodes[node] - other)).product()
    };
    let offset = half / 3f64.sqrt();
    half * (value(middle - offset) + value(middle + offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubic_slopes_are_integrated_exactly() {
        let nodes = [1., 1.5, 2.5, 4.];
        let (from, to) = (1., 0.25);
        let weights: Vec<f64> = (0..4).map(|node| integral(&nodes, node, from, to)).collect();
        for power in 0..4 {
            let found: f64 =
                nodes.iter().zip(&weights).map(|(x, w)| w * f64::powi(*x, power)).sum();
            let raised = power + 1;
            let exact = (f64::powi(to, raised) - f64::powi(from, raised)) / f64::from(raised);
            assert!((found - exact).abs() < 1e-12, "{power}: {found} {exact}");
        }
    }
}
