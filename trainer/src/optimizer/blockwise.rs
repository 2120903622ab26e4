//! Moments in 8 bits, after Dettmers et al. (arXiv:2110.02861), with the numbers of bitsandbytes:
//! blocks of 256 values that share their largest magnitude, and a code of 256 values that are dense
//! near zero. A tensor of less than 4096 values keeps f32.
//!
//! Values are rounded to the nearest code, as bitsandbytes does on a GPU.

use std::sync::OnceLock;

use anyhow::Result;

use super::state::{Reader, Writer};
use super::tensors::Field;

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// The 256 values of a code and the middles between neighbours.
pub(super) struct Code {
    values: [f32; 256],
    middles: [f32; 255],
}

/// Whether a moment can be negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signs {
    Both,
    Positive,
}

impl Code {
    /// The code of a moment.
    pub(super) fn of(signs: Signs) -> &'static Self {
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
    #[cfg(test)]
    pub(super) fn values(&self) -> &[f32; 256] {
        &self.values
    }

    fn nearest(&self, x: f32) -> u8 {
        self.middles.partition_point(|middle| *middle < x) as u8
    }

    fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0_f32, |largest, x| largest.max(x.abs()));
        let scale = if largest > 0. { 1. / largest } else { 0. };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = self.nearest(x * scale);
        }
        largest
    }

    fn decode(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
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

/// A moment of one tensor.
pub(super) enum Moment {
    /// A small tensor's, as it is.
    Full(Vec<f32>),
    /// Codes and a scale for each block.
    Blocks { signs: Signs, codes: Vec<u8>, scales: Vec<f32> },
}

impl Moment {
    /// Zeros; in 8 bits from `smallest` values on.
    pub(super) fn zeros(len: usize, signs: Signs, smallest: usize) -> Self {
        if len < smallest {
            return Self::Full(vec![0.; len]);
        }
        let zero = Code::of(signs).nearest(0.);
        Self::Blocks { signs, codes: vec![zero; len], scales: vec![0.; len.div_ceil(BLOCK)] }
    }

    /// Changes the block of this number, decoded and encoded again.
    pub(super) fn change(&mut self, block: usize, change: impl FnOnce(&mut [f32])) {
        let start = block * BLOCK;
        match self {
            Self::Full(values) => {
                let end = values.len().min(start + BLOCK);
                change(&mut values[start..end]);
            }
            Self::Blocks { signs, codes, scales } => {
                let end = codes.len().min(start + BLOCK);
                let (code, codes) = (Code::of(*signs), &mut codes[start..end]);
                let mut buffer = [0.; BLOCK];
                let values = &mut buffer[..codes.len()];
                code.decode(codes, scales[block], values);
                change(values);
                scales[block] = code.encode(values, codes);
            }
        }
    }
}

impl Field for Moment {
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> Result<()> {
        match self {
            Self::Full(values) => values.save(field, name, writer),
            Self::Blocks { codes, scales, .. } => {
                writer.bytes(field, name, codes);
                scales.save(&format!("{field}_absmax"), name, writer)
            }
        }
    }

    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> Result<()> {
        match self {
            Self::Full(values) => values.load(field, name, reader),
            Self::Blocks { codes, scales, .. } => {
                *codes = reader.bytes(field, name, codes.len())?;
                scales.load(&format!("{field}_absmax"), name, reader)
            }
        }
    }
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

    #[test]
    fn a_block_of_zeros_stays_zero_and_the_tail_is_a_block() {
        let mut moment = Moment::zeros(300, Signs::Both, 0);
        moment.change(0, |values| assert!(values.iter().all(|x| *x == 0.)));
        moment.change(1, |values| {
            assert_eq!(values.len(), 44);
            values[43] = -4.;
        });
        moment.change(1, |values| {
            assert!((values[43] + 4. * 0.9929687).abs() < 1e-5);
            assert_eq!(values[0], 0.);
        });
        moment.change(0, |values| assert!(values.iter().all(|x| *x == 0.)));
    }
}
