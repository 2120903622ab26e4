//! Which family a model belongs to, seen from its keys and shapes.
//!
//! Small models share their widths across families, so structure decides: the conditioner's
//! layout in single files, the rank of `proj_in` in diffusers folders.

use std::path::Path;

use serde_json::Value;

use crate::keys::Component;
use crate::tensor_file::TensorFile;
use crate::{FormatError, Weights};

/// A family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Stable Diffusion 1.x: CLIP ViT-L, 1x1 convolutions around the transformers.
    Sd1,
    /// Stable Diffusion 2.x: OpenCLIP ViT-H, Linear layers around the transformers.
    Sd2,
    /// Stable Diffusion XL: two text encoders, text and sizes added to the time embedding.
    Sdxl,
}

impl Family {
    /// The name for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Sd1 => "Stable Diffusion 1.x",
            Self::Sd2 => "Stable Diffusion 2.x",
            Self::Sdxl => "Stable Diffusion XL",
        }
    }

    /// `ss_base_model_version` of sd-scripts; `v`: whether the model predicts v.
    pub const fn version_tag(self, v: bool) -> &'static str {
        match (self, v) {
            (Self::Sd1, false) => "sd_v1",
            (Self::Sd1, true) => "sd_v1_v",
            (Self::Sd2, false) => "sd_v2",
            (Self::Sd2, true) => "sd_v2_v",
            (Self::Sdxl, _) => "sdxl_base_v1-0",
        }
    }
}

/// A family and how it was seen.
#[derive(Debug)]
pub(crate) struct Finding {
    pub family: Family,
    pub because: String,
}

impl Finding {
    /// Compares with the user's `v2`, if set.
    pub fn check(&self, v2: Option<bool>, path: &Path) -> Result<(), FormatError> {
        let found_v2 = self.family == Family::Sd2;
        match v2 {
            Some(v2) if v2 != found_v2 => Err(FormatError::FamilyMismatch {
                path: path.to_path_buf(),
                v2,
                found: self.family.title(),
                because: self.because.clone(),
                fix: if found_v2 {
                    "set `v2 = true`, or leave `v2` out: the model tells"
                } else {
                    "remove `v2`, or choose a Stable Diffusion 2.x model"
                },
            }),
            _ => Ok(()),
        }
    }
}

/// The prefix of the U-Net in single files.
pub(crate) const LDM_UNET: &str = "model.diffusion_model.";
/// The prefix of the text encoder in single files of SD1 and SD2.
pub(crate) const LDM_TEXT: &str = "cond_stage_model.";
/// The prefix of OpenCLIP within [`LDM_TEXT`].
pub(crate) const OPEN_CLIP: &str = "cond_stage_model.model.";

/// The prefix of SDXL's text encoders in single files.
const LDM_TEXTS: &str = "conditioner.embedders.";
/// The prefix of SDXL's first text encoder in single files, CLIP ViT-L of transformers.
pub(crate) const LDM_TEXT_1: &str = "conditioner.embedders.0.transformer.";
/// The prefix of SDXL's second text encoder in single files, OpenCLIP bigG.
pub(crate) const LDM_TEXT_2: &str = "conditioner.embedders.1.model.";

/// The family of a single-file checkpoint.
pub(crate) fn of_single_file(file: &dyn TensorFile) -> Result<Finding, FormatError> {
    let names = file.names();
    let with = |prefix: &str| names.iter().copied().find(|name| name.starts_with(prefix));
    let unsupported = |family, name: &str| FormatError::UnsupportedFamily {
        path: file.path().to_path_buf(),
        family,
        because: format!("it has `{name}`"),
    };
    let refused = [
        ("SD3", "model.diffusion_model.joint_blocks."),
        ("FLUX", "model.diffusion_model.double_blocks."),
        ("FLUX", "double_blocks."),
        ("SD3", "joint_blocks."),
    ];
    for (family, prefix) in refused {
        if let Some(name) = with(prefix) {
            return Err(unsupported(family, name));
        }
    }
    if with(LDM_UNET).is_none() {
        return Err(not_a_checkpoint(file, &names));
    }
    if let (Some(_), Some(name)) = (with(LDM_TEXT_1), with(LDM_TEXT_2)) {
        let because = format!("it has a second text encoder (`{name}`)");
        return Ok(Finding { family: Family::Sdxl, because });
    }
    if let Some(name) = with(LDM_TEXTS) {
        return Err(refiner(file.path(), &format!("it has `{name}` alone")));
    }
    if let (Some(name), Some(_)) = (with("model.diffusion_model.label_emb."), with(LDM_TEXT)) {
        return Err(unsupported("a U-Net with class embeddings", name));
    }
    if let Some(name) = with(OPEN_CLIP) {
        let because = format!("its text encoder is OpenCLIP (`{name}`)");
        return Ok(Finding { family: Family::Sd2, because });
    }
    if let Some(name) = with(LDM_TEXT) {
        let because = format!("its text encoder is CLIP ViT (`{name}`)");
        return Ok(Finding { family: Family::Sd1, because });
    }
    Err(FormatError::Unsupported {
        path: file.path().to_path_buf(),
        reason: "it has a U-Net but no text encoder".to_owned(),
        hint: "use the full checkpoint, not one pruned to its U-Net".to_owned(),
    })
}

fn not_a_checkpoint(file: &dyn TensorFile, names: &[&str]) -> FormatError {
    let any = |test: fn(&str) -> bool| names.iter().any(|name| test(name));
    let (reason, hint) = if any(|name| name.contains("lora_down") || name.contains("lora_A")) {
        (
            "it is a LoRA, not a model",
            "give the model the LoRA belongs to; the LoRA itself goes into `network_weights`",
        )
    } else if any(|name| name.starts_with("down_blocks.")) {
        (
            "it is a U-Net alone, in diffusers' layout",
            "give the folder that holds `unet/`, `text_encoder/` and `vae/`",
        )
    } else if any(|name| name.starts_with("text_model.")) {
        (
            "it is a text encoder alone",
            "give the folder that holds `unet/`, `text_encoder/` and `vae/`",
        )
    } else if any(|name| name.starts_with("encoder.") || name.starts_with("first_stage_model.")) {
        ("it is a VAE alone", "give it as `vae`, and a full checkpoint as the model")
    } else {
        (
            "it has no U-Net under `model.diffusion_model.`",
            "give a Stable Diffusion checkpoint or a diffusers folder",
        )
    };
    FormatError::Unsupported {
        path: file.path().to_path_buf(),
        reason: reason.to_owned(),
        hint: hint.to_owned(),
    }
}

/// The family of a U-Net in diffusers' layout.
pub(crate) fn of_diffusers_unet(
    unet: &Component,
    config: Option<&Value>,
) -> Result<Finding, FormatError> {
    let names = unet.names();
    let text_time = config.and_then(|c| c.get("addition_embed_type")).is_some_and(|v| !v.is_null());
    let added = names.iter().find(|name| name.starts_with("add_embedding."));
    if added.is_some() || text_time {
        let because = added.map_or_else(
            || "its U-Net config sets `addition_embed_type`".to_owned(),
            |name| format!("its U-Net has `{name}`"),
        );
        return Ok(Finding { family: Family::Sdxl, because });
    }
    let proj_in = names.iter().find(|name| name.ends_with(".proj_in.weight"));
    let rank = proj_in.and_then(|name| unet.shape(name)).map(|shape| shape.len());
    let (family, what) = match (proj_in, rank) {
        (Some(_), Some(2)) => (Family::Sd2, "a Linear"),
        (Some(_), Some(4)) => (Family::Sd1, "a 1x1 convolution"),
        _ => {
            return Err(FormatError::Unsupported {
                path: unet.path().to_path_buf(),
                reason: "its U-Net has no `proj_in` of a known shape".to_owned(),
                hint: "give a Stable Diffusion 1.x or 2.x model".to_owned(),
            });
        }
    };
    // Both are Some here.
    let name = proj_in.map_or("", String::as_str);
    Ok(Finding { family, because: format!("`{name}` of its U-Net is {what}") })
}

/// The error for SDXL's refiner, or a part of SDXL.
pub(crate) fn refiner(path: &Path, because: &str) -> FormatError {
    FormatError::Unsupported {
        path: path.to_path_buf(),
        reason: format!("it is the refiner of SDXL or a part of a model: {because}"),
        hint: "give the base model, which has both text encoders".to_owned(),
    }
}

/// What holds for every trainable model: four latent channels, and text encoders that are together
/// as wide as the U-Net's cross-attention expects.
pub(crate) fn check_parts(
    unet: &Component,
    text: &Component,
    second: Option<&Component>,
) -> Result<(), FormatError> {
    if let Some(shape) = unet.shape("conv_in.weight")
        && shape.get(1) != Some(&4)
    {
        return Err(FormatError::Unsupported {
            path: unet.path().to_path_buf(),
            reason: format!(
                "its U-Net takes {} input channels (an inpainting or depth model)",
                shape.get(1).copied().unwrap_or_default()
            ),
            hint: "train on the plain model of the same version, its U-Net takes 4".to_owned(),
        });
    }
    let names = unet.names();
    let cross = names.iter().find(|name| name.ends_with(".attn2.to_k.weight"));
    let cross = cross.and_then(|name| unet.shape(name)).and_then(|shape| shape.get(1).copied());
    let width = |text: &Component| {
        text.shape("text_model.final_layer_norm.weight").and_then(|shape| shape.first().copied())
    };
    let width = width(text).map(|first| first + second.and_then(width).unwrap_or(0));
    match (cross, width) {
        (Some(cross), Some(width)) if cross != width => Err(FormatError::Unsupported {
            path: unet.path().to_path_buf(),
            reason: format!(
                "its U-Net expects text of width {cross}, its text encoder gives width {width}"
            ),
            hint: "the parts come from different models; give a complete one".to_owned(),
        }),
        _ => Ok(()),
    }
}
