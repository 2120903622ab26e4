//! The values an unpickled checkpoint is made of, in an arena.
//!
//! Values refer to each other by index, so that a hostile pickle's nesting or cycles cost neither
//! recursion nor leaks. Values that loading weights never looks at are all the same `Opaque`.

use crate::Dtype;

/// Index of a value in its [`Arena`].
pub(super) type Id = u32;

/// Most values one pickle may make (checkpoints have some ten thousand); bounds the memory a
/// hostile file can ask for to about half a gigabyte.
const MAX_VALUES: usize = 8_000_000;

#[derive(Clone, Debug)]
pub(super) enum Value {
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Tensor),
    /// None, booleans, floats, bytes, sets, and everything made by an ignored global.
    Opaque,
}

/// An allowed global; none is ever executed, calling one builds a [`Value`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildTensorWithDtype,
    RebuildParameter,
    RebuildFromType,
    Size,
    /// A typed storage class, or the untyped one.
    Storage(Option<Dtype>),
    Dtype(Dtype),
    /// Harmless and of no interest: calling it gives `Opaque`.
    Ignored,
}

/// A run of elements in an entry `data/KEY` of the archive.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub key: String,
    /// `None` for untyped storage, whose elements are bytes.
    pub dtype: Option<Dtype>,
    pub elements: u64,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub storage: Id,
    pub dtype: Dtype,
    /// In elements, like the strides.
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// Owner of all values of one pickle.
#[derive(Debug)]
pub(super) struct Arena {
    values: Vec<Value>,
}

impl Arena {
    /// The one `Opaque` value, shared.
    pub const OPAQUE: Id = 0;

    pub fn new() -> Self {
        Self { values: vec![Value::Opaque] }
    }

    pub fn add(&mut self, value: Value) -> Result<Id, String> {
        if matches!(value, Value::Opaque) {
            return Ok(Self::OPAQUE);
        }
        if self.values.len() >= MAX_VALUES {
            return Err(format!("its pickle makes more values than allowed: {MAX_VALUES}"));
        }
        self.values.push(value);
        // Below MAX_VALUES, so it fits.
        Ok((self.values.len() - 1) as Id)
    }

    /// Ids are only made by [`Self::add`] and values never removed, so the index is valid.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    pub fn get_mut(&mut self, id: Id) -> &mut Value {
        &mut self.values[id as usize]
    }

    pub fn int(&self, id: Id) -> Option<u64> {
        match self.get(id) {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// A tuple of non-negative integers.
    pub fn sizes(&self, id: Id) -> Option<Vec<u64>> {
        self.tuple(id)?.iter().map(|item| self.int(*item)).collect()
    }
}
