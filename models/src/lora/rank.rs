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

/// Ranks whose updates are multiplied by `alpha/√dim` instead of `alpha/dim` (rsLoRA,
/// arXiv:2312.03732).
///
/// Files say so by a larger alpha, `alpha·√dim`, as LyCORIS writes it: programs that compute
/// `alpha/dim`, all of them, then apply the strength that was trained.
pub struct RootRanks(pub Box<dyn RankRule>);

impl RankRule for RootRanks {
    fn rank(&self, target: &Target) -> Option<Rank> {
        let rank = self.0.rank(target)?;
        Some(Rank { alpha: rank.alpha * (rank.dim as f32).sqrt(), ..rank })
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
            let Some((module, dim)) = rank_of(key, tensor) else { continue };
            let dim = dim.filter(|dim| *dim > 0).ok_or_else(|| {
                ModelError::Network(format!("the LoRA tensor `{key}` has no rank"))
            })?;
            let alpha = read_alpha(tensors, module)?.unwrap_or(0.);
            ranks.insert(module.to_owned(), Rank::new(dim, alpha));
        }
        // Kronecker products of two whole matrices have no rank; LyCORIS writes it as their alpha.
        for module in tensors.keys().filter_map(|key| key.strip_suffix(".lokr_w2")) {
            if !ranks.contains_key(module) {
                let alpha = read_alpha(tensors, module)?.unwrap_or(1.).max(1.);
                ranks.insert(module.to_owned(), Rank::new(alpha as usize, 0.));
            }
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

/// Module and rank, where this tensor shows a rank.
fn rank_of<'a>(key: &'a str, tensor: &OwnedTensor) -> Option<(&'a str, Option<usize>)> {
    let (module, suffix) = key.split_once('.')?;
    let outermost = matches!(suffix, "lora_down.weight" | "hada_w1_b" | "lokr_w1_b" | "lokr_w2_b");
    outermost.then(|| (module, tensor.shape.first().copied()))
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
