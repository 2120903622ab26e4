//! LoRA networks: which layers get one, their parameters, and their form in files.
//!
//! The way: [`unet_targets`] and [`text_encoder_targets`] list the layers of a base model from its
//! shapes; [`LoraNetwork::new`] picks modules and ranks; [`LoraNetwork::initial_values`] and
//! [`LoraNetwork::load_values`] give numbers; [`LoraNetwork::parameters`] lays them out for the
//! tape; [`LoraNetwork::install`] puts adapters into the models; [`LoraNetwork::export`] writes
//! sd-scripts' tensors. Another kind of adapter is a file beside `low_rank.rs` and a line in
//! [`Algorithm`].

mod load;
mod low_rank;
mod network;
mod rank;
mod target;
#[cfg(test)]
mod tests;

pub use load::LoadReport;
pub use network::{LoraModule, LoraNetwork, ParamGroup};
pub use rank::{FileRanks, Rank, RankRule, UniformRanks};
pub use target::{LayerKind, Part, Target, text_encoder_targets, unet_targets};

use engine::{Adapter, ParamId};

/// Kinds of adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// LoRA of sd-scripts' `networks.lora`: LierLa, and C3Lier with ranks for 3x3 convolutions.
    #[default]
    LowRank,
}

impl Algorithm {
    /// The tensors of a module, in the order of sd-scripts' parameters.
    fn tensors(self, target: &Target, dim: usize) -> Vec<TensorPlan> {
        match self {
            Algorithm::LowRank => low_rank::tensors(target, dim),
        }
    }

    /// What a layer is given; `first` is the first of the module's parameters.
    fn adapter(self, first: ParamId, scale: f32) -> Adapter {
        match self {
            Algorithm::LowRank => low_rank::adapter(first, scale),
        }
    }
}

/// How a tensor of a new module is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Init {
    /// All zeros.
    Zeros,
    /// Uniform within plus and minus this bound.
    Uniform(f32),
}

/// One tensor of a module: its place in files and in the engine.
#[derive(Clone, Debug, PartialEq)]
struct TensorPlan {
    /// Key in a file, behind the module's name and a dot.
    suffix: &'static str,
    /// Shape for the engine (OHWI).
    shape: Vec<usize>,
    /// Shape in files (OIHW).
    file_shape: Vec<usize>,
    init: Init,
}

impl TensorPlan {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Channels and pixels of a kernel in files, both 1 where the order is the same.
    fn kernel(&self) -> (usize, usize) {
        match *self.file_shape {
            [_, input, height, width] => (input, height * width),
            _ => (1, 1),
        }
    }

    /// From the order of files to the engine's.
    fn engine_order(&self, data: Vec<f32>) -> Vec<f32> {
        match self.kernel() {
            (_, 1) => data,
            (channels, pixels) => crate::reader::inner_axis_last(&data, channels, pixels),
        }
    }

    /// From the engine's order to that of files.
    fn file_order(&self, data: &[f32]) -> Vec<f32> {
        match self.kernel() {
            (_, 1) => data.to_vec(),
            (channels, pixels) => crate::reader::inner_axis_second(data, channels, pixels),
        }
    }
}
