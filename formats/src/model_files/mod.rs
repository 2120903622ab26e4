//! A whole model for offline work: which files it has, and where each layer that an adapter can
//! change lies in them, under kohya's names.
//!
//! SD1, SD2 and SDXL, as a single file in the LDM layout or as a diffusers folder. Opening reads
//! headers alone; tensors are views of the mapped files.

mod layers;
mod ldm;
mod open;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use ldm::{LdmLayout, LdmTensor};

use crate::tensor_file::TensorFile;
use crate::{Component, Family, FormatError, TensorView};

/// How a model lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// One file in the LDM layout.
    SingleFile,
    /// A diffusers folder with a folder for each component.
    Folder,
}

/// A component of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ComponentKind {
    /// The noise predictor.
    Unet,
    /// The text encoder; of SDXL the first one, CLIP ViT-L.
    TextEncoder,
    /// SDXL's second text encoder, OpenCLIP bigG.
    TextEncoder2,
    /// The autoencoder of pictures.
    Vae,
}

impl ComponentKind {
    /// The component's folder in diffusers' layout.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Vae => "vae",
        }
    }
}

/// A file with tensors of the model.
#[derive(Clone)]
pub struct StoredFile {
    /// Its path within the folder; empty for a single file.
    pub relative: PathBuf,
    /// The opened file.
    pub file: Arc<dyn TensorFile>,
    /// Whose tensors it holds; `None` for a single file, which holds all.
    pub component: Option<ComponentKind>,
}

impl std::fmt::Debug for StoredFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredFile")
            .field("path", &self.file.path())
            .field("component", &self.component)
            .finish_non_exhaustive()
    }
}

/// Which of kohya's networks change a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerTarget {
    /// `networks.lora` always: within `Transformer2DModel`, `CLIPAttention` and `CLIPMLP`.
    Attention,
    /// `networks.lora` with `conv_dim` alone: within `ResnetBlock2D`, `Downsample2D`, `Upsample2D`.
    Resnet,
    /// Never by `networks.lora`: the first and the last convolution, the embeddings of time and
    /// sizes. LyCORIS can.
    Outer,
}

/// Where a layer's weight is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlace {
    /// Index in [`ModelFiles::files`].
    pub file: usize,
    /// The tensor's key in that file.
    pub key: String,
    /// The rows that are the layer's, where the tensor joins several layers (OpenCLIP's q, k, v).
    pub rows: Option<Range<usize>>,
}

/// A Linear or convolution of the U-Net or a text encoder that an adapter can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// kohya's name: `lora_unet_...`, `lora_te_...`, of SDXL `lora_te1_...` and `lora_te2_...`.
    pub name: String,
    /// Whose layer it is.
    pub component: ComponentKind,
    /// Where its weight is.
    pub place: LayerPlace,
    /// `[out, in]` or `[out, in, kh, kw]`, of this layer alone.
    pub shape: Vec<usize>,
    /// Which networks change it.
    pub target: LayerTarget,
}

/// A whole model: SD1, SD2 or SDXL; single file (LDM layout) or diffusers folder.
pub struct ModelFiles {
    /// Which family it is of.
    pub family: Family,
    /// The file or folder that was opened.
    pub path: PathBuf,
    /// Which of both.
    pub container: Container,
    /// The files with its tensors. Of a folder: those of the chosen weights of each component.
    pub files: Vec<StoredFile>,
    /// What the user should know: fallbacks taken, unknown tensors passed over.
    pub notes: Vec<String>,
    components: BTreeMap<ComponentKind, Component>,
    layers: Vec<Layer>,
    /// Other names of layers, with their indices.
    aliases: HashMap<String, usize>,
    at: HashMap<(usize, String), Vec<usize>>,
    norms: HashMap<String, LayerPlace>,
}

impl std::fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFiles")
            .field("family", &self.family)
            .field("files", &self.files)
            .field("layers", &self.layers.len())
            .finish_non_exhaustive()
    }
}

impl ModelFiles {
    /// Opens a `.safetensors` or `.ckpt` file in the LDM layout, or a diffusers folder (weights of
    /// a component in one file or in shards). Of a single file the VAE may be missing.
    ///
    /// # Errors
    /// What is no such model (a LoRA, a U-Net alone, another family), what a folder lacks, and
    /// everything that reading gives.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if path.is_dir() { open::folder(path) } else { open::single_file(path) }
    }

    /// All layers, sorted by name.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer of a module's name. Of SDXL also under diffusers' names of the U-Net
    /// (`lora_unet_down_blocks_1_...`), and of the first text encoder as `lora_te_...`.
    pub fn layer(&self, name: &str) -> Option<&Layer> {
        let found = self.layers.binary_search_by(|layer| layer.name.as_str().cmp(name));
        let index = found.ok().or_else(|| self.aliases.get(name).copied())?;
        self.layers.get(index)
    }

    /// Where the scale of a normalisation is stored, by kohya's name of it; its bias lies beside,
    /// under the same key with `bias` for `weight`.
    pub fn norm(&self, name: &str) -> Option<&LayerPlace> {
        self.norms.get(name)
    }

    /// Indices in [`Self::layers`] of the layers that the tensor `key` of a file holds: none, one,
    /// or the three of a joined projection.
    pub fn layers_at(&self, file: usize, key: &str) -> &[usize] {
        // A tuple key cannot be looked up by reference; names are short.
        self.at.get(&(file, key.to_owned())).map_or(&[], Vec::as_slice)
    }

    /// The layer's weight in the layer's shape, borrowed where the file stores it contiguously.
    ///
    /// # Errors
    /// Those of [`TensorFile::view`].
    pub fn view(&self, layer: &Layer) -> Result<TensorView<'_>, FormatError> {
        let stored = self.files.get(layer.place.file).ok_or_else(|| missing(self, layer))?;
        let view = stored.file.view(&layer.place.key)?;
        match &layer.place.rows {
            None => Ok(view),
            Some(rows) => Ok(view.rows(rows.clone())),
        }
    }

    /// Says that the layer's weight was read: its pages need not stay in this process.
    pub fn release(&self, layer: &Layer) {
        if let Some(stored) = self.files.get(layer.place.file) {
            stored.file.release(&layer.place.key);
        }
    }

    /// A component under the names of diffusers and transformers; of a single file without VAE
    /// there is none.
    pub fn component(&self, kind: ComponentKind) -> Option<&Component> {
        self.components.get(&kind)
    }
}

fn missing(model: &ModelFiles, layer: &Layer) -> FormatError {
    FormatError::MissingTensor { path: model.path.clone(), name: layer.name.clone() }
}
