//! DyLoRA: a LoRA whose ranks are trained `unit` at a time (Valipour et al., arXiv:2210.07558). Its
//! files are those of a LoRA.
//!
//! Each unit is a parameter of its own, so that an optimizer leaves those alone that a step did not
//! reach, their moments and step counts too: as sd-scripts, which makes a parameter of every rank.

use engine::{Adapter, NestedAdapter, ParamId};

use super::target::Target;
use super::{TensorPlan, low_rank};

/// The tensors of a LoRA, cut into units; `up` is kept transposed, so that units are rows.
pub(super) fn tensors(target: &Target, dim: usize, unit: usize) -> Vec<TensorPlan> {
    let mut tensors = low_rank::tensors(target, dim);
    for plan in &mut tensors {
        plan.parts = dim / unit.max(1);
        if plan.suffix == "lora_up.weight" {
            plan.shape.reverse();
            plan.transposed = true;
        }
    }
    tensors
}

pub(super) fn adapter(first: ParamId, blocks: usize, scale: f32, module: u64) -> Adapter {
    let up = ParamId(first.0 + blocks);
    Adapter::Nested(NestedAdapter { down: first, up, blocks, scale, module })
}
