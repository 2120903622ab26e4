//! The safetensors format: a memory-mapped reader and a byte-deterministic writer.
//!
//! Own code over the published layout (8 bytes of header length, JSON header, tensor bytes:
//! <https://github.com/huggingface/safetensors#format>), so that each kind of damage has a message
//! that names file, tensor and numbers. What the reference library refuses is refused here too.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::mmap::FileBytes;
use crate::tensor_file::TensorFile;
use crate::{Dtype, FormatError, OwnedTensor, TensorSpec, TensorView};

/// Longest header accepted, as in the reference library.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range in the file.
    start: usize,
    end: usize,
}

/// An open safetensors file; its data stays in the page cache, nothing is copied.
#[derive(Debug)]
pub struct SafetensorsFile {
    map: FileBytes,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens and validates `path`: header, types, shapes, offsets, file length.
    ///
    /// # Errors
    /// [`FormatError::Io`], or [`FormatError::Malformed`] saying what is wrong.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::from_map(FileBytes::open(path)?)
    }

    /// True when the first bytes can be the start of a safetensors file.
    pub(crate) fn looks_like(bytes: &[u8]) -> bool {
        bytes.len() > 8 && bytes[8] == b'{'
    }

    /// Reads bytes that are in memory already; `path` is what errors name.
    ///
    /// # Errors
    /// As [`Self::open`], without the I/O.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::from_map(FileBytes::in_memory(path, bytes))
    }

    pub(crate) fn from_map(map: FileBytes) -> Result<Self, FormatError> {
        let strange = crate::tensor_file::describe_known_stranger(map.bytes());
        let (tensors, metadata) = strange
            .map_or_else(|| parse(map.bytes()), Err)
            .map_err(|reason| FormatError::malformed(map.path(), "safetensors", reason))?;
        Ok(Self { map, tensors, metadata })
    }

    /// Every byte after the header: what `sshs_model_hash` covers.
    pub fn data_section(&self) -> &[u8] {
        let start = self.tensors.values().map(|e| e.start).min();
        start.map_or(&[], |start| &self.map.bytes()[start..])
    }
}

impl TensorFile for SafetensorsFile {
    fn path(&self) -> &Path {
        self.map.path()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn describe(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.tensors.get(name).map(|e| (e.dtype, e.shape.as_slice()))
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let entry = self.tensors.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: self.path().to_path_buf(),
            name: name.to_owned(),
        })?;
        Ok(TensorView {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            data: Cow::Borrowed(&self.map.bytes()[entry.start..entry.end]),
        })
    }

    fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.map.release(entry.start..entry.end);
        }
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

type Parsed = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Splits and checks a whole file; the error is the reason alone.
fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("it is too short to hold a header, its bytes: {}", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!(
            "its header claims more than the allowed {MAX_HEADER} bytes: {length}\nhint: this is \
             probably another kind of file with the wrong name"
        ));
    }
    // Below 100 MB, so it fits usize on every platform.
    let length = length as usize;
    if length > rest.len() {
        return Err(format!(
            "its header should have {length} bytes, the file ends after: {}\nhint: the file is \
             truncated, download or copy it again",
            rest.len()
        ));
    }
    let (header, data) = rest.split_at(length);
    let header = std::str::from_utf8(header)
        .map_err(|e| format!("its header is not UTF-8 at byte: {}", e.valid_up_to() + 8))?;
    let header: Header = serde_json::from_str(header).map_err(|e| match e.classify() {
        serde_json::error::Category::Data => e.to_string(),
        _ => format!("its header is not JSON: {e}"),
    })?;
    let mut tensors = BTreeMap::new();
    for (name, raw) in header.tensors {
        let entry = check_entry(&name, raw, 8 + length)?;
        tensors.insert(name, entry);
    }
    check_layout(&tensors, 8 + length, bytes.len(), data.len())?;
    Ok((tensors, header.metadata))
}

fn check_entry(name: &str, raw: RawEntry, data_start: usize) -> Result<Entry, String> {
    let dtype = Dtype::from_safetensors_name(&raw.dtype)
        .ok_or_else(|| format!("tensor `{name}` has an unknown type: `{}`", raw.dtype))?;
    let sizes: Option<Vec<usize>> =
        raw.shape.iter().map(|size| usize::try_from(*size).ok()).collect();
    let bytes = sizes.as_ref().and_then(|sizes| {
        sizes.iter().try_fold(dtype.size(), |product, size| product.checked_mul(*size))
    });
    let (Some(shape), Some(bytes)) = (sizes, bytes) else {
        return Err(format!("tensor `{name}` has an impossible shape: {:?}", raw.shape));
    };
    let (from, to) = raw.data_offsets;
    let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
    let range = range.and_then(|(from, to)| {
        (from <= to).then_some(())?;
        Some((data_start.checked_add(from)?, data_start.checked_add(to)?))
    });
    let Some((start, end)) = range else {
        return Err(format!("tensor `{name}` has impossible offsets: {from}, {to}"));
    };
    if end - start != bytes {
        return Err(format!(
            "tensor `{name}` of shape {shape:?} and type {dtype} needs {bytes} bytes, its offsets \
             hold: {}",
            end - start
        ));
    }
    Ok(Entry { dtype, shape, start, end })
}

/// The tensors must fill the data section without holes and without overlaps.
fn check_layout(
    tensors: &BTreeMap<String, Entry>,
    data_start: usize,
    file_length: usize,
    data_length: usize,
) -> Result<(), String> {
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, entry)| (entry.start, entry.end));
    let mut expected = data_start;
    let mut previous = "the header";
    for (name, entry) in by_offset {
        if entry.start < expected {
            return Err(format!("tensor `{name}` overlaps the one before it: `{previous}`"));
        }
        if entry.start > expected {
            return Err(format!(
                "there is a hole before tensor `{name}`, bytes: {}",
                entry.start - expected
            ));
        }
        if entry.end > file_length {
            return Err(format!(
                "tensor `{name}` ends at byte {}, the file ends at: {file_length}\nhint: the file \
                 is truncated, download or copy it again",
                entry.end
            ));
        }
        expected = entry.end;
        previous = name;
    }
    if expected != file_length {
        return Err(format!(
            "its tensors fill {} bytes of data, the file holds: {data_length}",
            expected - data_start
        ));
    }
    Ok(())
}

/// The header as written; a name given twice is an error, which a plain map would hide.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawEntry)>,
}

#[derive(Deserialize, Serialize)]
struct RawEntry {
    dtype: Cow<'static, str>,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("the name `{name}` appears twice")));
                    }
                    if name == "__metadata__" {
                        let texts: Option<BTreeMap<String, String>> = map.next_value()?;
                        header.metadata = texts.unwrap_or_default();
                    } else {
                        let entry = map.next_value().map_err(|e| {
                            A::Error::custom(format!("tensor `{name}` is badly described: {e}"))
                        })?;
                        header.tensors.push((name, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Writes tensors and metadata; the same input always gives the same bytes.
///
/// Header entries are sorted by name and so is the metadata. Data lies in the order of the
/// reference library (widest type first, then by name), which keeps every tensor aligned and
/// makes `sshs_model_hash` agree with it.
///
/// # Errors
/// Those of `writer`.
pub fn write_safetensors(
    writer: &mut dyn Write,
    tensors: &BTreeMap<String, OwnedTensor>,
    metadata: Option<&BTreeMap<String, String>>,
) -> io::Result<()> {
    let specs = filled_specs(tensors)?;
    let header = header_bytes(&specs, metadata)?;
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for spec in &specs {
        writer.write_all(&tensors[&spec.name].data)?;
    }
    Ok(())
}

/// The file of [`write_safetensors`] without metadata, as pieces to be written one after the other:
/// its head, and the data of the tensors where they lie.
///
/// # Errors
/// When the data of a tensor is not what its type and shape say.
pub fn safetensors_pieces<'a>(
    tensors: &BTreeMap<String, &'a OwnedTensor>,
) -> io::Result<(Vec<u8>, Vec<&'a [u8]>)> {
    let specs = filled_specs(tensors.iter().map(|(name, tensor)| (name, *tensor)))?;
    let header = header_bytes(&specs, None)?;
    let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    Ok((head, specs.iter().map(|spec| &tensors[&spec.name].data[..]).collect()))
}

/// The tensors in the order of their data.
///
/// # Errors
/// When the data of one is not what its type and shape say.
pub(crate) fn filled_specs<'a>(
    tensors: impl IntoIterator<Item = (&'a String, &'a OwnedTensor)>,
) -> io::Result<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    for (name, tensor) in tensors {
        tensor.check_filled(name)?;
        specs.push(tensor.spec(name));
    }
    sort_by_layout(&mut specs);
    Ok(specs)
}

/// Widest type first, then by name.
pub(crate) fn sort_by_layout(specs: &mut [TensorSpec]) {
    specs.sort_by(|a, b| {
        let types = b.dtype.layout_order().cmp(&a.dtype.layout_order());
        types.then_with(|| a.name.cmp(&b.name))
    });
}

/// The JSON header of tensors whose data lie in this order, padded with spaces to a multiple of 8.
pub(crate) fn header_bytes(
    specs: &[TensorSpec],
    metadata: Option<&BTreeMap<String, String>>,
) -> io::Result<Vec<u8>> {
    let mut offset = 0_u64;
    let mut entries = BTreeMap::new();
    for spec in specs {
        let end = offset + spec.bytes() as u64;
        let entry = RawEntry {
            dtype: Cow::Borrowed(spec.dtype.safetensors_name()),
            shape: spec.shape.iter().map(|size| *size as u64).collect(),
            data_offsets: (offset, end),
        };
        entries.insert(spec.name.as_str(), entry);
        offset = end;
    }
    let mut header = String::from("{");
    if let Some(metadata) = metadata {
        header += "\"__metadata__\":";
        header += &serde_json::to_string(metadata)?;
    }
    for (name, entry) in &entries {
        if header.len() > 1 {
            header.push(',');
        }
        header += &serde_json::to_string(name)?;
        header.push(':');
        header += &serde_json::to_string(entry)?;
    }
    header.push('}');
    let mut header = header.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
