//! Which layers get a module, and of what rank.

use std::collections::BTreeMap;

use formats::OwnedTensor;

use super::target::Target;
use crate::{ModelError, Result};

/// Rank and strength of a module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rank {
    /// Rank, at least 1.
    pub dim: usize,
    /// The module's update is multiplied by `alpha/dim`.
    pub alpha: f32,
}

impl Rank {
    /// `alpha` 0 means that the update is not scaled.
    pub fn new(dim: usize, alpha: f32) -> Self {
        Self { dim, alpha: if alpha == 0. { dim as f32 } else { alpha } }
    }

    /// `alpha/dim`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.dim as f32
    }
}

/// Gives each layer its rank.
pub trait RankRule {
    /// `None`: this layer gets no module.
    fn rank(&self, target: &Target) -> Option<Rank>;
}

/// One rank for linear layers and 1x1 convolutions, one for other convolutions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UniformRanks {
    /// `network_dim` and `network_alpha`.
    pub linear: Rank,
    /// `conv_dim` and `conv_alpha`; `None` trains the transformers alone (LierLa).
    pub conv: Option<Rank>,
}

impl RankRule for UniformRanks {
    fn rank(&self, target: &Target) -> Option<Rank> {
        if target.is_pointwise() {
            (target.in_transformer || self.conv.is_some()).then_some(self.linear)
        } else {
            self.conv
        }
    }
}

/// The ranks of a LoRA file (`dim_from_weights`): modules that it lacks are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct FileRanks {
    ranks: BTreeMap<String, Rank>,
}

impl FileRanks {
    /// Reads ranks and alphas off the tensors of a LoRA file; a missing alpha is the rank.
    pub fn new(tensors: &BTreeMap<String, OwnedTensor>) -> Result<Self> {
        let mut ranks = BTreeMap::new();
        for (key, tensor) in tensors {
            let Some(module) = key.strip_suffix(".lora_down.weight") else { continue };
            let dim = tensor.shape.first().copied().filter(|dim| *dim > 0);
            let dim = dim.ok_or_else(|| {
                ModelError::Network(format!("the LoRA tensor `{key}` has no rank"))
            })?;
            let alpha = read_alpha(tensors, module)?.unwrap_or(0.);
            ranks.insert(module.to_owned(), Rank::new(dim, alpha));
        }
        if ranks.is_empty() {
            let example = tensors.keys().next().cloned();
            let example = example.unwrap_or_else(|| "the file is empty".to_owned());
            return Err(ModelError::LoraForeign { example });
        }
        Ok(Self { ranks })
    }

    /// Module names in the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.ranks.keys().map(String::as_str)
    }
}

impl RankRule for FileRanks {
    fn rank(&self, target: &Target) -> Option<Rank> {
        self.ranks.get(&target.name).copied()
    }
}

/// A module's alpha, `None` where the file has none.
pub(super) fn read_alpha(
    tensors: &BTreeMap<String, OwnedTensor>,
    module: &str,
) -> Result<Option<f32>> {
    let key = format!("{module}.alpha");
    let Some(tensor) = tensors.get(&key) else { return Ok(None) };
    match tensor.to_f32()[..] {
        [alpha] if alpha.is_finite() => Ok(Some(alpha)),
        _ => {
            let got = tensor.shape.clone();
            Err(ModelError::LoraShape { key, expected: Vec::new(), got })
        }
    }
}
