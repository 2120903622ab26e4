//! LoRA networks: which layers get one, their parameters, and their form in files.
//!
//! The way: [`unet_targets`] and [`text_encoder_targets`] list the layers of a base model from its
//! shapes; [`LoraNetwork::new`] picks modules and ranks; [`LoraNetwork::initial_values`] and
//! [`LoraNetwork::load_values`] give numbers; [`LoraNetwork::parameters`] lays them out for the
//! tape; [`LoraNetwork::groups`] says which parameters share a learning rate;
//! [`LoraNetwork::install`] puts adapters into the models; [`LoraNetwork::export`] writes
//! sd-scripts' tensors. Another kind of adapter is a file beside `low_rank.rs` and a line in
//! [`Algorithm`].

mod blocks;
mod change;
mod composed;
mod dora;
mod dylora;
mod groups;
mod load;
mod loha;
mod lokr;
mod low_rank;
mod lycoris;
mod merge;
mod network;
mod norms;
#[cfg(test)]
mod parts_tests;
mod rank;
mod stack;
mod target;
#[cfg(test)]
mod tests;

pub use blocks::{
    BlockLayout, BlockLrText, BlockRankText, BlockRanks, BlockRates, LR_CURVES, UniformRank,
};
pub use composed::{Composition, Form};
pub use groups::{LoraPlus, ParamGroup};
pub use load::LoadReport;
pub use lokr::Split;
pub use lycoris::{Preset, PresetRanks, outer_targets};
pub use merge::{BaseMerge, MergeReport, MergedWeights};
pub use network::{LoraModule, LoraNetwork};
pub use norms::NormReport;
pub use rank::{FileRanks, Rank, RankRule, RootRanks, UniformRanks};
pub use stack::{LoraStack, StackReport, StackedWeights};
pub use target::{
    LayerKind, Part, Target, sdxl_text_encoder_targets, text_encoder_targets, unet_targets,
};

use engine::{Adapter, Dropouts, ParamId};

/// Kinds of adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// LoRA of sd-scripts' `networks.lora`: LierLa, and C3Lier with ranks for 3x3 convolutions.
    #[default]
    LowRank,
    /// LoRA of sd-scripts' `networks.dylora`: `unit` ranks are trained at a time.
    DyLora {
        /// Divides the rank.
        unit: usize,
    },
    /// Networks of LyCORIS.
    Composed(Composition),
}

impl Algorithm {
    /// The tensors of a module, in the order of the reference's parameters.
    fn tensors(self, target: &Target, dim: usize) -> Vec<TensorPlan> {
        match self {
            Algorithm::LowRank => low_rank::tensors(target, dim),
            Algorithm::DyLora { unit } => dylora::tensors(target, dim, unit),
            Algorithm::Composed(composition) => composition.tensors(target, dim),
        }
    }

    /// What a layer is given.
    fn adapter(self, module: &LoraModule, multiplier: f32, dropouts: Dropouts) -> Adapter {
        let (first, key) = (ParamId(module.first), name_key(&module.target.name));
        let scale = module.rank.scale() * multiplier;
        match self {
            Algorithm::LowRank => low_rank::adapter(first, scale, dropouts, key),
            Algorithm::DyLora { .. } => dylora::adapter(first, module.tensors[0].parts, scale, key),
            Algorithm::Composed(composition) => composition.adapter(module, multiplier, dropouts),
        }
    }

    /// The rank and alpha that hold for a layer where these are asked for.
    fn settle(self, target: &Target, rank: Rank) -> Rank {
        match self {
            Algorithm::LowRank | Algorithm::DyLora { .. } => rank,
            Algorithm::Composed(composition) => composition.settle(target, rank),
        }
    }
}

/// A number for a name in files that no other program version changes (FNV-1a).
pub fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// How a tensor of a new module is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Init {
    /// All zeros.
    Zeros,
    /// Uniform within plus and minus this bound.
    Uniform(f32),
    /// Normal with this deviation.
    Normal(f32),
    /// The norms of the frozen weight's rows: [`LoraNetwork::set_magnitudes`].
    RowNorms,
}

/// One tensor of a module in files, and the parameters that hold it in the engine.
#[derive(Clone, Debug, PartialEq)]
struct TensorPlan {
    /// Key in a file, behind the module's name and a dot.
    suffix: &'static str,
    /// Shape for the engine (OHWI).
    shape: Vec<usize>,
    /// Shape in files (OIHW).
    file_shape: Vec<usize>,
    init: Init,
    /// Parameters that it is cut into along the first axis of `shape`, each trained on its own.
    parts: usize,
    /// The engine keeps `[n,m]` where files have `[m,n]`.
    transposed: bool,
    /// Pixels of a kernel that files flatten into the last axis, behind its channels; otherwise 1.
    window: usize,
}

impl TensorPlan {
    /// A tensor that is one parameter, in the order of files up to its kernel.
    fn whole(suffix: &'static str, shape: Vec<usize>, file_shape: Vec<usize>, init: Init) -> Self {
        Self { suffix, shape, file_shape, init, parts: 1, transposed: false, window: 1 }
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same for one of the parts.
    fn part(&self) -> Self {
        let cut = |shape: &[usize], axis: usize| {
            let mut shape = shape.to_vec();
            shape[axis] /= self.parts;
            shape
        };
        let file_shape = cut(&self.file_shape, usize::from(self.transposed));
        Self { shape: cut(&self.shape, 0), file_shape, parts: 1, ..self.clone() }
    }

    /// Values in the engine's order, one vector per part.
    fn cut(&self, values: Vec<f32>) -> Vec<Vec<f32>> {
        if self.parts == 1 {
            return vec![values];
        }
        values.chunks((values.len() / self.parts).max(1)).map(<[f32]>::to_vec).collect()
    }

    /// Channels and pixels of a kernel in files, both 1 where the order is the same.
    fn kernel(&self) -> (usize, usize) {
        match *self.file_shape {
            [_, input, height, width] => (input, height * width),
            [_, columns] => (columns / self.window, self.window),
            _ => (1, 1),
        }
    }

    /// From the order of files to the engine's.
    fn engine_order(&self, data: Vec<f32>) -> Vec<f32> {
        if self.transposed {
            let columns = self.shape[0];
            return crate::reader::inner_axis_last(&data, data.len() / columns.max(1), columns);
        }
        match self.kernel() {
            (_, 1) => data,
            (channels, pixels) => crate::reader::inner_axis_last(&data, channels, pixels),
        }
    }

    /// From the engine's order to that of files.
    fn file_order(&self, data: &[f32]) -> Vec<f32> {
        if self.transposed {
            let rows = self.shape[0];
            return crate::reader::inner_axis_last(data, rows, data.len() / rows.max(1));
        }
        match self.kernel() {
            (_, 1) => data.to_vec(),
            (channels, pixels) => crate::reader::inner_axis_second(data, channels, pixels),
        }
    }
}
