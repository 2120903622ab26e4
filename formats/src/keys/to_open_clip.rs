//! Transformers' names of a text encoder under those of OpenCLIP: the inverse of `clip`.

use std::collections::BTreeMap;

use super::split_index;

/// A tensor of OpenCLIP and the names of transformers that it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenClipTensor {
    /// Name without the prefix of single files.
    pub name: String,
    /// One name, or q, k and v, which are joined by rows.
    pub parts: Vec<String>,
    /// Whether rows and columns are exchanged.
    pub transposed: bool,
}

/// OpenCLIP's tensors for a text encoder with the tensors `names`, and the names that have no
/// place there.
pub(crate) fn open_clip_tensors(names: &[String]) -> (Vec<OpenClipTensor>, Vec<String>) {
    let mut tensors: BTreeMap<String, OpenClipTensor> = BTreeMap::new();
    let mut left = Vec::new();
    for name in names {
        let Some((key, third)) = place(name) else {
            left.push(name.clone());
            continue;
        };
        let transposed = key == "text_projection";
        let tensor = tensors.entry(key.clone()).or_insert_with(|| {
            let count = if third.is_some() { 3 } else { 1 };
            OpenClipTensor { name: key, parts: vec![String::new(); count], transposed }
        });
        tensor.parts[third.unwrap_or(0)].clone_from(name);
    }
    // A projection without its other thirds cannot be joined.
    let mut whole = Vec::new();
    for tensor in tensors.into_values() {
        if tensor.parts.iter().any(String::is_empty) {
            left.extend(tensor.parts.into_iter().filter(|part| !part.is_empty()));
        } else {
            whole.push(tensor);
        }
    }
    (whole, left)
}

/// OpenCLIP's name, and which third of it.
fn place(name: &str) -> Option<(String, Option<usize>)> {
    const OUTER: [(&str, &str); 5] = [
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.final_layer_norm.weight", "ln_final.weight"),
        ("text_model.final_layer_norm.bias", "ln_final.bias"),
        ("text_projection.weight", "text_projection"),
    ];
    const PARTS: [(&str, &str); 5] = [
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("self_attn.out_proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    ];
    const THIRDS: [&str; 3] = ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."];
    if let Some((_, to)) = OUTER.iter().find(|(from, _)| *from == name) {
        return Some(((*to).to_owned(), None));
    }
    let (layer, rest) = split_index(name.strip_prefix("text_model.encoder.layers.")?)?;
    let block = format!("transformer.resblocks.{layer}");
    for (third, from) in THIRDS.iter().enumerate() {
        if let Some(kind @ ("weight" | "bias")) = rest.strip_prefix(from) {
            return Some((format!("{block}.attn.in_proj_{kind}"), Some(third)));
        }
    }
    PARTS.iter().find_map(|(from, to)| {
        let rest = rest.strip_prefix(from)?;
        Some((format!("{block}.{to}{rest}"), None))
    })
}
