//! The U-Net of single-file checkpoints (`model.diffusion_model.`) under diffusers' names.
//!
//! The LDM layout numbers blocks through all levels: each entry of `input_blocks` and
//! `output_blocks` is a list of modules. What a module is shows in its keys, and a level ends at
//! its down- or upsampler, so the table needs no size.

use std::collections::BTreeMap;

use super::{KeyMap, Part, split_index, under};
use crate::tensor_file::TensorFile;

/// LDM and diffusers' names of the parts outside the blocks.
pub(super) const OUTER: [(&str, &str); 6] = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];

/// LDM and diffusers' names of what a resnet holds.
pub(super) const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// What a module of a block is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Resnet,
    Attention,
    /// `op`: strided convolution.
    Down,
    /// `conv` after nearest-neighbour upsampling.
    Up,
    /// The first convolution.
    Plain,
}

/// (block, module) -> (key, rest of the name) of its tensors.
type Modules<'f> = BTreeMap<(usize, usize), Vec<(&'f str, &'f str)>>;

/// The table for the U-Net whose keys start with `prefix`.
pub(crate) fn map_ldm_unet(file: &dyn TensorFile, prefix: &str) -> KeyMap {
    let mut map = KeyMap::default();
    let mut input = Modules::new();
    let mut output = Modules::new();
    let mut middle: BTreeMap<usize, Vec<(&str, &str)>> = BTreeMap::new();
    for (key, rest) in under(file, prefix) {
        if let Some(name) = outer_name(rest) {
            map.insert(name, key, Part::Whole);
        } else if let Some((block, module, rest)) = indices(rest, "input_blocks.") {
            input.entry((block, module)).or_default().push((key, rest));
        } else if let Some((block, module, rest)) = indices(rest, "output_blocks.") {
            output.entry((block, module)).or_default().push((key, rest));
        } else if let Some((module, rest)) =
            rest.strip_prefix("middle_block.").and_then(split_index)
        {
            middle.entry(module).or_default().push((key, rest));
        } else {
            map.ignored.push(key.to_owned());
        }
    }
    map_levels(&mut map, &input, "down_blocks", "downsamplers.0.");
    map_levels(&mut map, &output, "up_blocks", "upsamplers.0.");
    map_middle(&mut map, &middle);
    map
}

/// Parts outside the blocks.
fn outer_name(rest: &str) -> Option<String> {
    OUTER.iter().find_map(|(from, to)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
}

fn indices<'f>(rest: &'f str, prefix: &str) -> Option<(usize, usize, &'f str)> {
    let (block, rest) = split_index(rest.strip_prefix(prefix)?)?;
    let (module, rest) = split_index(rest)?;
    Some((block, module, rest))
}

fn kind_of(tensors: &[(&str, &str)]) -> Kind {
    let has = |prefix: &str| tensors.iter().any(|(_, rest)| rest.starts_with(prefix));
    if has("in_layers.") {
        Kind::Resnet
    } else if has("transformer_blocks.") || has("proj_in.") {
        Kind::Attention
    } else if has("op.") {
        Kind::Down
    } else if has("conv.") {
        Kind::Up
    } else {
        Kind::Plain
    }
}

/// `side`: `down_blocks` or `up_blocks`; `sampler`: the name of what ends a level.
fn map_levels(map: &mut KeyMap, modules: &Modules<'_>, side: &str, sampler: &str) {
    let (mut level, mut index) = (0, 0);
    let mut blocks: BTreeMap<usize, Vec<&Vec<(&str, &str)>>> = BTreeMap::new();
    for ((block, _), tensors) in modules {
        blocks.entry(*block).or_default().push(tensors);
    }
    for (block, modules) in blocks {
        let kinds: Vec<Kind> = modules.iter().map(|tensors| kind_of(tensors)).collect();
        for (tensors, kind) in modules.iter().zip(&kinds) {
            let module = match kind {
                Kind::Resnet => format!("{side}.{level}.resnets.{index}."),
                Kind::Attention => format!("{side}.{level}.attentions.{index}."),
                Kind::Down | Kind::Up => format!("{side}.{level}.{sampler}"),
                Kind::Plain => "conv_in.".to_owned(),
            };
            map_module(map, tensors, *kind, &module);
        }
        let ends_level = kinds.iter().any(|kind| matches!(kind, Kind::Down | Kind::Up));
        if ends_level {
            (level, index) = (level + 1, 0);
        } else if block > 0 || !kinds.contains(&Kind::Plain) {
            index += 1;
        }
    }
}

fn map_middle(map: &mut KeyMap, middle: &BTreeMap<usize, Vec<(&str, &str)>>) {
    let (mut resnets, mut attentions) = (0, 0);
    for tensors in middle.values() {
        let kind = kind_of(tensors);
        let (count, name) = match kind {
            Kind::Attention => (&mut attentions, "attentions"),
            _ => (&mut resnets, "resnets"),
        };
        map_module(map, tensors, kind, &format!("mid_block.{name}.{count}."));
        *count += 1;
    }
}

fn map_module(map: &mut KeyMap, tensors: &[(&str, &str)], kind: Kind, module: &str) {
    for (key, rest) in tensors {
        let name = match kind {
            Kind::Resnet => resnet_name(rest),
            Kind::Down => rest.strip_prefix("op.").map(|rest| format!("conv.{rest}")),
            Kind::Attention | Kind::Up => Some((*rest).to_owned()),
            Kind::Plain => matches!(*rest, "weight" | "bias").then(|| (*rest).to_owned()),
        };
        match name {
            Some(name) => map.insert(format!("{module}{name}"), key, Part::Whole),
            None => map.ignored.push((*key).to_owned()),
        }
    }
}

fn resnet_name(rest: &str) -> Option<String> {
    RESNET.iter().find_map(|(from, to)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
}
