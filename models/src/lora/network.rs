//! The modules of a LoRA, their parameters, and the way into models and files.

use std::collections::BTreeMap;
use std::ops::Range;

use engine::{Adapter, Device, Dropouts, ParamId, ParamStore};
use formats::{Dtype, OwnedTensor};

use super::groups::Rates;
use super::rank::{Rank, RankRule};
use super::target::{Part, Target};
use super::{Algorithm, Init, TensorPlan};
use crate::{ClipTextModel, ModelError, Result, TextEncoders, Unet};

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
        self.first..self.first + self.tensors.iter().map(|plan| plan.parts).sum::<usize>()
    }

    /// Its tensors in files, each with its parameters.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&TensorPlan, Range<usize>)> {
        let mut first = self.first;
        self.tensors.iter().map(move |plan| {
            let params = first..first + plan.parts;
            first = params.end;
            (plan, params)
        })
    }
}

/// What a parameter is: all of a tensor of a module, or one of its parts.
#[derive(Clone, Copy, Debug)]
struct Place {
    module: usize,
    tensor: usize,
    part: usize,
}

/// A LoRA over a base model: text encoder first, then U-Net, each in diffusers' order.
#[derive(Clone, Debug)]
pub struct LoraNetwork {
    pub(super) algorithm: Algorithm,
    pub(super) modules: Vec<LoraModule>,
    /// One per parameter.
    places: Vec<Place>,
    pub(super) rates: Rates,
    /// What is left out in training.
    pub dropouts: Dropouts,
}

impl LoraNetwork {
    /// A module for each of `targets` that `rule` gives a rank. The order of `targets` is kept.
    pub fn new(targets: Vec<Target>, rule: &dyn RankRule, algorithm: Algorithm) -> Result<Self> {
        let (modules, places, rates) = (Vec::new(), Vec::new(), Rates::default());
        let dropouts = Dropouts::default();
        let mut network = Self { algorithm, modules, places, rates, dropouts };
        for target in targets {
            let Some(rank) = rule.rank(&target) else { continue };
            if rank.dim == 0 {
                let message = format!("the rank of a LoRA must be at least 1, it is: {}", rank.dim);
                return Err(ModelError::Network(message));
            }
            if let Algorithm::DyLora { unit } = algorithm
                && !rank.dim.is_multiple_of(unit)
            {
                let message = format!("`unit` ({unit}) does not divide the rank: {}", rank.dim);
                return Err(ModelError::Network(message));
            }
            let rank = algorithm.settle(&target, rank);
            let tensors = algorithm.tensors(&target, rank.dim);
            let (module, first) = (network.modules.len(), network.places.len());
            for (tensor, plan) in tensors.iter().enumerate() {
                let parts = (0..plan.parts).map(|part| Place { module, tensor, part });
                network.places.extend(parts);
            }
            network.modules.push(LoraModule { target, rank, tensors, first });
        }
        if network.modules.is_empty() {
            let message = "no layer of the base model gets a LoRA with these settings";
            return Err(ModelError::Network(message.to_owned()));
        }
        Ok(network)
    }

    /// Whether training passes leave parts out: they need draws on the tape.
    pub fn draws_in_training(&self) -> bool {
        self.dropouts != Dropouts::default() || matches!(self.algorithm, Algorithm::DyLora { .. })
    }

    /// Its modules.
    pub fn modules(&self) -> &[LoraModule] {
        &self.modules
    }

    /// Number of modules of a part.
    pub fn module_count(&self, part: Part) -> usize {
        self.modules.iter().filter(|module| module.target.part == part).count()
    }

    /// Whether it has modules in a text encoder.
    pub fn has_text_modules(&self) -> bool {
        self.modules.iter().any(|module| module.target.part.is_text())
    }

    /// Number of parameters (tensors).
    pub fn param_count(&self) -> usize {
        self.places.len()
    }

    /// Number of trainable numbers.
    pub fn element_count(&self) -> usize {
        self.modules.iter().flat_map(|module| &module.tensors).map(TensorPlan::len).sum()
    }

    /// Tensor and part of a parameter.
    fn plan(&self, id: ParamId) -> (&LoraModule, &TensorPlan, usize) {
        let place = self.places[id.0];
        let module = &self.modules[place.module];
        (module, &module.tensors[place.tensor], place.part)
    }

    /// Key of a parameter in files: `lora_unet_..._to_q.lora_down.weight`, with the ranks behind it
    /// (`[4..8]`) where a file's tensor is several parameters.
    pub fn key(&self, id: ParamId) -> String {
        let (module, plan, part) = self.plan(id);
        let key = format!("{}.{}", module.target.name, plan.suffix);
        if plan.parts == 1 {
            return key;
        }
        let ranks = plan.shape[0] / plan.parts;
        format!("{key}[{}..{}]", part * ranks, (part + 1) * ranks)
    }

    /// Shape of a parameter in files.
    pub fn file_shape(&self, id: ParamId) -> Vec<usize> {
        self.plan(id).1.part().file_shape
    }

    /// Numbers of a parameter (or of its gradient) in the order of files.
    pub fn file_order(&self, id: ParamId, data: &[f32]) -> Vec<f32> {
        self.plan(id).1.part().file_order(data)
    }

    /// Undoes [`Self::file_order`].
    pub fn engine_order(&self, id: ParamId, data: Vec<f32>) -> Vec<f32> {
        self.plan(id).1.part().engine_order(data)
    }

    /// Values of a new LoRA, one vector per parameter, in the engine's order. Magnitudes are left to
    /// [`LoraNetwork::set_magnitudes`].
    ///
    /// `uniform(key, n)` gives `n` independent numbers in 0..1 for the tensor of that key; keyed by
    /// the caller's seed, so that every rank gets the same.
    pub fn initial_values(
        &self,
        uniform: &mut dyn FnMut(&str, usize) -> Vec<f32>,
    ) -> Vec<Vec<f32>> {
        let mut values = Vec::with_capacity(self.places.len());
        for module in &self.modules {
            for plan in &module.tensors {
                let mut draw =
                    |n: usize| uniform(&format!("{}.{}", module.target.name, plan.suffix), n);
                let value = match plan.init {
                    Init::Zeros | Init::RowNorms => vec![0.; plan.len()],
                    Init::Normal(deviation) => {
                        plan.engine_order(normal(&draw(2 * plan.len()), deviation))
                    }
                    Init::Uniform(bound) => {
                        let drawn = draw(plan.len());
                        plan.engine_order(drawn.iter().map(|x| (2. * x - 1.) * bound).collect())
                    }
                };
                values.extend(plan.cut(value));
            }
        }
        values
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
            .map(|(id, data)| (self.plan(ParamId(id)).1.part().shape, data))
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
        self.install_in((Some(text_encoder), None), unet, multiplier)
    }

    /// The same where the text encoders are gone: the network must have no modules for them.
    pub fn install_unet(&self, unet: &mut Unet, multiplier: f32) -> Result<()> {
        self.install_in((None, None), unet, multiplier)
    }

    /// The same for a model with one text encoder or two.
    pub fn install_all(
        &self,
        texts: &mut TextEncoders,
        unet: &mut Unet,
        multiplier: f32,
    ) -> Result<()> {
        self.install_in((Some(&mut texts.first), texts.second.as_mut()), unet, multiplier)
    }

    fn install_in(
        &self,
        (text_encoder, second): (Option<&mut ClipTextModel>, Option<&mut ClipTextModel>),
        unet: &mut Unet,
        multiplier: f32,
    ) -> Result<()> {
        let mut adapters: BTreeMap<(Part, String), Adapter> = BTreeMap::new();
        for module in &self.modules {
            let adapter = self.algorithm.adapter(module, multiplier, self.dropouts);
            adapters.insert((module.target.part, module.target.path.clone()), adapter);
        }
        let mut take = |part, path: &str| adapters.remove(&(part, path.to_owned()));
        if let Some(text_encoder) = text_encoder {
            text_encoder.visit_slots(&mut |path, slot| *slot = take(Part::TextEncoder, path));
        }
        if let Some(second) = second {
            second.visit_slots(&mut |path, slot| *slot = take(Part::TextEncoder2, path));
        }
        unet.visit_slots(&mut |path, slot| *slot = take(Part::Unet, path));
        match adapters.into_keys().next() {
            None => Ok(()),
            Some((part, path)) => Err(ModelError::Network(format!(
                "the model has no layer for the LoRA module `{}`: {path}",
                part.group_name()
            ))),
        }
    }

    /// The parameters that low-rank adapters read as they are but for a factor, for
    /// [`ParamStore::keep_working`]; `multiplier` as in [`LoraNetwork::install`].
    pub fn factors(&self, multiplier: f32) -> Vec<(ParamId, f32)> {
        let factors_of = |module| match self.algorithm.adapter(module, multiplier, self.dropouts) {
            Adapter::LowRank(adapter) => vec![(adapter.down, 1.), (adapter.up, adapter.scale)],
            Adapter::Nested(_) | Adapter::Composed(_) => Vec::new(),
        };
        self.modules.iter().flat_map(factors_of).collect()
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
            for (plan, ids) in module.parts() {
                let mut data = Vec::with_capacity(plan.len());
                for id in ids {
                    data.extend(params.tensor(ParamId(id))?.to_vec_f32()?);
                }
                let data = plan.file_order(&data);
                let tensor = OwnedTensor::from_f32(&plan.file_shape, &data, dtype)?;
                tensors.insert(format!("{}.{}", module.target.name, plan.suffix), tensor);
            }
        }
        Ok(tensors)
    }
}

/// Normal numbers from pairs of uniform ones in 0..1 (Box and Muller).
fn normal(uniform: &[f32], deviation: f32) -> Vec<f32> {
    let number = |pair: &[f32; 2]| {
        let [radius, turn] = pair.map(f64::from);
        let radius = (-2. * (1. - radius).ln()).sqrt();
        (radius * (std::f64::consts::TAU * turn).cos()) as f32 * deviation
    };
    uniform.as_chunks::<2>().0.iter().map(number).collect()
}
