//! A model written with adapters in it, tensor by tensor from the mapped files: what stays is passed
//! on, what changes goes through a core's cache in blocks of rows.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::ensure;
use formats::model_files::{ComponentKind, ModelFiles, StoredFile};
use formats::stream::{TensorSink, write_tensors};
use formats::{Dtype, SaveAs, TensorSpec, TensorView};

use super::change::{self, Change, Stored};
use super::plan::{Changed, Plan};
use crate::finite::FiniteRule;
use crate::progress::Progress;

/// Bytes passed on at a time: they are in a core's cache when they are written.
const PIECE: usize = 1 << 20;

/// What single files hold beside the model (schedules, averages of the training, optimizers) has
/// other beginnings, and stays as it is.
const COMPONENTS: [&str; 4] =
    ["model.diffusion_model.", "cond_stage_model.", "conditioner.", "first_stage_model."];

/// Everything that decides what is written.
#[derive(Debug)]
pub(super) struct Merge<'a> {
    /// The model read.
    pub model: &'a ModelFiles,
    /// What changes.
    pub plan: Plan<'a>,
    /// The type of the floats written.
    pub save: Dtype,
    /// The type that the merge is made in; `None` is f32.
    pub rounding: Option<Dtype>,
    /// What to do with NaN.
    pub finite: FiniteRule,
    /// Told of every byte written.
    pub progress: &'a Progress,
}

impl Merge<'_> {
    /// Bytes to be written.
    pub fn total_bytes(model: &ModelFiles, save: Dtype) -> u64 {
        let of_file = |stored: &StoredFile| -> u64 {
            specs(stored, save).iter().map(|spec| spec.bytes() as u64).sum()
        };
        model.files.iter().map(of_file).sum()
    }

    /// Writes the file `index` of the model to `path`.
    ///
    /// # Errors
    /// What cannot be read or written, values that are not finite.
    pub fn write_file(
        &self,
        index: usize,
        path: &Path,
        save_as: SaveAs,
        metadata: Option<&BTreeMap<String, String>>,
    ) -> anyhow::Result<()> {
        let stored = &self.model.files[index];
        let specs = specs(stored, self.save);
        write_tensors(path, save_as, &specs, metadata, |at, sink| {
            let spec = &specs[at];
            self.fill(index, spec, sink)?;
            stored.file.release(&spec.name);
            self.progress.advance(spec.bytes() as u64);
            Ok(())
        })
    }

    fn fill(
        &self,
        index: usize,
        spec: &TensorSpec,
        sink: &mut TensorSink<'_>,
    ) -> anyhow::Result<()> {
        let stored = &self.model.files[index];
        let view = stored.file.view(&spec.name)?;
        if !view.dtype.is_float() {
            return Ok(sink.write(&view.data)?);
        }
        let path = stored.file.path();
        let changes = self.plan.changes_at(index, &spec.name)?;
        if !changes.is_empty() {
            return self.fill_weight(path, &view, changes, sink);
        }
        let rounding = self.rounding.filter(|_| is_rounded(stored, &spec.name));
        let added = self.plan.added_at(index, &spec.name)?;
        if !added.is_empty() {
            let mut values = view.to_f32();
            for (first, added) in &added {
                for (sum, value) in values[*first..].iter_mut().zip(added) {
                    *sum += value;
                }
            }
            return self.write_block(path, (&mut values, 0), rounding, sink);
        }
        if view.dtype == spec.dtype && rounding.is_none() {
            for (piece, bytes) in view.data.chunks(PIECE).enumerate() {
                let first = piece * PIECE / view.dtype.size();
                self.finite.check_bytes(path, &spec.name, first, (view.dtype, bytes))?;
                sink.write(bytes)?;
            }
            return Ok(());
        }
        let stored = Stored { dtype: view.dtype, bytes: &view.data, cols: 1 };
        stored.each_block(|first, block| self.write_block(path, (block, first), rounding, sink))
    }

    /// A weight, or several joined in one tensor, of which some rows change.
    fn fill_weight(
        &self,
        path: &Path,
        view: &TensorView<'_>,
        changes: Vec<Changed>,
        sink: &mut TensorSink<'_>,
    ) -> anyhow::Result<()> {
        let rows = view.shape.first().copied().unwrap_or(0);
        let cols = view.len() / rows.max(1);
        let row_bytes = cols * view.dtype.size();
        let part = |from: usize, to: usize| Stored {
            dtype: view.dtype,
            bytes: &view.data[from * row_bytes..to * row_bytes],
            cols,
        };
        let mut done = 0;
        for Changed { rows: range, mut changes } in changes {
            let range = range.unwrap_or(0..rows);
            ensure!(
                done <= range.start && range.end <= rows,
                "`{}` holds layers that overlap in `{}`",
                path.display(),
                sink.spec().name
            );
            self.write_rows(path, part(done, range.start), (done * cols, &[]), sink)?;
            let part = part(range.start, range.end);
            change::measure_inputs(&mut changes, part)?;
            self.write_rows(path, part, (range.start * cols, &changes), sink)?;
            done = range.end;
        }
        self.write_rows(path, part(done, rows), (done * cols, &[]), sink)
    }

    /// `first` is the place of the first number in the tensor.
    fn write_rows(
        &self,
        path: &Path,
        rows: Stored<'_>,
        (first, changes): (usize, &[Change]),
        sink: &mut TensorSink<'_>,
    ) -> anyhow::Result<()> {
        rows.each_block(|row, block| {
            if let Some(dtype) = self.rounding {
                change::round(block, dtype)?;
            }
            change::apply_all(changes, row, block)?;
            self.write_block(path, (block, first + row * rows.cols), None, sink)
        })
    }

    fn write_block(
        &self,
        path: &Path,
        (block, first): (&mut [f32], usize),
        rounding: Option<Dtype>,
        sink: &mut TensorSink<'_>,
    ) -> anyhow::Result<()> {
        if let Some(dtype) = rounding {
            change::round(block, dtype)?;
        }
        self.finite.check_block(path, &sink.spec().name, first, block)?;
        if sink.spec().dtype == Dtype::F16 && !self.finite.allow_nan {
            check_half(path, &sink.spec().name, block)?;
        }
        Ok(sink.write_f32(block)?)
    }
}

/// That no value becomes infinite in half precision.
fn check_half(path: &Path, name: &str, values: &[f32]) -> anyhow::Result<()> {
    /// Halfway between the largest number and the next, which there is not.
    const LIMIT: f32 = 65520.0;
    let most = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    ensure!(
        most < LIMIT,
        "`{}` has a value in `{name}` that half precision cannot hold, after the merge it is: \
         {most}\nhint: `--save_precision bf16` or `float` can",
        path.display()
    );
    Ok(())
}

/// The tensors as they are written.
fn specs(stored: &StoredFile, save: Dtype) -> Vec<TensorSpec> {
    let names = stored.file.names().into_iter();
    let spec = |name: &str| {
        let (dtype, shape) = stored.file.describe(name)?;
        let converted = dtype.is_float() && is_of_model(stored, name);
        let dtype = if converted { save } else { dtype };
        Some(TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() })
    };
    names.filter_map(spec).collect()
}

/// Whether a tensor is one of the model's weights.
fn is_of_model(stored: &StoredFile, name: &str) -> bool {
    stored.component.is_some() || COMPONENTS.iter().any(|start| name.starts_with(start))
}

/// Whether sd-scripts turns a tensor into the type that the merge is made in: all weights of the
/// networks that LoRAs are for.
fn is_rounded(stored: &StoredFile, name: &str) -> bool {
    match stored.component {
        Some(component) => component != ComponentKind::Vae,
        None => is_of_model(stored, name) && !name.starts_with("first_stage_model."),
    }
}
