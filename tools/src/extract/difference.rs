//! The difference of one layer in two models, made from the mapped files in pieces.

use std::ops::Range;

use anyhow::Context;
use formats::model_files::{Layer, ModelFiles};
use formats::{Dtype, TensorView, bytes_from_f32, extend_f32};

use crate::finite::FiniteRule;

/// Numbers read at a time: both pieces stay in a core's cache.
const PIECE: usize = 1 << 14;

/// The two models.
#[derive(Debug)]
pub(super) struct Models {
    /// Where the difference starts.
    pub original: ModelFiles,
    /// Where it leads.
    pub tuned: ModelFiles,
    /// What weights are rounded to before, and the difference after; `None` keeps them.
    pub rounding: Option<Dtype>,
    /// What to do with NaN.
    pub finite: FiniteRule,
}

impl Models {
    /// `tuned - original`, in the order of the file: `[out, in*kh*kw]`. What is not finite counts as
    /// 0, where it is not refused.
    ///
    /// # Errors
    /// What cannot be read; values that are not finite, with file and tensor.
    pub fn difference(&self, layer: &Layer) -> anyhow::Result<Vec<f32>> {
        let mut out = Vec::with_capacity(layer.shape.iter().product());
        self.each_piece(layer, |piece| {
            let finite = |value: &f32| if value.is_finite() { *value } else { 0.0 };
            out.extend(piece.iter().map(finite));
        })?;
        Ok(out)
    }

    /// The largest of the differences without their signs.
    ///
    /// # Errors
    /// As [`Self::difference`].
    pub fn largest_difference(&self, layer: &Layer) -> anyhow::Result<f32> {
        let mut most = 0.0_f32;
        self.each_piece(layer, |piece| {
            most = piece.iter().fold(most, |most, value| most.max(value.abs()));
        })?;
        Ok(most)
    }

    fn each_piece(&self, layer: &Layer, mut see: impl FnMut(&[f32])) -> anyhow::Result<()> {
        let other = self.tuned.layer(&layer.name).context("a layer is gone")?;
        let (from, to) = (self.original.view(layer)?, self.tuned.view(other)?);
        let count = from.len();
        let (mut piece, mut subtrahend) = (Vec::with_capacity(PIECE), Vec::with_capacity(PIECE));
        for start in (0..count).step_by(PIECE) {
            let range = start..count.min(start + PIECE);
            read(&to, range.clone(), self.rounding, &mut piece)?;
            read(&from, range, self.rounding, &mut subtrahend)?;
            for (value, less) in piece.iter_mut().zip(&subtrahend) {
                *value -= less;
            }
            if let Some(dtype) = self.rounding {
                round(dtype, &mut piece)?;
            }
            if !piece.iter().all(|value| value.is_finite()) {
                self.name_culprit(layer, &from, &self.original)?;
                self.name_culprit(other, &to, &self.tuned)?;
            }
            see(&piece);
        }
        self.original.release(layer);
        self.tuned.release(other);
        Ok(())
    }

    /// An error if the layer's weight is not finite itself.
    fn name_culprit(
        &self,
        layer: &Layer,
        view: &TensorView<'_>,
        model: &ModelFiles,
    ) -> anyhow::Result<()> {
        let path = model.files.get(layer.place.file).map(|stored| stored.file.path());
        let path = path.unwrap_or(&model.path);
        self.finite.check(path, &layer.place.key, &view.to_f32())
    }
}

fn read(
    view: &TensorView<'_>,
    range: Range<usize>,
    rounding: Option<Dtype>,
    out: &mut Vec<f32>,
) -> anyhow::Result<()> {
    let size = view.dtype.size();
    out.clear();
    extend_f32(view.dtype, &view.data[range.start * size..range.end * size], out);
    match rounding {
        Some(dtype) if dtype != view.dtype => round(dtype, out),
        _ => Ok(()),
    }
}

/// Rounds to a narrower type and back.
fn round(dtype: Dtype, values: &mut Vec<f32>) -> anyhow::Result<()> {
    let bytes = bytes_from_f32(values, dtype)?;
    values.clear();
    extend_f32(dtype, &bytes, values);
    Ok(())
}
