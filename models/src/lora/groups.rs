//! Which parameters share a learning rate: sd-scripts' optimizer groups, in its order and under its
//! names.

use engine::ParamId;

use super::blocks::BlockRates;
use super::network::{LoraModule, LoraNetwork};
use super::target::Part;

/// Parameters that share a learning rate.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamGroup {
    /// Part of the model.
    pub part: Part,
    /// What sd-scripts' logs call it: `unet`, `textencoder plus`, `unet_block4`.
    pub label: String,
    /// Factor of the part's learning rate: weight of the block times ratio of LoRA+.
    pub lr_factor: f64,
    /// Its parameters, ascending.
    pub params: Vec<ParamId>,
}

/// LoRA+ (Hayou et al., arXiv:2402.12354): `lora_up` learns faster than `lora_down`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraPlus {
    /// Factor in both parts of the model.
    pub all: Option<f64>,
    /// Factor in the U-Net, before `all`.
    pub unet: Option<f64>,
    /// Factor in the text encoder, before `all`.
    pub text_encoder: Option<f64>,
}

impl LoraPlus {
    fn ratio(&self, part: Part) -> Option<f64> {
        let own = match part {
            Part::TextEncoder | Part::TextEncoder2 => self.text_encoder,
            Part::Unet => self.unet,
        };
        own.or(self.all)
    }
}

/// What makes learning rates differ within a part.
#[derive(Clone, Debug, Default)]
pub(super) struct Rates {
    pub blocks: Option<BlockRates>,
    pub plus: LoraPlus,
}

impl LoraNetwork {
    /// Sets learning rates that differ by block and by half.
    pub fn set_rates(&mut self, blocks: Option<BlockRates>, plus: LoraPlus) {
        self.rates = Rates { blocks, plus };
    }

    /// Parameters by learning rate; every parameter is in one group.
    pub fn groups(&self) -> Vec<ParamGroup> {
        let two_texts = self.modules.iter().any(|module| module.target.part == Part::TextEncoder2);
        // Name, factor and modules, in the order in which names appear.
        let mut sets: Vec<(Part, String, f64, Vec<&LoraModule>)> = Vec::new();
        for module in &self.modules {
            let part = module.target.part;
            let (label, factor) = match (part, &self.rates.blocks) {
                (Part::Unet, Some(blocks)) => {
                    let (block, factor) = blocks.of(&module.target.name);
                    (format!("unet_block{block}"), factor)
                }
                (Part::TextEncoder, _) if two_texts => ("textencoder 1".to_owned(), 1.),
                _ => (part.group_name().to_owned(), 1.),
            };
            match sets.iter_mut().find(|set| set.1 == label) {
                Some(set) => set.3.push(module),
                None => sets.push((part, label, factor, vec![module])),
            }
        }
        let mut groups = Vec::new();
        for (part, label, factor, modules) in sets {
            let ratio = self.rates.plus.ratio(part);
            let (mut plain, mut plus) = (Vec::new(), Vec::new());
            for (plan, ids) in modules.into_iter().flat_map(LoraModule::parts) {
                let faster = ratio.is_some() && plan.suffix == "lora_up.weight";
                let set = if faster { &mut plus } else { &mut plain };
                set.extend(ids.map(ParamId));
            }
            let halves = [
                (label.clone(), factor, plain),
                (format!("{label} plus"), factor * ratio.unwrap_or(1.), plus),
            ];
            groups.extend(
                halves.into_iter().filter(|half| !half.2.is_empty()).map(
                    |(label, lr_factor, params)| ParamGroup { part, label, lr_factor, params },
                ),
            );
        }
        groups
    }
}
