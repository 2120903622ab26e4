//! torch checkpoints (`.ckpt`, `.pt`, `.bin`): a zip of a pickle and raw tensor data.
//!
//! The pickle is read by our own machine that knows a closed list of names and executes nothing;
//! tensor data is memory-mapped and borrowed.

mod globals;
mod machine;
mod value;
mod write;
mod zip;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use machine::Stop;
use value::{Arena, Id, Value};
pub(crate) use write::frame;
pub use write::write_pickle;

use crate::mmap::FileBytes;
use crate::tensor_file::TensorFile;
use crate::{Dtype, FormatError, TensorView};

const FORMAT: &str = "torch checkpoint";

/// A pickle larger than this is no checkpoint's (they have about a megabyte).
const MAX_PICKLE: usize = 256 << 20;

/// Largest copy made for a tensor that is larger than its storage (`expand`ed before saving).
const MAX_EXPANDED: u64 = 1 << 26;

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range in the file that holds every element.
    range: Range<usize>,
    /// In elements; `None` when the elements lie in row-major order.
    strides: Option<Vec<usize>>,
}

/// An open torch checkpoint.
#[derive(Debug)]
pub struct PickleFile {
    map: FileBytes,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl PickleFile {
    /// Opens `path` and reads its pickle. The tensors are those of the outermost dictionary, or
    /// of its `state_dict` where it has one; of an optimizer's, those of parameter 3 as `3.exp_avg`.
    /// Values that are no tensors are passed over.
    ///
    /// # Errors
    /// [`FormatError::ForbiddenPickle`] when the pickle asks for anything that could run code,
    /// [`FormatError::Unsupported`] for the format before torch 1.6, [`FormatError::Malformed`]
    /// for damage, [`FormatError::Io`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::from_map(FileBytes::open(path)?)
    }

    /// Reads bytes that are in memory already; `path` is what errors name.
    ///
    /// # Errors
    /// As [`Self::open`], without the I/O.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::from_map(FileBytes::in_memory(path, bytes))
    }

    pub(crate) fn from_map(map: FileBytes) -> Result<Self, FormatError> {
        let tensors = read(&map)?;
        Ok(Self { map, tensors, metadata: BTreeMap::new() })
    }
}

impl TensorFile for PickleFile {
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
        let bytes = &self.map.bytes()[entry.range.clone()];
        let data = match &entry.strides {
            None => Cow::Borrowed(bytes),
            Some(strides) => Cow::Owned(gather(bytes, entry.dtype.size(), &entry.shape, strides)),
        };
        Ok(TensorView { dtype: entry.dtype, shape: entry.shape.clone(), data })
    }

    fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.map.release(entry.range.clone());
        }
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Copies a strided tensor into row-major order. Ranges were checked when the file was opened.
fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let total: usize = shape.iter().product();
    let mut out = Vec::with_capacity(total * size);
    let mut index = vec![0_usize; shape.len()];
    for _ in 0..total {
        let element: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
        out.extend_from_slice(&bytes[element * size..(element + 1) * size]);
        for (i, len) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *len {
                break;
            }
            *i = 0;
        }
    }
    out
}

fn read(map: &FileBytes) -> Result<BTreeMap<String, Entry>, FormatError> {
    let path = map.path();
    let malformed = |reason: String| FormatError::malformed(path, FORMAT, reason);
    if !map.bytes().starts_with(b"PK") {
        return Err(not_a_zip(map));
    }
    let entries = zip::read_directory(map.bytes()).map_err(malformed)?;
    let (prefix, pickle) = find_pickle(&entries).map_err(malformed)?;
    if let Some(order) = entries.get(&format!("{prefix}byteorder"))
        && map.bytes()[order.clone()] != *b"little"
    {
        return Err(malformed("it was saved on a big-endian machine".to_owned()));
    }
    let (arena, root) = machine::unpickle(&map.bytes()[pickle]).map_err(|stop| match stop {
        Stop::Damaged(reason) => malformed(reason),
        Stop::Forbidden(what) => FormatError::ForbiddenPickle { path: path.to_path_buf(), what },
    })?;
    let tensors = state_dict(&arena, root).map_err(malformed)?;
    let mut out = BTreeMap::new();
    for (name, id) in tensors {
        let entry = locate(&arena, id, |key| entries.get(&format!("{prefix}data/{key}")).cloned())
            .map_err(|reason| malformed(format!("tensor `{name}` {reason}")))?;
        out.insert(name, entry);
    }
    Ok(out)
}

fn not_a_zip(map: &FileBytes) -> FormatError {
    let bytes = map.bytes();
    // PROTO 2 and the magic number with which torch's old format starts.
    if bytes.starts_with(&[0x80, 0x02, 0x8a, 0x0a]) || bytes.starts_with(&[0x80, 0x02, b'}']) {
        return FormatError::Unsupported {
            path: map.path().to_path_buf(),
            reason: "it is in the format that PyTorch wrote before version 1.6".to_owned(),
            hint: "save it once with a current PyTorch: `torch.save(torch.load(path, \
                   weights_only=True), path)`"
                .to_owned(),
        };
    }
    let reason = crate::tensor_file::describe_known_stranger(bytes)
        .unwrap_or_else(|| "it starts like no model file".to_owned());
    FormatError::malformed(map.path(), FORMAT, reason)
}

/// The common prefix of the entries' names (`archive/`) and the place of `data.pkl`.
fn find_pickle(entries: &zip::Entries) -> Result<(String, Range<usize>), String> {
    let mut found = entries.iter().filter_map(|(name, range)| {
        let prefix = name.strip_suffix("data.pkl")?;
        (prefix.is_empty() || (prefix.ends_with('/') && prefix.matches('/').count() == 1))
            .then(|| (prefix.to_owned(), range.clone()))
    });
    let (prefix, range) = found.next().ok_or("it is a zip file without a `data.pkl`")?;
    if found.next().is_some() {
        return Err("it holds more than one `data.pkl`".to_owned());
    }
    if range.len() > MAX_PICKLE {
        return Err(format!("its pickle is larger than any checkpoint's: {}", range.len()));
    }
    Ok((prefix, range))
}

/// The tensors by name, going through a `state_dict` level. Later entries of a name win, as in
/// Python.
fn state_dict(arena: &Arena, root: Id) -> Result<BTreeMap<String, Id>, String> {
    let Value::Dict(mut items) = arena.get(root).clone() else {
        return Err("its pickle holds no dictionary of tensors".to_owned());
    };
    let inner = items.iter().rev().find(|(key, _)| arena.text(*key) == Some("state_dict"));
    if let Some((_, inner)) = inner
        && let Value::Dict(inner) = arena.get(*inner)
    {
        items = inner.clone();
    }
    let mut tensors = BTreeMap::new();
    for (key, value) in items {
        if let (Some(name), Value::Tensor(_)) = (arena.text(key), arena.get(value)) {
            tensors.insert(name.to_owned(), value);
        }
    }
    if tensors.is_empty() {
        tensors = optimizer_state(arena, root);
    }
    if tensors.is_empty() {
        return Err("its pickle holds no tensors".to_owned());
    }
    Ok(tensors)
}

/// The tensors of an optimizer's `state_dict`: those of `state[3]["exp_avg"]` as `3.exp_avg`.
fn optimizer_state(arena: &Arena, root: Id) -> BTreeMap<String, Id> {
    let entries = |id: Id| match arena.get(id) {
        Value::Dict(items) => items.as_slice(),
        _ => &[],
    };
    let mut tensors = BTreeMap::new();
    let state = entries(root).iter().rev().find(|(key, _)| arena.text(*key) == Some("state"));
    for (number, parameter) in state.map_or(&[][..], |(_, state)| entries(*state)) {
        let Some(number) = arena.int(*number) else { continue };
        for (name, value) in entries(*parameter) {
            if let (Some(name), Value::Tensor(_)) = (arena.text(*name), arena.get(*value)) {
                tensors.insert(format!("{number}.{name}"), *value);
            }
        }
    }
    tensors
}

/// Checks a tensor against its storage and the storage against the archive.
fn locate(
    arena: &Arena,
    id: Id,
    entry_of: impl Fn(&str) -> Option<Range<usize>>,
) -> Result<Entry, String> {
    let Value::Tensor(tensor) = arena.get(id) else { return Err("is no tensor".to_owned()) };
    let Value::Storage(storage) = arena.get(tensor.storage) else {
        return Err("has no storage".to_owned());
    };
    let data = entry_of(&storage.key)
        .ok_or_else(|| format!("needs data that the file lacks: `data/{}`", storage.key))?;
    let size = tensor.dtype.size() as u64;
    let storage_bytes =
        storage
            .elements
            .checked_mul(storage.dtype.map_or(1, Dtype::size) as u64)
            .ok_or_else(|| format!("has a storage of impossible size: {}", storage.elements))?;
    if storage_bytes > data.len() as u64 {
        return Err(format!(
            "needs {storage_bytes} bytes of `data/{}`, it holds: {}",
            storage.key,
            data.len()
        ));
    }
    let impossible = || format!("has an impossible shape: {:?}", tensor.shape);
    let total = tensor
        .shape
        .iter()
        .try_fold(1_u64, |product, size| product.checked_mul(*size))
        .ok_or_else(impossible)?;
    // One past the last element used, counted from the offset.
    let extent = if total == 0 {
        0
    } else {
        tensor
            .shape
            .iter()
            .zip(&tensor.strides)
            .try_fold(1_u64, |sum, (size, stride)| {
                sum.checked_add((size - 1).checked_mul(*stride)?)
            })
            .ok_or_else(impossible)?
    };
    let end = tensor.offset.checked_add(extent).and_then(|end| end.checked_mul(size));
    if end.is_none_or(|end| end > storage_bytes) {
        return Err(format!(
            "of shape {:?} reaches beyond its storage of bytes: {storage_bytes}",
            tensor.shape
        ));
    }
    if total > extent.max(MAX_EXPANDED) {
        return Err(format!("is expanded from few elements to too many: {total}"));
    }
    // All below the length of a mapped file, or below MAX_EXPANDED.
    let start = data.start + (tensor.offset * size) as usize;
    let shape: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
    let strides: Vec<usize> = tensor.strides.iter().map(|stride| *stride as usize).collect();
    Ok(Entry {
        dtype: tensor.dtype,
        range: start..start + (extent * size) as usize,
        strides: (!is_row_major(&shape, &strides)).then_some(strides),
        shape,
    })
}

/// Dimensions of size 1 may have any stride.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(size, stride)| {
        let fits = *size == 1 || *stride == expected;
        expected *= size;
        fits
    })
}
