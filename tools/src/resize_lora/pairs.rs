//! The pairs of factors in a file, under the names that the file has for them.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{bail, ensure};
use formats::TensorFile;
use formats::adapter::{AdapterFile, AdapterKind};

/// The names of down and up: sd-scripts, PEFT, ControlLoRA.
const NAMES: [(&str, &str); 3] = [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("down", "up")];

/// Two factors of one layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pair {
    /// What stands before the names of the factors.
    pub name: String,
    /// Key of `[rank, in]` or `[rank, in, kh, kw]`.
    pub down: String,
    /// Key of `[out, rank]` or `[out, rank, 1, 1]`.
    pub up: String,
    /// Key of the alpha, also of one that the file does not have yet.
    pub alpha: String,
    /// What the product is multiplied by.
    pub scale: f32,
    /// The rank now.
    pub rank: usize,
    /// Whether the tensors have four dimensions.
    pub is_convolution: bool,
}

/// Every pair of the file, sorted by name. Other tensors are none of this tool's.
///
/// # Errors
/// Half a pair, shapes that cannot be, a core between the factors, no pair at all.
pub(super) fn find(file: &Arc<dyn TensorFile>) -> anyhow::Result<Vec<Pair>> {
    let scales = known_scales(file);
    let mut pairs = Vec::new();
    for down in file.names() {
        let Some((name, up)) = split(down) else { continue };
        pairs.push(pair(file.as_ref(), name, down, &up, &scales)?);
    }
    if pairs.is_empty() {
        bail!(
            "`{}` has no pair of factors (`lora_down` and `lora_up`, `lora_A` and `lora_B`, or \
             `down` and `up`) to resize\nhint: `lorarun svd-merge` makes a LoRA of every kind of \
             adapter",
            file.path().display()
        );
    }
    pairs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pairs)
}

/// The module's name and the key of the other factor, of a key that is a down.
fn split(key: &str) -> Option<(&str, String)> {
    let with = |stem: &str, ending: &str| {
        NAMES.iter().find_map(|(down, up)| {
            let name = stem.strip_suffix(down)?.strip_suffix('.')?;
            (!name.is_empty()).then(|| (name.len(), format!("{name}.{up}{ending}")))
        })
    };
    // Their names stand last, or before a last word such as `weight`.
    let (stem, ending) = key.rfind('.').map(|dot| key.split_at(dot))?;
    let (length, up) = with(stem, ending).or_else(|| with(key, ""))?;
    Some((&key[..length], up))
}

/// alpha / rank by the key of down, as every other tool reads it: from a tensor, or from PEFT's
/// configuration beside the file.
fn known_scales(file: &Arc<dyn TensorFile>) -> HashMap<String, f32> {
    // ControlLoRA's names are known here alone.
    let Ok(adapter) = AdapterFile::of(Arc::clone(file)) else { return HashMap::new() };
    let scale = |module: &formats::adapter::AdapterModule| match &module.kind {
        AdapterKind::LowRank { down, .. } => Some((down.clone(), module.scale(&adapter))),
        _ => None,
    };
    adapter.modules.iter().filter_map(scale).collect()
}

fn pair(
    file: &dyn TensorFile,
    name: &str,
    down: &str,
    up: &str,
    scales: &HashMap<String, f32>,
) -> anyhow::Result<Pair> {
    let path = file.path().display();
    let Some((up_type, up_shape)) = file.describe(up) else {
        bail!("`{path}` has one half of a pair, `{down}`, without the other: `{up}`");
    };
    let (down_type, down_shape) = file.describe(down).unwrap_or((up_type, &[]));
    for (key, dtype, shape) in [(down, down_type, down_shape), (up, up_type, up_shape)] {
        ensure!(dtype.is_float(), "`{path}` holds numbers that are no floats, `{key}`: {dtype}");
        ensure!(
            matches!(shape.len(), 2 | 4) && !shape.contains(&0),
            "`{path}` holds a factor that should have two or four dimensions, `{key}`: {shape:?}"
        );
    }
    ensure!(
        up_shape[1] == down_shape[0] && up_shape[2..].iter().all(|size| *size == 1),
        "`{path}` holds factors that do not fit, `{down}` and `{up}`: {down_shape:?} and {up_shape:?}"
    );
    let core = format!("{name}.lora_mid.weight");
    ensure!(
        file.describe(&core).is_none(),
        "`{path}` has a core between the factors (Tucker form): `{core}`\nhint: `lorarun svd-merge` \
         makes an ordinary LoRA of it"
    );
    // diffusers' older names say `lora` before `down`, and put alpha beside it or before it.
    let places = [Some(name), name.strip_suffix(".lora")];
    let alphas = places.into_iter().flatten().map(|name| format!("{name}.alpha"));
    let alpha = alphas.clone().find(|key| file.describe(key).is_some());
    let rank = down_shape[0];
    let scale = match (scales.get(down), &alpha) {
        (Some(scale), _) => *scale,
        (None, Some(key)) => match file.view(key)?.to_f32()[..] {
            [0.0] => 1.0,
            [alpha] => alpha / rank as f32,
            _ => bail!("`{path}` holds an alpha that should be one number: `{key}`"),
        },
        (None, None) => 1.0,
    };
    Ok(Pair {
        name: name.to_owned(),
        down: down.to_owned(),
        up: up.to_owned(),
        alpha: alpha.unwrap_or_else(|| format!("{name}.alpha")),
        scale,
        rank,
        is_convolution: down_shape.len() == 4,
    })
}

#[cfg(test)]
mod tests {
    use formats::lora_file::{self, SaveAs, Tensors};
    use formats::{Dtype, OwnedTensor};

    use super::*;

    /// Key and shape.
    type Entry<'a> = (&'a str, &'a [usize]);

    fn found(entries: &[Entry<'_>]) -> anyhow::Result<Vec<Pair>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = |shape: &[usize]| {
            let values = vec![3.0; shape.iter().product()];
            OwnedTensor::from_f32(shape, &values, Dtype::F32).unwrap()
        };
        let tensors: Tensors =
            entries.iter().map(|(key, shape)| ((*key).to_owned(), tensor(shape))).collect();
        lora_file::write(&path, &tensors, &Default::default(), SaveAs::Safetensors).unwrap();
        find(&formats::open_tensor_file(&path)?)
    }

    #[test]
    fn pairs_are_found_under_every_naming() {
        let cases: [(&str, &str, &str, &str); 4] = [
            (
                "lora_unet_mid_block_attentions_0_proj_in",
                ".lora_down.weight",
                ".lora_up.weight",
                ".alpha",
            ),
            ("unet.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight", ".alpha"),
            ("unet.mid_block.attentions.0.proj_in.lora", ".down.weight", ".up.weight", ".alpha"),
            ("down_blocks.0.attentions.0.proj_in", ".down", ".up", ".alpha"),
        ];
        for (name, down, up, alpha) in cases {
            let (down, up) = (format!("{name}{down}"), format!("{name}{up}"));
            let alpha = format!("{name}{alpha}");
            let shapes: [&[usize]; 2] = [&[6, 8], &[10, 6]];
            let pairs = found(&[(&down, shapes[0]), (&up, shapes[1])]).unwrap();
            let expected = Pair {
                name: name.to_owned(),
                down: down.clone(),
                up: up.clone(),
                alpha: alpha.clone(),
                scale: 1.0,
                rank: 6,
                is_convolution: false,
            };
            assert_eq!(pairs, std::slice::from_ref(&expected));
            let pairs = found(&[(&down, shapes[0]), (&up, shapes[1]), (&alpha, &[])]).unwrap();
            assert_eq!(pairs, [Pair { scale: 0.5, ..expected }]);
        }
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        let down = "lora_unet_a.lora_down.weight";
        let up = "lora_unet_a.lora_up.weight";
        let cases: [(&[Entry<'_>], &str); 5] = [
            (&[(down, &[2, 3])], "without the other"),
            (&[(down, &[2, 3]), (up, &[4, 5])], "do not fit"),
            (&[(down, &[2]), (up, &[4, 2])], "two or four"),
            (&[("lora_unet_a.hada_w1_a", &[2, 3])], "no pair"),
            (
                &[
                    (down, &[2, 3, 1, 1]),
                    (up, &[4, 2, 1, 1]),
                    ("lora_unet_a.lora_mid.weight", &[2, 2, 3, 3]),
                ],
                "Tucker",
            ),
        ];
        for (entries, word) in cases {
            let error = found(entries).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
