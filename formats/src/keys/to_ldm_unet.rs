//! Diffusers' names of a U-Net under those of the LDM layout: the inverse of `ldm_unet`.
//!
//! The LDM layout counts blocks through all levels, so where a level begins follows from the
//! levels before it: their blocks and samplers are counted in the names given.

use std::collections::BTreeMap;

use super::ldm_unet::{OUTER, RESNET};
use super::split_index;

/// Where one level of `down_blocks` or `up_blocks` lies in the LDM layout.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    /// Index of its first block in `input_blocks` or `output_blocks`.
    first: usize,
    resnets: usize,
    attentions: usize,
    has_sampler: bool,
}

/// Translates the names of one U-Net.
#[derive(Clone, Debug)]
pub(crate) struct LdmUnetNames {
    down: Vec<Level>,
    up: Vec<Level>,
    middle_has_attention: bool,
}

impl LdmUnetNames {
    /// For the U-Net whose tensors have these names in diffusers' layout.
    pub fn of(names: &[String]) -> Self {
        let mut down = levels(names, "down_blocks.");
        // `conv_in` is block 0, a downsampler is a block of its own.
        place(&mut down, 1, |level| level.resnets + usize::from(level.has_sampler));
        let mut up = levels(names, "up_blocks.");
        place(&mut up, 0, |level| level.resnets);
        let middle_has_attention =
            names.iter().any(|name| name.starts_with("mid_block.attentions."));
        Self { down, up, middle_has_attention }
    }

    /// The LDM name (without the prefix of single files) of a tensor or module; `None` for a name
    /// that no U-Net of this kind has.
    pub fn name(&self, diffusers: &str) -> Option<String> {
        // The way here, the first convolution is told by its place.
        for (to, from) in OUTER.into_iter().chain([("input_blocks.0.0.", "conv_in.")]) {
            if let Some(rest) = diffusers.strip_prefix(from) {
                return Some(format!("{to}{rest}"));
            }
        }
        if let Some(rest) = diffusers.strip_prefix("mid_block.") {
            return self.middle(rest);
        }
        if let Some(rest) = diffusers.strip_prefix("down_blocks.") {
            return in_level(&self.down, rest, "input_blocks");
        }
        in_level(&self.up, diffusers.strip_prefix("up_blocks.")?, "output_blocks")
    }

    fn middle(&self, rest: &str) -> Option<String> {
        let (what, rest) = rest.split_once('.')?;
        let (index, rest) = split_index(rest)?;
        match what {
            "attentions" => Some(format!("middle_block.{}.{rest}", 2 * index + 1)),
            "resnets" => {
                let step = if self.middle_has_attention { 2 } else { 1 };
                Some(format!("middle_block.{}.{}", step * index, resnet(rest)?))
            }
            _ => None,
        }
    }
}

/// Counts blocks and samplers of each level.
fn levels(names: &[String], side: &str) -> Vec<Level> {
    let mut levels: BTreeMap<usize, Level> = BTreeMap::new();
    let parts = names.iter().filter_map(|name| {
        let (level, rest) = split_index(name.strip_prefix(side)?)?;
        let (what, rest) = rest.split_once('.')?;
        Some((level, what, split_index(rest)?.0))
    });
    for (index, what, block) in parts {
        let level = levels.entry(index).or_default();
        match what {
            "resnets" => level.resnets = level.resnets.max(block + 1),
            "attentions" => level.attentions = level.attentions.max(block + 1),
            "downsamplers" | "upsamplers" => level.has_sampler = true,
            _ => {}
        }
    }
    // A number that is left out (which no U-Net does) would count as a level without blocks.
    let count = levels.keys().next_back().map_or(0, |last| (last + 1).min(1 + levels.len()));
    (0..count).map(|index| levels.get(&index).copied().unwrap_or_default()).collect()
}

fn place(levels: &mut [Level], first: usize, blocks: impl Fn(&Level) -> usize) {
    let mut next = first;
    for level in levels {
        level.first = next;
        next += blocks(level);
    }
}

fn in_level(levels: &[Level], rest: &str, side: &str) -> Option<String> {
    let (level, rest) = split_index(rest)?;
    let level = levels.get(level)?;
    let (what, rest) = rest.split_once('.')?;
    let (index, rest) = split_index(rest)?;
    match what {
        "resnets" => Some(format!("{side}.{}.0.{}", level.first + index, resnet(rest)?)),
        "attentions" => Some(format!("{side}.{}.1.{rest}", level.first + index)),
        "downsamplers" => {
            let rest = rest.strip_prefix("conv.")?;
            Some(format!("{side}.{}.0.op.{rest}", level.first + level.resnets))
        }
        "upsamplers" => {
            // The last module of the level's last block.
            let block = (level.first + level.resnets).checked_sub(1)?;
            let module = 1 + usize::from(level.attentions > 0);
            Some(format!("{side}.{block}.{module}.{rest}"))
        }
        _ => None,
    }
}

fn resnet(rest: &str) -> Option<String> {
    RESNET.iter().find_map(|(to, from)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
}
