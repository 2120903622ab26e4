//! Keeps the update of each module within a norm (`scale_weight_norms`).

use engine::backend::Gemm;
use engine::{ParamId, ParamStore, Tensor};

use super::network::{LoraModule, LoraNetwork};
use crate::Result;

/// What [`LoraNetwork::limit_norms`] found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormReport {
    /// Modules that were scaled down.
    pub scaled: usize,
    /// Mean of the norms afterwards.
    pub mean: f64,
    /// The largest norm afterwards.
    pub max: f64,
}

impl LoraModule {
    /// `lora_down` and `lora_up`, of a module that has them whole.
    fn halves(&self) -> Option<(ParamId, ParamId)> {
        let find = |suffix: &str| {
            let half = self.parts().find(|(plan, _)| plan.suffix == suffix && plan.parts == 1);
            half.map(|(_, ids)| ParamId(ids.start))
        };
        Some((find("lora_down.weight")?, find("lora_up.weight")?))
    }
}

impl LoraNetwork {
    /// Scales modules whose update `alpha/dim · up·down` has a Frobenius norm above `limit` down to
    /// it, both halves by the root of the ratio. Modules of other kinds stay as they are.
    ///
    /// The same numbers on every rank: nothing here depends on how the work is shared.
    pub fn limit_norms(&self, params: &mut ParamStore, limit: f64) -> Result<NormReport> {
        let mut report = NormReport::default();
        let (mut sum, mut count, mut ratios) = (0., 0_usize, Vec::new());
        for module in &self.modules {
            let Some((down, up)) = module.halves() else { continue };
            let norm = f64::from(module.rank.scale())
                * product_norm(&params.tensor(up)?, &params.tensor(down)?)?;
            // As the reference, which keeps the divisor away from 0: a smaller norm has the ratio 1.
            let ratio = if norm > limit { limit / norm } else { 1. };
            if ratio != 1. {
                report.scaled += 1;
                ratios.push((params.range(down), params.range(up), ratio.sqrt() as f32));
            }
            sum += norm * ratio;
            count += 1;
            report.max = report.max.max(norm * ratio);
        }
        if !ratios.is_empty() {
            params.update(|flat| {
                for (down, up, factor) in ratios {
                    flat[down].iter_mut().for_each(|x| *x *= factor);
                    flat[up].iter_mut().for_each(|x| *x *= factor);
                }
            })?;
        }
        report.mean = sum / count.max(1) as f64;
        Ok(report)
    }
}

/// Frobenius norm of `up[out,r] · down[r,...]` without the product: its square is the sum of
/// `(upᵀup) ⊙ (down·downᵀ)`, two matrices of the rank's size.
fn product_norm(up: &Tensor, down: &Tensor) -> Result<f64> {
    let rank = up.last_dim().max(1);
    let down = down.reshape(&[rank, down.len() / rank])?;
    let backend = up.device().backend();
    let of_up = backend.gemm(&Gemm::new(up, true, up, false))?.to_vec_f32()?;
    let of_down = backend.gemm(&Gemm::new(&down, false, &down, true))?.to_vec_f32()?;
    let square: f64 = of_up.iter().zip(&of_down).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    Ok(square.max(0.).sqrt())
}
