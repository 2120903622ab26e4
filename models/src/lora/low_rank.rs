//! LoRA proper: `up·down` of rank `dim`, `up` a 1x1 window (Hu et al., arXiv:2106.09685).

use engine::{Adapter, Dropouts, LowRankAdapter, ParamId};

use super::target::{LayerKind, Target};
use super::{Init, TensorPlan};

/// `lora_down`, filled as PyTorch fills a layer (kaiming uniform with a = √5), and `lora_up`, zeros.
pub(super) fn tensors(target: &Target, dim: usize) -> Vec<TensorPlan> {
    let (out, input) = (target.out, target.input);
    let (down, down_file, up_file, fan_in) = match target.kind {
        LayerKind::Linear => (vec![dim, input], vec![dim, input], vec![out, dim], input),
        LayerKind::Conv { kernel: (height, width) } => {
            let pointwise = height * width == 1;
            let engine = if pointwise { vec![dim, input] } else { vec![dim, height, width, input] };
            let fan_in = input * height * width;
            (engine, vec![dim, input, height, width], vec![out, dim, 1, 1], fan_in)
        }
    };
    let bound = 1. / (fan_in.max(1) as f32).sqrt();
    vec![
        TensorPlan::whole("lora_down.weight", down, down_file, Init::Uniform(bound)),
        TensorPlan::whole("lora_up.weight", vec![out, dim], up_file, Init::Zeros),
    ]
}

pub(super) fn adapter(first: ParamId, scale: f32, dropouts: Dropouts, module: u64) -> Adapter {
    let up = ParamId(first.0 + 1);
    Adapter::LowRank(LowRankAdapter { down: first, up, scale, dropouts, module })
}
