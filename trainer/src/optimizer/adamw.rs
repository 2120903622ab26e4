//! AdamW (Loshchilov & Hutter, arXiv:1711.05101) in PyTorch's order of operations, by the engine's
//! own kernel.

use anyhow::Result;
use engine::backend::AdamWStep;
use engine::cuda::flat::{AdamWRule, Moments};
use engine::{DType, Device, ParamStore, Tensor};

use super::adam::AdamSettings;
use super::on_card::CardAdamW;
use super::settings::settings;
use super::state::{Reader, Writer};
use super::{Build, Optimize, OptimizerState, Recipe, StepInput, TensorForm};

settings! {
    /// Settings of AdamW; the defaults are PyTorch's.
    AdamWSettings {
        /// Decay rates of the first and second moment.
        betas: (f64, f64) = (0.9, 0.999), Share;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, NotNegative;
        /// Decoupled weight decay.
        weight_decay: f64 = 0.01, NotNegative;
        /// Divide by the largest second moment so far.
        amsgrad: bool = false, Any;
        /// Climb instead of descend.
        maximize: bool = false, Any;
    }
    // The last three are bitsandbytes' `PagedAdamW`.
    idle: [
        "foreach", "capturable", "differentiable", "fused", "optim_bits", "args", "min_8bit_size",
    ]
}

impl Recipe for AdamWSettings {
    fn build(&self, build: &Build) -> Result<Box<dyn Optimize>> {
        let plain = !self.amsgrad && !self.maximize;
        if plain && build.params.device().card().is_some() {
            let Self { betas, eps, weight_decay, .. } = *self;
            let rule = AdamWRule { betas, eps, weight_decay, moments: Moments::Full };
            return Ok(Box::new(CardAdamW::new(rule, build)?));
        }
        if plain {
            return Ok(Box::new(AdamW::new(*self, build.params, build.forms)?));
        }
        let adam = AdamSettings {
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
            amsgrad: self.amsgrad,
            maximize: self.maximize,
            decoupled_weight_decay: true,
        };
        adam.build(build)
    }

    fn state_bytes(&self) -> f64 {
        if self.amsgrad { 12. } else { 8. }
    }
}

/// AdamW with its moments, two numbers per parameter.
struct AdamW {
    settings: AdamWSettings,
    forms: Vec<TensorForm>,
    device: Device,
    /// Steps that each tensor has taken: PyTorch counts them one by one, since a tensor without
    /// a gradient takes none.
    steps: Vec<u32>,
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// Moments of zero.
    fn new(settings: AdamWSettings, params: &ParamStore, forms: &[TensorForm]) -> Result<Self> {
        let zeros = || Tensor::zeros(params.device(), &[params.len()], DType::F32);
        Ok(Self {
            settings,
            forms: forms.to_vec(),
            device: params.device(),
            steps: vec![0; forms.len()],
            first: zeros()?,
            second: zeros()?,
        })
    }

    /// Neighbours with one learning rate and one number of steps go through the kernel together.
    fn stretches(&mut self, input: &StepInput) -> Vec<AdamWStep> {
        let mut stretches: Vec<AdamWStep> = Vec::new();
        for tensor in input.tensors {
            let count = &mut self.steps[tensor.id.0];
            *count += 1;
            match stretches.last_mut() {
                Some(last)
                    if last.range.end == tensor.range.start
                        && last.lr == tensor.lr
                        && last.step == *count =>
                {
                    last.range.end = tensor.range.end;
                }
                _ => stretches.push(AdamWStep {
                    range: tensor.range.clone(),
                    lr: tensor.lr,
                    beta1: self.settings.betas.0,
                    beta2: self.settings.betas.1,
                    eps: self.settings.eps as f32,
                    weight_decay: self.settings.weight_decay as f32,
                    step: *count,
                }),
            }
        }
        stretches
    }
}

impl Optimize for AdamW {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let backend = params.device().backend();
        let len = input.gradient.len();
        let gradient = Tensor::from_f32(self.device, &[len], input.gradient, DType::F32)?;
        for stretch in self.stretches(input) {
            let moments = (&mut self.first, &mut self.second);
            backend.adamw(&stretch, params.flat_mut(), &gradient, moments)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        let (first, second) = (self.first.to_vec_f32()?, self.second.to_vec_f32()?);
        let mut writer = Writer::default();
        let mut start = 0;
        for (form, count) in self.forms.iter().zip(&self.steps) {
            let range = start..start + form.len();
            writer.number("step", &form.name, f64::from(*count));
            writer.values("exp_avg", &form.name, &first[range.clone()])?;
            writer.values("exp_avg_sq", &form.name, &second[range])?;
            start += form.len();
        }
        Ok(writer.finish())
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let mut reader = Reader::new("AdamW", state);
        let (mut steps, mut first, mut second) = (Vec::new(), Vec::new(), Vec::new());
        for form in &self.forms {
            steps.push(reader.count("step", &form.name)?);
            first.extend(reader.values("exp_avg", &form.name, form.len())?);
            second.extend(reader.values("exp_avg_sq", &form.name, form.len())?);
        }
        reader.finish()?;
        let tensor = |data: &[f32]| Tensor::from_f32(self.device, &[data.len()], data, DType::F32);
        (self.first, self.second, self.steps) = (tensor(&first)?, tensor(&second)?, steps);
        Ok(())
    }
}
