//! Adapter files of every naming and kind, their modules under sd-scripts' names.
//!
//! A file is read as it lies: keys are sorted into modules, ranks and sizes of a module's tensors
//! are checked against each other, numbers stay in the file until they are asked for. What the
//! names of the file look like is known to `names` alone; everything after it sees one naming.

mod alphas;
mod dotted;
mod kohya;
mod names;
mod parts;
mod sdxl_unet;
mod told_family;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::lora_file::Metadata;
use crate::tensor_file::{TensorFile, open_tensor_file};
use crate::{Family, FormatError, TensorView};

use names::Part;

pub use dotted::diffusers_path;
pub use sdxl_unet::original_name as sdxl_original_name;

/// How the keys of a file are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// sd-scripts and LyCORIS: `lora_unet_down_blocks_0_..._to_q.lora_down.weight`.
    Kohya,
    /// diffusers before PEFT: `unet.down_blocks.0...to_q.lora.down.weight`, and attention processors.
    Diffusers,
    /// PEFT, as diffusers writes today: `unet.down_blocks.0...to_q.lora_A.weight`.
    Peft,
}

/// An adapter file of any naming, its modules under sd-scripts' names.
pub struct AdapterFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its tensors; the keys in [`AdapterModule`] are keys of this file.
    pub file: Arc<dyn TensorFile>,
    /// Every text of its header; empty for `.ckpt` and `.pt`.
    pub metadata: Metadata,
    /// How its keys are written; where a file mixes namings, that of most modules.
    pub naming: Naming,
    /// The family of models it belongs to, told from names, shapes and metadata, in this order.
    pub family: Option<Family>,
    /// Sorted by name. At least one.
    pub modules: Vec<AdapterModule>,
    /// Keys that belong to no module, sorted: what no loader of LoRAs knows either.
    pub unknown: Vec<String>,
}

/// What an adapter does to one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// sd-scripts' name of the layer: `lora_unet_...`, `lora_te_...`; for SDXL `lora_te1_...`,
    /// `lora_te2_...` and the original names of the U-Net (`lora_unet_input_blocks_4_1_proj_in`).
    pub name: String,
    /// The name in the file, as it stands before the ending of the key of its first tensor.
    pub stored: String,
    /// The tensors and how they make the change of the layer.
    pub kind: AdapterKind,
    /// The stored alpha, from a tensor or from PEFT's configuration; `None` or 0 means the rank. For
    /// kinds without a rank the scale itself, which only PEFT's LoKr has.
    pub alpha: Option<f32>,
    /// Key of DoRA's magnitudes: one number for each output of the layer (`[out, 1, ..]`, with PEFT
    /// `[out]` or `[1, out, 1, 1]`), or for each input (`[1, in, ..]`, LyCORIS' `wd_on_output=False`).
    pub dora_scale: Option<String>,
    /// Key of what is added to the layer's bias (`diff_b`), `[out]`.
    pub bias: Option<String>,
}

/// The tensors of a module; texts are keys of the file. Shapes as [`AdapterFile::open`] checks them:
/// `in` and `out` are the layer's, `r` is the rank, `k` the kernel of a convolution.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the shapes are said at each kind")]
pub enum AdapterKind {
    /// `up · down`: up `[out, r]`, down `[r, in]`; convolutions `[out, r, 1, 1]` and
    /// `[r, in, k, k]`. With `mid` (Tucker) `[r, r, k, k]` the others are 1x1.
    LowRank { down: String, up: String, mid: Option<String> },
    /// LoHa: `(w1_a · w1_b) ∘ (w2_a · w2_b)`, a `[out, r]`, b `[r, in·k·k]`. With cores t
    /// `[r, r, k, k]`: a `[r, out]`, b `[r, in]`.
    Hadamard {
        w1_a: String,
        w1_b: String,
        w2_a: String,
        w2_b: String,
        t1: Option<String>,
        t2: Option<String>,
    },
    /// LoKr: `w1 ⊗ w2`. A product is a `[rows, r]` · b `[r, columns]`; with the core t2
    /// `[r, r, k, k]` w2 is a `[r, rows]`, b `[r, columns]`.
    Kronecker { w1: KronFactor, w2: KronFactor, t2: Option<String> },
    /// The whole difference of the layer's weight, in its shape.
    Full { diff: String },
    /// Differences of a normalisation's weight and bias, or of a bias alone.
    Norm { w_norm: Option<String>, b_norm: Option<String> },
}

/// A factor of a Kronecker product.
#[derive(Clone, Debug, PartialEq)]
pub enum KronFactor {
    /// Stored as it is: key.
    Whole(String),
    /// Stored as a product: keys of a and b.
    Product(String, String),
}

impl AdapterFile {
    /// Reads and checks what a file holds, not its numbers: `.safetensors`, `.ckpt`, `.pt`, `.bin`.
    /// Beside PEFT's `adapter_model.safetensors` its `adapter_config.json` is read too.
    ///
    /// # Errors
    /// All reading errors; [`FormatError::BadLora`] naming the key that breaks the rules: half a
    /// pair, ranks that differ, a file without any module.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::of(open_tensor_file(path)?)
    }

    /// The adapter in an open file.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of(file: Arc<dyn TensorFile>) -> Result<Self, FormatError> {
        let parts::Grouped { modules: mut found, unknown } = parts::group(file.as_ref())?;
        let naming = naming_of(&found);
        let family = told_family::tell(file.as_ref(), &found);
        alphas::complete(file.as_ref(), &mut found)?;
        let mut modules = BTreeMap::new();
        for found in found {
            let name = canonical_name(found.part, &found.layer, family);
            let stored = found.module.stored.clone();
            if let Some(double) =
                modules.insert(name.clone(), AdapterModule { name, ..found.module })
            {
                return Err(FormatError::BadLora {
                    path: file.path().to_path_buf(),
                    reason: format!("two modules change one layer, `{}` and this", double.stored),
                    key: stored,
                });
            }
        }
        Ok(Self {
            path: file.path().to_path_buf(),
            metadata: file.metadata().clone(),
            file,
            naming,
            family,
            modules: modules.into_values().collect(),
            unknown,
        })
    }

    /// A tensor of the file.
    ///
    /// # Errors
    /// Those of [`TensorFile::view`].
    pub fn view(&self, key: &str) -> Result<TensorView<'_>, FormatError> {
        self.file.view(key)
    }

    fn shape(&self, key: &str) -> &[usize] {
        self.file.shape(key).unwrap_or_default()
    }
}

impl std::fmt::Debug for AdapterFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdapterFile")
            .field("path", &self.path)
            .field("naming", &self.naming)
            .field("family", &self.family)
            .field("modules", &self.modules.len())
            .field("unknown", &self.unknown)
            .finish()
    }
}

impl AdapterModule {
    /// The rank; 0 for kinds that have none: whole differences, norms and a Kronecker product of two
    /// whole factors.
    pub fn rank(&self, file: &AdapterFile) -> usize {
        parts::rank(&self.kind, |key| file.shape(key))
    }

    /// What the kind's product is multiplied by: alpha / rank, 1 where the file gives no alpha.
    pub fn scale(&self, file: &AdapterFile) -> f32 {
        match self.alpha {
            Some(alpha) if alpha != 0.0 => alpha / self.rank(file).max(1) as f32,
            _ => 1.0,
        }
    }

    /// The shape of the weight that it changes: `[out, in]`, `[out, in, kh, kw]`, or `[out, in·kh·kw]`
    /// where the file does not tell the kernel (LoHa and LoKr products without a core). For norms
    /// the shape of the difference.
    pub fn layer_shape(&self, file: &AdapterFile) -> Vec<usize> {
        parts::layer_shape(&self.kind, |key| file.shape(key))
    }

    /// Every key of the module but its alpha's.
    pub fn keys(&self) -> Vec<&str> {
        let mut keys = parts::kind_keys(&self.kind);
        keys.extend(self.dora_scale.as_deref());
        keys.extend(self.bias.as_deref());
        keys
    }
}

/// sd-scripts' name of a layer.
fn canonical_name(part: Part, layer: &str, family: Option<Family>) -> String {
    let sdxl = family == Some(Family::Sdxl);
    match part {
        Part::Unet if sdxl => {
            let original = sdxl_unet::original_name(layer);
            format!("lora_unet_{}", original.as_deref().unwrap_or(layer))
        }
        Part::Unet => format!("lora_unet_{layer}"),
        Part::Text if !sdxl => format!("lora_te_{layer}"),
        Part::Text | Part::Text1 => format!("lora_te1_{layer}"),
        Part::Text2 => format!("lora_te2_{layer}"),
    }
}

fn naming_of(modules: &[parts::Found]) -> Naming {
    let count = |naming| modules.iter().filter(|found| found.naming == naming).count();
    // The first of equals.
    let all = [Naming::Peft, Naming::Diffusers, Naming::Kohya];
    all.into_iter().max_by_key(|naming| count(*naming)).unwrap_or(Naming::Kohya)
}

#[cfg(test)]
mod tests;
