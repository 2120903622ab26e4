//! States of sd-scripts, as Hugging Face accelerate writes them: the LoRA, the step and the moments
//! of AdamW are used.
//!
//! What cannot be carried is named: random numbers and the scheduler's state mean nothing here (both
//! are functions of the step), and the order of the data is another one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::ParamId;
use formats::{Dtype, OwnedTensor, lora_file};
use models::lora::LoraNetwork;

use super::folder::Files;
use super::keeper::WEIGHTS;
use super::parts;
use crate::console;
use crate::network::PreparedNetwork;
use crate::optimizer::OptimizerState;

/// The optimizer whose moments can be carried.
pub const ADAMW: &str = "torch.optim.adamw.AdamW";

/// Names of the network's weights, newest first.
const WEIGHT_FILES: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
/// The part of [`read`] that holds the moments.
pub const MOMENTS: &str = "moments";
/// Step and epoch, since sd-scripts 0.8.
const TRAIN_STATE: &str = "train_state.json";

/// Whether a folder is one of accelerate's.
pub fn recognise(folder: &Path) -> bool {
    let beside = ["optimizer.bin", "random_states_0.pkl", TRAIN_STATE];
    weight_file(folder).is_some() && beside.iter().any(|name| folder.join(name).exists())
}

fn weight_file(folder: &Path) -> Option<PathBuf> {
    WEIGHT_FILES.iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

/// Steps done; 0 where an old sd-scripts did not write them down.
pub fn step(folder: &Path) -> Result<usize> {
    let path = folder.join(TRAIN_STATE);
    if !path.exists() {
        return Ok(0);
    }
    let text = std::fs::read(&path)
        .with_context(|| format!("cannot read the state of sd-scripts: {}", path.display()))?;
    let value: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
    let step = value.and_then(|value| value["current_step"].as_u64());
    let step = step.with_context(|| format!("`current_step` is missing: {}", path.display()))?;
    Ok(step as usize)
}

/// Moments of AdamW by number of parameter.
const MOMENTS_FILE: &str = "optimizer.bin";

/// The weights, and the optimizer's moments where they can be read, as files of ours.
pub fn read(folder: &Path) -> Result<Files> {
    let path = weight_file(folder)
        .with_context(|| format!("the state has no weights: {}", folder.display()))?;
    let part = |tensors| parts::to_bytes(&OptimizerState { tensors, ..Default::default() });
    let mut files =
        Files::from([(format!("{WEIGHTS}.safetensors"), part(lora_file::read(&path)?.tensors)?)]);
    // What else an optimizer may hold is no reason to refuse the LoRA.
    if let Ok(moments) = lora_file::read(&folder.join(MOMENTS_FILE)) {
        files.insert(format!("{MOMENTS}.safetensors"), part(moments.tensors)?);
    }
    Ok(files)
}

/// The state of our AdamW from PyTorch's, whose parameters are numbered in the order of the
/// optimizer's groups; `None` where number or shapes are not this network's.
pub fn adamw_state(
    network: &LoraNetwork,
    moments: &BTreeMap<String, OwnedTensor>,
) -> Option<OptimizerState> {
    let groups = network.groups();
    let ids: Vec<ParamId> = groups.into_iter().flat_map(|group| group.params).collect();
    if moments.len() != 3 * ids.len() {
        return None;
    }
    let mut state = OptimizerState::default();
    for (number, id) in ids.into_iter().enumerate() {
        let key = network.key(id);
        for name in ["exp_avg", "exp_avg_sq"] {
            let moment = moments.get(&format!("{number}.{name}"))?;
            if moment.shape != network.file_shape(id) {
                return None;
            }
            let values = network.engine_order(id, moment.to_f32());
            let tensor = OwnedTensor::from_f32(&[values.len()], &values, Dtype::F32).ok()?;
            state.tensors.insert(format!("{name}/{key}"), tensor);
        }
        let step = moments.get(&format!("{number}.step"))?.to_f32();
        state.numbers.insert(format!("step/{key}"), f64::from(*step.first()?));
    }
    Some(state)
}

/// Puts the weights into the network and says what is left behind. Gives the state of the
/// optimizer, where `takes_adamw` and there is one that fits.
pub fn replace_values(
    folder: &Path,
    (weights, moments): (BTreeMap<String, OwnedTensor>, BTreeMap<String, OwnedTensor>),
    prepared: &mut PreparedNetwork,
    takes_adamw: bool,
) -> Result<Option<OptimizerState>> {
    let place = folder.display();
    let report = prepared
        .network
        .load_values(&mut prepared.values, &weights)
        .with_context(|| format!("the state of sd-scripts is of another network: {place}"))?;
    let odd = [("lacks", report.missing.first()), ("also has", report.unused.first())];
    for (what, module) in odd {
        if let Some(module) = module {
            bail!(
                "the state of sd-scripts is of another network, which {what} the module: \
                 `{module}`\nhint: give the network options it was trained with, or give the LoRA \
                 as `network_weights`"
            );
        }
    }
    let optimizer = adamw_state(&prepared.network, &moments).filter(|_| takes_adamw);
    let taken = match (folder.join(TRAIN_STATE).exists(), optimizer.is_some()) {
        (true, true) => "the LoRA, the step and AdamW's moments",
        (true, false) => "the LoRA and the step",
        (false, true) => "the LoRA and AdamW's moments",
        (false, false) => "the LoRA",
    };
    let lost = if optimizer.is_some() { "" } else { "the optimizer's state (it starts afresh), " };
    console::note(&format!(
        "taken from the state of sd-scripts: {taken}; not carried: {lost}random numbers and the \
         order of the data (this program has its own), the scheduler's position (it follows from \
         the step): {place}"
    ));
    Ok(optimizer)
}
