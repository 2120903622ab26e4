//! Single-file checkpoints in the LDM layout, split into their components.

use std::path::Path;
use std::sync::Arc;

use crate::FormatError;
use crate::family::{self, Family, Finding, LDM_TEXT_1, LDM_TEXT_2, LDM_UNET, OPEN_CLIP};
use crate::keys::{
    Component, KeyMap, OpenClip, map_diffusers_vae, map_ldm_unet, map_ldm_vae, map_open_clip,
    map_transformers_clip,
};
use crate::tensor_file::{TensorFile, open_tensor_file};

/// The prefix of the VAE in single files.
pub(crate) const LDM_VAE: &str = "first_stage_model.";

/// The components of one file; the VAE may be missing when it is replaced anyway.
pub(crate) struct SingleFile {
    pub finding: Finding,
    pub unet: Component,
    pub text_encoder: Component,
    /// SDXL's second.
    pub text_encoder_2: Option<Component>,
    pub vae: Option<Component>,
    pub notes: Vec<String>,
}

/// Opens `path` and maps its keys. EMA weights and training state are passed over.
pub(crate) fn open(path: &Path) -> Result<SingleFile, FormatError> {
    let file = open_tensor_file(path)?;
    let finding = family::of_single_file(file.as_ref())?;
    let mut notes = Vec::new();
    let unet = map_ldm_unet(file.as_ref(), LDM_UNET);
    let text = match finding.family {
        Family::Sd2 => map_open_clip(file.as_ref(), OPEN_CLIP, OpenClip::BeforeLast),
        Family::Sd1 => map_transformers_clip(file.as_ref(), clip_prefix(file.as_ref())),
        Family::Sdxl => map_transformers_clip(file.as_ref(), LDM_TEXT_1),
    };
    let second = (finding.family == Family::Sdxl)
        .then(|| map_open_clip(file.as_ref(), LDM_TEXT_2, OpenClip::WithProjection));
    let vae = map_ldm_vae(file.as_ref(), LDM_VAE);
    note_ignored(&mut notes, "U-Net", &unet);
    note_ignored(&mut notes, "text encoder", &text);
    if let Some(second) = &second {
        note_ignored(&mut notes, "second text encoder", second);
    }
    note_ignored(&mut notes, "VAE", &vae);
    let second = second.map(|map| Component::new(Arc::clone(&file), map)).transpose()?;
    let vae = (!vae.is_empty()).then(|| Component::new(Arc::clone(&file), vae)).transpose()?;
    Ok(SingleFile {
        finding,
        unet: Component::new(Arc::clone(&file), unet)?,
        text_encoder: Component::new(file, text)?,
        text_encoder_2: second,
        vae,
        notes,
    })
}

/// Checkpoints differ in how deep the text model lies below `cond_stage_model.`.
pub(crate) fn clip_prefix(file: &dyn TensorFile) -> &'static str {
    const TRANSFORMER: &str = "cond_stage_model.transformer.";
    if file.names().iter().any(|name| name.starts_with(TRANSFORMER)) {
        TRANSFORMER
    } else {
        family::LDM_TEXT
    }
}

pub(crate) fn note_ignored(notes: &mut Vec<String>, what: &str, map: &KeyMap) {
    if let Some(first) = map.ignored.first() {
        notes.push(format!(
            "{} tensors of the {what} have unknown names and are ignored, the first: `{first}`",
            map.ignored.len()
        ));
    }
}

/// A VAE file of its own, in the LDM layout (with or without its prefix) or diffusers'.
pub(crate) fn open_vae(path: &Path) -> Result<Component, FormatError> {
    let file = open_tensor_file(path)?;
    vae_component(file)
}

pub(crate) fn vae_component(file: Arc<dyn TensorFile>) -> Result<Component, FormatError> {
    let names = file.names();
    let has = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    let map = if has("first_stage_model.encoder.") {
        map_ldm_vae(file.as_ref(), LDM_VAE)
    } else if has("encoder.down_blocks.") {
        map_diffusers_vae(file.as_ref())
    } else if has("encoder.down.") {
        map_ldm_vae(file.as_ref(), "")
    } else {
        return Err(FormatError::Unsupported {
            path: file.path().to_path_buf(),
            reason: "it holds no VAE encoder".to_owned(),
            hint: "give a VAE in the layout of Stable Diffusion or diffusers".to_owned(),
        });
    };
    drop(names);
    Component::new(file, map)
}
