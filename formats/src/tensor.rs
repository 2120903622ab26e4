//! Tensors as they lie in files: type, shape, bytes; borrowed from the mapped file or owned.
//!
//! No arithmetic beyond conversion of number types.

use std::borrow::Cow;
use std::ops::Range;

use crate::dtype::{bytes_from_f32, extend_f32};
use crate::{Dtype, FormatError};

/// A tensor read from a file: row-major, little endian.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Number type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements; borrowed from the memory map wherever the file stores them contiguously.
    /// No alignment is promised.
    pub data: Cow<'a, [u8]>,
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    /// True when a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// All elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.len());
        extend_f32(self.dtype, &self.data, &mut out);
        out
    }

    /// The rows of this range (of the outermost dimension), within its bounds.
    #[must_use]
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        let Some(count) = self.shape.first().copied() else { return self };
        let row = self.data.len() / count.max(1);
        let end = range.end.min(count);
        let start = range.start.min(end);
        let mut shape = self.shape;
        shape[0] = end - start;
        let bytes = start * row..end * row;
        let data = match self.data {
            Cow::Borrowed(data) => Cow::Borrowed(&data[bytes]),
            Cow::Owned(data) => Cow::Owned(data[bytes].to_vec()),
        };
        Self { dtype: self.dtype, shape, data }
    }

    /// A copy that does not borrow the file.
    pub fn to_owned_tensor(&self) -> OwnedTensor {
        OwnedTensor { dtype: self.dtype, shape: self.shape.clone(), data: self.data.to_vec() }
    }
}

/// What a file says of a tensor: everything but its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Key in the file.
    pub name: String,
    /// Number type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the data.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

/// A tensor in memory of its own: row-major, little endian.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedTensor {
    /// Number type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<u8>,
}

impl OwnedTensor {
    /// A tensor of `shape` stored as `dtype`, rounded to nearest even.
    ///
    /// # Errors
    /// [`FormatError::WrongDtype`] when `dtype` is not F64, F32, F16 or BF16.
    ///
    /// # Panics
    /// When `values.len()` is not the product of `shape`.
    pub fn from_f32(shape: &[usize], values: &[f32], dtype: Dtype) -> Result<Self, FormatError> {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "elements of shape {shape:?}");
        Ok(Self { dtype, shape: shape.to_vec(), data: bytes_from_f32(values, dtype)? })
    }

    /// A scalar (0-dim) of `dtype`.
    ///
    /// # Errors
    /// As [`Self::from_f32`].
    pub fn scalar(value: f32, dtype: Dtype) -> Result<Self, FormatError> {
        Self::from_f32(&[], &[value], dtype)
    }

    /// What a file says of it under the name `name`.
    pub fn spec(&self, name: &str) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype: self.dtype, shape: self.shape.clone() }
    }

    /// An error for writers when the data is not what type and shape say.
    pub(crate) fn check_filled(&self, name: &str) -> std::io::Result<()> {
        let size = self.shape.iter().try_fold(self.dtype.size(), |bytes, n| bytes.checked_mul(*n));
        if size == Some(self.data.len()) {
            return Ok(());
        }
        Err(std::io::Error::other(format!("tensor `{name}` does not fill its shape")))
    }

    /// The same tensor, borrowed.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: self.shape.clone(), data: Cow::Borrowed(&self.data) }
    }

    /// All elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.data.len() / self.dtype.size());
        extend_f32(self.dtype, &self.data, &mut out);
        out
    }

    /// The tensor in another float type (rounded to nearest even); itself when it is of that
    /// type already or does not hold floats.
    ///
    /// # Errors
    /// As [`Self::from_f32`].
    pub fn cast(&self, dtype: Dtype) -> Result<Self, FormatError> {
        if self.dtype == dtype || !self.dtype.is_float() {
            return Ok(self.clone());
        }
        Self::from_f32(&self.shape, &self.to_f32(), dtype)
    }
}

/// The weights of one component of a model, under the names of diffusers or transformers.
pub trait Weights: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// A tensor, borrowed from the mapped file where its layout allows.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`] naming tensor and file.
    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError>;

    /// Says that `name` was read and will hardly be read again: its pages need not stay in this
    /// process. Weights that are no part of a file have nothing to do.
    fn release(&self, _name: &str) {}

    /// A tensor's shape without touching its data, `None` when there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// True when there is such a tensor.
    fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }
}
