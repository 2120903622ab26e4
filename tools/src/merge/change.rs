//! One module's change of one layer's weight, made for a few rows at a time.
//!
//! The plain kinds add `ratio * delta`. With `--precision fp16|bf16` each step is rounded as
//! sd-scripts' tensors of that type are. DoRA gives the changed weight the trained lengths:
//! `W' = m * (W + delta) / |W + delta|`, and `ratio` leads from W to W', as in the WebUI and
//! ComfyUI (LyCORIS' own multiplier does not end at W for 0; at 1 all agree). W is the weight as the
//! adapters before have left it.

use anyhow::bail;
use formats::adapter::{AdapterFile, AdapterModule, Naming};
use formats::{Dtype, bytes_from_f32, extend_f32};

use crate::delta::{Delta, delta_of};
use crate::finite::FiniteRule;

/// What one module does to one layer.
#[derive(Debug)]
pub(super) struct Change {
    delta: Delta,
    ratio: f32,
    magnitude: Option<Magnitude>,
    /// The type that every step is rounded to; `None` is f32.
    rounding: Option<Dtype>,
}

/// DoRA's lengths.
#[derive(Debug)]
enum Magnitude {
    /// One for each row of the weight.
    Rows(Vec<f32>),
    /// One for each input, whose numbers lie `window` to a row.
    Inputs { lengths: Vec<f32>, window: usize, factors: Vec<f32> },
}

/// A weight as it is stored, `[rows, cols]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'v> {
    /// Number type.
    pub dtype: Dtype,
    /// All rows.
    pub bytes: &'v [u8],
    /// Numbers in a row.
    pub cols: usize,
}

/// Numbers in work at a time: 1 MB of f32 stays in a core's cache from reading to writing, and is
/// enough for a product to run at full speed (1280x8x11520 on one core of a Zen 4: 11 ms, the whole
/// at once 23 ms; 2026-11).
const BLOCK: usize = 1 << 18;

impl Stored<'_> {
    fn row_bytes(&self) -> usize {
        self.cols * self.dtype.size()
    }

    /// Calls `see` with blocks of rows as f32, and the number of the first.
    pub fn each_block(
        &self,
        mut see: impl FnMut(usize, &mut [f32]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let rows = (BLOCK / self.cols.max(1)).max(1);
        let mut block = Vec::with_capacity(rows * self.cols);
        for (index, bytes) in self.bytes.chunks((rows * self.row_bytes()).max(1)).enumerate() {
            block.clear();
            extend_f32(self.dtype, bytes, &mut block);
            see(index * rows, &mut block)?;
        }
        Ok(())
    }
}

impl Change {
    /// Reads a module. `shape` is the layer's: `[out, in]` or `[out, in, kh, kw]`.
    ///
    /// # Errors
    /// Those of [`delta_of`], and magnitudes that do not fit the layer.
    pub fn read(
        file: &AdapterFile,
        module: &AdapterModule,
        shape: &[usize],
        (ratio, rounding): (f32, Option<Dtype>),
        finite: FiniteRule,
    ) -> anyhow::Result<Self> {
        let mut delta = delta_of(file, module, finite)?;
        if let Some(dtype) = rounding {
            delta.round(dtype)?;
        }
        let magnitude = match &module.dora_scale {
            None => None,
            Some(key) => {
                let view = file.view(key)?;
                let lengths = view.to_f32();
                finite.check(&file.path, key, &lengths)?;
                Some(magnitude(file, key, &view.shape, lengths, shape)?)
            }
        };
        Ok(Self { delta, ratio, magnitude, rounding })
    }

    /// Adds itself to the rows from `first` on, which the changes before have seen.
    fn apply(&self, first: usize, block: &mut [f32]) -> anyhow::Result<()> {
        match (&self.magnitude, self.rounding) {
            (None, None) => self.delta.add_rows(first, block, self.ratio),
            (None, Some(dtype)) => self.add_rounded(first, block, dtype)?,
            (Some(magnitude), rounding) => {
                let before = block.to_vec();
                self.delta.add_rows(first, block, 1.0);
                magnitude.stretch(first, block, self.delta.size().1);
                for (after, before) in block.iter_mut().zip(&before) {
                    *after = before + self.ratio * (*after - before);
                }
                if let Some(dtype) = rounding {
                    round(block, dtype)?;
                }
            }
        }
        Ok(())
    }

    /// `W + ratio * (up @ down) * scale` with each result rounded.
    fn add_rounded(&self, first: usize, block: &mut [f32], dtype: Dtype) -> anyhow::Result<()> {
        let mut step = vec![0.0; block.len()];
        self.delta.add_rows_unscaled(first, &mut step);
        round(&mut step, dtype)?;
        let mut scale = [self.delta.scale()];
        round(&mut scale, dtype)?;
        for factor in [self.ratio, scale[0]] {
            step.iter_mut().for_each(|value| *value *= factor);
            round(&mut step, dtype)?;
        }
        for (sum, step) in block.iter_mut().zip(&step) {
            *sum += step;
        }
        round(block, dtype)
    }
}

/// Applies all changes in order.
pub(super) fn apply_all(changes: &[Change], first: usize, block: &mut [f32]) -> anyhow::Result<()> {
    changes.iter().try_for_each(|change| change.apply(first, block))
}

/// Completes changes whose lengths are those of inputs: their norms go over all rows, so the weight
/// is gone through once for each of them.
pub(super) fn measure_inputs(changes: &mut [Change], weight: Stored<'_>) -> anyhow::Result<()> {
    for at in 0..changes.len() {
        let (before, rest) = changes.split_at_mut(at);
        let Some(Change {
            delta,
            magnitude: Some(Magnitude::Inputs { lengths, window, factors }),
            ..
        }) = rest.first_mut()
        else {
            continue;
        };
        let mut squares = vec![0.0_f64; lengths.len()];
        weight.each_block(|first, block| {
            apply_all(before, first, block)?;
            delta.add_rows(first, block, 1.0);
            for row in block.chunks_exact(weight.cols) {
                for (sum, cell) in squares.iter_mut().zip(row.chunks_exact(*window)) {
                    *sum += cell.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                }
            }
            Ok(())
        })?;
        let factor =
            |(length, square): (&f32, &f64)| length / (square.sqrt() as f32 + f32::EPSILON);
        *factors = lengths.iter().zip(&squares).map(factor).collect();
    }
    Ok(())
}

impl Magnitude {
    /// Gives rows or inputs their lengths.
    fn stretch(&self, first: usize, block: &mut [f32], cols: usize) {
        match self {
            Self::Rows(lengths) => {
                for (row, length) in block.chunks_exact_mut(cols).zip(&lengths[first..]) {
                    let square: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                    let factor = length / (square.sqrt() as f32 + f32::EPSILON);
                    row.iter_mut().for_each(|x| *x *= factor);
                }
            }
            Self::Inputs { window, factors, .. } => {
                for row in block.chunks_exact_mut(cols) {
                    for (cell, factor) in row.chunks_exact_mut(*window).zip(factors) {
                        cell.iter_mut().for_each(|x| *x *= factor);
                    }
                }
            }
        }
    }
}

/// Tells by the shape of `dora_scale` whose lengths it holds.
fn magnitude(
    file: &AdapterFile,
    key: &str,
    shape: &[usize],
    lengths: Vec<f32>,
    layer: &[usize],
) -> anyhow::Result<Magnitude> {
    let (out, inputs) = (layer[0], layer[1]);
    let ones = |sizes: &[usize]| sizes.iter().all(|size| *size == 1);
    let of_rows = match shape {
        [n, rest @ ..] if *n == out && ones(rest) => true,
        // PEFT's convolutions.
        [1, n, rest @ ..] if *n == out && ones(rest) && file.naming == Naming::Peft => true,
        [1, n, rest @ ..] if *n == inputs && ones(rest) => false,
        _ => bail!(
            "`{}` has magnitudes that fit neither outputs nor inputs of the layer of shape \
             {layer:?}, `{key}`, their shape is: {shape:?}",
            file.path.display()
        ),
    };
    Ok(match of_rows {
        true => Magnitude::Rows(lengths),
        false => {
            Magnitude::Inputs { lengths, window: layer[2..].iter().product(), factors: Vec::new() }
        }
    })
}

/// Rounds to a narrower type and back.
pub(super) fn round(values: &mut [f32], dtype: Dtype) -> anyhow::Result<()> {
    let mut rounded = Vec::with_capacity(values.len());
    extend_f32(dtype, &bytes_from_f32(values, dtype)?, &mut rounded);
    values.copy_from_slice(&rounded);
    Ok(())
}

#[cfg(test)]
#[path = "change_tests.rs"]
mod tests;
