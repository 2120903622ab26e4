//! Tables from the names in files to the names of diffusers and transformers.
//!
//! One file per layout. The tables are derived from which keys exist, so depth, width and blocks
//! per level are whatever the file holds. A table only renames, slices rows or drops trailing
//! 1x1 dimensions; no data is read to build one.

mod clip;
mod ldm_unet;
mod ldm_vae;
mod to_ldm_unet;
mod to_ldm_vae;
mod to_open_clip;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub(crate) use clip::{
    OpenClip, map_open_clip, map_transformers_clip, map_transformers_clip_with_projection,
};
pub(crate) use ldm_unet::map_ldm_unet;
pub(crate) use ldm_vae::{map_diffusers_vae, map_ldm_vae};
pub(crate) use to_ldm_unet::LdmUnetNames;
pub(crate) use to_ldm_vae::{last_vae_level, ldm_vae_name};
pub(crate) use to_open_clip::{OpenClipTensor, open_clip_tensors};

use crate::tensor_file::TensorFile;
use crate::{Dtype, FormatError, TensorView, Weights};

/// Which part of a stored tensor a name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Part {
    Whole,
    /// The n-th third of the rows: q, k or v of a joined projection.
    Third(usize),
    /// A 1x1 convolution seen as the matrix of a Linear.
    Matrix,
    /// A matrix with rows and columns exchanged.
    Transposed,
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
                Part::Transposed => (shape.len() == 2, "a matrix"),
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

    /// The names with the key and the part of it that each stands for, sorted by name.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (&str, &str, Part)> {
        self.slots.iter().map(|(name, slot)| (name.as_str(), slot.key.as_str(), slot.part))
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
            Part::Transposed => view = transposed(&view),
            Part::Third(third) => {
                let rows = view.shape[0] / 3;
                view = view.rows(third * rows..(third + 1) * rows);
            }
        }
        Ok(view)
    }

    fn release(&self, name: &str) {
        if let Some(slot) = self.slots.get(name) {
            self.file.release(&slot.key);
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let slot = self.slots.get(name)?;
        let mut shape = self.file.shape(&slot.key)?.to_vec();
        match slot.part {
            Part::Whole => {}
            Part::Matrix => shape.truncate(2),
            Part::Transposed => shape.reverse(),
            // Checked to have rows when the component was made.
            Part::Third(_) => shape[0] /= 3,
        }
        Some(shape)
    }
}

/// A copy of a matrix with rows and columns exchanged.
pub(crate) fn transposed(view: &TensorView<'_>) -> TensorView<'static> {
    let (rows, columns, size) = (view.shape[0], view.shape[1], view.dtype.size());
    let mut data = Vec::with_capacity(view.data.len());
    for column in 0..columns {
        for row in 0..rows {
            let start = (row * columns + column) * size;
            data.extend_from_slice(&view.data[start..start + size]);
        }
    }
    TensorView { dtype: view.dtype, shape: vec![columns, rows], data: Cow::Owned(data) }
}

/// Keys of `file` that start with `prefix`: (whole key, rest).
fn under<'f>(file: &'f dyn TensorFile, prefix: &str) -> Vec<(&'f str, &'f str)> {
    let names = file.names().into_iter();
    names.filter_map(|key| Some((key, key.strip_prefix(prefix)?))).collect()
}

/// Splits `12.rest` into the number and the rest. No model counts anything beyond 16 bits, so that
/// numbers from a hostile file can be added up.
fn split_index(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((number.parse::<u16>().ok()?.into(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OwnedTensor;
    use crate::safetensors_file::{SafetensorsFile, write_safetensors};

    /// A file of vectors `[0, 1, ... 5]` under these names.
    fn file(names: &[&str]) -> SafetensorsFile {
        let values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let tensor = OwnedTensor::from_f32(&[6], &values, Dtype::F32).unwrap();
        let tensors = names.iter().map(|name| ((*name).to_owned(), tensor.clone())).collect();
        let mut bytes = Vec::new();
        write_safetensors(&mut bytes, &tensors, None).unwrap();
        SafetensorsFile::from_bytes(Path::new("x"), bytes).unwrap()
    }

    fn pairs(map: &KeyMap) -> Vec<(&str, &str)> {
        assert!(map.ignored.is_empty(), "{:?}", map.ignored);
        map.slots.iter().map(|(name, slot)| (slot.key.as_str(), name.as_str())).collect()
    }

    /// Each key of `expected` gives the name beside it, and nothing else is made.
    fn assert_maps(map: &KeyMap, expected: &[(&str, &str)]) {
        let mut expected = expected.to_vec();
        expected.sort_by_key(|(_, name)| *name);
        assert_eq!(pairs(map), expected);
    }

    #[test]
    fn a_unet_of_two_levels_with_one_block_each() {
        let expected = [
            ("u.input_blocks.0.0.weight", "conv_in.weight"),
            ("u.input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"),
            ("u.input_blocks.2.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
            (
                "u.input_blocks.3.0.emb_layers.1.weight",
                "down_blocks.1.resnets.0.time_emb_proj.weight",
            ),
            ("u.input_blocks.3.0.in_layers.0.weight", "down_blocks.1.resnets.0.norm1.weight"),
            ("u.input_blocks.3.1.norm.weight", "down_blocks.1.attentions.0.norm.weight"),
            ("u.input_blocks.3.1.proj_in.weight", "down_blocks.1.attentions.0.proj_in.weight"),
            ("u.middle_block.0.in_layers.0.weight", "mid_block.resnets.0.norm1.weight"),
            ("u.middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
            ("u.middle_block.2.in_layers.0.weight", "mid_block.resnets.1.norm1.weight"),
            ("u.output_blocks.0.0.in_layers.0.weight", "up_blocks.0.resnets.0.norm1.weight"),
            ("u.output_blocks.0.1.proj_in.weight", "up_blocks.0.attentions.0.proj_in.weight"),
            ("u.output_blocks.1.0.in_layers.0.weight", "up_blocks.0.resnets.1.norm1.weight"),
            ("u.output_blocks.1.1.proj_in.weight", "up_blocks.0.attentions.1.proj_in.weight"),
            ("u.output_blocks.1.2.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            ("u.output_blocks.2.0.in_layers.0.weight", "up_blocks.1.resnets.0.norm1.weight"),
            ("u.output_blocks.3.0.in_layers.0.weight", "up_blocks.1.resnets.1.norm1.weight"),
            (
                "u.output_blocks.3.0.skip_connection.weight",
                "up_blocks.1.resnets.1.conv_shortcut.weight",
            ),
            ("u.out.0.weight", "conv_norm_out.weight"),
            ("u.out.2.weight", "conv_out.weight"),
            ("u.time_embed.2.bias", "time_embedding.linear_2.bias"),
        ];
        let keys: Vec<&str> = expected.iter().map(|(key, _)| *key).collect();
        assert_maps(&map_ldm_unet(&file(&keys), "u."), &expected);
    }

    #[test]
    fn block_numbers_sort_as_numbers() {
        // Twelve blocks without a sampler: 10 and 11 come after 9.
        let keys: Vec<String> =
            (0..12).map(|i| format!("output_blocks.{i}.0.in_layers.0.bias")).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let map = map_ldm_unet(&file(&keys), "");
        let key = &map.slots["up_blocks.0.resnets.11.norm1.bias"].key;
        assert_eq!(key, "output_blocks.11.0.in_layers.0.bias");
    }

    #[test]
    fn a_vae_of_three_levels_counts_its_decoder_backwards() {
        let expected = [
            ("decoder.up.0.block.0.norm1.weight", "decoder.up_blocks.2.resnets.0.norm1.weight"),
            ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.1.upsamplers.0.conv.bias"),
            (
                "decoder.up.2.block.1.nin_shortcut.bias",
                "decoder.up_blocks.0.resnets.1.conv_shortcut.bias",
            ),
            ("encoder.down.2.block.0.norm1.weight", "encoder.down_blocks.2.resnets.0.norm1.weight"),
            ("encoder.norm_out.bias", "encoder.conv_norm_out.bias"),
            ("post_quant_conv.bias", "post_quant_conv.bias"),
        ];
        let keys: Vec<&str> = expected.iter().map(|(key, _)| *key).collect();
        assert_maps(&map_ldm_vae(&file(&keys), ""), &expected);
    }

    #[test]
    fn joined_projections_are_split_and_the_last_layer_left_out() {
        let keys = [
            "transformer.resblocks.0.attn.in_proj_bias",
            "transformer.resblocks.0.ln_2.weight",
            "transformer.resblocks.1.attn.in_proj_bias",
            "transformer.resblocks.1.ln_2.weight",
            "logit_scale",
        ];
        let file = file(&keys);
        let map = map_open_clip(&file, "", OpenClip::BeforeLast);
        let component = Component::new(Arc::new(file), map).unwrap();
        let layer = "text_model.encoder.layers.0";
        let names = [
            format!("{layer}.layer_norm2.weight"),
            format!("{layer}.self_attn.k_proj.bias"),
            format!("{layer}.self_attn.q_proj.bias"),
            format!("{layer}.self_attn.v_proj.bias"),
        ];
        assert_eq!(component.names(), names);
        let values = |part: &str| {
            component.get(&format!("{layer}.self_attn.{part}_proj.bias")).unwrap().to_f32()
        };
        assert_eq!([values("q"), values("k"), values("v")], [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]);
        assert_eq!(component.shape(&names[1]), Some(vec![2]));
    }

    #[test]
    fn shapes_that_cannot_be_taken_apart_are_named() {
        let tensor = OwnedTensor::from_f32(&[4], &[0.0; 4], Dtype::F32).unwrap();
        let key = "transformer.resblocks.0.attn.in_proj_bias";
        let tensors = [key, "transformer.resblocks.1.ln_1.bias"];
        let tensors = tensors.map(|name| (name.to_owned(), tensor.clone())).into();
        let mut bytes = Vec::new();
        write_safetensors(&mut bytes, &tensors, None).unwrap();
        let file = SafetensorsFile::from_bytes(Path::new("x"), bytes).unwrap();
        let map = map_open_clip(&file, "", OpenClip::BeforeLast);
        let text = Component::new(Arc::new(file), map).unwrap_err().to_string();
        assert!(text.contains(key) && text.ends_with("its shape is: [4]"), "{text}");
    }

    #[test]
    fn a_text_model_may_leave_out_its_prefix() {
        let expected = [
            ("t.encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
            ("t.text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ];
        let mut keys: Vec<&str> = expected.iter().map(|(key, _)| *key).collect();
        keys.extend(["t.embeddings.position_ids", "t.text_projection.weight", "other"]);
        assert_maps(&map_transformers_clip(&file(&keys), "t."), &expected);
    }
}
