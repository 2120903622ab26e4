//! LoRA files of a pipeline: applied, changed in strength, merged.

use std::collections::BTreeSet;
use std::path::Path;

use formats::Weights;
use formats::adapter::AdapterFile;

use super::{Pipeline, PipelineError};
use crate::ModelError;
use crate::lora::{
    LoraStack, Part, StackReport, Target, outer_targets, sdxl_text_encoder_targets,
    text_encoder_targets, unet_targets,
};
use crate::reader::{LayerVisitor, Reader};

/// A LoRA of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraHandle(usize);

/// The LoRA files of a pipeline, from the bottom.
#[derive(Default)]
pub(super) struct Loras {
    stack: LoraStack,
    reports: Vec<StackReport>,
    /// This many are part of the weights for good.
    merged: usize,
}

impl Loras {
    fn index(&self, handle: LoraHandle) -> Result<usize, PipelineError> {
        let is_open = (self.merged..self.stack.len()).contains(&handle.0);
        is_open.then_some(handle.0).ok_or(PipelineError::NoSuchLora)
    }
}

impl Pipeline {
    /// Applies a LoRA file, of any kind and naming that `lorarun merge` reads, with a multiplier: 1 is
    /// what was trained. It comes on top of those that were added before.
    ///
    /// # Errors
    /// A file that cannot be read, is of another family of models, or does not fit the layers; the
    /// pipeline is as before then.
    pub fn add_lora(&mut self, path: &Path, multiplier: f32) -> Result<LoraHandle, PipelineError> {
        let file = AdapterFile::open(path)?;
        let targets = self.targets();
        self.check_biases(&file, &targets)?;
        let on = (self.files.family, targets.as_slice());
        let report = self.loras.stack.push(file, multiplier, on)?;
        let index = self.loras.stack.len() - 1;
        if multiplier != 0.
            && let Err(error) = self.renew(&self.loras.stack.layers_of(index))
        {
            let layers = self.loras.stack.layers_of(index);
            self.loras.stack.pop();
            self.renew(&layers)?;
            return Err(error);
        }
        self.loras.reports.push(report);
        Ok(LoraHandle(index))
    }

    /// Which modules of a LoRA are at work and which have no place in the model.
    ///
    /// # Errors
    /// A handle of another pipeline.
    pub fn lora_report(&self, handle: LoraHandle) -> Result<&StackReport, PipelineError> {
        self.loras.reports.get(handle.0).ok_or(PipelineError::NoSuchLora)
    }

    /// Changes how strongly a LoRA works; with 0 everywhere pictures are the base model's to the bit.
    /// The weights of its layers are made anew: that takes as long as reading them from the file.
    ///
    /// # Errors
    /// A LoRA that has been merged, a multiplier that is not finite.
    pub fn set_multiplier(
        &mut self,
        handle: LoraHandle,
        multiplier: f32,
    ) -> Result<(), PipelineError> {
        let index = self.loras.index(handle)?;
        let before = self.loras.stack.get(index).map_or(0., |(_, multiplier)| multiplier);
        if before == multiplier {
            return Ok(());
        }
        self.loras.stack.set_multiplier(index, multiplier)?;
        let layers = self.loras.stack.layers_of(index);
        if let Err(error) = self.renew(&layers) {
            self.loras.stack.set_multiplier(index, before)?;
            self.renew(&layers)?;
            return Err(error);
        }
        Ok(())
    }

    /// The multiplier of a LoRA.
    ///
    /// # Errors
    /// A LoRA that has been merged.
    pub fn multiplier(&self, handle: LoraHandle) -> Result<f32, PipelineError> {
        let index = self.loras.index(handle)?;
        Ok(self.loras.stack.get(index).map_or(0., |(_, multiplier)| multiplier))
    }

    /// Makes all LoRAs part of the weights: their multipliers can no longer be changed. Pictures stay as
    /// they are, to the bit, since the weights of the layers already hold them.
    pub fn merge_loras(&mut self) {
        self.loras.merged = self.loras.stack.len();
    }

    /// Every layer that a module of a file can belong to.
    fn targets(&self) -> Vec<Target> {
        let first = &*self.files.text_encoder;
        let mut targets = match &self.files.text_encoder_2 {
            Some(second) => sdxl_text_encoder_targets(first, &**second),
            None => text_encoder_targets(first),
        };
        targets.extend(unet_targets(&*self.files.unet));
        targets.extend(outer_targets(&*self.files.unet));
        targets
    }

    /// A difference of a bias needs a bias.
    fn check_biases(&self, file: &AdapterFile, targets: &[Target]) -> Result<(), PipelineError> {
        for module in file.modules.iter().filter(|module| module.bias.is_some()) {
            let target = targets.iter().find(|target| target.name == module.name);
            let has_bias = |target: &Target| {
                let name = format!("{}.bias", target.path);
                self.weights(target.part).is_some_and(|weights| weights.contains(&name))
            };
            if !target.is_none_or(has_bias) {
                return Err(PipelineError::Model(ModelError::Network(format!(
                    "the LoRA changes a bias that the layer does not have: {}",
                    module.stored
                ))));
            }
        }
        Ok(())
    }

    fn weights(&self, part: Part) -> Option<&dyn Weights> {
        match part {
            Part::TextEncoder => Some(&*self.files.text_encoder),
            Part::TextEncoder2 => self.files.text_encoder_2.as_deref(),
            Part::Unet => Some(&*self.files.unet),
        }
    }

    /// Makes the weights of these layers anew, as the stack now is.
    fn renew(&mut self, layers: &BTreeSet<(Part, String)>) -> Result<(), PipelineError> {
        self.texts.forget();
        let Self { files, loras, text_encoders, unet, dtype, .. } = self;
        let mut texts = vec![(Part::TextEncoder, &*files.text_encoder, &mut text_encoders.first)];
        let second = files.text_encoder_2.as_deref().zip(text_encoders.second.as_mut());
        texts.extend(second.map(|(weights, model)| (Part::TextEncoder2, weights, model)));
        for (part, weights, model) in texts {
            let over = loras.stack.over(part, weights);
            let reader = Reader::new(&over, model.device(), *dtype);
            renew_layers(&reader, (part, layers), |visit| model.visit_layers(visit))?;
        }
        let over = loras.stack.over(Part::Unet, &*files.unet);
        let reader = Reader::new(&over, unet.device(), *dtype);
        renew_layers(&reader, (Part::Unet, layers), |visit| unet.visit_layers(visit))
    }
}

fn renew_layers(
    reader: &Reader,
    (part, layers): (Part, &BTreeSet<(Part, String)>),
    visit_all: impl FnOnce(LayerVisitor),
) -> Result<(), PipelineError> {
    let mut result = Ok(());
    visit_all(&mut |path, layer| {
        if result.is_ok() && layers.contains(&(part, path.to_owned())) {
            result = reader.renew(path, layer);
        }
    });
    Ok(result?)
}
