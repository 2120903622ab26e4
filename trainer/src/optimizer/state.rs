//! What an optimizer carries from step to step, as named tensors and numbers, and how it is read
//! back: everything that is missing, of another size or left over is an error that names it.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use formats::{Dtype, OwnedTensor};

/// Named tensors and named numbers: everything to go on from.
///
/// Names are `exp_avg/lora_unet_....lora_down.weight`: what it is, a slash, the tensor in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Arrays, of f32 or bytes.
    pub tensors: BTreeMap<String, OwnedTensor>,
    /// Counters and estimates, exact in f64.
    pub numbers: BTreeMap<String, f64>,
}

/// Collects a state.
#[derive(Default)]
pub(crate) struct Writer {
    state: OptimizerState,
}

fn key(what: &str, name: &str) -> String {
    if name.is_empty() { what.to_owned() } else { format!("{what}/{name}") }
}

impl Writer {
    /// Adds a number of one tensor (of all: `name` is empty).
    pub(crate) fn number(&mut self, what: &str, name: &str, value: f64) {
        self.state.numbers.insert(key(what, name), value);
    }

    /// Adds f32 values.
    pub(crate) fn values(&mut self, what: &str, name: &str, values: &[f32]) -> Result<()> {
        let tensor = OwnedTensor::from_f32(&[values.len()], values, Dtype::F32)?;
        self.state.tensors.insert(key(what, name), tensor);
        Ok(())
    }

    /// Adds bytes.
    pub(super) fn bytes(&mut self, what: &str, name: &str, bytes: &[u8]) {
        let tensor =
            OwnedTensor { dtype: Dtype::U8, shape: vec![bytes.len()], data: bytes.to_vec() };
        self.state.tensors.insert(key(what, name), tensor);
    }

    /// What was collected.
    pub(crate) fn finish(self) -> OptimizerState {
        self.state
    }
}

/// Takes a state apart. `optimizer` names whose it is, in messages.
pub(crate) struct Reader {
    optimizer: &'static str,
    state: OptimizerState,
}

impl Reader {
    /// Reads for the optimizer of this name.
    pub(crate) fn new(optimizer: &'static str, state: OptimizerState) -> Self {
        Self { optimizer, state }
    }

    /// A number.
    pub(crate) fn number(&mut self, what: &str, name: &str) -> Result<f64> {
        let key = key(what, name);
        match self.state.numbers.remove(&key) {
            Some(number) => Ok(number),
            None => bail!("the saved state of {} lacks the number: `{key}`", self.optimizer),
        }
    }

    /// A number of steps.
    pub(crate) fn count(&mut self, what: &str, name: &str) -> Result<u32> {
        let number = self.number(what, name)?;
        if number < 0. || number > f64::from(u32::MAX) || number.fract() != 0. {
            bail!(
                "the saved state of {} holds no count in `{}`: {number}",
                self.optimizer,
                key(what, name)
            );
        }
        Ok(number as u32)
    }

    /// As many f32 values as `len`.
    pub(crate) fn values(&mut self, what: &str, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(&key(what, name), Dtype::F32, len)?.to_f32())
    }

    /// As many bytes as `len`.
    pub(super) fn bytes(&mut self, what: &str, name: &str, len: usize) -> Result<Vec<u8>> {
        Ok(self.tensor(&key(what, name), Dtype::U8, len)?.data)
    }

    fn tensor(&mut self, key: &str, dtype: Dtype, len: usize) -> Result<OwnedTensor> {
        let Some(tensor) = self.state.tensors.remove(key) else {
            bail!("the saved state of {} lacks the tensor: `{key}`", self.optimizer);
        };
        let size = tensor.data.len() / tensor.dtype.size();
        if tensor.dtype != dtype || size != len {
            bail!(
                "the saved state of {} does not fit, `{key}` must hold {len} values of {}, it holds: \
                 {size} of {}",
                self.optimizer,
                dtype.safetensors_name(),
                tensor.dtype.safetensors_name()
            );
        }
        Ok(tensor)
    }

    /// All must have been read.
    pub(crate) fn finish(self) -> Result<()> {
        let mut left = self.state.tensors.keys().chain(self.state.numbers.keys());
        match left.next() {
            None => Ok(()),
            Some(key) => bail!(
                "the saved state holds more than {} has, the first: `{key}`\n\
                 hint: resume with the network and the optimizer that wrote it",
                self.optimizer
            ),
        }
    }
}
