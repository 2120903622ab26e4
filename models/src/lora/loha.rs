//! LoHa: `(w1_a·w1_b) ∘ (w2_a·w2_b)`, two low-rank products multiplied element by element, of rank up
//! to the square of theirs (FedPara, arXiv:2108.06098).

use engine::{Factor, Update};

use super::Init;
use super::composed::{Parts, Sizes};

/// The tensors in LyCORIS' order; `w2_a` starts as zeros, so that the update is zero.
pub(super) fn list(parts: &mut Parts, sizes: Sizes, dim: usize, tucker: bool) -> Update {
    let mut half = |a: &'static str, a_init, b: &'static str, t: &'static str| {
        let wide = Init::Normal(1.);
        if tucker {
            let core = parts.core(t, dim, sizes, Init::Normal(0.1));
            let left = parts.matrix(a, [dim, sizes.out], a_init);
            let right = parts.matrix(b, [dim, sizes.input], wide);
            Factor::Tucker { core, left, right, left_by_rows: false }
        } else {
            let left = parts.matrix(a, [sizes.out, dim], a_init);
            let right = parts.flattened(b, (dim, sizes.input), sizes.window(), wide);
            Factor::Product { left, right }
        }
    };
    let first = half("hada_w1_a", Init::Normal(0.1), "hada_w1_b", "hada_t1");
    let second = half("hada_w2_a", Init::Zeros, "hada_w2_b", "hada_t2");
    Update::Hadamard(first, second)
}
