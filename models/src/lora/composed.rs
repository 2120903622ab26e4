//! Networks that compose the weights of their layers: LoHa, LoKr, and LoRA with a Tucker core or
//! trained magnitudes (DoRA).
//!
//! Names, shapes, ranks and first values are those of LyCORIS 4.1 (`lycoris/modules`), so that files
//! are the same key for key. Each kind describes a module once: its tensors in files and the engine's
//! form of its update come from one function.

use engine::{Adapter, ComposedAdapter, Dropouts, Factor, ParamId, Update};

use super::lokr::Split;
use super::network::LoraModule;
use super::rank::Rank;
use super::target::{LayerKind, Target};
use super::{Init, TensorPlan, dora, loha, lokr, low_rank, name_key};

/// How a module's update is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `up·down`.
    LowRank,
    /// Two low-rank products, multiplied element by element (LoHa).
    Hadamard,
    /// A small matrix each of whose elements multiplies a larger one (LoKr).
    Kronecker(Split),
}

/// A network that composes weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Composition {
    /// Its update.
    pub form: Form,
    /// 3x3 convolutions get a Tucker core (`use_tucker`).
    pub tucker: bool,
    /// The lengths of the weight's rows are trained beside it (`dora_wd`).
    pub magnitude: bool,
}

/// Sizes of a layer's weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub out: usize,
    pub input: usize,
    pub kernel: (usize, usize),
    /// Whether files have it with a kernel.
    pub conv: bool,
}

impl Sizes {
    pub fn new(target: &Target) -> Self {
        let (kernel, conv) = match target.kind {
            LayerKind::Linear => ((1, 1), false),
            LayerKind::Conv { kernel } => (kernel, true),
        };
        Self { out: target.out, input: target.input, kernel, conv }
    }

    /// Pixels of the kernel.
    pub fn window(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    /// `[rows, columns]` and, for a convolution, its kernel, as in files.
    pub fn file_shape(&self, rows: usize, columns: usize) -> Vec<usize> {
        match self.conv {
            true => vec![rows, columns, self.kernel.0, self.kernel.1],
            false => vec![rows, columns],
        }
    }
}

/// The tensors of a module as they are listed; they become parameters in this order.
pub(super) struct Parts {
    first: usize,
    tensors: Vec<TensorPlan>,
}

impl Parts {
    pub fn add(&mut self, plan: TensorPlan) -> ParamId {
        self.tensors.push(plan);
        ParamId(self.first + self.tensors.len() - 1)
    }

    /// A matrix that is the same in files and in the engine.
    pub fn matrix(&mut self, suffix: &'static str, shape: [usize; 2], init: Init) -> ParamId {
        self.add(TensorPlan::whole(suffix, shape.to_vec(), shape.to_vec(), init))
    }

    /// `[rank, columns·window]` in files, the window innermost.
    pub fn flattened(
        &mut self,
        suffix: &'static str,
        (rank, columns): (usize, usize),
        window: usize,
        init: Init,
    ) -> ParamId {
        let shape = vec![rank, columns * window];
        self.add(TensorPlan { window, ..TensorPlan::whole(suffix, shape.clone(), shape, init) })
    }

    /// A Tucker core `[rank, rank, kh, kw]`.
    pub fn core(&mut self, suffix: &'static str, rank: usize, sizes: Sizes, init: Init) -> ParamId {
        let (height, width) = sizes.kernel;
        let shape = vec![rank, height, width, rank];
        self.add(TensorPlan::whole(suffix, shape, vec![rank, rank, height, width], init))
    }
}

/// Kaiming's uniform distribution with a = √5, of a tensor whose outputs see `fan_in` inputs.
pub(super) fn kaiming(fan_in: usize) -> Init {
    Init::Uniform(1. / (fan_in.max(1) as f32).sqrt())
}

impl Composition {
    fn list(self, target: &Target, dim: usize, first: usize) -> (Parts, Update, Option<ParamId>) {
        let sizes = Sizes::new(target);
        let tucker = self.tucker && sizes.window() > 1;
        let mut parts = Parts { first, tensors: Vec::new() };
        let update = match self.form {
            Form::LowRank if tucker => low_rank_with_core(&mut parts, sizes, dim),
            Form::LowRank => {
                let mut ids =
                    low_rank::tensors(target, dim).into_iter().map(|plan| parts.add(plan));
                let right = ids.next().unwrap_or(ParamId(first));
                let left = ids.next().unwrap_or(right);
                Update::Plain(Factor::Product { left, right })
            }
            Form::Hadamard => loha::list(&mut parts, sizes, dim, tucker),
            Form::Kronecker(split) => lokr::list(&mut parts, sizes, dim, tucker, split),
        };
        let magnitude = self.magnitude.then(|| parts.add(dora::tensor(sizes)));
        (parts, update, magnitude)
    }

    /// The tensors of a module.
    pub(super) fn tensors(self, target: &Target, dim: usize) -> Vec<TensorPlan> {
        self.list(target, dim, 0).0.tensors
    }

    /// What a layer is given.
    pub(super) fn adapter(
        self,
        module: &LoraModule,
        multiplier: f32,
        dropouts: Dropouts,
    ) -> Adapter {
        let LoraModule { target, rank, first, .. } = module;
        let (window, key) = (Sizes::new(target).window(), name_key(&target.name));
        if self.form == Form::LowRank && !self.magnitude && !(self.tucker && window > 1) {
            // Nothing to compose: the layer adds it to its own product.
            return low_rank::adapter(ParamId(*first), rank.scale() * multiplier, dropouts, key);
        }
        let (_, update, magnitude) = self.list(target, rank.dim, *first);
        let magnitude = magnitude.map(|rows| engine::Magnitude { rows, multiplier });
        // With magnitudes the multiplier moves the lengths, not the update.
        let scale = if magnitude.is_some() { rank.scale() } else { rank.scale() * multiplier };
        Adapter::Composed(ComposedAdapter { update, scale, magnitude, dropouts, module: key })
    }

    /// The rank that holds: a Kronecker product of two whole matrices is not scaled.
    pub(super) fn settle(self, target: &Target, rank: Rank) -> Rank {
        match self.form {
            Form::Kronecker(split) if lokr::is_whole(Sizes::new(target), rank.dim, split) => {
                Rank::new(rank.dim, 0.)
            }
            _ => rank,
        }
    }
}

/// LyCORIS' LoCon with `use_tucker`: `down` and `up` are 1x1, the window is in the core.
fn low_rank_with_core(parts: &mut Parts, sizes: Sizes, dim: usize) -> Update {
    let (input, out) = (sizes.input, sizes.out);
    let mut pointwise = |suffix, shape: [usize; 2], init| {
        let file = vec![shape[0], shape[1], 1, 1];
        parts.add(TensorPlan::whole(suffix, shape.to_vec(), file, init))
    };
    let right = pointwise("lora_down.weight", [dim, input], kaiming(input));
    let left = pointwise("lora_up.weight", [out, dim], Init::Zeros);
    let core = parts.core("lora_mid.weight", dim, sizes, kaiming(dim * sizes.window()));
    Update::Plain(Factor::Tucker { core, left, right, left_by_rows: true })
}

#[cfg(test)]
mod tests;
