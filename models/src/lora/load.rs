//! Takes the numbers of a LoRA file into a network (`network_weights`).

use std::collections::{BTreeMap, BTreeSet};

use formats::OwnedTensor;

use super::TensorPlan;
use super::network::{LoraModule, LoraNetwork};
use super::rank::{Rank, read_alpha};
use crate::{ModelError, Result};

/// What a file and a network did not have in common.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadReport {
    /// Number of modules taken from the file.
    pub loaded: usize,
    /// Modules that the file lacks: they keep their values.
    pub missing: Vec<String>,
    /// Modules of the file that the network lacks: they are lost.
    pub unused: Vec<String>,
    /// Modules whose alpha differs, with the network's former and the file's, which now holds.
    /// (sd-scripts computes with the former and writes the latter.)
    pub alphas: Vec<(String, f32, f32)>,
}

impl LoraNetwork {
    /// Replaces `values` by those of the file, module by module.
    ///
    /// A module of another shape, or with one half missing, is an error, and so is a file none of
    /// whose modules belongs to the network.
    pub fn load_values(
        &mut self,
        values: &mut [Vec<f32>],
        tensors: &BTreeMap<String, OwnedTensor>,
    ) -> Result<LoadReport> {
        let mut report = LoadReport::default();
        let mut unused: BTreeSet<&str> =
            tensors.keys().filter_map(|key| key.split('.').next()).collect();
        for module in &mut self.modules {
            let name = module.target.name.clone();
            refuse_others(module, tensors)?;
            if !has_tensors(module, tensors)? {
                report.missing.push(name);
                continue;
            }
            unused.remove(name.as_str());
            for (plan, ids) in module.parts() {
                let key = format!("{name}.{}", plan.suffix);
                if let (Some(values), Some(tensor)) = (values.get_mut(ids), tensors.get(&key)) {
                    let parts = plan.cut(read(key, plan, tensor)?);
                    values.iter_mut().zip(parts).for_each(|(value, part)| *value = part);
                }
            }
            let alpha = read_alpha(tensors, &name)?.unwrap_or(0.);
            let rank = Rank::new(module.rank.dim, alpha);
            let rank = self.algorithm.settle(&module.target, rank);
            if rank.alpha != module.rank.alpha {
                report.alphas.push((name, module.rank.alpha, rank.alpha));
                module.rank = rank;
            }
            report.loaded += 1;
        }
        if report.loaded == 0 {
            let example = tensors.keys().next().cloned();
            let example = example.unwrap_or_else(|| "the file is empty".to_owned());
            return Err(ModelError::LoraForeign { example });
        }
        report.unused = unused.into_iter().map(str::to_owned).collect();
        Ok(report)
    }
}

/// Whether the file has the module; an error if it has a part of it only.
fn has_tensors(module: &LoraModule, tensors: &BTreeMap<String, OwnedTensor>) -> Result<bool> {
    let key = |plan: &TensorPlan| format!("{}.{}", module.target.name, plan.suffix);
    let (found, missing): (Vec<String>, Vec<String>) =
        module.tensors.iter().map(key).partition(|key| tensors.contains_key(key));
    match (found.first(), missing.first()) {
        (Some(found), Some(missing)) => {
            let (found, missing) = (found.clone(), missing.clone());
            Err(ModelError::LoraHalf { found, missing })
        }
        (found, _) => Ok(found.is_some()),
    }
}

/// An error if the file has tensors of the module that this kind of network has not: without them
/// the module would be another one.
fn refuse_others(module: &LoraModule, tensors: &BTreeMap<String, OwnedTensor>) -> Result<()> {
    let start = format!("{}.", module.target.name);
    let known =
        |suffix: &str| suffix == "alpha" || module.tensors.iter().any(|plan| plan.suffix == suffix);
    let mut of_module = tensors.range(start.clone()..).map_while(|(k, _)| k.strip_prefix(&start));
    match of_module.find(|suffix| !known(suffix)) {
        None => Ok(()),
        Some(suffix) => Err(ModelError::LoraKind { key: format!("{start}{suffix}") }),
    }
}

/// `[n,m]` and `[n,m,1,1]` are the same matrix: sd-scripts writes one or the other for SD2.
fn read(key: String, plan: &TensorPlan, tensor: &OwnedTensor) -> Result<Vec<f32>> {
    let matrix = |shape: &[usize]| match *shape {
        [n, m, 1, 1] => vec![n, m],
        _ => shape.to_vec(),
    };
    if matrix(&tensor.shape) != matrix(&plan.file_shape) {
        let (expected, got) = (plan.file_shape.clone(), tensor.shape.clone());
        return Err(ModelError::LoraShape { key, expected, got });
    }
    Ok(plan.engine_order(tensor.to_f32()))
}
