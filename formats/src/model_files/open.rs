//! Opens models for offline work: chooses files, maps names, lists layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::layers::Found;
use super::{ComponentKind, Container, ModelFiles, StoredFile};
use crate::diffusers_dir::{
    Place, ShardedFile, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, choose_weights, is_index,
    list_files, read_config,
};
use crate::family::{self, LDM_TEXT_1, LDM_TEXT_2, LDM_UNET, OPEN_CLIP};
use crate::keys::{
    KeyMap, OpenClip, map_ldm_unet, map_ldm_vae, map_open_clip, map_transformers_clip,
    map_transformers_clip_with_projection,
};
use crate::single_file::{LDM_VAE, clip_prefix, note_ignored, vae_component};
use crate::tensor_file::{TensorFile, open_tensor_file};
use crate::{Component, Family, FormatError};

type Components = BTreeMap<ComponentKind, Component>;

pub(super) fn single_file(path: &Path) -> Result<ModelFiles, FormatError> {
    let file = open_tensor_file(path)?;
    let family = family::of_single_file(file.as_ref())?.family;
    let mut maps = vec![
        (ComponentKind::Unet, "U-Net", map_ldm_unet(file.as_ref(), LDM_UNET)),
        (ComponentKind::Vae, "VAE", map_ldm_vae(file.as_ref(), LDM_VAE)),
    ];
    let text = |map| (ComponentKind::TextEncoder, "text encoder", map);
    match family {
        Family::Sd1 => {
            let prefix = clip_prefix(file.as_ref());
            maps.push(text(map_transformers_clip(file.as_ref(), prefix)));
        }
        Family::Sd2 => {
            maps.push(text(map_open_clip(file.as_ref(), OPEN_CLIP, OpenClip::BeforeLast)));
        }
        Family::Sdxl => {
            maps.push(text(map_transformers_clip(file.as_ref(), LDM_TEXT_1)));
            let second = map_open_clip(file.as_ref(), LDM_TEXT_2, OpenClip::WithProjection);
            maps.push((ComponentKind::TextEncoder2, "second text encoder", second));
        }
    }
    let mut notes = Vec::new();
    let mut components = Components::new();
    for (kind, what, map) in maps {
        note_ignored(&mut notes, what, &map);
        if !map.is_empty() {
            components.insert(kind, Component::new(Arc::clone(&file), map)?);
        }
    }
    let mut found = Found::default();
    for (kind, component) in &components {
        found.add(family, *kind, component, &|_| 0);
    }
    let stored = StoredFile { relative: PathBuf::new(), file, component: None };
    Ok(finish(family, path, Container::SingleFile, vec![stored], (notes, components, found)))
}

pub(super) fn folder(dir: &Path) -> Result<ModelFiles, FormatError> {
    let names = list_files(dir)?;
    let mut notes = Vec::new();
    let mut files = Vec::new();
    let mut open = |place: Place, kind: ComponentKind| -> Result<Opened, FormatError> {
        let relative = choose_weights(dir, place, &names, None, &mut notes)?;
        let opened = open_component(dir, &relative, files.len())?;
        files.extend(opened.stored.iter().map(|(relative, file)| StoredFile {
            relative: relative.clone(),
            file: Arc::clone(file),
            component: Some(kind),
        }));
        Ok(opened)
    };
    let unet = open(UNET, ComponentKind::Unet)?;
    let text = open(TEXT_ENCODER, ComponentKind::TextEncoder)?;
    let unet_component = Component::whole_file(Arc::clone(&unet.file));
    let config = read_config(dir, "unet/config.json")?;
    let family = family::of_diffusers_unet(&unet_component, config.as_ref())?.family;
    refuse_other_pipelines(dir, family)?;
    let second = (family == Family::Sdxl)
        .then(|| open(TEXT_ENCODER_2, ComponentKind::TextEncoder2))
        .transpose()?;
    let vae = open(VAE, ComponentKind::Vae)?;

    let mut components = Components::from([
        (ComponentKind::Unet, unet_component),
        (ComponentKind::Vae, vae_component(Arc::clone(&vae.file))?),
    ]);
    let mut add_text = |kind, opened: &Opened, map: KeyMap| -> Result<(), FormatError> {
        note_ignored(&mut notes, "text encoder", &map);
        components.insert(kind, Component::new(Arc::clone(&opened.file), map)?);
        Ok(())
    };
    add_text(ComponentKind::TextEncoder, &text, map_transformers_clip(text.file.as_ref(), ""))?;
    if let Some(second) = &second {
        let map = map_transformers_clip_with_projection(second.file.as_ref());
        add_text(ComponentKind::TextEncoder2, second, map)?;
    }
    let opened = [
        (ComponentKind::Unet, Some(&unet)),
        (ComponentKind::TextEncoder, Some(&text)),
        (ComponentKind::TextEncoder2, second.as_ref()),
    ];
    let mut found = Found::default();
    for (kind, opened) in opened {
        if let (Some(opened), Some(component)) = (opened, components.get(&kind)) {
            found.add(family, kind, component, &|key| opened.file_of(key));
        }
    }
    Ok(finish(family, dir, Container::Folder, files, (notes, components, found)))
}

fn finish(
    family: Family,
    path: &Path,
    container: Container,
    files: Vec<StoredFile>,
    (notes, components, mut found): (Vec<String>, Components, Found),
) -> ModelFiles {
    let norms = std::mem::take(&mut found.norms);
    let (layers, aliases, at) = found.finish();
    let path = path.to_path_buf();
    ModelFiles { family, path, container, files, notes, components, layers, aliases, at, norms }
}

/// One component of a folder.
struct Opened {
    /// All its tensors.
    file: Arc<dyn TensorFile>,
    /// The files of it, with their paths in the model.
    stored: Vec<(PathBuf, Arc<dyn TensorFile>)>,
    sharded: Option<Arc<ShardedFile>>,
    /// Index of the first of `stored` among the files of the model.
    first: usize,
}

impl Opened {
    /// Index among the files of the model of the one with `key`.
    fn file_of(&self, key: &str) -> usize {
        let shard = self.sharded.as_ref().and_then(|sharded| sharded.shard_of(key));
        let place = shard
            .and_then(|shard| self.stored.iter().position(|(_, file)| Arc::ptr_eq(file, shard)));
        self.first + place.unwrap_or_default()
    }
}

fn open_component(dir: &Path, relative: &str, first: usize) -> Result<Opened, FormatError> {
    let path = dir.join(relative);
    if !is_index(&path) {
        let file = open_tensor_file(&path)?;
        let stored = vec![(PathBuf::from(relative), Arc::clone(&file))];
        return Ok(Opened { file, stored, sharded: None, first });
    }
    let sharded = Arc::new(ShardedFile::open(&path)?);
    let place = |name: &String| Path::new(relative).with_file_name(name);
    let stored = sharded.shards.iter().map(|(name, file)| (place(name), Arc::clone(file)));
    let stored = stored.collect();
    let file: Arc<dyn TensorFile> = Arc::clone(&sharded) as _;
    Ok(Opened { file, stored, sharded: Some(sharded), first })
}

/// A folder whose pipeline is another than its U-Net tells would be converted wrongly.
fn refuse_other_pipelines(dir: &Path, family: Family) -> Result<(), FormatError> {
    let index = read_config(dir, "model_index.json")?;
    let class = index.as_ref().and_then(|i| i.get("_class_name")).and_then(Value::as_str);
    let Some(class) = class else { return Ok(()) };
    let is_other = class.contains("Refiner")
        || class.contains("StableDiffusion3")
        || class.contains("Flux")
        || class.contains("XL") != (family == Family::Sdxl);
    if !is_other {
        return Ok(());
    }
    Err(FormatError::Unsupported {
        path: dir.to_path_buf(),
        reason: format!("its pipeline is `{class}`, its U-Net is of {}", family.title()),
        hint: "the folder was put together from different models; give a complete one".to_owned(),
    })
}
