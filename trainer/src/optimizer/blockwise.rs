//! Moments in 8 bits ([`engine::blockwise`]), as the optimizers of bitsandbytes keep them. A tensor of
//! less than 4096 values keeps f32.

use anyhow::Result;
pub(super) use engine::blockwise::{BLOCK, Code, Signs};

use super::state::{Reader, Writer};
use super::tensors::Field;

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
