//! Lists the layers of components under kohya's names.

use std::collections::HashMap;

use super::{ComponentKind, Layer, LayerPlace, LayerTarget};
use crate::keys::{LdmUnetNames, Part};
use crate::{Component, Family, Weights};

/// The layers of a model while they are found.
#[derive(Default)]
pub(super) struct Found {
    pub layers: Vec<Layer>,
    /// (other name, name).
    other_names: Vec<(String, String)>,
    /// Normalisations by all their names.
    pub norms: HashMap<String, LayerPlace>,
}

impl Found {
    /// Adds the layers of a U-Net or text encoder; `file_of` gives the index of the file with a
    /// key.
    pub fn add(
        &mut self,
        family: Family,
        kind: ComponentKind,
        component: &Component,
        file_of: &dyn Fn(&str) -> usize,
    ) {
        let ldm = (family == Family::Sdxl && kind == ComponentKind::Unet)
            .then(|| LdmUnetNames::of(&component.names()));
        let prefix = prefix(family, kind);
        for (name, key, part) in component.slots() {
            let (Some(module), Some(shape)) = (name.strip_suffix(".weight"), component.shape(name))
            else {
                continue;
            };
            if shape.len() == 1 && kind != ComponentKind::Vae {
                let place = LayerPlace { file: file_of(key), key: key.to_owned(), rows: None };
                for path in [Some(name.to_owned()), ldm.as_ref().and_then(|ldm| ldm.name(name))] {
                    let Some(path) = path else { continue };
                    let module = path.strip_suffix(".weight").unwrap_or(&path).replace('.', "_");
                    self.norms.insert(format!("{prefix}{module}"), place.clone());
                }
                continue;
            }
            let Some(target) = target(kind, module) else { continue };
            // A matrix that is stored transposed is no layer.
            if !matches!(shape.len(), 2 | 4) || part == Part::Transposed {
                continue;
            }
            let rows = match part {
                Part::Third(third) => Some(third * shape[0]..(third + 1) * shape[0]),
                _ => None,
            };
            let plain = format!("{prefix}{}", module.replace('.', "_"));
            let name = match &ldm {
                None => plain,
                // A name of no known place keeps diffusers'.
                Some(ldm) => match ldm.name(name) {
                    None => plain,
                    Some(name) => {
                        let module = name.strip_suffix(".weight").unwrap_or(&name);
                        let name = format!("{prefix}{}", module.replace('.', "_"));
                        self.other_names.push((plain, name.clone()));
                        name
                    }
                },
            };
            if let Some(rest) = name.strip_prefix("lora_te1_") {
                self.other_names.push((format!("lora_te_{rest}"), name.clone()));
            }
            let place = LayerPlace { file: file_of(key), key: key.to_owned(), rows };
            self.layers.push(Layer { name, component: kind, place, shape, target });
        }
    }

    /// The layers by name, the other names, and which layers each stored tensor holds.
    #[expect(clippy::type_complexity, reason = "three parts of one struct that is made at once")]
    pub fn finish(
        mut self,
    ) -> (Vec<Layer>, HashMap<String, usize>, HashMap<(usize, String), Vec<usize>>) {
        self.layers.sort_by(|a, b| a.name.cmp(&b.name));
        let mut at: HashMap<(usize, String), Vec<usize>> = HashMap::new();
        for (index, layer) in self.layers.iter().enumerate() {
            at.entry((layer.place.file, layer.place.key.clone())).or_default().push(index);
        }
        let index =
            |name: &str| self.layers.binary_search_by(|layer| layer.name.as_str().cmp(name));
        let aliases = self.other_names.iter();
        let aliases = aliases.filter_map(|(other, name)| Some((other.clone(), index(name).ok()?)));
        let aliases = aliases.collect();
        (self.layers, aliases, at)
    }
}

/// What kohya's names of a component begin with.
fn prefix(family: Family, kind: ComponentKind) -> &'static str {
    match (kind, family) {
        (ComponentKind::TextEncoder, Family::Sdxl) => "lora_te1_",
        (ComponentKind::TextEncoder, _) => "lora_te_",
        (ComponentKind::TextEncoder2, _) => "lora_te2_",
        (ComponentKind::Unet | ComponentKind::Vae, _) => "lora_unet_",
    }
}

/// `module` is diffusers' or transformers' path; `None` when no adapter of ours can change it.
fn target(kind: ComponentKind, module: &str) -> Option<LayerTarget> {
    let has = |part: &str| module.contains(part);
    match kind {
        ComponentKind::Vae => None,
        ComponentKind::TextEncoder | ComponentKind::TextEncoder2 => {
            (has(".self_attn.") || has(".mlp.")).then_some(LayerTarget::Attention)
        }
        ComponentKind::Unet => Some(if has(".attentions.") {
            LayerTarget::Attention
        } else if has(".resnets.") || has(".downsamplers.") || has(".upsamplers.") {
            LayerTarget::Resnet
        } else {
            LayerTarget::Outer
        }),
    }
}
