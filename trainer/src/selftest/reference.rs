//! A reference folder: its inputs, its cases, and the numbers to compare with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use formats::lora_file::{self, LoraFile};
use formats::{TensorFile, open_tensor_file};
use serde::Deserialize;
use std::collections::BTreeMap;

use crate::options::{Options, find_option};

/// `cases.json`. Keys that are not named here are for people.
#[derive(Debug, Deserialize)]
pub struct Cases {
    /// sd-scripts options of the network.
    pub network: serde_json::Map<String, serde_json::Value>,
    /// Weight of each sample.
    pub loss_weights: Vec<f32>,
    /// Objectives.
    pub cases: Vec<Case>,
    /// Five optimizer steps.
    pub adamw: Adamw,
    /// Largest difference of float32 and float64 in the reference, by group.
    #[serde(default)]
    pub fp32_vs_fp64: BTreeMap<String, Noise>,
    /// Parameters whose gradient is zero but for rounding: what an optimizer makes of them is noise.
    #[serde(default)]
    pub gradient_is_rounding_only: Vec<String>,
}

/// One objective on one step's inputs.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Name; ends in `_stepN` for variants.
    pub name: String,
    /// Layers of the text encoder to leave out.
    pub clip_skip: Option<usize>,
    /// Which noise and timesteps.
    pub step: usize,
    /// sd-scripts options.
    pub options: serde_json::Map<String, serde_json::Value>,
    /// Loss.
    pub loss: f32,
    /// Norm of all gradients together.
    pub grad_norm: f32,
}

/// Five steps of AdamW.
#[derive(Debug, Deserialize)]
pub struct Adamw {
    /// Learning rates: text encoder, U-Net.
    pub lr: Vec<f64>,
    /// Decay of the moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are clipped to this norm.
    pub max_grad_norm: f64,
    /// Loss before each step.
    pub losses: Vec<f32>,
    /// Gradient norm at each step.
    pub grad_norm_before_clip: Vec<f32>,
}

/// The reference's own rounding error.
#[derive(Debug, Deserialize)]
pub struct Noise {
    /// Largest difference between float32 and float64.
    pub maxdiff: f64,
}

/// An opened reference.
pub struct Reference {
    /// Folder of the base model.
    pub model: PathBuf,
    /// Inputs of all cases.
    pub inputs: Arc<dyn TensorFile>,
    /// Results without LoRA.
    pub base: Arc<dyn TensorFile>,
    /// Results with LoRA.
    pub results: Arc<dyn TensorFile>,
    /// Gradients of some variants.
    pub variant_gradients: Option<Arc<dyn TensorFile>>,
    /// The LoRA before the first step.
    pub init: LoraFile,
    /// The LoRA after five steps.
    pub after: LoraFile,
    /// What to run.
    pub cases: Cases,
}

impl Reference {
    /// Opens a case folder and the parity folder it belongs to.
    pub fn open(case: &Path, base: &Path) -> Result<Self> {
        let cases = case.join("cases.json");
        let text = std::fs::read_to_string(&cases)
            .with_context(|| format!("cannot read the reference: {}", cases.display()))?;
        let cases: Cases = serde_json::from_str(&text)
            .with_context(|| format!("not a reference's cases: {}", cases.display()))?;
        let open = |folder: &Path, name: &str| open_tensor_file(&folder.join(name));
        let variants = case.join("ref_variant_grads.safetensors");
        let reference = Self {
            model: base.join("model"),
            inputs: open(base, "inputs.safetensors")?,
            base: open(base, "base.safetensors")?,
            results: open(case, "ref.safetensors")?,
            variant_gradients: match variants.exists() {
                true => Some(open_tensor_file(&variants)?),
                false => None,
            },
            init: lora_file::read(&case.join("init.safetensors"))?,
            after: lora_file::read(&case.join("after5.safetensors"))?,
            cases,
        };
        if reference.cases.cases.is_empty() || reference.cases.adamw.lr.len() != 2 {
            bail!("the reference has no cases, or not two learning rates: {}", case.display());
        }
        Ok(reference)
    }

    /// Largest rounding error of a group's values in the reference itself; 0 where unknown.
    pub fn noise(&self, group: &str) -> f64 {
        self.cases.fp32_vs_fp64.get(group).map_or(0., |noise| noise.maxdiff)
    }
}

/// sd-scripts options given as JSON.
pub fn options_from_json<'a>(
    maps: impl IntoIterator<Item = &'a serde_json::Map<String, serde_json::Value>>,
) -> Result<Options> {
    let mut options = Options::default();
    for (name, value) in maps.into_iter().flatten() {
        let spec = find_option(name)
            .with_context(|| format!("the reference uses an unknown option: `{name}`"))?;
        let value = toml::Value::try_from(value)
            .with_context(|| format!("the reference's option `{name}` has no TOML form"))?;
        (spec.assign)(&mut options, &value)
            .map_err(|mismatch| anyhow::anyhow!("the reference's option `{name}`: {mismatch:?}"))?;
    }
    Ok(options)
}

/// Reads a tensor as f32, with its shape.
pub fn read(file: &dyn TensorFile, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
    let view = file.view(name)?;
    Ok((view.shape.clone(), view.to_f32()))
}

/// Reads a tensor of whole numbers.
pub fn read_integers(file: &dyn TensorFile, name: &str) -> Result<(Vec<usize>, Vec<usize>)> {
    let view = file.view(name)?;
    let mut numbers = Vec::with_capacity(view.len());
    match view.dtype {
        formats::Dtype::I64 => {
            for bytes in view.data.as_chunks::<8>().0 {
                numbers.push(usize::try_from(i64::from_le_bytes(*bytes))?);
            }
        }
        formats::Dtype::I32 => {
            for bytes in view.data.as_chunks::<4>().0 {
                numbers.push(usize::try_from(i32::from_le_bytes(*bytes))?);
            }
        }
        other => bail!("`{name}` should hold whole numbers, it holds: {other:?}"),
    }
    Ok((view.shape.clone(), numbers))
}
