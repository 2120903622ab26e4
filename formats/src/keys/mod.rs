//! Tables from the names in files to the names of diffusers and transformers.
//!
//! One file per layout. The tables are derived from which keys exist, so depth, width and blocks
//! per level are whatever the file holds. A table only renames, slices rows or drops trailing
//! 1x1 dimensions; no data is read to build one.

mod clip;
mod ldm_unet;
mod ldm_vae;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub(crate) use clip::{map_open_clip, map_transformers_clip};
pub(crate) use ldm_unet::map_ldm_unet;
pub(crate) use ldm_vae::{map_diffusers_vae, map_ldm_vae};

use crate::tensor_file::TensorFile;
use crate::{Dtype, FormatError, TensorView, Weights};

/// Which part of a stored tensor a name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Whole,
    /// The n-th third of the rows: q, k or v of a joined projection.
    Third(usize),
    /// A 1x1 convolution seen as the matrix of a Linear.
    Matrix,
}

#[derive(Clone, Debug)]
struct Slot {
    key: String,
    part: Part,
}

/// Names of one component and where each lies in the file.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyMap {
    slots: BTreeMap<String, Slot>,
    /// Keys under the component's prefix that no rule knows.
    pub ignored: Vec<String>,
}

impl KeyMap {
    /// Every tensor under its own name.
    pub fn identity(file: &dyn TensorFile) -> Self {
        let mut map = Self::default();
        for name in file.names() {
            map.insert(name.to_owned(), name, Part::Whole);
        }
        map
    }

    fn insert(&mut self, name: String, key: &str, part: Part) {
        self.slots.insert(name, Slot { key: key.to_owned(), part });
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

/// One component of a model: a file seen through a key table.
#[derive(Clone)]
pub struct Component {
    file: Arc<dyn TensorFile>,
    slots: BTreeMap<String, Slot>,
}

impl std::fmt::Debug for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Component")
            .field("file", &self.file.path())
            .field("tensors", &self.slots.len())
            .finish()
    }
}

impl Component {
    /// Checks that the stored shapes allow the parts that the table takes.
    pub(crate) fn new(file: Arc<dyn TensorFile>, map: KeyMap) -> Result<Self, FormatError> {
        for slot in map.slots.values() {
            let shape = file.shape(&slot.key).unwrap_or_default();
            let (fits, expected) = match slot.part {
                Part::Whole => (true, ""),
                Part::Third(_) => {
                    (shape.first().is_some_and(|rows| rows % 3 == 0), "divisible by 3 in rows")
                }
                Part::Matrix => (
                    shape.len() >= 2 && shape[2..].iter().all(|size| *size == 1),
                    "a matrix or a 1x1 convolution",
                ),
            };
            if !fits {
                return Err(FormatError::WrongShape {
                    path: file.path().to_path_buf(),
                    name: slot.key.clone(),
                    expected: expected.to_owned(),
                    got: shape.to_vec(),
                });
            }
        }
        Ok(Self { file, slots: map.slots })
    }

    /// Every tensor of `file` under its own name.
    pub fn whole_file(file: Arc<dyn TensorFile>) -> Self {
        let map = KeyMap::identity(file.as_ref());
        Self { file, slots: map.slots }
    }

    /// The file that holds the tensors.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// A tensor's stored number type.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        let slot = self.slots.get(name)?;
        self.file.describe(&slot.key).map(|(dtype, _)| dtype)
    }
}

impl Weights for Component {
    fn names(&self) -> Vec<String> {
        self.slots.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let slot = self.slots.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: self.path().to_path_buf(),
            name: name.to_owned(),
        })?;
        let mut view = self.file.view(&slot.key)?;
        match slot.part {
            Part::Whole => {}
            Part::Matrix => view.shape.truncate(2),
            Part::Third(index) => {
                let bytes = view.data.len() / 3;
                let range = index * bytes..(index + 1) * bytes;
                view.shape[0] /= 3;
                view.data = match view.data {
                    Cow::Borrowed(data) => Cow::Borrowed(&data[range]),
                    Cow::Owned(data) => Cow::Owned(data[range].to_vec()),
                };
            }
        }
        Ok(view)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let slot = self.slots.get(name)?;
        let mut shape = self.file.shape(&slot.key)?.to_vec();
        match slot.part {
            Part::Whole => {}
            Part::Matrix => shape.truncate(2),
            // Checked to have rows when the component was made.
            Part::Third(_) => shape[0] /= 3,
        }
        Some(shape)
    }
}

/// Keys of `file` that start with `prefix`: (whole key, rest).
fn under<'f>(file: &'f dyn TensorFile, prefix: &str) -> Vec<(&'f str, &'f str)> {
    let names = file.names().into_iter();
    names.filter_map(|key| Some((key, key.strip_prefix(prefix)?))).collect()
}

/// Splits `12.rest` into the number and the rest.
fn split_index(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((number.parse().ok()?, rest))
}
