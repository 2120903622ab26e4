//! Text encoders under the names of transformers' `CLIPTextModel`.
//!
//! SD1 checkpoints hold that model itself under one of several prefixes. SD2 checkpoints hold
//! OpenCLIP: joined q/k/v projections, other names, and one layer more than Stable Diffusion 2
//! uses (it reads the last but one layer), so the last layer is left out here, as in diffusers.
//! SDXL has both: CLIP ViT-L and, with all its layers and the projection, OpenCLIP bigG.

use super::{KeyMap, Part, split_index, under};
use crate::tensor_file::TensorFile;

const PROJECTION: &str = "text_projection.weight";

/// The table for a transformers text model whose keys start with `prefix`; `text_model.` is added
/// where the file leaves it out.
pub(crate) fn map_transformers_clip(file: &dyn TensorFile, prefix: &str) -> KeyMap {
    const KNOWN: [&str; 3] = ["embeddings.", "encoder.", "final_layer_norm."];
    let mut map = KeyMap::default();
    for (key, rest) in under(file, prefix) {
        let inner = rest.strip_prefix("text_model.").unwrap_or(rest);
        // A buffer of 0..77 that older versions saved; the projection belongs to CLIP as a whole.
        if inner == "embeddings.position_ids"
            || matches!(inner, "text_projection.weight" | "logit_scale")
        {
            continue;
        }
        if KNOWN.iter().any(|known| inner.starts_with(known)) {
            map.insert(format!("text_model.{inner}"), key, Part::Whole);
        } else {
            map.ignored.push(key.to_owned());
        }
    }
    map
}

/// The table for `CLIPTextModelWithProjection`, SDXL's second text encoder in diffusers folders.
pub(crate) fn map_transformers_clip_with_projection(file: &dyn TensorFile) -> KeyMap {
    let mut map = map_transformers_clip(file, "");
    if file.describe(PROJECTION).is_some() {
        map.insert(PROJECTION.to_owned(), PROJECTION, Part::Whole);
    }
    map
}

/// How much of an OpenCLIP text model is the text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenClip {
    /// SD2: all layers but the last.
    BeforeLast,
    /// SDXL: all layers, and the projection of the pooled output.
    WithProjection,
}

/// The table for an OpenCLIP text model whose keys start with `prefix`.
pub(crate) fn map_open_clip(file: &dyn TensorFile, prefix: &str, extent: OpenClip) -> KeyMap {
    let mut map = KeyMap::default();
    let tensors = under(file, prefix);
    let layers = tensors.iter().filter_map(|(_, rest)| layer_of(rest).map(|(layer, _)| layer));
    let left_out = if extent == OpenClip::BeforeLast { layers.max() } else { None };
    for (key, rest) in tensors {
        let outer = match rest {
            "positional_embedding" => Some("embeddings.position_embedding.weight"),
            "token_embedding.weight" => Some("embeddings.token_embedding.weight"),
            "ln_final.weight" => Some("final_layer_norm.weight"),
            "ln_final.bias" => Some("final_layer_norm.bias"),
            _ => None,
        };
        if let Some(name) = outer {
            map.insert(format!("text_model.{name}"), key, Part::Whole);
            continue;
        }
        if rest == "text_projection" && extent == OpenClip::WithProjection {
            map.insert(PROJECTION.to_owned(), key, Part::Transposed);
            continue;
        }
        // Parts of CLIP that no text encoder needs, and a buffer that some programs add.
        if matches!(rest, "text_projection" | "logit_scale" | "attn_mask")
            || rest.starts_with("visual.")
            || rest.ends_with(".position_ids")
        {
            continue;
        }
        match layer_of(rest) {
            Some((layer, _)) if Some(layer) == left_out => {}
            Some((layer, rest)) => map_layer(&mut map, key, layer, rest),
            None => map.ignored.push(key.to_owned()),
        }
    }
    map
}

fn layer_of(rest: &str) -> Option<(usize, &str)> {
    split_index(rest.strip_prefix("transformer.resblocks.")?)
}

fn map_layer(map: &mut KeyMap, key: &str, layer: usize, rest: &str) {
    const PARTS: [(&str, &str); 5] = [
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("attn.out_proj.", "self_attn.out_proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ];
    let layer = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_")
        && matches!(kind, "weight" | "bias")
    {
        for (third, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
            map.insert(format!("{layer}.self_attn.{name}.{kind}"), key, Part::Third(third));
        }
        return;
    }
    let name = PARTS.iter().find_map(|(from, to)| {
        let rest = rest.strip_prefix(from)?;
        Some(format!("{layer}.{to}{rest}"))
    });
    match name {
        Some(name) => map.insert(name, key, Part::Whole),
        None => map.ignored.push(key.to_owned()),
    }
}
