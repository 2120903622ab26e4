//! A model of any container as the tensors of a single file in the LDM layout.

use std::borrow::Cow;

use super::{ComponentKind, ModelFiles};
use crate::dtype::bytes_from_f32;
use crate::family::{LDM_TEXT_1, LDM_TEXT_2, LDM_UNET, OPEN_CLIP};
use crate::keys::{
    LdmUnetNames, OpenClipTensor, last_vae_level, ldm_vae_name, open_clip_tensors, transposed,
};
use crate::single_file::LDM_VAE;
use crate::{Component, Dtype, Family, FormatError, TensorSpec, TensorView, Weights};

/// The prefix under which SD1 checkpoints hold the text encoder.
const TEXT_SD1: &str = "cond_stage_model.transformer.";

/// What a tensor of the LDM layout is made of.
#[derive(Clone, Debug)]
enum Source {
    /// Tensors of a component, one after the other.
    Parts(ComponentKind, Vec<String>),
    /// A matrix of a component with rows and columns exchanged.
    Transposed(ComponentKind, String),
    /// A number in every place, for what the model lacks and nobody reads.
    Ones,
}

/// A tensor of the LDM layout.
#[derive(Clone, Debug)]
pub struct LdmTensor {
    /// Key, shape, and the number type that the model stores it in.
    pub spec: TensorSpec,
    source: Source,
}

impl LdmTensor {
    /// Its data: one piece or several, which follow each other; a piece may be of another number
    /// type than `spec` where a model mixes them.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read<'m>(&self, model: &'m ModelFiles) -> Result<Vec<TensorView<'m>>, FormatError> {
        let component = |kind: ComponentKind| {
            model.component(kind).ok_or_else(|| FormatError::MissingTensor {
                path: model.path.clone(),
                name: self.spec.name.clone(),
            })
        };
        match &self.source {
            Source::Parts(kind, names) => {
                let component = component(*kind)?;
                names.iter().map(|name| component.get(name)).collect()
            }
            Source::Transposed(kind, name) => Ok(vec![transposed(&component(*kind)?.get(name)?)]),
            Source::Ones => {
                let data = bytes_from_f32(&vec![1.0; self.spec.len()], self.spec.dtype)?;
                let (dtype, shape) = (self.spec.dtype, self.spec.shape.clone());
                Ok(vec![TensorView { dtype, shape, data: Cow::Owned(data) }])
            }
        }
    }
}

/// A model in the LDM layout.
#[derive(Clone, Debug, Default)]
pub struct LdmLayout {
    /// Its tensors, in no order.
    pub tensors: Vec<LdmTensor>,
    /// Tensors of the components (`unet/...`) that the layout has no place for.
    pub left_out: Vec<String>,
    /// What stands in for parts that the model lacks, in words.
    pub notes: Vec<String>,
}

impl ModelFiles {
    /// How the model is written as a single file: names of the LDM layout, q, k and v of OpenCLIP
    /// joined, the attention of the VAE as 1x1 convolutions.
    ///
    /// A folder of SD2 lacks OpenCLIP's last layer, which the model does not use: it repeats the
    /// layer before it, and `text_projection` is filled with ones, as in sd-scripts' files.
    pub fn ldm_layout(&self) -> LdmLayout {
        let mut layout = LdmLayout::default();
        if let Some(unet) = self.component(ComponentKind::Unet) {
            let names = unet.names();
            let table = LdmUnetNames::of(&names);
            let rename = |name: &str| Some((format!("{LDM_UNET}{}", table.name(name)?), false));
            layout.rename(ComponentKind::Unet, unet, &names, &rename);
        }
        if let Some(vae) = self.component(ComponentKind::Vae) {
            let names = vae.names();
            let last = last_vae_level(&names);
            let rename = |name: &str| {
                let (name, is_conv) = ldm_vae_name(name, last)?;
                Some((format!("{LDM_VAE}{name}"), is_conv))
            };
            layout.rename(ComponentKind::Vae, vae, &names, &rename);
        }
        if let Some(text) = self.component(ComponentKind::TextEncoder) {
            let kind = ComponentKind::TextEncoder;
            match self.family {
                Family::Sd2 => layout.add_open_clip(kind, text, OPEN_CLIP, true),
                Family::Sd1 | Family::Sdxl => {
                    let prefix = if self.family == Family::Sd1 { TEXT_SD1 } else { LDM_TEXT_1 };
                    let rename = |name: &str| Some((format!("{prefix}{name}"), false));
                    layout.rename(kind, text, &text.names(), &rename);
                }
            }
        }
        if let Some(text) = self.component(ComponentKind::TextEncoder2) {
            layout.add_open_clip(ComponentKind::TextEncoder2, text, LDM_TEXT_2, false);
        }
        layout
    }

    /// Keys that belong to no component, by file: averaged weights, buffers, what is unknown.
    pub fn outside_components(&self) -> Vec<(usize, &str)> {
        let mut used: Vec<std::collections::HashSet<&str>> =
            vec![Default::default(); self.files.len()];
        for (kind, component) in &self.components {
            for (index, stored) in self.files.iter().enumerate() {
                if stored.component.is_none_or(|component| component == *kind) {
                    used[index].extend(component.slots().map(|(_, key, _)| key));
                }
            }
        }
        let files = self.files.iter().zip(&used).enumerate();
        let keys = files.flat_map(|(index, (stored, used))| {
            let keys = stored.file.names().into_iter().filter(|key| !used.contains(key));
            keys.map(move |key| (index, key)).collect::<Vec<_>>()
        });
        keys.collect()
    }
}

impl LdmLayout {
    /// Adds tensors that are only renamed, matrices of the VAE made 1x1 convolutions.
    fn rename(
        &mut self,
        kind: ComponentKind,
        component: &Component,
        names: &[String],
        rename: &dyn Fn(&str) -> Option<(String, bool)>,
    ) {
        for name in names {
            let found = rename(name).zip(component.shape(name)).zip(component.dtype(name));
            let Some((((key, is_conv), mut shape), dtype)) = found else {
                self.left_out.push(format!("{}/{name}", kind.folder()));
                continue;
            };
            if is_conv && shape.len() == 2 {
                shape.extend([1, 1]);
            }
            self.add(key, dtype, shape, Source::Parts(kind, vec![name.clone()]));
        }
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, source: Source) {
        self.tensors.push(LdmTensor { spec: TensorSpec { name, dtype, shape }, source });
    }

    /// Adds a text encoder under OpenCLIP's names; `complete` makes up what SD2 leaves out.
    fn add_open_clip(
        &mut self,
        kind: ComponentKind,
        component: &Component,
        prefix: &str,
        complete: bool,
    ) {
        const LAYERS: &str = "transformer.resblocks.";
        let (tensors, left) = open_clip_tensors(&component.names());
        self.left_out.extend(left.iter().map(|name| format!("{}/{name}", kind.folder())));
        let layer_of = |name: &str| -> Option<usize> {
            name.strip_prefix(LAYERS)?.split_once('.')?.0.parse().ok()
        };
        let last = tensors.iter().filter_map(|tensor| layer_of(&tensor.name)).max();
        for tensor in &tensors {
            let repeats = complete && last.is_some() && layer_of(&tensor.name) == last;
            if let (true, Some(last)) = (repeats, last) {
                let rest = tensor.name.splitn(4, '.').nth(3).unwrap_or_default();
                let name = format!("{LAYERS}{}.{rest}", last + 1);
                let copy = OpenClipTensor { name, ..tensor.clone() };
                self.add_open_clip_tensor(kind, component, prefix, &copy);
            }
            self.add_open_clip_tensor(kind, component, prefix, tensor);
        }
        let norm = "text_model.final_layer_norm.weight";
        let known = component.shape(norm).zip(component.dtype(norm));
        if let (true, Some(last), Some((shape, dtype))) = (complete, last, known) {
            let width = shape.first().copied().unwrap_or_default();
            let projection = format!("{prefix}text_projection");
            self.add(projection, dtype, vec![width, width], Source::Ones);
            self.add(format!("{prefix}logit_scale"), dtype, Vec::new(), Source::Ones);
            self.notes.push(format!(
                "layer {} of the text encoder repeats layer {last}, `text_projection` and \
                 `logit_scale` are ones: a folder of {} has none of them, and none is used",
                last + 1,
                Family::Sd2.title(),
            ));
        }
    }

    fn add_open_clip_tensor(
        &mut self,
        kind: ComponentKind,
        component: &Component,
        prefix: &str,
        tensor: &OpenClipTensor,
    ) {
        let first = &tensor.parts[0];
        let Some((mut shape, dtype)) = component.shape(first).zip(component.dtype(first)) else {
            return;
        };
        let joins = tensor.parts.iter().all(|part| component.shape(part).as_ref() == Some(&shape));
        if !joins || shape.is_empty() || tensor.transposed && shape.len() != 2 {
            let parts = tensor.parts.iter();
            self.left_out.extend(parts.map(|part| format!("{}/{part}", kind.folder())));
            return;
        }
        let source = if tensor.transposed {
            shape.reverse();
            Source::Transposed(kind, first.clone())
        } else {
            shape[0] *= tensor.parts.len();
            Source::Parts(kind, tensor.parts.clone())
        };
        self.add(format!("{prefix}{}", tensor.name), dtype, shape, source);
    }
}
