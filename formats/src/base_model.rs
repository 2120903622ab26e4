//! One door to every base model: a file, a folder or a hub id becomes components with uniform
//! names.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::family::{self, Family};
use crate::hub::{self, HubOptions, Wanted};
use crate::keys::Component;
use crate::model_hash::ModelIdentity;
use crate::{FormatError, Weights, diffusers_dir, single_file};

/// What the user may say about a base model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// `v2` of the config; `None` lets the model tell.
    pub v2: Option<bool>,
    /// Which variant of a diffusers folder's weights to take (`fp16`); `None` takes the plain
    /// ones, or fp16 where there are no others.
    pub variant: Option<String>,
    /// A VAE to use instead of the model's: file, folder or hub id.
    pub vae: Option<String>,
}

/// An opened base model: memory-mapped weights under the names of diffusers and transformers.
pub struct BaseModel {
    /// Stable Diffusion 1, 2 or XL.
    pub family: Family,
    /// `UNet2DConditionModel`'s weights. `proj_in` and `proj_out` are as stored: 1x1 convolutions
    /// in SD1, matrices in SD2.
    pub unet: Box<dyn Weights>,
    /// `CLIPTextModel`'s weights; for SD2 without the last layer of OpenCLIP.
    pub text_encoder: Box<dyn Weights>,
    /// SDXL's second text encoder: `CLIPTextModelWithProjection`'s weights, `text_projection` among them.
    pub text_encoder_2: Option<Box<dyn Weights>>,
    /// `AutoencoderKL`'s weights, the attention as `to_q`, `to_k`, `to_v`, `to_out.0` matrices.
    pub vae: Box<dyn Weights>,
    /// `unet/config.json`; single files have none.
    pub unet_config: Option<Value>,
    /// `text_encoder/config.json`.
    pub text_encoder_config: Option<Value>,
    /// `text_encoder_2/config.json`.
    pub text_encoder_2_config: Option<Value>,
    /// `vae/config.json`.
    pub vae_config: Option<Value>,
    /// `scheduler/scheduler_config.json`.
    pub scheduler_config: Option<Value>,
    /// The `tokenizer` folder, where there is one.
    pub tokenizer_dir: Option<PathBuf>,
    /// The `tokenizer_2` folder, where there is one.
    pub tokenizer_2_dir: Option<PathBuf>,
    /// `ss_sd_model_name`: file name, folder name or hub id.
    pub name: String,
    /// Gives `ss_sd_model_hash` and `ss_new_sd_model_hash` when asked (takes seconds).
    pub identity: ModelIdentity,
    /// Gives `ss_vae_name`, `ss_vae_hash` and `ss_new_vae_hash` when the VAE was replaced.
    pub vae_identity: Option<ModelIdentity>,
    /// The file or folder that was opened.
    pub path: PathBuf,
    /// What the user should know: fallbacks taken, unknown tensors ignored.
    pub notes: Vec<String>,
}

impl std::fmt::Debug for BaseModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BaseModel")
            .field("family", &self.family)
            .field("path", &self.path)
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

impl BaseModel {
    /// `prediction_type` of the scheduler's config (`epsilon`, `v_prediction`), where there is one.
    pub fn prediction_type(&self) -> Option<&str> {
        self.scheduler_config.as_ref()?.get("prediction_type")?.as_str()
    }
}

/// Opens a base model: a `.safetensors` or `.ckpt` file in the LDM layout, a diffusers folder, or
/// a hub id.
///
/// # Errors
/// Every variant of [`FormatError`] that reading can give; the message is for the user.
pub fn open_base_model(path_or_id: &str, options: &OpenOptions) -> Result<BaseModel, FormatError> {
    open_base_model_with(path_or_id, options, &HubOptions::from_env())
}

/// As [`open_base_model`], with the hub's settings given instead of read from the environment.
///
/// # Errors
/// As [`open_base_model`].
pub fn open_base_model_with(
    path_or_id: &str,
    options: &OpenOptions,
    hub: &HubOptions,
) -> Result<BaseModel, FormatError> {
    let variant = options.variant.as_deref();
    let with_vae = options.vae.is_none();
    let mut notes = Vec::new();
    let found = locate(path_or_id, Wanted::Model { with_vae }, variant, hub, &mut notes)?;
    let parts = if found.path.is_dir() {
        diffusers_dir::open(&found.path, variant, with_vae)?
    } else {
        from_single_file(&found.path)?
    };
    notes.extend(parts.notes);
    parts.finding.check(options.v2, &found.path)?;
    let second = parts.text_encoder_2.as_ref();
    family::check_parts(&parts.unet, &parts.text_encoder, second)?;

    let (vae, vae_config, vae_identity) = match (&options.vae, parts.vae) {
        (Some(given), _) => {
            let (vae, config, identity) = open_other_vae(given, variant, hub, &mut notes)?;
            (vae, config, Some(identity))
        }
        (None, Some(vae)) => (vae, parts.vae_config, None),
        (None, None) => {
            return Err(FormatError::Unsupported {
                path: found.path,
                reason: "it holds no VAE".to_owned(),
                hint: "give one with `vae`".to_owned(),
            });
        }
    };
    Ok(BaseModel {
        family: parts.finding.family,
        unet: Box::new(parts.unet),
        text_encoder: Box::new(parts.text_encoder),
        text_encoder_2: parts.text_encoder_2.map(|part| Box::new(part) as Box<dyn Weights>),
        vae: Box::new(vae),
        unet_config: parts.unet_config,
        text_encoder_config: parts.text_encoder_config,
        text_encoder_2_config: parts.text_encoder_2_config,
        vae_config,
        scheduler_config: parts.scheduler_config,
        tokenizer_dir: parts.tokenizer_dir,
        tokenizer_2_dir: parts.tokenizer_2_dir,
        name: found.identity.name.clone(),
        path: found.path,
        identity: found.identity,
        vae_identity,
        notes,
    })
}

fn from_single_file(path: &Path) -> Result<diffusers_dir::Folder, FormatError> {
    let file = single_file::open(path)?;
    Ok(diffusers_dir::Folder {
        finding: file.finding,
        unet: file.unet,
        text_encoder: file.text_encoder,
        text_encoder_2: file.text_encoder_2,
        vae: file.vae,
        unet_config: None,
        text_encoder_config: None,
        text_encoder_2_config: None,
        vae_config: None,
        scheduler_config: None,
        tokenizer_dir: None,
        tokenizer_2_dir: None,
        notes: file.notes,
    })
}

struct Found {
    path: PathBuf,
    identity: ModelIdentity,
}

/// A local path, or the cache folder of a hub id.
fn locate(
    given: &str,
    wanted: Wanted,
    variant: Option<&str>,
    hub: &HubOptions,
    notes: &mut Vec<String>,
) -> Result<Found, FormatError> {
    let path = Path::new(given);
    if path.exists() {
        return Ok(Found { path: path.to_path_buf(), identity: ModelIdentity::of_path(path) });
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let is_file_name = matches!(extension, "safetensors" | "ckpt" | "pt" | "pth" | "bin");
    if is_file_name || !hub::is_hub_id(given) {
        return Err(FormatError::NotFound {
            given: given.to_owned(),
            hint: "give an existing `.safetensors` or `.ckpt` file, a diffusers folder, or a hub \
                   id such as `org/name`"
                .to_owned(),
        });
    }
    let path = hub::fetch(given, wanted, variant, hub, notes)?;
    let identity = ModelIdentity { name: given.to_owned(), path: path.clone() };
    Ok(Found { path, identity })
}

fn open_other_vae(
    given: &str,
    variant: Option<&str>,
    hub: &HubOptions,
    notes: &mut Vec<String>,
) -> Result<(Component, Option<Value>, ModelIdentity), FormatError> {
    let found = locate(given, Wanted::Vae, variant, hub, notes)?;
    let (vae, config) = if found.path.is_dir() {
        diffusers_dir::open_vae_dir(&found.path, variant, notes)?
    } else {
        diffusers_dir::open_vae_file(&found.path)?
    };
    Ok((vae, config, found.identity))
}
