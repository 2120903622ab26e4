//! AdamW and AdamW8bit over the flat tensor of a card: the engine's one kernel for all tensors.
//!
//! The moments stay on the card. They are saved as the optimizers of the CPU save theirs, so that a
//! run can go on on the other device.

use anyhow::{Context, Result};
use engine::cuda::flat::{AdamWRule, FlatAdamW, FlatTensor, HostMoment, Moments};
use engine::{DType, Device, ParamId, ParamStore, Tensor};

use super::blockwise::{Moment, Signs};
use super::state::{Reader, Writer};
use super::tensors::Field;
use super::{Build, CardStep, Optimize, OptimizerState, StepInput, TensorForm, TensorStep};

/// Names of the two moments in a saved state.
const FULL_NAMES: [&str; 2] = ["exp_avg", "exp_avg_sq"];
const EIGHT_NAMES: [&str; 2] = ["state1", "state2"];

/// AdamW whose moments are on a card.
pub(super) struct CardAdamW {
    flat: FlatAdamW,
    device: Device,
    moments: Moments,
    forms: Vec<TensorForm>,
    /// Steps that each tensor has taken.
    steps: Vec<u32>,
}

impl CardAdamW {
    /// With fresh moments.
    pub(super) fn new(rule: AdamWRule, build: &Build) -> Result<Self> {
        let device = build.params.device();
        let tensors: Vec<FlatTensor> = build
            .forms
            .iter()
            .enumerate()
            .map(|(index, form)| {
                let (inner, window) = form.kernel();
                FlatTensor { range: build.params.range(ParamId(index)), inner, window }
            })
            .collect();
        Ok(Self {
            flat: FlatAdamW::new(device, &tensors, rule)?,
            device,
            moments: rule.moments,
            forms: build.forms.to_vec(),
            steps: vec![0; build.forms.len()],
        })
    }

    fn names(&self) -> [&'static str; 2] {
        match self.moments {
            Moments::Full => FULL_NAMES,
            Moments::Eight { .. } => EIGHT_NAMES,
        }
    }

    /// A moment of zeros, of the size and kind that the tensor's has.
    fn zeros(&self, form: &TensorForm, signs: Signs) -> Moment {
        match self.moments {
            Moments::Full => Moment::Full(vec![0.; form.len()]),
            Moments::Eight { min_size } => Moment::zeros(form.len(), signs, min_size),
        }
    }
}

/// Which tensors a step touches, as the kernel reads it.
fn flags(count: usize, tensors: &[TensorStep]) -> Vec<f32> {
    let mut touched = vec![0.; count];
    tensors.iter().for_each(|tensor| touched[tensor.id.0] = 1.);
    touched
}

impl CardStep for CardAdamW {
    fn prepare(&mut self, tensors: &[TensorStep]) -> Result<()> {
        let mut rates: Vec<(f32, u32)> = self.steps.iter().map(|step| (0., step + 1)).collect();
        tensors.iter().for_each(|tensor| rates[tensor.id.0].0 = tensor.lr);
        Ok(self.flat.set_step(&rates)?)
    }

    fn give(
        &mut self,
        params: &mut ParamStore,
        gradient: &Tensor,
        touched: &Tensor,
        clip: &Tensor,
    ) -> engine::Result<()> {
        self.flat.step(params.flat_mut(), gradient, touched, clip)
    }

    fn confirm(&mut self, touched: &[bool]) {
        let moved = self.steps.iter_mut().zip(touched).filter(|(_, touched)| **touched);
        moved.for_each(|(step, _)| *step += 1);
    }
}

impl Optimize for CardAdamW {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let tensor = |data: &[f32]| Tensor::from_f32(self.device, &[data.len()], data, DType::F32);
        let touched = flags(self.steps.len(), input.tensors);
        let (gradient, clip) = (tensor(input.gradient)?, tensor(&[1., 0.])?);
        let on_card = tensor(&touched)?;
        self.prepare(input.tensors)?;
        self.give(params, &gradient, &on_card, &clip)?;
        self.confirm(&touched.iter().map(|flag| *flag > 0.).collect::<Vec<_>>());
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        let mut writer = Writer::default();
        let moments = self.flat.moments().context("read the optimizer's state from the card")?;
        for ((form, count), pair) in self.forms.iter().zip(&self.steps).zip(moments) {
            writer.number("step", &form.name, f64::from(*count));
            let signs = [Signs::Both, Signs::Positive];
            for ((moment, name), signs) in [pair.0, pair.1].into_iter().zip(self.names()).zip(signs)
            {
                let moment = match moment {
                    HostMoment::Full(values) => Moment::Full(values),
                    HostMoment::Blocks { codes, scales } => Moment::Blocks { signs, codes, scales },
                };
                moment.save(name, &form.name, &mut writer)?;
            }
        }
        Ok(writer.finish())
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let name = match self.moments {
            Moments::Full => "AdamW",
            Moments::Eight { .. } => "AdamW8bit",
        };
        let mut reader = Reader::new(name, state);
        let (mut steps, mut pairs) = (Vec::new(), Vec::new());
        for form in &self.forms {
            steps.push(reader.count("step", &form.name)?);
            let mut load = |field: &str, signs: Signs| {
                let mut moment = self.zeros(form, signs);
                moment.load(field, &form.name, &mut reader)?;
                anyhow::Ok(match moment {
                    Moment::Full(values) => HostMoment::Full(values),
                    Moment::Blocks { codes, scales, .. } => HostMoment::Blocks { codes, scales },
                })
            };
            let [first, second] = self.names();
            pairs.push((load(first, Signs::Both)?, load(second, Signs::Positive)?));
        }
        reader.finish()?;
        self.flat.set_moments(&pairs)?;
        self.steps = steps;
        Ok(())
    }

    fn on_card(&mut self) -> Option<&mut dyn CardStep> {
        Some(self)
    }
}
