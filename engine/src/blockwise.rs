//! Numbers in 8 bits, after Dettmers et al. (arXiv:2110.02861), with the numbers of bitsandbytes:
//! blocks of 256 values that share their largest magnitude, and a code of 256 values that are dense
//! near zero.
//!
//! Values are rounded to the nearest code, as bitsandbytes does on a GPU.

use std::sync::OnceLock;

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// The 256 values of a code and the middles between neighbours.
pub struct Code {
    values: [f32; 256],
    middles: [f32; 255],
}

/// Whether what is stored can be negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signs {
    /// It can.
    Both,
    /// It cannot.
    Positive,
}

impl Code {
    /// The code for numbers of these signs.
    pub fn of(signs: Signs) -> &'static Self {
        static BOTH: OnceLock<Code> = OnceLock::new();
        static POSITIVE: OnceLock<Code> = OnceLock::new();
        match signs {
            Signs::Both => BOTH.get_or_init(|| Self::new(true)),
            Signs::Positive => POSITIVE.get_or_init(|| Self::new(false)),
        }
    }

    /// Seven decades, each with twice the values of the one below: the middles of equal steps from
    /// 0.1 to 1 of the decade. With 0 and 1 they are 256.
    fn new(signed: bool) -> Self {
        const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.];
        let mut all = vec![0., 1.];
        for (index, power) in POWERS.iter().enumerate() {
            let count = if signed { 1 << index } else { 2 << index };
            let bounds = equal_steps(count + 1);
            for pair in bounds.windows(2) {
                let value = power * ((pair[0] + pair[1]) / 2.);
                all.push(value);
                if signed {
                    all.push(-value);
                }
            }
        }
        all.sort_by(f32::total_cmp);
        let mut values = [0.; 256];
        for (place, value) in values.iter_mut().zip(all) {
            *place = value;
        }
        let mut middles = [0.; 255];
        for (middle, pair) in middles.iter_mut().zip(values.windows(2)) {
            *middle = (pair[0] + pair[1]) / 2.;
        }
        Self { values, middles }
    }

    /// The code's values, ascending.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The middles between neighbours, ascending: above one starts the next value.
    pub fn middles(&self) -> &[f32; 255] {
        &self.middles
    }

    /// The number of the value that is nearest to `x`; the lower one of two.
    pub fn nearest(&self, x: f32) -> u8 {
        self.middles.partition_point(|middle| *middle < x) as u8
    }

    /// Stores a block as codes; gives its scale.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0_f32, |largest, x| largest.max(x.abs()));
        let scale = if largest > 0. { 1. / largest } else { 0. };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = self.nearest(x * scale);
        }
        largest
    }

    /// The numbers of a stored block.
    pub fn decode(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(*code)] * scale;
        }
    }
}

/// `count` numbers from 0.1 to 1 at equal distances, the second half counted from the end, as
/// PyTorch's `linspace` does in f32.
fn equal_steps(count: usize) -> Vec<f32> {
    let (first, last) = (0.1_f32, 1_f32);
    let step = f64::from((last - first) / (count - 1) as f32);
    // It rounds product and sum at once, as f64 does here before the rounding to f32.
    let number = |index: usize| match index < count / 2 {
        true => (f64::from(first) + step * index as f64) as f32,
        false => (f64::from(last) - step * (count - index - 1) as f64) as f32,
    };
    (0..count).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_the_code_is_kept_and_others_go_to_the_nearest() {
        for signs in [Signs::Both, Signs::Positive] {
            let code = Code::of(signs);
            for (index, value) in code.values.iter().enumerate() {
                assert_eq!(usize::from(code.nearest(*value)), index);
            }
            for x in [0.3, 0.01234, 3e-7, 1e-9, 0.9999_f32] {
                let near = code.values[usize::from(code.nearest(x))];
                let best = code.values.iter().map(|v| (v - x).abs()).fold(9., f32::min);
                assert_eq!((near - x).abs(), best, "{x}");
            }
        }
    }
}
