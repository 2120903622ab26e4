//! Models as diffusers folders: which file of each component to take, sharded or not, safetensors
//! or `.bin`, with or without a variant; and the configs beside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::family::{self, Family, Finding};
use crate::keys::{Component, map_transformers_clip, map_transformers_clip_with_projection};
use crate::single_file::{note_ignored, open_vae, vae_component};
use crate::tensor_file::{TensorFile, open_tensor_file};
use crate::{Dtype, FormatError, TensorView};

/// One component's folder and the stem of its weight files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// `unet`, or empty for a folder that holds the component itself.
    pub folder: &'static str,
    safetensors: &'static str,
    bin: &'static str,
}

pub(crate) const UNET: Place = diffusers_place("unet");
pub(crate) const VAE: Place = diffusers_place("vae");
pub(crate) const TEXT_ENCODER: Place = transformers_place("text_encoder");
pub(crate) const TEXT_ENCODER_2: Place = transformers_place("text_encoder_2");

const fn diffusers_place(folder: &'static str) -> Place {
    Place { folder, safetensors: "diffusion_pytorch_model", bin: "diffusion_pytorch_model" }
}

const fn transformers_place(folder: &'static str) -> Place {
    Place { folder, safetensors: "model", bin: "pytorch_model" }
}

impl Place {
    /// The VAE's weights in the folder itself.
    pub const fn at_root(self) -> Self {
        Self { folder: "", ..self }
    }

    /// The path of `file` within the model.
    pub fn join(&self, file: &str) -> String {
        if self.folder.is_empty() { file.to_owned() } else { format!("{}/{file}", self.folder) }
    }

    /// File names in order of preference for one variant (`None`: plain names).
    fn candidates(&self, variant: Option<&str>) -> [String; 4] {
        let (middle, after) =
            variant.map_or((String::new(), String::new()), |v| (format!(".{v}"), format!(".{v}")));
        [
            format!("{}{middle}.safetensors", self.safetensors),
            format!("{}.safetensors.index{after}.json", self.safetensors),
            format!("{}{middle}.bin", self.bin),
            format!("{}.bin.index{after}.json", self.bin),
        ]
    }

    /// The weight file (or shard index) to take among the `files` of the model, and what to tell
    /// the user about the choice. `None` when there is none at all.
    pub fn choose(
        &self,
        files: &[String],
        variant: Option<&str>,
    ) -> Option<(String, Option<String>)> {
        let find = |variant: Option<&str>| {
            let candidates = self.candidates(variant).map(|name| self.join(&name));
            candidates.into_iter().find(|name| files.contains(name))
        };
        if let Some(found) = find(variant) {
            return Some((found, None));
        }
        let what = if self.folder.is_empty() { "model" } else { self.folder };
        let fallback = if variant.is_some() { None } else { Some("fp16") };
        let found = find(fallback)?;
        let wanted = variant.map_or("full-precision".to_owned(), |v| format!("`{v}`"));
        Some((
            found.clone(),
            Some(format!("`{what}` has no {wanted} weights, taken instead: `{found}`")),
        ))
    }
}

/// The parts of an opened folder.
pub(crate) struct Folder {
    pub finding: Finding,
    pub unet: Component,
    pub text_encoder: Component,
    /// SDXL's second.
    pub text_encoder_2: Option<Component>,
    /// `None` when the caller replaces it anyway.
    pub vae: Option<Component>,
    pub unet_config: Option<Value>,
    pub text_encoder_config: Option<Value>,
    pub text_encoder_2_config: Option<Value>,
    pub vae_config: Option<Value>,
    pub scheduler_config: Option<Value>,
    pub tokenizer_dir: Option<PathBuf>,
    pub tokenizer_2_dir: Option<PathBuf>,
    pub notes: Vec<String>,
}

/// Opens a model folder; `with_vae` is false when the user gives another VAE.
pub(crate) fn open(
    dir: &Path,
    variant: Option<&str>,
    with_vae: bool,
) -> Result<Folder, FormatError> {
    let files = list_files(dir)?;
    let mut notes = Vec::new();
    let mut weights = |place: Place| open_weights(dir, place, &files, variant, &mut notes);
    let unet = weights(UNET)?;
    let unet_config = read_config(dir, "unet/config.json")?;
    let unet = Component::whole_file(unet);
    let finding = family::of_diffusers_unet(&unet, unet_config.as_ref())?;
    let is_sdxl = finding.family == Family::Sdxl;
    if is_sdxl && TEXT_ENCODER.choose(&files, variant).is_none() {
        return Err(family::refiner(dir, "it has no `text_encoder`"));
    }
    let text = weights(TEXT_ENCODER)?;
    let second = is_sdxl.then(|| weights(TEXT_ENCODER_2)).transpose()?;
    let vae = with_vae.then(|| weights(VAE)).transpose()?;
    check_variant_used(dir, &files, variant)?;

    let text_map = map_transformers_clip(text.as_ref(), "");
    note_ignored(&mut notes, "text encoder", &text_map);
    let second = second
        .map(|file| {
            let map = map_transformers_clip_with_projection(file.as_ref());
            note_ignored(&mut notes, "second text encoder", &map);
            Component::new(file, map)
        })
        .transpose()?;
    let folder = |name: &str| Some(dir.join(name)).filter(|path| path.is_dir());
    Ok(Folder {
        finding,
        unet,
        text_encoder: Component::new(text, text_map)?,
        text_encoder_2: second,
        vae: vae.map(vae_component).transpose()?,
        unet_config,
        text_encoder_config: read_config(dir, "text_encoder/config.json")?,
        text_encoder_2_config: read_config(dir, "text_encoder_2/config.json")?,
        vae_config: read_config(dir, "vae/config.json")?,
        scheduler_config: read_config(dir, "scheduler/scheduler_config.json")?,
        tokenizer_dir: folder("tokenizer"),
        tokenizer_2_dir: folder("tokenizer_2"),
        notes,
    })
}

/// A VAE folder: the component itself, or a model with a `vae` folder. Returns its config, too.
pub(crate) fn open_vae_dir(
    dir: &Path,
    variant: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<(Component, Option<Value>), FormatError> {
    let files = list_files(dir)?;
    let place = vae_place(&files);
    let file = open_weights(dir, place, &files, variant, notes)?;
    Ok((vae_component(file)?, read_config(dir, &place.join("config.json"))?))
}

/// Where the VAE lies among the `files` of a folder or repository.
pub(crate) fn vae_place(files: &[String]) -> Place {
    if files.iter().any(|name| name.starts_with("vae/")) { VAE } else { VAE.at_root() }
}

/// A VAE given as a file: its layout is told from its keys, a config beside it is read.
pub(crate) fn open_vae_file(path: &Path) -> Result<(Component, Option<Value>), FormatError> {
    let component = open_vae(path)?;
    let is_diffusers =
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(VAE.safetensors));
    let config = match path.parent() {
        Some(dir) if is_diffusers => read_config(dir, "config.json")?,
        _ => None,
    };
    Ok((component, config))
}

/// Relative paths of the files in `dir` and in its direct subfolders.
pub(crate) fn list_files(dir: &Path) -> Result<Vec<String>, FormatError> {
    let mut files = Vec::new();
    let mut list = |folder: &Path, prefix: &str| -> Result<Vec<PathBuf>, FormatError> {
        let mut folders = Vec::new();
        let fail = |e| FormatError::io("list", folder, e);
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // Follows links: hub caches are made of them.
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if entry.path().is_file() {
                files.push(format!("{prefix}{name}"));
            }
        }
        Ok(folders)
    };
    for folder in list(dir, "")? {
        if let Some(name) = folder.file_name().and_then(|name| name.to_str()) {
            list(&folder, &format!("{name}/"))?;
        }
    }
    files.sort();
    Ok(files)
}

/// An explicit variant that no component has is a mistake, not a preference.
fn check_variant_used(
    dir: &Path,
    files: &[String],
    variant: Option<&str>,
) -> Result<(), FormatError> {
    let Some(variant) = variant else { return Ok(()) };
    let used = [UNET, TEXT_ENCODER, TEXT_ENCODER_2, VAE].iter().any(|place| {
        let chosen = place.choose(files, Some(variant));
        chosen.is_some_and(|(_, note)| note.is_none())
    });
    if used {
        return Ok(());
    }
    Err(FormatError::MissingFile {
        path: dir.to_path_buf(),
        what: format!("weights of the variant `{variant}`"),
        hint: "leave `variant` out to take what is there".to_owned(),
    })
}

fn open_weights(
    dir: &Path,
    place: Place,
    files: &[String],
    variant: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<Arc<dyn TensorFile>, FormatError> {
    let path = dir.join(choose_weights(dir, place, files, variant, notes)?);
    if is_index(&path) {
        return Ok(Arc::new(ShardedFile::open(&path)?));
    }
    open_tensor_file(&path)
}

/// True for the list of a component's shards.
pub(crate) fn is_index(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

/// The weight file or shard index of a component, relative to the model.
pub(crate) fn choose_weights(
    dir: &Path,
    place: Place,
    files: &[String],
    variant: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<String, FormatError> {
    let Some((name, note)) = place.choose(files, variant) else {
        let [first, _, bin, _] = place.candidates(variant);
        return Err(FormatError::MissingFile {
            path: dir.to_path_buf(),
            what: format!("`{}` (or `{bin}`)", place.join(&first)),
            hint: "a diffusers model has the folders `unet`, `text_encoder` and `vae`; a variant \
                   other than fp16 must be named with `variant`"
                .to_owned(),
        });
    };
    notes.extend(note);
    Ok(name)
}

/// Reads a JSON file of the folder; `None` when it is not there.
pub(crate) fn read_config(dir: &Path, name: &str) -> Result<Option<Value>, FormatError> {
    let path = dir.join(name);
    if !path.exists() {
        return Ok(None);
    }
    read_json(&path).map(Some)
}

pub(crate) fn read_json(path: &Path) -> Result<Value, FormatError> {
    let bytes = std::fs::read(path).map_err(|e| FormatError::io("read", path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::malformed(path, "JSON", e.to_string()))
}

/// The shard names of an index file, checked to be plain file names.
pub(crate) fn shards_of(path: &Path) -> Result<BTreeMap<String, String>, FormatError> {
    let index = read_json(path)?;
    let malformed = |reason: String| FormatError::malformed(path, "shard index", reason);
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| malformed("it has no `weight_map`".to_owned()))?;
    let mut shards = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().unwrap_or_default();
        let is_plain = Path::new(file).file_name().is_some_and(|name| name == file);
        if !is_plain {
            return Err(malformed(format!("the file of `{tensor}` is no plain name: `{file}`")));
        }
        shards.insert(tensor.clone(), file.to_owned());
    }
    Ok(shards)
}

/// A component split over several files by an index.
pub(crate) struct ShardedFile {
    index: PathBuf,
    tensors: BTreeMap<String, Arc<dyn TensorFile>>,
    /// The files by their names.
    pub shards: BTreeMap<String, Arc<dyn TensorFile>>,
    metadata: BTreeMap<String, String>,
}

impl ShardedFile {
    pub fn open(index: &Path) -> Result<Self, FormatError> {
        let dir = index.parent().unwrap_or(Path::new("."));
        let mut files: BTreeMap<String, Arc<dyn TensorFile>> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, name) in shards_of(index)? {
            let file = match files.get(&name) {
                Some(file) => Arc::clone(file),
                None => {
                    let file = open_tensor_file(&dir.join(&name))?;
                    files.insert(name, Arc::clone(&file));
                    file
                }
            };
            if file.describe(&tensor).is_none() {
                return Err(FormatError::MissingTensor {
                    path: file.path().to_path_buf(),
                    name: tensor,
                });
            }
            tensors.insert(tensor, file);
        }
        let metadata = BTreeMap::new();
        Ok(Self { index: index.to_path_buf(), tensors, shards: files, metadata })
    }

    /// The file with the tensor.
    pub fn shard_of(&self, name: &str) -> Option<&Arc<dyn TensorFile>> {
        self.tensors.get(name)
    }
}

impl TensorFile for ShardedFile {
    fn path(&self) -> &Path {
        &self.index
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn describe(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.tensors.get(name)?.describe(name)
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let file = self.tensors.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: self.index.clone(),
            name: name.to_owned(),
        })?;
        file.view(name)
    }

    fn release(&self, name: &str) {
        if let Some(file) = self.tensors.get(name) {
            file.release(name);
        }
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}
