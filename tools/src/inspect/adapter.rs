//! What an adapter file is: its network, modules, ranks, strengths, hashes and who would load it.

use std::collections::BTreeMap;

use formats::adapter::{AdapterFile, AdapterKind, AdapterModule, Naming};
use formats::model_hash::{file_sha256, legacy_hash};
use formats::{Family, TensorFile, lora_file};
use serde::Serialize;

use super::loaders::{Verdict, part_of, verdicts};
use super::norms::norms;
use super::training::Training;

/// Everything told of an adapter.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterReport {
    /// `adapter`
    pub kind: &'static str,
    pub path: String,
    pub bytes: u64,
    /// `LoRA (LierLa)`, `DyLoRA`, `LoHa`, ...; several kinds joined by ` + `.
    pub network: String,
    /// `sd1`, `sd2`, `sdxl`.
    pub family: Option<&'static str>,
    /// `kohya`, `diffusers`, `peft`.
    pub naming: &'static str,
    pub parts: Vec<PartReport>,
    pub dtypes: Vec<DtypeReport>,
    /// Keys of no module.
    pub unknown_keys: Vec<String>,
    pub hashes: Hashes,
    pub training: Training,
    pub programs: Vec<Verdict>,
    pub metadata: BTreeMap<String, String>,
}

/// The modules of one network of the model.
#[derive(Debug, Serialize)]
pub(crate) struct PartReport {
    /// `unet`, `te`, `te1`, `te2`.
    pub part: &'static str,
    pub modules: usize,
    pub ranks: Vec<Count<usize>>,
    pub alphas: Vec<Count<f32>>,
    /// Modules with DoRA's magnitudes.
    pub dora: usize,
    /// Norms of what modules add to their layers.
    pub norm_mean: Option<f64>,
    pub norm_max: Option<f64>,
    pub norm_max_module: Option<String>,
}

/// How often a value occurs.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Count<T> {
    pub value: T,
    pub modules: usize,
}

/// Tensors of one number type.
#[derive(Debug, Serialize)]
pub(crate) struct DtypeReport {
    #[serde(rename = "type")]
    pub dtype: String,
    pub tensors: usize,
    pub values: usize,
}

/// Hashes of the file by which programs know it.
#[derive(Debug, Serialize)]
pub(crate) struct Hashes {
    /// Of the whole file.
    pub sha256: String,
    /// The first ten digits of it.
    pub auto_v2: String,
    /// 64 KiB at 0x100000.
    pub legacy: String,
    /// Of the tensors, as sd-scripts writes it and WebUI looks for it (`AutoV3`).
    pub sshs_model: Option<String>,
    /// Whether the header says the same; absent without such an entry.
    pub sshs_model_agrees: Option<bool>,
    pub sshs_legacy_agrees: Option<bool>,
}

/// Looks at an open adapter.
///
/// # Errors
/// What cannot be read.
pub(crate) fn report(file: &AdapterFile) -> anyhow::Result<AdapterReport> {
    let norms = norms(file)?;
    let mut parts: BTreeMap<&'static str, Vec<(&AdapterModule, f64)>> = BTreeMap::new();
    for (module, norm) in file.modules.iter().zip(norms) {
        parts.entry(part_of(&module.name)).or_default().push((module, norm));
    }
    let bytes = std::fs::metadata(&file.path).map_or(0, |data| data.len());
    Ok(AdapterReport {
        kind: "adapter",
        path: file.path.display().to_string(),
        bytes,
        network: network(file),
        family: file.family.map(family_word),
        naming: match file.naming {
            Naming::Kohya => "kohya",
            Naming::Diffusers => "diffusers",
            Naming::Peft => "peft",
        },
        parts: parts.into_iter().map(|(part, modules)| part_report(file, part, &modules)).collect(),
        dtypes: dtypes(file.file.as_ref()),
        unknown_keys: file.unknown.clone(),
        hashes: hashes(file)?,
        training: Training::of(&file.metadata),
        programs: verdicts(file),
        metadata: file.metadata.clone(),
    })
}

/// The family in JSON.
pub(crate) fn family_word(family: Family) -> &'static str {
    match family {
        Family::Sd1 => "sd1",
        Family::Sd2 => "sd2",
        Family::Sdxl => "sdxl",
    }
}

fn part_report(
    file: &AdapterFile,
    part: &'static str,
    modules: &[(&AdapterModule, f64)],
) -> PartReport {
    let mut ranks: BTreeMap<usize, usize> = BTreeMap::new();
    let mut alphas: Vec<Count<f32>> = Vec::new();
    for (module, _) in modules {
        let rank = module.rank(file);
        if rank == 0 {
            continue;
        }
        *ranks.entry(rank).or_default() += 1;
        let alpha = module.scale(file) * rank as f32;
        match alphas.iter_mut().find(|count| count.value == alpha) {
            Some(count) => count.modules += 1,
            None => alphas.push(Count { value: alpha, modules: 1 }),
        }
    }
    alphas.sort_by(|a, b| a.value.total_cmp(&b.value));
    let finite: Vec<_> = modules.iter().filter(|(_, norm)| norm.is_finite()).collect();
    let largest = finite.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let sum: f64 = finite.iter().map(|(_, norm)| norm).sum();
    PartReport {
        part,
        modules: modules.len(),
        ranks: ranks.into_iter().map(|(value, modules)| Count { value, modules }).collect(),
        alphas,
        dora: modules.iter().filter(|(module, _)| module.dora_scale.is_some()).count(),
        norm_mean: (!finite.is_empty()).then(|| sum / finite.len() as f64),
        norm_max: largest.map(|(_, norm)| *norm),
        norm_max_module: largest.map(|(module, _)| module.name.clone()),
    }
}

/// The kinds of modules in a few words.
fn network(file: &AdapterFile) -> String {
    let dylora = file
        .metadata
        .get("ss_network_module")
        .is_some_and(|module| module.to_ascii_lowercase().contains("dylora"));
    let mut found: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
        }
    };
    for module in &file.modules {
        match &module.kind {
            AdapterKind::LowRank { mid: Some(_), .. } => add("LoCon (Tucker)"),
            AdapterKind::LowRank { .. } if dylora => add("DyLoRA"),
            AdapterKind::LowRank { .. }
                if file.modules.iter().any(|m| beyond_attention(&m.name)) =>
            {
                add("LoRA (C3Lier)");
            }
            AdapterKind::LowRank { .. } => add("LoRA (LierLa)"),
            AdapterKind::Hadamard { .. } => add("LoHa"),
            AdapterKind::Kronecker { .. } => add("LoKr"),
            AdapterKind::Full { .. } => add("full difference"),
            AdapterKind::Norm { .. } => add("norms"),
        }
    }
    let dora = file.modules.iter().any(|module| module.dora_scale.is_some());
    format!("{}{}", found.join(" + "), if dora { ", with DoRA" } else { "" })
}

/// Layers that `networks.lora` reaches with `conv_dim` alone.
fn beyond_attention(name: &str) -> bool {
    const PARTS: [&str; 8] = [
        "_resnets_",
        "_downsamplers_",
        "_upsamplers_",
        "_in_layers_",
        "_out_layers_",
        "_emb_layers_",
        "_skip_connection",
        "_0_op",
    ];
    name.starts_with("lora_unet_")
        && (PARTS.iter().any(|part| name.contains(part)) || name.ends_with("_conv"))
}

/// Tensors and values by number type, most values first.
pub(crate) fn dtypes(file: &dyn TensorFile) -> Vec<DtypeReport> {
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for name in file.names() {
        if let Some((dtype, shape)) = file.describe(name) {
            let count = counts.entry(dtype.to_string()).or_default();
            count.0 += 1;
            count.1 += shape.iter().product::<usize>();
        }
    }
    let report = |(dtype, (tensors, values))| DtypeReport { dtype, tensors, values };
    let mut all: Vec<DtypeReport> = counts.into_iter().map(report).collect();
    all.sort_by_key(|report| std::cmp::Reverse(report.values));
    all
}

fn hashes(file: &AdapterFile) -> anyhow::Result<Hashes> {
    let sha256 = file_sha256(&file.path)?;
    let (model, legacy) = sshs(file)?;
    let stored = |key: &str| file.metadata.get(key);
    Ok(Hashes {
        auto_v2: sha256.chars().take(10).collect(),
        legacy: legacy_hash(&file.path)?,
        sshs_model_agrees: stored("sshs_model_hash").map(|hash| *hash == model),
        sshs_legacy_agrees: stored("sshs_legacy_hash").map(|hash| *hash == legacy),
        sshs_model: Some(model),
        sha256,
    })
}

/// (`sshs_model_hash`, `sshs_legacy_hash`) as they should be.
///
/// # Errors
/// Tensors that cannot be read.
pub(crate) fn sshs(file: &AdapterFile) -> anyhow::Result<(String, String)> {
    let mut tensors = lora_file::Tensors::new();
    for name in file.file.names() {
        tensors.insert(name.to_owned(), file.view(name)?.to_owned_tensor());
    }
    Ok(lora_file::sshs_hashes(&tensors, &file.metadata)?)
}
