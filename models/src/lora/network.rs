//! The modules of a LoRA, their parameters, and the way into models and files.

use std::collections::BTreeMap;
use std::ops::Range;

use engine::{Adapter, Device, ParamId, ParamStore};
use formats::{Dtype, OwnedTensor};

use super::rank::{Rank, RankRule};
use super::target::{Part, Target};
use super::{Algorithm, Init, TensorPlan};
use crate::{ClipTextModel, ModelError, Result, Unet};

/// An adapter of one layer.
#[derive(Clone, Debug)]
pub struct LoraModule {
    /// The layer.
    pub target: Target,
    /// Rank and alpha.
    pub rank: Rank,
    pub(super) tensors: Vec<TensorPlan>,
    pub(super) first: usize,
}

impl LoraModule {
    /// Its parameters, in the order of [`ParamId`].
    pub fn params(&self) -> Range<usize> {
        self.first..self.first + self.tensors.len()
    }
}

/// Parameters that share a learning rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamGroup {
    /// Part of the model.
    pub part: Part,
    /// Indices of its [`ParamId`]s.
    pub params: Range<usize>,
}

/// A LoRA over a base model: text encoder first, then U-Net, each in diffusers' order.
#[derive(Clone, Debug)]
pub struct LoraNetwork {
    algorithm: Algorithm,
    pub(super) modules: Vec<LoraModule>,
    /// Module and place in it of each parameter.
    places: Vec<(usize, usize)>,
}

impl LoraNetwork {
    /// A module for each of `targets` that `rule` gives a rank. The order of `targets` is kept.
    pub fn new(targets: Vec<Target>, rule: &dyn RankRule, algorithm: Algorithm) -> Result<Self> {
        let mut network = Self { algorithm, modules: Vec::new(), places: Vec::new() };
        for target in targets {
            let Some(rank) = rule.rank(&target) else { continue };
            if rank.dim == 0 {
                let message = format!("the rank of a LoRA must be at least 1, it is: {}", rank.dim);
                return Err(ModelError::Network(message));
            }
            let tensors = algorithm.tensors(&target, rank.dim);
            let (index, first) = (network.modules.len(), network.places.len());
            network.places.extend((0..tensors.len()).map(|place| (index, place)));
            network.modules.push(LoraModule { target, rank, tensors, first });
        }
        if network.modules.is_empty() {
            let message = "no layer of the base model gets a LoRA with these settings";
            return Err(ModelError::Network(message.to_owned()));
        }
        Ok(network)
    }

    /// Its modules.
    pub fn modules(&self) -> &[LoraModule] {
        &self.modules
    }

    /// Number of modules of a part.
    pub fn module_count(&self, part: Part) -> usize {
        self.modules.iter().filter(|module| module.target.part == part).count()
    }

    /// Number of parameters (tensors).
    pub fn param_count(&self) -> usize {
        self.places.len()
    }

    /// Number of trainable numbers.
    pub fn element_count(&self) -> usize {
        self.modules.iter().flat_map(|module| &module.tensors).map(TensorPlan::len).sum()
    }

    /// Parameters by part, in the order of sd-scripts' optimizer groups; parts without any are left
    /// out.
    pub fn groups(&self) -> Vec<ParamGroup> {
        let mut groups: Vec<ParamGroup> = Vec::new();
        for module in &self.modules {
            let (part, params) = (module.target.part, module.params());
            match groups.last_mut() {
                Some(group) if group.part == part => group.params.end = params.end,
                _ => groups.push(ParamGroup { part, params }),
            }
        }
        groups
    }

    fn plan(&self, id: ParamId) -> (&LoraModule, &TensorPlan) {
        let (module, place) = self.places[id.0];
        (&self.modules[module], &self.modules[module].tensors[place])
    }

    /// Key of a parameter in files: `lora_unet_..._to_q.lora_down.weight`.
    pub fn key(&self, id: ParamId) -> String {
        let (module, plan) = self.plan(id);
        format!("{}.{}", module.target.name, plan.suffix)
    }

    /// Shape of a parameter in files.
    pub fn file_shape(&self, id: ParamId) -> &[usize] {
        &self.plan(id).1.file_shape
    }

    /// Numbers of a parameter (or of its gradient) in the order of files.
    pub fn file_order(&self, id: ParamId, data: &[f32]) -> Vec<f32> {
        self.plan(id).1.file_order(data)
    }

    /// Values of a new LoRA, one vector per parameter, in the engine's order.
    ///
    /// `uniform(key, n)` gives `n` independent numbers in 0..1 for the tensor of that key; keyed by
    /// the caller's seed, so that every rank gets the same.
    pub fn initial_values(
        &self,
        uniform: &mut dyn FnMut(&str, usize) -> Vec<f32>,
    ) -> Vec<Vec<f32>> {
        let value = |id: usize| {
            let plan = self.plan(ParamId(id)).1;
            match plan.init {
                Init::Zeros => vec![0.; plan.len()],
                Init::Uniform(bound) => {
                    let drawn = uniform(&self.key(ParamId(id)), plan.len());
                    plan.engine_order(drawn.iter().map(|x| (2. * x - 1.) * bound).collect())
                }
            }
        };
        (0..self.places.len()).map(value).collect()
    }

    /// The parameters on a device, for the tape.
    pub fn parameters(&self, device: Device, values: Vec<Vec<f32>>) -> Result<ParamStore> {
        if values.len() != self.places.len() {
            let message =
                format!("{} parameters are needed, got: {}", self.places.len(), values.len());
            return Err(ModelError::Network(message));
        }
        let tensors: Vec<_> = values
            .into_iter()
            .enumerate()
            .map(|(id, data)| (self.plan(ParamId(id)).1.shape.clone(), data))
            .collect();
        Ok(ParamStore::new(device, &tensors)?)
    }

    /// Puts the adapters into the layers of both models, in place of what they had; `multiplier`
    /// scales all of them (1 in training).
    pub fn install(
        &self,
        text_encoder: &mut ClipTextModel,
        unet: &mut Unet,
        multiplier: f32,
    ) -> Result<()> {
        let mut adapters: BTreeMap<(Part, String), Adapter> = BTreeMap::new();
        for module in &self.modules {
            let scale = module.rank.scale() * multiplier;
            let adapter = self.algorithm.adapter(ParamId(module.first), scale);
            adapters.insert((module.target.part, module.target.path.clone()), adapter);
        }
        let mut take = |part, path: &str| adapters.remove(&(part, path.to_owned()));
        text_encoder.visit_slots(&mut |path, slot| *slot = take(Part::TextEncoder, path));
        unet.visit_slots(&mut |path, slot| *slot = take(Part::Unet, path));
        match adapters.into_keys().next() {
            None => Ok(()),
            Some((part, path)) => Err(ModelError::Network(format!(
                "the model has no layer for the LoRA module `{}`: {path}",
                part.group_name()
            ))),
        }
    }

    /// The tensors of a LoRA file in sd-scripts' names and shapes, with alphas, all as `dtype`.
    pub fn export(
        &self,
        params: &ParamStore,
        dtype: Dtype,
    ) -> Result<BTreeMap<String, OwnedTensor>> {
        let mut tensors = BTreeMap::new();
        for module in &self.modules {
            let alpha = OwnedTensor::scalar(module.rank.alpha, dtype)?;
            tensors.insert(format!("{}.alpha", module.target.name), alpha);
            for id in module.params().map(ParamId) {
                let plan = self.plan(id).1;
                let data = plan.file_order(&params.tensor(id)?.to_vec_f32()?);
                let tensor = OwnedTensor::from_f32(&plan.file_shape, &data, dtype)?;
                tensors.insert(self.key(id), tensor);
            }
        }
        Ok(tensors)
    }
}
