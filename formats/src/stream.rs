//! Files written tensor by tensor, each at its place, on all cores: a checkpoint of any size costs
//! the memory of the tensors in work.
//!
//! What a file will hold is known before its first byte: names, types and shapes give every offset.
//! So its space is reserved first (a full disk shows before the work), tensors are made and written
//! in any order, and the bytes are those of the writers in `safetensors_file` and `pickle`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rayon::prelude::*;

use crate::atomic::write_atomic_in_place;
use crate::dtype::bytes_from_f32;
use crate::pickle::frame;
use crate::safetensors_file::{header_bytes, sort_by_layout};
use crate::{Dtype, FormatError, SaveAs, TensorSpec};

/// Values converted at a time.
const BLOCK: usize = 1 << 16;

/// Writes `path` atomically with the tensors of `specs`. `fill` is called once for each, from
/// several threads, with the index in `specs`, and writes all of the tensor's data. Metadata go
/// into `.safetensors` alone.
///
/// # Errors
/// Those of `fill`, a tensor that was not filled, an 8-bit float for a pickle
/// ([`FormatError::Io`]), and [`FormatError::DiskFull`]; nothing is left at `path` then.
pub fn write_tensors<E: From<FormatError> + Send>(
    path: &Path,
    save_as: SaveAs,
    specs: &[TensorSpec],
    metadata: Option<&BTreeMap<String, String>>,
    fill: impl Fn(usize, &mut TensorSink<'_>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let fail = |source| FormatError::io("write", path, source);
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by(|a, b| specs[*a].name.cmp(&specs[*b].name));
    if let Some(pair) = order.windows(2).find(|pair| specs[pair[0]].name == specs[pair[1]].name) {
        let reason = format!("two tensors are to have the name `{}`", specs[pair[0]].name);
        return Err(fail(io::Error::other(reason)).into());
    }
    let index_of = |name: &str| order[order.partition_point(|i| specs[*i].name.as_str() < name)];
    let mut sorted: Vec<TensorSpec> = order.iter().map(|index| specs[*index].clone()).collect();
    let (pieces, offsets, length) = match save_as {
        SaveAs::Safetensors => {
            sort_by_layout(&mut sorted);
            let header = header_bytes(&sorted, metadata).map_err(fail)?;
            let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
            let mut end = head.len() as u64;
            let offsets = sorted.iter().map(|spec| {
                end += spec.bytes() as u64;
                end - spec.bytes() as u64
            });
            let offsets: Vec<u64> = offsets.collect();
            (vec![(0, Some(head))], offsets, end)
        }
        SaveAs::Pickle => {
            let frame = frame(&sorted, &vec![0; sorted.len()]).map_err(fail)?;
            let offsets = frame.data_offsets();
            (frame.pieces, offsets, frame.length)
        }
    };
    write_atomic_in_place(path, |file| {
        reserve(file, length).map_err(fail)?;
        let with_sums = save_as == SaveAs::Pickle;
        let one = |(spec, start): (&TensorSpec, &u64)| -> Result<u32, E> {
            let mut sink = TensorSink::new(file, path, spec, *start, with_sums);
            fill(index_of(&spec.name), &mut sink)?;
            Ok(sink.finish()?)
        };
        // One at a time from each thread's share: neighbours in the file differ much in size.
        let sums: Result<Vec<u32>, E> =
            sorted.par_iter().zip(&offsets).with_max_len(1).map(one).collect();
        let sums = sums?;
        let pieces = match save_as {
            SaveAs::Safetensors => pieces,
            SaveAs::Pickle => frame(&sorted, &sums).map_err(fail)?.pieces,
        };
        for (at, piece) in &pieces {
            file.write_all_at(piece.as_deref().unwrap_or_default(), *at).map_err(fail)?;
        }
        Ok(())
    })
}

/// Takes the space from the file system, so that it cannot run out later.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        // Some file systems cannot: they say so when the bytes are written.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
            file.set_len(length)
        }
        Err(error) => Err(error.into()),
    }
}

/// The place of one tensor in the file; its data are written in order, in pieces of any size.
#[derive(Debug)]
pub struct TensorSink<'f> {
    file: &'f File,
    path: &'f Path,
    spec: &'f TensorSpec,
    position: u64,
    end: u64,
    crc: Option<crc32fast::Hasher>,
}

impl<'f> TensorSink<'f> {
    fn new(
        file: &'f File,
        path: &'f Path,
        spec: &'f TensorSpec,
        start: u64,
        with_sum: bool,
    ) -> Self {
        let end = start + spec.bytes() as u64;
        let crc = with_sum.then(crc32fast::Hasher::new);
        Self { file, path, spec, position: start, end, crc }
    }

    /// What is to be written.
    pub fn spec(&self) -> &TensorSpec {
        self.spec
    }

    /// Writes the next bytes, in the tensor's number type.
    ///
    /// # Errors
    /// [`FormatError::Io`] or [`FormatError::DiskFull`]; more bytes than the tensor has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        if bytes.len() as u64 > self.end - self.position {
            return Err(self.misfit("more"));
        }
        let written = self.file.write_all_at(bytes, self.position);
        written.map_err(|source| FormatError::io("write", self.path, source))?;
        self.position += bytes.len() as u64;
        if let Some(crc) = &mut self.crc {
            crc.update(bytes);
        }
        Ok(())
    }

    /// Writes the next values, rounded to the tensor's float type (to nearest, ties to even).
    ///
    /// # Errors
    /// As [`Self::write`], and [`FormatError::WrongDtype`] when the type is not F64, F32, F16 or
    /// BF16.
    pub fn write_f32(&mut self, values: &[f32]) -> Result<(), FormatError> {
        if self.spec.dtype == Dtype::F32 && cfg!(target_endian = "little") {
            return self.write(bytes_of(values));
        }
        for block in values.chunks(BLOCK) {
            self.write(&bytes_from_f32(block, self.spec.dtype)?)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<u32, FormatError> {
        if self.position != self.end {
            return Err(self.misfit("fewer"));
        }
        Ok(self.crc.map_or(0, crc32fast::Hasher::finalize))
    }

    fn misfit(&self, what: &str) -> FormatError {
        let reason = format!(
            "{what} bytes were given for the tensor `{}` than the planned: {}",
            self.spec.name,
            self.spec.bytes()
        );
        FormatError::io("write", self.path, io::Error::other(reason))
    }
}

/// The values as they lie in memory.
fn bytes_of(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OwnedTensor;
    use crate::pickle::write_pickle;
    use crate::safetensors_file::write_safetensors;

    fn tensors() -> BTreeMap<String, OwnedTensor> {
        let make = |shape: &[usize], dtype| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..count).map(|i| i as f32 * 0.37 - 20.0).collect();
            OwnedTensor::from_f32(shape, &values, dtype).unwrap()
        };
        BTreeMap::from([
            ("b.half".to_owned(), make(&[3, 5], Dtype::F16)),
            ("a.full".to_owned(), make(&[300, 401], Dtype::F32)),
            ("c.alpha".to_owned(), make(&[], Dtype::BF16)),
            ("d.none".to_owned(), make(&[0, 4], Dtype::F32)),
        ])
    }

    /// Reversed, so that the order given is not the order of the file.
    fn specs(tensors: &BTreeMap<String, OwnedTensor>) -> Vec<TensorSpec> {
        tensors.iter().rev().map(|(name, tensor)| tensor.spec(name)).collect()
    }

    #[test]
    fn both_containers_have_the_bytes_of_their_writers() {
        let tensors = tensors();
        let specs = specs(&tensors);
        let metadata = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let folder = tempfile::tempdir().unwrap();
        let mut expected = [Vec::new(), Vec::new()];
        write_safetensors(&mut expected[0], &tensors, Some(&metadata)).unwrap();
        write_pickle(&mut expected[1], &tensors).unwrap();
        let names = ["x.safetensors", "x.ckpt"];
        for (name, expected) in names.iter().zip(&expected) {
            let path = folder.path().join(name);
            let save_as = SaveAs::of_path(&path).unwrap();
            write_tensors(&path, save_as, &specs, Some(&metadata), |index, sink| {
                let tensor = &tensors[&specs[index].name];
                assert_eq!(*sink.spec(), specs[index]);
                if tensor.dtype == Dtype::F32 {
                    // In two pieces, as numbers.
                    let values = tensor.to_f32();
                    let (one, two) = values.split_at(values.len() / 3);
                    sink.write_f32(one)?;
                    return sink.write_f32(two);
                }
                sink.write(&tensor.data)
            })
            .unwrap();
            assert!(std::fs::read(&path).unwrap() == *expected, "{name}");
        }
    }

    #[test]
    fn a_tensor_that_was_not_filled_leaves_no_file() {
        let tensors = tensors();
        let specs = specs(&tensors);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        for (extra, what) in [(0, "fewer"), (2, "more")] {
            let result = write_tensors(&path, SaveAs::Safetensors, &specs, None, |index, sink| {
                let data = &tensors[&specs[index].name].data;
                let end = if specs[index].name == "c.alpha" { extra } else { 0 };
                match end {
                    0 if specs[index].name == "c.alpha" => Ok(()),
                    0 => sink.write(data),
                    _ => sink.write(&[data.as_slice(), &[0; 2]].concat()),
                }
            });
            let text = result.map_err(|e: FormatError| e).unwrap_err().to_string();
            assert!(text.contains(what) && text.contains("`c.alpha`"), "{text}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }
}
