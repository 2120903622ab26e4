//! Whether a state belongs to a run.
//!
//! What would make the saved numbers mean something else is an error: another network, optimizer,
//! base model or seed. What people change on purpose between two parts of a training (learning
//! rate, length, loss, captions) is told and done. The position in the data is `start`'s.

use anyhow::{Result, bail};

use super::facts::{Facts, RunFacts};

/// What the run that wants to go on is.
pub struct Expected<'a> {
    /// Its facts.
    pub run: &'a RunFacts,
    /// Its seed.
    pub seed: u64,
}

/// What helps where the state cannot be used but its LoRA can.
const OTHERWISE: &str = "to start anew from what was learned, leave `resume` out and give the LoRA \
                         file saved with the state as `network_weights`";

/// Checks a state against the run; gives the differences that the user should know of.
pub fn check(state: &Facts, expected: &Expected) -> Result<Vec<String>> {
    let (old, new) = (&state.run, expected.run);
    check_network(old, new)?;
    if old.optimizer != new.optimizer {
        bail!(
            "the state is of another optimizer, `{}`, this run has: `{}`\nhint: give the \
             `optimizer_type` of the state; {OTHERWISE}",
            old.optimizer,
            new.optimizer
        );
    }
    if old.base_model_hash != new.base_model_hash {
        bail!(
            "the state was trained on another base model, `{}`, this run has: `{}`\nhint: {OTHERWISE}",
            old.base_model,
            new.base_model
        );
    }
    if state.seed != expected.seed {
        bail!(
            "the state has another seed, {}, this run has: {}\nhint: give the state's `seed`, or none \
             to take it over",
            state.seed,
            expected.seed
        );
    }
    let mut notes = Vec::new();
    if old.data.images_hash == new.data.images_hash
        && old.data.captions_hash != new.data.captions_hash
    {
        notes.push("captions or their options are others than the state's".to_owned());
    }
    notes.extend(differences(old, new));
    Ok(notes)
}

fn check_network(old: &RunFacts, new: &RunFacts) -> Result<()> {
    let hint = format!("hint: give the network options of the state; {OTHERWISE}");
    let pairs = old.tensors.iter().zip(&new.tensors);
    if let Some(((name, was), (here, is))) = pairs.clone().find(|(old, new)| old != new) {
        if name == here {
            bail!(
                "the state is of another network, the shape of `{name}` was {was:?}, here it is: \
                 {is:?}\n{hint}"
            );
        }
        bail!(
            "the state is of another network, where this one has `{here}`, the state has: \
             `{name}`\n{hint}"
        );
    }
    let common = old.tensors.len().min(new.tensors.len());
    if let Some((name, _)) = old.tensors.get(common) {
        bail!("the state is of another network, which also has the tensor: `{name}`\n{hint}");
    }
    if let Some((name, _)) = new.tensors.get(common) {
        bail!("the state is of another network, which lacks the tensor: `{name}`\n{hint}");
    }
    for (module, was) in &old.alphas {
        let is = new.alphas.get(module).map_or("absent", String::as_str);
        if is != was {
            bail!(
                "the state is of another network, the alpha of `{module}` was {was}, here it is: \
                 {is}\n{hint}"
            );
        }
    }
    Ok(())
}

/// Options that shape the course of training and are not as they were.
fn differences(old: &RunFacts, new: &RunFacts) -> Vec<String> {
    let unset = "unset".to_owned();
    let names: std::collections::BTreeSet<&String> =
        old.options.keys().chain(new.options.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let was = old.options.get(name).unwrap_or(&unset);
            let is = new.options.get(name).unwrap_or(&unset);
            (was != is)
                .then(|| format!("`{name}` differs from the state's, {was}, and is now: {is}"))
        })
        .collect()
}
