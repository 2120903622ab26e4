//! The modules of a LoRA file: each a pair of matrices with a scale.

use std::collections::BTreeMap;
use std::path::Path;

use crate::{FormatError, OwnedTensor};

/// One adapted layer.
#[derive(Clone, Debug)]
pub struct LoraModule<'a> {
    /// The key before the suffix: `lora_unet_down_blocks_0_attentions_0_proj_in`.
    pub name: String,
    /// `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
    pub down: &'a OwnedTensor,
    /// `[out, rank]`, or `[out, rank, 1, 1]`.
    pub up: &'a OwnedTensor,
    /// The stored alpha; the rank where it is missing or 0, as sd-scripts takes it.
    pub alpha: f32,
    /// Whether the file has an alpha.
    pub has_alpha: bool,
    /// Rank of the pair.
    pub rank: usize,
    /// `(kh, kw)` when the layer is a convolution.
    pub kernel: Option<(usize, usize)>,
}

impl LoraModule<'_> {
    /// What the product `up * down` is multiplied by: alpha / rank.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

const DOWN: &str = ".lora_down.weight";
const UP: &str = ".lora_up.weight";
const ALPHA: &str = ".alpha";

#[derive(Default)]
struct Parts<'a> {
    down: Option<&'a OwnedTensor>,
    up: Option<&'a OwnedTensor>,
    alpha: Option<&'a OwnedTensor>,
}

/// Groups the tensors of a LoRA file; `path` is for messages.
///
/// # Errors
/// [`FormatError::BadLora`] naming the first key with an unknown suffix, without its other half,
/// or whose shape contradicts it.
pub fn group_modules<'a>(
    tensors: &'a BTreeMap<String, OwnedTensor>,
    path: &Path,
) -> Result<Vec<LoraModule<'a>>, FormatError> {
    let bad = |reason: String, key: &str| FormatError::BadLora {
        path: path.to_path_buf(),
        reason,
        key: key.to_owned(),
    };
    let mut modules: BTreeMap<&str, Parts<'a>> = BTreeMap::new();
    for (key, tensor) in tensors {
        if let Some(name) = key.strip_suffix(DOWN) {
            modules.entry(name).or_default().down = Some(tensor);
        } else if let Some(name) = key.strip_suffix(UP) {
            modules.entry(name).or_default().up = Some(tensor);
        } else if let Some(name) = key.strip_suffix(ALPHA) {
            modules.entry(name).or_default().alpha = Some(tensor);
        } else {
            return Err(bad(unknown_suffix(key).to_owned(), key));
        }
    }
    if modules.is_empty() {
        return Err(bad("it holds no tensors".to_owned(), ""));
    }
    let build = |(name, parts): (&str, Parts<'a>)| {
        build_module(name, &parts)
            .map_err(|(suffix, reason)| bad(reason, &format!("{name}{suffix}")))
    };
    modules.into_iter().map(build).collect()
}

/// What kind of file an unknown key tells of.
fn unknown_suffix(key: &str) -> &'static str {
    if key.contains("hada_") || key.contains("lokr_") || key.contains("oft_") {
        "it is a LyCORIS network of another kind than LoRA, this key tells"
    } else if key.ends_with(".lora_mid.weight") {
        "it is a LoCon in Tucker form, which is not supported, this key tells"
    } else if key.ends_with(".dora_scale") {
        "it is a DoRA, which is not supported, this key tells"
    } else if key.contains("lora_A") || key.contains("lora.down") || key.contains("lora_linear") {
        "it has the names of diffusers or PEFT, not those of sd-scripts, this key tells"
    } else {
        "this key has an unknown ending"
    }
}

fn build_module<'a>(
    name: &str,
    parts: &Parts<'a>,
) -> Result<LoraModule<'a>, (&'static str, String)> {
    let (down, up) = match (parts.down, parts.up) {
        (Some(down), Some(up)) => (down, up),
        (Some(_), None) => return Err((DOWN, "this key lacks its `lora_up.weight`".to_owned())),
        (None, Some(_)) => return Err((UP, "this key lacks its `lora_down.weight`".to_owned())),
        (None, None) => return Err((ALPHA, "this key belongs to no weights".to_owned())),
    };
    for (tensor, suffix) in [(down, DOWN), (up, UP)] {
        if !tensor.dtype.is_float() {
            return Err((suffix, format!("this key holds {} numbers", tensor.dtype)));
        }
        if !matches!(tensor.shape.len(), 2 | 4) || tensor.shape.contains(&0) {
            return Err((suffix, format!("this key has the shape {:?}", tensor.shape)));
        }
    }
    let rank = down.shape[0];
    if up.shape[1] != rank {
        return Err((
            UP,
            format!(
                "its halves have different ranks, {rank} (down) and {} (up), of this key",
                up.shape[1]
            ),
        ));
    }
    if up.shape[2..].iter().any(|size| *size != 1) {
        return Err((UP, format!("this key should be a 1x1 kernel, it is {:?}", up.shape)));
    }
    if up.shape.len() != down.shape.len() {
        return Err((UP, "this key and its other half differ in dimensions".to_owned()));
    }
    let alpha = match parts.alpha {
        None => rank as f32,
        Some(alpha) => {
            let values = alpha.to_f32();
            let [value] = values[..] else {
                return Err((
                    ALPHA,
                    format!("this key should hold one number, not {}", values.len()),
                ));
            };
            if !value.is_finite() {
                return Err((ALPHA, format!("this key holds {value}")));
            }
            if value == 0.0 { rank as f32 } else { value }
        }
    };
    let kernel = (down.shape.len() == 4).then(|| (down.shape[2], down.shape[3]));
    Ok(LoraModule {
        name: name.to_owned(),
        down,
        up,
        alpha,
        has_alpha: parts.alpha.is_some(),
        rank,
        kernel,
    })
}
