//! LoRA files added to a base model's weights before training (`base_weights`).
//!
//! The sum is made in f32 when a weight is read and rounded once, when the model is loaded into its
//! compute type; nothing is kept but the files' own tensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use engine::backend::Gemm;
use engine::{DType, Device, Tensor};
use formats::{Dtype, FormatError, OwnedTensor, TensorView, Weights};

use super::rank::read_alpha;
use super::target::{Part, Target};
use crate::{ModelError, Result};

/// One module's update of a weight.
struct Update {
    /// `[out,r]`.
    up: Tensor,
    /// `[r,in·window]`.
    down: Tensor,
    /// `multiplier · alpha/r`.
    scale: f32,
}

/// The updates of all weights, in the order of the files.
#[derive(Default)]
pub struct BaseMerge {
    updates: BTreeMap<(Part, String), Vec<Update>>,
}

/// What became of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// Modules that are added to the base model.
    pub merged: usize,
    /// Modules that it has no place for, or of another kind.
    pub unused: Vec<String>,
}

impl BaseMerge {
    /// Takes the modules of a file, `multiplier` times, for the layers `targets`.
    ///
    /// A file none of whose modules fits is an error, and so is a module of another shape.
    pub fn add(
        &mut self,
        tensors: &BTreeMap<String, OwnedTensor>,
        multiplier: f32,
        targets: &[Target],
    ) -> Result<MergeReport> {
        let names = tensors.keys().filter_map(|key| key.split_once('.'));
        let mut unused: BTreeSet<&str> = names.map(|(name, _)| name).collect();
        let mut report = MergeReport::default();
        for target in targets {
            let Some(update) = read_update(tensors, multiplier, target)? else { continue };
            let weight = (target.part, format!("{}.weight", target.path));
            self.updates.entry(weight).or_default().push(update);
            unused.remove(target.name.as_str());
            report.merged += 1;
        }
        if report.merged == 0 {
            let example = tensors.keys().next().cloned();
            let example = example.unwrap_or_else(|| "the file is empty".to_owned());
            return Err(ModelError::LoraForeign { example });
        }
        report.unused = unused.into_iter().map(str::to_owned).collect();
        Ok(report)
    }

    /// The weights of a part with the updates in them.
    pub fn over<'w>(&'w self, part: Part, weights: &'w dyn Weights) -> MergedWeights<'w> {
        MergedWeights { merge: self, part, weights }
    }
}

/// A module of a file, `None` where it has none for this layer.
fn read_update(
    tensors: &BTreeMap<String, OwnedTensor>,
    multiplier: f32,
    target: &Target,
) -> Result<Option<Update>> {
    let key = |suffix: &str| format!("{}.{suffix}.weight", target.name);
    let (down_key, up_key) = (key("lora_down"), key("lora_up"));
    let (down, up) = match (tensors.get(&down_key), tensors.get(&up_key)) {
        (Some(down), Some(up)) => (down, up),
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(ModelError::LoraHalf { found: down_key, missing: up_key }),
        (None, Some(_)) => return Err(ModelError::LoraHalf { found: up_key, missing: down_key }),
    };
    // Without these tensors the update would be another one.
    for suffix in ["dora_scale", "lora_mid.weight"] {
        let key = format!("{}.{suffix}", target.name);
        if tensors.contains_key(&key) {
            return Err(ModelError::Network(format!(
                "only plain LoRA can be merged, this is not: `{key}`"
            )));
        }
    }
    let rank = down.shape.first().copied().unwrap_or(0);
    let columns = target.weight_columns();
    for (key, tensor, len) in [(down_key, down, rank * columns), (up_key, up, target.out * rank)] {
        if rank == 0 || tensor.shape.iter().product::<usize>() != len {
            let expected = match key.contains("lora_down") {
                true => vec![rank.max(1), columns],
                false => vec![target.out, rank.max(1)],
            };
            let got = tensor.shape.clone();
            return Err(ModelError::LoraShape { key, expected, got });
        }
    }
    let alpha = read_alpha(tensors, &target.name)?.filter(|alpha| *alpha != 0.);
    let scale = multiplier * alpha.map_or(1., |alpha| alpha / rank as f32);
    let tensor = |shape: [usize; 2], from: &OwnedTensor| {
        Tensor::from_f32(Device::Cpu, &shape, &from.to_f32(), DType::F32)
    };
    let (up, down) = (tensor([target.out, rank], up)?, tensor([rank, columns], down)?);
    Ok(Some(Update { up, down, scale }))
}

/// Weights of a file with updates added as they are read.
pub struct MergedWeights<'w> {
    merge: &'w BaseMerge,
    part: Part,
    weights: &'w dyn Weights,
}

impl Weights for MergedWeights<'_> {
    fn names(&self) -> Vec<String> {
        self.weights.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.shape(name)
    }

    fn release(&self, name: &str) {
        self.weights.release(name);
    }

    fn get(&self, name: &str) -> std::result::Result<TensorView<'_>, FormatError> {
        let view = self.weights.get(name)?;
        let Some(updates) = self.merge.updates.get(&(self.part, name.to_owned())) else {
            return Ok(view);
        };
        let sum = add_updates(&view, updates).map_err(|error| FormatError::Io {
            action: "merge a LoRA into",
            path: name.into(),
            source: std::io::Error::other(error.to_string()),
        })?;
        let data = sum.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(TensorView { dtype: Dtype::F32, shape: view.shape, data: Cow::Owned(data) })
    }
}

fn add_updates(view: &TensorView<'_>, updates: &[Update]) -> Result<Vec<f32>> {
    let rows = view.shape.first().copied().unwrap_or(1).max(1);
    let shape = [rows, view.len() / rows];
    let mut sum = Tensor::from_f32(Device::Cpu, &shape, &view.to_f32(), DType::F32)?;
    for Update { up, down, scale } in updates {
        let product = Gemm::new(up, false, down, false);
        let gemm = Gemm { alpha: *scale, residual: Some(&sum), ..product };
        sum = sum.device().backend().gemm(&gemm)?;
    }
    Ok(sum.to_vec_f32()?)
}
