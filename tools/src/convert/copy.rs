//! Writes tensors as they are or in another number type, in blocks, with progress.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use formats::stream::{TensorSink, write_tensors};
use formats::{Dtype, SaveAs, TensorSpec, TensorView};

use crate::finite::FiniteRule;
use crate::precision::Precision;
use crate::progress::Progress;

/// Values converted at a time.
const BLOCK: usize = 1 << 16;

/// How numbers are written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Casting {
    pub precision: Option<Precision>,
    pub finite: FiniteRule,
}

impl Casting {
    /// The number type in the new file; what is no float stays.
    pub fn dtype(self, stored: Dtype) -> Dtype {
        match self.precision {
            Some(precision) if stored.is_float() => precision.dtype(),
            _ => stored,
        }
    }

    /// The same tensor in the number type of the new file.
    pub fn spec(self, mut spec: TensorSpec) -> TensorSpec {
        spec.dtype = self.dtype(spec.dtype);
        spec
    }
}

/// A file to be written.
pub(super) struct Target<'a> {
    pub path: &'a Path,
    pub save_as: SaveAs,
    /// For `.safetensors`.
    pub metadata: Option<&'a BTreeMap<String, String>>,
    /// The file or folder that is read, for messages.
    pub source: &'a Path,
}

/// Writes the tensors of `specs`; `read` gives the pieces of one.
///
/// # Errors
/// Those of `read` and of writing; a value that becomes infinite.
pub(super) fn write<'m>(
    target: &Target<'_>,
    specs: &[TensorSpec],
    finite: FiniteRule,
    read: impl Fn(usize) -> anyhow::Result<Vec<TensorView<'m>>> + Sync,
) -> anyhow::Result<()> {
    let progress = Progress::of_bytes(specs.iter().map(|spec| spec.bytes() as u64).sum());
    write_tensors(target.path, target.save_as, specs, target.metadata, |index, sink| {
        for piece in read(index)? {
            copy(&piece, sink, target.source, finite)?;
        }
        progress.advance(sink.spec().bytes() as u64);
        Ok(())
    })
}

fn copy(
    piece: &TensorView<'_>,
    sink: &mut TensorSink<'_>,
    source: &Path,
    finite: FiniteRule,
) -> anyhow::Result<()> {
    let dtype = sink.spec().dtype;
    if piece.dtype == dtype {
        return Ok(sink.write(&piece.data)?);
    }
    for block in piece.data.chunks(BLOCK * piece.dtype.size()) {
        let shape = vec![block.len() / piece.dtype.size()];
        let block = TensorView { dtype: piece.dtype, shape, data: Cow::Borrowed(block) };
        let values = block.to_f32();
        if dtype == Dtype::F16 && !finite.allow_nan {
            // Half way between the largest f16 and what would come after it.
            let lost = values.iter().find(|value| value.is_finite() && value.abs() >= 65520.0);
            if let Some(value) = lost {
                bail!(
                    "`{}` holds a number in `{}` that fp16 cannot hold: {value}\nhint: \
                     `--save_precision bf16` can; `--allow_nan` writes infinity",
                    source.display(),
                    sink.spec().name
                );
            }
        }
        sink.write_f32(&values)?;
    }
    Ok(())
}
