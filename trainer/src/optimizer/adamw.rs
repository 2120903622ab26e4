//! AdamW (Loshchilov & Hutter, arXiv:1711.05101) in PyTorch's order of operations.

use anyhow::Result;
use engine::backend::AdamWStep;
use engine::{DType, ParamStore, Tensor};

use super::Stretch;

/// Settings of AdamW; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW with its moments, two numbers per parameter.
pub struct AdamW {
    settings: AdamWSettings,
    step: u32,
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// Moments of zero.
    pub fn new(settings: AdamWSettings, params: &ParamStore) -> Result<Self> {
        let zeros = || Tensor::zeros(params.device(), &[params.len()], DType::F32);
        Ok(Self { settings, step: 0, first: zeros()?, second: zeros()? })
    }

    /// One step over the stretches.
    pub fn step(
        &mut self,
        params: &mut ParamStore,
        gradient: &[f32],
        stretches: &[Stretch],
    ) -> Result<()> {
        self.step += 1;
        let backend = params.device().backend();
        for stretch in stretches {
            let step = AdamWStep {
                range: stretch.range.clone(),
                lr: stretch.lr,
                beta1: self.settings.betas.0,
                beta2: self.settings.betas.1,
                eps: self.settings.eps as f32,
                weight_decay: self.settings.weight_decay as f32,
                step: self.step,
            };
            let moments = (&mut self.first, &mut self.second);
            backend.adamw(&step, params.flat_mut(), gradient, moments)?;
        }
        Ok(())
    }
}
