//! Writes a dictionary of tensors as torch does, so that `torch.load(weights_only=True)` reads it.
//!
//! The bytes depend on the tensors alone: no dates, no names of machines; entries in name order.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::globals::storage_name;
use crate::{OwnedTensor, TensorSpec};

/// torch aligns tensor data to this many bytes by padding the entry's extra field.
const ALIGNMENT: u64 = 64;
/// Sizes and offsets from here on need the zip64 fields.
const ZIP64_LIMIT: u64 = 0xffff_ffff;

/// Writes `tensors` as a torch zip checkpoint holding an `OrderedDict`.
///
/// # Errors
/// Those of `writer`, and [`io::ErrorKind::Unsupported`] for 8-bit floats.
pub fn write_pickle(
    writer: &mut dyn Write,
    tensors: &BTreeMap<String, OwnedTensor>,
) -> io::Result<()> {
    write_with_limit(writer, tensors, ZIP64_LIMIT)
}

/// `limit`: from which size on zip64 fields are written; a parameter for the tests.
pub(super) fn write_with_limit(
    writer: &mut dyn Write,
    tensors: &BTreeMap<String, OwnedTensor>,
    limit: u64,
) -> io::Result<()> {
    let mut specs = Vec::new();
    for (name, tensor) in tensors {
        tensor.check_filled(name)?;
        specs.push(tensor.spec(name));
    }
    let sums: Vec<u32> = tensors.values().map(|tensor| crc32fast::hash(&tensor.data)).collect();
    let frame = frame_with_limit(&specs, &sums, limit)?;
    let mut data = tensors.values();
    for (_, piece) in &frame.pieces {
        match piece {
            Some(bytes) => writer.write_all(bytes)?,
            None => writer.write_all(data.next().map_or(&[], |tensor| &tensor.data))?,
        }
    }
    Ok(())
}

/// Everything of a checkpoint but the tensors' data.
pub(crate) struct Frame {
    /// Where each piece begins, in order; `None` is the place of the next tensor's data.
    pub pieces: Vec<(u64, Option<Vec<u8>>)>,
    /// Bytes of the whole file.
    pub length: u64,
}

impl Frame {
    /// Where the data of each tensor begins.
    pub fn data_offsets(&self) -> Vec<u64> {
        self.pieces.iter().filter(|(_, piece)| piece.is_none()).map(|(at, _)| *at).collect()
    }
}

/// The frame around `specs`, which are sorted by name, with the data's checksums (CRC-32). Lengths
/// and offsets do not depend on the checksums.
pub(crate) fn frame(specs: &[TensorSpec], sums: &[u32]) -> io::Result<Frame> {
    frame_with_limit(specs, sums, ZIP64_LIMIT)
}

fn frame_with_limit(specs: &[TensorSpec], sums: &[u32], limit: u64) -> io::Result<Frame> {
    let pickle = pickle_of(specs)?;
    let mut zip = ZipFrame { pieces: Vec::new(), position: 0, entries: Vec::new(), limit };
    zip.file("archive/data.pkl", pickle);
    zip.file("archive/byteorder", b"little".to_vec());
    for (index, (spec, crc)) in specs.iter().zip(sums).enumerate() {
        zip.entry(&format!("archive/data/{index}"), *crc, spec.bytes() as u64);
        zip.pieces.push((zip.position, None));
        zip.position += spec.bytes() as u64;
    }
    zip.file("archive/version", b"3\n".to_vec());
    zip.finish();
    Ok(Frame { pieces: zip.pieces, length: zip.position })
}

/// Protocol 2, the one torch writes.
fn pickle_of(specs: &[TensorSpec]) -> io::Result<Vec<u8>> {
    let mut out = vec![0x80, 2];
    ordered_dict(&mut out);
    if !specs.is_empty() {
        out.push(b'(');
        for (index, spec) in specs.iter().enumerate() {
            text(&mut out, &spec.name)?;
            tensor_value(&mut out, index, spec)?;
        }
        out.push(b'u');
    }
    out.push(b'.');
    Ok(out)
}

fn ordered_dict(out: &mut Vec<u8>) {
    out.extend(b"ccollections\nOrderedDict\n)R");
}

fn tensor_value(out: &mut Vec<u8>, index: usize, tensor: &TensorSpec) -> io::Result<()> {
    let class = storage_name(tensor.dtype).ok_or_else(|| {
        let reason = format!("a {} tensor has no place in a torch checkpoint", tensor.dtype);
        io::Error::new(io::ErrorKind::Unsupported, reason)
    })?;
    let elements = tensor.bytes() / tensor.dtype.size();
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n(");
    // The persistent id of the storage.
    out.push(b'(');
    text(out, "storage")?;
    out.extend(format!("ctorch\n{class}\n").into_bytes());
    text(out, &index.to_string())?;
    text(out, "cpu")?;
    integer(out, elements);
    out.extend(b"tQ");
    integer(out, 0);
    tuple(out, &tensor.shape);
    tuple(out, &row_major_strides(&tensor.shape));
    // requires_grad = False, no hooks.
    out.push(0x89);
    ordered_dict(out);
    out.extend(b"tR");
    Ok(())
}

fn row_major_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at].max(1);
    }
    strides
}

fn tuple(out: &mut Vec<u8>, values: &[usize]) {
    out.push(b'(');
    for value in values {
        integer(out, *value);
    }
    out.push(b't');
}

fn integer(out: &mut Vec<u8>, value: usize) {
    if let Ok(small) = i32::try_from(value) {
        out.push(b'J');
        out.extend(small.to_le_bytes());
    } else {
        // LONG1 with a ninth byte so that the sign stays positive.
        out.extend([0x8a, 9]);
        out.extend((value as u64).to_le_bytes());
        out.push(0);
    }
}

fn text(out: &mut Vec<u8>, text: &str) -> io::Result<()> {
    let len = u32::try_from(text.len()).map_err(|_| io::Error::other("a name is too long"))?;
    out.push(b'X');
    out.extend(len.to_le_bytes());
    out.extend(text.as_bytes());
    Ok(())
}

struct Written {
    name: String,
    crc: u32,
    size: u64,
    offset: u64,
}

/// Stored entries only.
struct ZipFrame {
    pieces: Vec<(u64, Option<Vec<u8>>)>,
    position: u64,
    entries: Vec<Written>,
    limit: u64,
}

impl ZipFrame {
    fn push(&mut self, bytes: Vec<u8>) {
        let start = self.position;
        self.position += bytes.len() as u64;
        self.pieces.push((start, Some(bytes)));
    }

    /// An entry with its content.
    fn file(&mut self, name: &str, content: Vec<u8>) {
        self.entry(name, crc32fast::hash(&content), content.len() as u64);
        self.push(content);
    }

    /// The header of an entry; its content follows.
    fn entry(&mut self, name: &str, crc: u32, size: u64) {
        let offset = self.position;
        let mut extra = Vec::new();
        if size >= self.limit {
            extra.extend(zip64_extra(&[size, size]));
        }
        // A private extra field ("FB", as torch names it) pads up to the alignment.
        let before = offset + 30 + name.len() as u64 + extra.len() as u64 + 4;
        let padding = (before.next_multiple_of(ALIGNMENT) - before) as usize;
        extra.extend(b"FB");
        extra.extend((padding as u16).to_le_bytes());
        extra.resize(extra.len() + padding, b'Z');

        let mut header = b"PK\x03\x04".to_vec();
        header.extend(self.shared_fields(crc, size));
        header.extend((name.len() as u16).to_le_bytes());
        header.extend((extra.len() as u16).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend(extra);
        self.push(header);
        self.entries.push(Written { name: name.to_owned(), crc, size, offset });
    }

    /// Version needed, UTF-8 flag, method stored, 1980-01-01, checksum and both sizes.
    fn shared_fields(&self, crc: u32, size: u64) -> Vec<u8> {
        let version: u16 = if size >= self.limit { 45 } else { 20 };
        let mut out = version.to_le_bytes().to_vec();
        out.extend(0x0800_u16.to_le_bytes());
        out.extend([0, 0, 0, 0, 0x21, 0]);
        out.extend(crc.to_le_bytes());
        out.extend(self.saturated(size).to_le_bytes());
        out.extend(self.saturated(size).to_le_bytes());
        out
    }

    fn saturated(&self, value: u64) -> u32 {
        if value >= self.limit { u32::MAX } else { value as u32 }
    }

    fn finish(&mut self) {
        let start = self.position;
        for entry in std::mem::take(&mut self.entries) {
            let mut wide = Vec::new();
            if entry.size >= self.limit {
                wide.extend([entry.size, entry.size]);
            }
            if entry.offset >= self.limit {
                wide.push(entry.offset);
            }
            let extra = if wide.is_empty() { Vec::new() } else { zip64_extra(&wide) };
            let mut record = b"PK\x01\x02".to_vec();
            record.extend(45_u16.to_le_bytes());
            record.extend(self.shared_fields(entry.crc, entry.size));
            record.extend((entry.name.len() as u16).to_le_bytes());
            record.extend((extra.len() as u16).to_le_bytes());
            // Comment length, disk, internal and external attributes.
            record.extend([0; 10]);
            record.extend(self.saturated(entry.offset).to_le_bytes());
            record.extend(entry.name.as_bytes());
            record.extend(extra);
            self.push(record);
            self.entries.push(entry);
        }
        self.write_end(start);
    }

    fn write_end(&mut self, start: u64) {
        let size = self.position - start;
        let count = self.entries.len() as u64;
        let wide = start >= self.limit || size >= self.limit || count >= 0xffff;
        if wide {
            let end_64 = self.position;
            let mut record = b"PK\x06\x06".to_vec();
            record.extend(44_u64.to_le_bytes());
            record.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            for value in [count, count, size, start] {
                record.extend(value.to_le_bytes());
            }
            record.extend(b"PK\x06\x07\0\0\0\0");
            record.extend(end_64.to_le_bytes());
            record.extend(1_u32.to_le_bytes());
            self.push(record);
        }
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend(count.to_le_bytes());
        end.extend(count.to_le_bytes());
        end.extend(self.saturated(size).to_le_bytes());
        end.extend(self.saturated(start).to_le_bytes());
        end.extend([0, 0]);
        self.push(end);
    }
}

fn zip64_extra(values: &[u64]) -> Vec<u8> {
    let mut out = 1_u16.to_le_bytes().to_vec();
    out.extend(((values.len() * 8) as u16).to_le_bytes());
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pickle::PickleFile;
    use crate::{Dtype, TensorFile};

    #[test]
    fn zip64_fields_are_written_and_read_where_sizes_need_them() {
        let tensor = |len: usize| {
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            OwnedTensor::from_f32(&[len], &values, Dtype::F32).unwrap()
        };
        let tensors = BTreeMap::from([("a".to_owned(), tensor(3)), ("b".to_owned(), tensor(400))]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wide.ckpt");
        // From "every field" over "some" to "none".
        for limit in [0, 100, 1500, ZIP64_LIMIT] {
            let mut bytes = Vec::new();
            write_with_limit(&mut bytes, &tensors, limit).unwrap();
            let wide = bytes.windows(4).any(|four| four == b"PK\x06\x06");
            assert_eq!(wide, limit < 2000, "{limit}");
            std::fs::write(&path, bytes).unwrap();
            let file = PickleFile::open(&path).unwrap();
            for (name, tensor) in &tensors {
                assert_eq!(file.view(name).unwrap(), tensor.view(), "{limit} {name}");
            }
        }
    }

    #[test]
    fn tensor_data_is_aligned() {
        let tensor = OwnedTensor::from_f32(&[2], &[1.0, 2.0], Dtype::F32).unwrap();
        let tensors = ["x", "yy", "zzz"].map(|name| (name.to_owned(), tensor.clone())).into();
        let mut bytes = Vec::new();
        write_pickle(&mut bytes, &tensors).unwrap();
        let places: Vec<usize> =
            (0..bytes.len() - 8).filter(|at| bytes[*at..*at + 8] == tensor.data).collect();
        assert_eq!(places.len(), 3);
        assert!(places.iter().all(|at| at % ALIGNMENT as usize == 0), "{places:?}");
    }

    #[test]
    fn a_tensor_that_does_not_fill_its_shape_is_refused() {
        let tensor = OwnedTensor { dtype: Dtype::F32, shape: vec![3], data: vec![0; 4] };
        let tensors = BTreeMap::from([("x".to_owned(), tensor)]);
        let error = write_pickle(&mut Vec::new(), &tensors).unwrap_err();
        assert!(error.to_string().contains("`x` does not fill its shape"), "{error}");
    }
}
