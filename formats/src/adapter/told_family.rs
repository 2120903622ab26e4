//! Which family of models an adapter belongs to.
//!
//! Structure speaks before widths (small models share theirs), widths before metadata, which
//! tools copy from file to file, and the layers around the transformers last: a file need not have
//! any of them.

use super::names::Part;
use super::parts::{self, Found};
use crate::Family;
use crate::tensor_file::TensorFile;

/// `None` when nothing tells.
pub(super) fn tell(file: &dyn TensorFile, modules: &[Found]) -> Option<Family> {
    of_names(modules)
        .or_else(|| of_widths(file, modules))
        .or_else(|| of_metadata(file))
        .or_else(|| of_projections(file, modules))
}

fn of_names(modules: &[Found]) -> Option<Family> {
    const ORIGINAL: [&str; 4] = ["input_blocks_", "middle_block_", "output_blocks_", "label_emb_"];
    let sdxl = modules.iter().any(|found| match found.part {
        Part::Text1 | Part::Text2 => true,
        Part::Text => false,
        Part::Unet => {
            ORIGINAL.iter().any(|start| found.layer.starts_with(start))
                // Only SDXL has more than one block in a transformer.
                || found.layer.contains("_transformer_blocks_1_")
                || found.layer.starts_with("add_embedding_")
        }
    });
    sdxl.then_some(Family::Sdxl)
}

/// Columns of a module's layer.
fn columns(file: &dyn TensorFile, found: &Found) -> Option<usize> {
    let shape = parts::layer_shape(&found.module.kind, |key| file.shape(key).unwrap_or_default());
    shape.get(1).copied()
}

/// The width of the text that cross-attention reads, and of the text encoder.
fn of_widths(file: &dyn TensorFile, modules: &[Found]) -> Option<Family> {
    let family = |width: usize| match width {
        768 => Some(Family::Sd1),
        1024 => Some(Family::Sd2),
        2048 => Some(Family::Sdxl),
        _ => None,
    };
    let width_of = |part: Part, endings: &[&str]| {
        let found = modules.iter().find(|found| {
            found.part == part && endings.iter().any(|end| found.layer.ends_with(end))
        });
        family(columns(file, found?)?)
    };
    width_of(Part::Unet, &["_attn2_to_k", "_attn2_to_v"])
        .or_else(|| width_of(Part::Text, &["_self_attn_q_proj", "_self_attn_k_proj", "_mlp_fc1"]))
}

fn of_metadata(file: &dyn TensorFile) -> Option<Family> {
    let base = file.metadata().get("ss_base_model_version").map(String::as_str);
    let architecture = file.metadata().get("modelspec.architecture").map(String::as_str);
    let starts = |text: Option<&str>, start: &str| text.is_some_and(|text| text.starts_with(start));
    let rows = [
        ("sdxl_", "stable-diffusion-xl", Family::Sdxl),
        ("sd_v2", "stable-diffusion-v2", Family::Sd2),
        ("sd_v1", "stable-diffusion-v1", Family::Sd1),
    ];
    rows.into_iter()
        .find(|(tag, name, _)| starts(base, tag) || starts(architecture, name))
        .map(|(_, _, family)| family)
}

/// 1x1 convolutions around the transformers in SD1, Linear layers in SD2.
fn of_projections(file: &dyn TensorFile, modules: &[Found]) -> Option<Family> {
    let found = modules.iter().find(|found| {
        found.part == Part::Unet
            && (found.layer.ends_with("_proj_in") || found.layer.ends_with("_proj_out"))
    })?;
    let shape = parts::layer_shape(&found.module.kind, |key| file.shape(key).unwrap_or_default());
    let by_key = parts::kind_keys(&found.module.kind);
    let dims = by_key.first().and_then(|key| file.shape(key)).map_or(0, <[usize]>::len);
    match (shape.len(), dims) {
        (4, _) => Some(Family::Sd1),
        // Products of LoHa and LoKr are matrices for both.
        (2, 2) if !by_key.iter().any(|key| key.contains("hada_") || key.contains("lokr_")) => {
            Some(Family::Sd2)
        }
        _ => None,
    }
}
