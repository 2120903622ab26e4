//! LoRAs from sd-scripts' names to diffusers' and back.
//!
//! Numbers are copied as they lie; only the strength changes its place. sd-scripts keeps an alpha
//! beside each pair; diffusers refuses such keys beside names with dots and reads PEFT's settings in
//! the header instead (`lora_adapter_metadata`), rank and alpha of every layer among them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use clap::ValueEnum;
use formats::adapter::{AdapterFile, AdapterKind, Naming, diffusers_path};
use formats::lora_file::{self, Metadata, SaveAs, Tensors};
use formats::{Family, OwnedTensor};
use serde_json::{Map, Value, json};

use crate::Usage;
use crate::finite::FiniteRule;
use crate::precision::Precision;
use crate::progress::tell;

/// Whose names to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// sd-scripts, WebUI, ComfyUI: `lora_unet_..._to_q.lora_down.weight`, alphas as tensors
    #[value(alias = "sd-scripts")]
    Kohya,
    /// diffusers and PEFT: `unet....to_q.lora_A.weight`, alphas in the header
    #[value(alias = "peft")]
    Diffusers,
}

/// Writes `file` under the names of `target`, of the other naming when it is left out.
///
/// # Errors
/// A module of a kind that the target cannot hold, or without a name there; values that are not
/// finite; what cannot be written.
pub(super) fn convert(
    file: &AdapterFile,
    target: Option<Target>,
    save_to: &Path,
    save_as: SaveAs,
    precision: Option<Precision>,
    finite: FiniteRule,
) -> anyhow::Result<()> {
    if let Some(key) = file.unknown.first() {
        bail!(
            "`{}` holds {} keys of no module, which would be lost, the first: `{key}`",
            file.path.display(),
            file.unknown.len()
        );
    }
    let target = target.unwrap_or(match file.naming {
        Naming::Kohya => Target::Diffusers,
        Naming::Diffusers | Naming::Peft => Target::Kohya,
    });
    let (mut tensors, metadata) = match target {
        Target::Kohya => (file.kohya_tensors()?, kohya_metadata(file)),
        Target::Diffusers => to_diffusers(file)?,
    };
    for (name, tensor) in &tensors {
        finite.check(&file.path, name, &tensor.to_f32())?;
    }
    if save_as == SaveAs::Pickle && metadata.contains_key(SETTINGS) && !all_scales_are_one(file) {
        return Err(Usage(format!(
            "`save_to` cannot hold the strengths of the modules, which diffusers reads from a \
             `.safetensors` header: `{}`\nhint: end the name in `.safetensors`",
            save_to.display()
        ))
        .into());
    }
    if let Some(precision) = precision {
        for tensor in tensors.values_mut() {
            *tensor = tensor.cast(precision.dtype())?;
        }
    }
    lora_file::write(save_to, &tensors, &metadata, save_as)?;
    let names = if target == Target::Kohya { "sd-scripts" } else { "diffusers" };
    tell(&format!(
        "{} modules under the names of {names}: {}",
        file.modules.len(),
        save_to.display()
    ));
    Ok(())
}

/// The header's entry of PEFT's settings.
const SETTINGS: &str = "lora_adapter_metadata";

fn all_scales_are_one(file: &AdapterFile) -> bool {
    file.modules.iter().all(|module| module.scale(file) == 1.0)
}

fn tensor(file: &AdapterFile, key: &str) -> anyhow::Result<OwnedTensor> {
    Ok(file.view(key)?.to_owned_tensor())
}

/// Names with dots, and the settings of each component.
fn to_diffusers(file: &AdapterFile) -> anyhow::Result<(Tensors, Metadata)> {
    let mut tensors = Tensors::new();
    let mut components: BTreeMap<&str, Vec<Entry>> = BTreeMap::new();
    for module in &file.modules {
        let refuse = |what: &str| {
            let path = file.path.display();
            anyhow::anyhow!("diffusers holds no {what}, `{path}` has one: `{}`", module.stored)
        };
        let (down, up) = match &module.kind {
            AdapterKind::LowRank { down, up, mid: None } => (down, up),
            AdapterKind::LowRank { .. } => return Err(refuse("LoRA in Tucker form")),
            AdapterKind::Hadamard { .. } => return Err(refuse("LoHa")),
            AdapterKind::Kronecker { .. } => return Err(refuse("LoKr")),
            AdapterKind::Full { .. } => return Err(refuse("whole difference")),
            AdapterKind::Norm { .. } => return Err(refuse("difference of a norm or bias")),
        };
        if module.bias.is_some() {
            return Err(refuse("difference of a bias"));
        }
        let Some((component, path)) = diffusers_path(&module.name) else {
            return Err(refuse("layer of this name"));
        };
        let name = format!("{component}.{path}");
        tensors.insert(format!("{name}.lora_A.weight"), tensor(file, down)?);
        tensors.insert(format!("{name}.lora_B.weight"), tensor(file, up)?);
        if let Some(key) = &module.dora_scale {
            let Some(magnitudes) = file.magnitudes_of_outputs(module, key)? else {
                return Err(refuse("DoRA over a layer's inputs"));
            };
            let shape = match module.layer_shape(file).len() {
                2 => vec![magnitudes.shape[0]],
                _ => vec![1, magnitudes.shape[0], 1, 1],
            };
            tensors.insert(
                format!("{name}.lora_magnitude_vector"),
                OwnedTensor { shape, ..magnitudes },
            );
        }
        let rank = module.rank(file);
        let entry = Entry {
            // Newer transformers have no `text_model.`, older ones find the layer by the rest too.
            path: path.strip_prefix("text_model.").map_or(path.clone(), str::to_owned),
            rank,
            alpha: module.scale(file) * rank as f32,
            dora: module.dora_scale.is_some(),
        };
        components.entry(component).or_default().push(entry);
    }
    let mut settings = Map::new();
    for (component, entries) in &components {
        if entries.iter().any(|entry| entry.dora != entries[0].dora) {
            bail!(
                "`{}` has DoRA in a part of its modules, diffusers in all of a component or in none: \
                 `{component}`",
                file.path.display()
            );
        }
        describe(&mut settings, component, entries);
    }
    let mut metadata = file.metadata.clone();
    metadata.insert("format".to_owned(), "pt".to_owned());
    metadata.insert(SETTINGS.to_owned(), serde_json::to_string_pretty(&Value::Object(settings))?);
    Ok((tensors, metadata))
}

/// A layer of a component in PEFT's settings.
struct Entry {
    path: String,
    rank: usize,
    alpha: f32,
    dora: bool,
}

/// PEFT's settings of one component: the most frequent rank and alpha, and who differs.
fn describe(settings: &mut Map<String, Value>, component: &str, entries: &[Entry]) {
    let rank = most_frequent(entries.iter().map(|entry| entry.rank));
    let alpha = most_frequent(entries.iter().map(|entry| entry.alpha.to_bits()));
    let pattern = |differs: &dyn Fn(&Entry) -> Option<Value>| -> Value {
        let pairs = entries.iter().filter_map(|entry| Some((entry.path.clone(), differs(entry)?)));
        Value::Object(pairs.collect())
    };
    let ranks = pattern(&|entry| (Some(entry.rank) != rank).then(|| json!(entry.rank)));
    let alphas = pattern(&|entry| {
        (Some(entry.alpha.to_bits()) != alpha).then(|| json!(f64::from(entry.alpha)))
    });
    let targets: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
    let rows = [
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("lora_alpha", json!(alpha.map(|bits| f64::from(f32::from_bits(bits))))),
        ("rank_pattern", ranks),
        ("alpha_pattern", alphas),
        ("target_modules", json!(targets)),
        ("use_dora", json!(entries.iter().any(|entry| entry.dora))),
    ];
    settings.extend(rows.into_iter().map(|(name, value)| (format!("{component}.{name}"), value)));
}

/// The smallest of the most frequent values.
fn most_frequent<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let most = counts.values().max().copied()?;
    counts.into_iter().find(|(_, count)| *count == most).map(|(value, _)| value)
}

/// The file's metadata with what WebUI wants to know of a LoRA, where it is missing.
fn kohya_metadata(file: &AdapterFile) -> Metadata {
    let mut metadata = file.metadata.clone();
    metadata.remove(SETTINGS);
    metadata.remove("format");
    let mut set = |key: &str, value: String| {
        metadata.entry(key.to_owned()).or_insert(value);
    };
    if let Some(family) = file.family {
        let version = match family {
            Family::Sd1 => "sd_v1",
            Family::Sd2 => "sd_v2",
            Family::Sdxl => "sdxl_base_v1-0",
        };
        set("ss_base_model_version", version.to_owned());
        set("ss_v2", if family == Family::Sd2 { "True" } else { "False" }.to_owned());
    }
    let plain = file.modules.iter().all(|module| {
        matches!(module.kind, AdapterKind::LowRank { mid: None, .. })
            && module.dora_scale.is_none()
            && module.bias.is_none()
    });
    let network = if plain { "networks.lora" } else { "lycoris.kohya" };
    set("ss_network_module", network.to_owned());
    let with_rank = file.modules.iter().filter(|module| module.rank(file) > 0);
    let pairs = with_rank.map(|module| {
        let rank = module.rank(file);
        (rank, (module.scale(file) * rank as f32).to_bits())
    });
    if let Some((rank, alpha)) = most_frequent(pairs) {
        set("ss_network_dim", rank.to_string());
        set("ss_network_alpha", format!("{:?}", f32::from_bits(alpha)));
    }
    metadata
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use formats::Dtype;
    use formats::adapter::{AdapterModule, KronFactor};

    use super::*;

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
    }

    fn converted(file: &AdapterFile, target: Target) -> AdapterFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let rule = FiniteRule::default();
        convert(file, Some(target), &path, SaveAs::Safetensors, None, rule).unwrap();
        // Mapped: the file may go.
        AdapterFile::open(&path).unwrap()
    }

    /// Names, kinds, strengths and numbers.
    fn assert_same(one: &AdapterFile, two: &AdapterFile) {
        assert_eq!(one.family, two.family);
        assert_eq!(one.modules.len(), two.modules.len());
        for (a, b) in one.modules.iter().zip(&two.modules) {
            assert_eq!(a.name, b.name);
            assert!((a.scale(one) - b.scale(two)).abs() <= f32::EPSILON * a.scale(one).abs());
            assert_eq!(a.keys().len(), b.keys().len());
            for (x, y) in a.keys().into_iter().zip(b.keys()) {
                assert_eq!(one.view(x).unwrap().data, two.view(y).unwrap().data, "{x} {y}");
            }
        }
    }

    #[test]
    fn there_and_back_nothing_changes() {
        for name in [
            "lora/lierla_r4.safetensors",
            "adapters/diffusers_metadata.safetensors",
            "adapters/diffusers_before_peft.safetensors",
            "adapters/diffusers_sdxl.safetensors",
            "adapters/peft_rslora/adapter_model.safetensors",
        ] {
            let file = AdapterFile::open(&data(name)).unwrap();
            let there = converted(&file, Target::Diffusers);
            assert_eq!(there.naming, Naming::Peft, "{name}");
            assert_same(&file, &there);
            let back = converted(&there, Target::Kohya);
            assert_eq!(back.naming, Naming::Kohya, "{name}");
            assert_same(&file, &back);
            let version = back.metadata.get("ss_base_model_version").map(String::as_str);
            assert!(version.is_some() && !back.metadata.contains_key(SETTINGS), "{name}");
        }
    }

    #[test]
    fn kinds_of_lycoris_go_to_sd_scripts_alone() {
        for (name, kind) in [("peft_loha", "LoHa"), ("peft_lokr", "LoKr")] {
            let path = data("adapters").join(name).join("adapter_model.safetensors");
            let file = AdapterFile::open(&path).unwrap();
            let kohya = converted(&file, Target::Kohya);
            assert_eq!(kohya.modules.len(), file.modules.len());
            assert_eq!(kohya.metadata["ss_network_module"], "lycoris.kohya");
            let error = to_diffusers(&kohya).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains("attn1_to_q"), "{error}");
        }
        // A scale that LyCORIS would not apply is in the numbers.
        let path = data("adapters/peft_lokr/adapter_model.safetensors");
        let file = AdapterFile::open(&path).unwrap();
        let kohya = converted(&file, Target::Kohya);
        for (a, b) in file.modules.iter().zip(&kohya.modules) {
            let first = |file: &AdapterFile, module: &AdapterModule| {
                let AdapterKind::Kronecker { w1: KronFactor::Whole(key), .. } = &module.kind else {
                    panic!("{}", module.name)
                };
                file.view(key).unwrap().to_f32()[0] * module.scale(file)
            };
            assert_eq!(first(&file, a), first(&kohya, b));
            assert_ne!(a.scale(&file), 1.0);
        }
    }

    #[test]
    fn magnitudes_of_dora_change_their_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let make = |shape: &[usize]| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..count).map(|i| i as f32 + 1.0).collect();
            OwnedTensor::from_f32(shape, &values, Dtype::F32).unwrap()
        };
        let (linear, conv) = (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2",
            "lora_unet_mid_block_resnets_0_conv1",
        );
        let file = |of_inputs: bool| {
            let magnitudes: &[usize] = if of_inputs { &[1, 3] } else { &[4, 1] };
            let tensors = Tensors::from([
                (format!("{linear}.lora_down.weight"), make(&[2, 3])),
                (format!("{linear}.lora_up.weight"), make(&[4, 2])),
                (format!("{linear}.dora_scale"), make(magnitudes)),
                (format!("{conv}.lora_down.weight"), make(&[2, 3, 3, 3])),
                (format!("{conv}.lora_up.weight"), make(&[4, 2, 1, 1])),
                (format!("{conv}.dora_scale"), make(&[4, 1, 1, 1])),
            ]);
            lora_file::write(&path, &tensors, &Metadata::new(), SaveAs::Safetensors).unwrap();
            AdapterFile::open(&path).unwrap()
        };
        let there = converted(&file(false), Target::Diffusers);
        let shape = |file: &AdapterFile, index: usize| {
            let key = file.modules[index].dora_scale.clone().unwrap();
            file.file.shape(&key).unwrap().to_vec()
        };
        assert_eq!((shape(&there, 0), shape(&there, 1)), (vec![4], vec![1, 4, 1, 1]));
        let settings: Value = serde_json::from_str(&there.metadata[SETTINGS]).unwrap();
        assert_eq!(settings["unet.use_dora"], json!(true));
        let back = converted(&there, Target::Kohya);
        assert_eq!((shape(&back, 0), shape(&back, 1)), (vec![4, 1], vec![4, 1, 1, 1]));
        let error = to_diffusers(&file(true)).unwrap_err().to_string();
        assert!(error.contains("DoRA over a layer's inputs") && error.contains(linear), "{error}");
    }
}
