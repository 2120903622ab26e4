//! LoRA files over the weights of a base model, each with a multiplier that can be changed.
//!
//! Nothing is kept but the mapped files: a changed weight is made anew from the base model's, in f32,
//! and rounded once, when it is read. So files of all kinds stack, in the order in which they came, a
//! picture takes no longer than without them, and with multipliers of 0 the weights are the base
//! model's to the bit.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use engine::{DType, Device, Tensor};
use formats::adapter::{AdapterFile, AdapterKind};
use formats::{Dtype, Family, FormatError, TensorView, Weights, bytes_from_f32};

use super::change::{Change, no_layer};
use super::target::{Part, Target};
use crate::{ModelError, Result};

/// What became of a LoRA file's modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackReport {
    /// Modules on layers of the text encoder.
    pub text_encoder: usize,
    /// Modules on layers of the U-Net.
    pub unet: usize,
    /// Modules for which the model has no layer.
    pub unused: Vec<String>,
    /// Tensors that belong to no module.
    pub unknown: Vec<String>,
}

/// A module's place.
struct Place {
    file: usize,
    module: usize,
    target: Target,
}

/// LoRA files over a base model, in the order in which they are applied.
#[derive(Default)]
pub struct LoraStack {
    files: Vec<(AdapterFile, f32)>,
    layers: BTreeMap<(Part, String), Vec<Place>>,
}

impl LoraStack {
    /// Puts a file on top, for a base model of this family and these layers.
    ///
    /// # Errors
    /// A file of another family, one none of whose modules has a layer, a module of another shape or
    /// of a kind that changes no layer. The stack is as before then.
    pub fn push(
        &mut self,
        file: AdapterFile,
        multiplier: f32,
        (family, targets): (Family, &[Target]),
    ) -> Result<StackReport> {
        check_multiplier(multiplier)?;
        if let Some(other) = file.family.filter(|other| *other != family) {
            let path = file.path.clone();
            let (lora, model) = (other.title(), family.title());
            return Err(ModelError::LoraFamily { path, lora, model });
        }
        let by_name: BTreeMap<&str, &Target> =
            targets.iter().map(|target| (target.name.as_str(), target)).collect();
        let mut report = StackReport { unknown: file.unknown.clone(), ..StackReport::default() };
        let mut places = Vec::new();
        for (module, found) in file.modules.iter().enumerate() {
            if let AdapterKind::Norm { .. } = found.kind {
                return Err(no_layer(found));
            }
            let Some(&target) = by_name.get(found.name.as_str()) else {
                report.unused.push(found.stored.clone());
                continue;
            };
            let got = found.layer_shape(&file);
            let columns: usize = got.iter().skip(1).product();
            if got.first() != Some(&target.out) || columns != target.weight_columns() {
                let (key, expected) = (found.stored.clone(), vec![target.out, target.input]);
                return Err(ModelError::LoraShape { key, expected, got });
            }
            match target.part {
                Part::TextEncoder | Part::TextEncoder2 => report.text_encoder += 1,
                Part::Unet => report.unet += 1,
            }
            places.push(Place { file: self.files.len(), module, target: target.clone() });
        }
        if places.is_empty() {
            let example = file.modules.first().map(|module| module.stored.clone());
            return Err(ModelError::LoraForeign { example: example.unwrap_or_default() });
        }
        for place in places {
            let layer = (place.target.part, place.target.path.clone());
            self.layers.entry(layer).or_default().push(place);
        }
        self.files.push((file, multiplier));
        Ok(report)
    }

    /// Takes the topmost file off again.
    pub fn pop(&mut self) {
        self.files.pop();
        let left = self.files.len();
        self.layers.values_mut().for_each(|places| places.retain(|place| place.file < left));
        self.layers.retain(|_, places| !places.is_empty());
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// A file and its multiplier, by its place from the bottom.
    pub fn get(&self, index: usize) -> Option<(&AdapterFile, f32)> {
        self.files.get(index).map(|(file, multiplier)| (file, *multiplier))
    }

    /// Changes the multiplier of a file; nothing happens where there is no such file.
    ///
    /// # Errors
    /// A multiplier that is not finite.
    pub fn set_multiplier(&mut self, index: usize, multiplier: f32) -> Result<()> {
        check_multiplier(multiplier)?;
        if let Some((_, old)) = self.files.get_mut(index) {
            *old = multiplier;
        }
        Ok(())
    }

    /// The layers that a file has modules for.
    pub fn layers_of(&self, index: usize) -> BTreeSet<(Part, String)> {
        let has = |places: &[Place]| places.iter().any(|place| place.file == index);
        let layers = self.layers.iter().filter(|(_, places)| has(places));
        layers.map(|(layer, _)| layer.clone()).collect()
    }

    /// The weights of a part with the changes in them.
    pub fn over<'w>(&'w self, part: Part, weights: &'w dyn Weights) -> StackedWeights<'w> {
        StackedWeights { stack: self, part, weights }
    }

    fn changes(&self, part: Part, layer: &str) -> impl Iterator<Item = Change<'_>> {
        let places = self.layers.get(&(part, layer.to_owned())).into_iter().flatten();
        let change = |place: &'_ Place| -> Option<(&AdapterFile, f32)> { self.get(place.file) };
        places.filter_map(move |place| {
            let (file, multiplier) = change(place)?;
            let module = file.modules.get(place.module)?;
            let change = Change { file, module, target: &place.target, multiplier };
            (multiplier != 0.).then_some(change)
        })
    }
}

fn check_multiplier(multiplier: f32) -> Result<()> {
    match multiplier.is_finite() {
        true => Ok(()),
        false => Err(ModelError::Network(format!(
            "the multiplier of a LoRA must be a finite number, it is: {multiplier}"
        ))),
    }
}

/// Weights of a file with the changes of a stack made as they are read.
pub struct StackedWeights<'w> {
    stack: &'w LoraStack,
    part: Part,
    weights: &'w dyn Weights,
}

impl Weights for StackedWeights<'_> {
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
        let Some((layer, tensor)) = name.rsplit_once('.') else { return Ok(view) };
        let mut changes = self.stack.changes(self.part, layer).peekable();
        let changed = match tensor {
            _ if changes.peek().is_none() => return Ok(view),
            "weight" => changed_weight(&view, changes),
            "bias" => changed_bias(&view, changes),
            _ => return Ok(view),
        };
        let values = changed.map_err(|error| match error {
            ModelError::Format(error) => error,
            error => FormatError::Io {
                action: "apply a LoRA to",
                path: name.into(),
                source: std::io::Error::other(error.to_string()),
            },
        })?;
        let data = Cow::Owned(bytes_from_f32(&values, Dtype::F32)?);
        Ok(TensorView { dtype: Dtype::F32, shape: view.shape, data })
    }
}

fn changed_weight<'c>(
    view: &TensorView<'_>,
    mut changes: impl Iterator<Item = Change<'c>>,
) -> Result<Vec<f32>> {
    let rows = view.shape.first().copied().unwrap_or(1).max(1);
    let shape = [rows, view.len() / rows];
    let weight = Tensor::from_f32(Device::Cpu, &shape, &view.to_f32(), DType::F32)?;
    let weight = changes.try_fold(weight, |weight, change| change.apply(weight))?;
    Ok(weight.to_vec_f32()?)
}

fn changed_bias<'c>(
    view: &TensorView<'_>,
    mut changes: impl Iterator<Item = Change<'c>>,
) -> Result<Vec<f32>> {
    let mut bias = view.to_f32();
    changes.try_for_each(|change| change.add_bias(&mut bias))?;
    Ok(bias)
}
