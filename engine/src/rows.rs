//! Tensors made row by row, as from a file: a piece at a time on all threads, never whole as f32
//! beside themselves.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::cpu::round;
use crate::pool;
use crate::{DType, Device, EngineError, Result, Tensor};

/// Numbers that a thread makes at a time: 64 KiB of f32, which a core's cache holds.
const PIECE: usize = 16 << 10;

impl Tensor {
    /// A tensor of `shape` whose numbers `fill` gives: called with a range of rows (of the first axis),
    /// room that is kept from call to call, and where the rows go, as f32.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] for types that the device does not hold.
    pub fn from_rows<F>(device: Device, shape: &[usize], dtype: DType, fill: F) -> Result<Self>
    where
        F: Fn(Range<usize>, &mut Vec<f32>, &mut [f32]) + Sync,
    {
        let len: usize = shape.iter().product();
        let row = len / shape.first().copied().unwrap_or(1).max(1);
        let piece = (PIECE / row.max(1)).max(1) * row.max(1);
        let rows = |index: usize, numbers: usize| {
            let first = index * (piece / row.max(1));
            first..first + numbers / row.max(1)
        };
        let single = |out: &mut [f32]| {
            out.par_chunks_mut(piece)
                .enumerate()
                .for_each_init(Vec::new, |room, (i, to)| fill(rows(i, to.len()), room, to));
        };
        match (device, dtype) {
            (Device::Cpu, DType::F32) => {
                let mut out = pool::take::<f32>(len);
                single(&mut out);
                Ok(Self::from_pooled(shape, out))
            }
            (Device::Cpu, DType::BF16) => {
                let mut out = pool::take::<bf16>(len);
                let rooms = || (Vec::new(), vec![0.; piece.min(len)]);
                out.par_chunks_mut(piece).enumerate().for_each_init(
                    rooms,
                    |(room, wide), (i, to)| {
                        let wide = &mut wide[..to.len()];
                        fill(rows(i, to.len()), room, wide);
                        round(to, wide);
                    },
                );
                Ok(Self::from_pooled(shape, out))
            }
            (Device::Cpu, other) => Err(EngineError::not_on_cpu("from_rows", other)),
            (Device::Card(_), _) => {
                let mut host = pool::take::<f32>(len);
                single(&mut host);
                let tensor = Self::from_f32(device, shape, &host, dtype);
                pool::give(host);
                tensor
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_length_come_to_their_places() {
        for shape in [vec![70_001], vec![3, 5, 7], vec![2, 40_000], vec![300, 300], vec![0, 4]] {
            let len: usize = shape.iter().product();
            let row = len / shape[0].max(1);
            let expected: Vec<f32> = (0..len).map(|x| (x % 256) as f32).collect();
            for dtype in [DType::F32, DType::BF16] {
                let tensor = Tensor::from_rows(Device::Cpu, &shape, dtype, |rows, _, out| {
                    out.copy_from_slice(&expected[rows.start * row..rows.end * row]);
                })
                .unwrap();
                assert_eq!(tensor.shape(), shape);
                assert_eq!(tensor.to_vec_f32().unwrap(), expected, "{shape:?} {dtype:?}");
            }
        }
        assert!(Tensor::from_rows(Device::Cpu, &[1], DType::F8, |_, _, _| ()).is_err());
    }
}
