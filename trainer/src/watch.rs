//! Watchfulness: a step whose loss or gradient is not finite is left out, by all ranks together.
//!
//! The sums over the ranks say that a step is bad, so every rank knows it at the same time. Only then
//! the ranks tell each other what each of them saw: the first bad tensor and the images. The weights,
//! the optimizer and the average of the weights stay as they were; the step counts for the schedule
//! and the order of the samples, so that a run with a skipped step ends where it would have ended.
//! After too many such steps in a row the run stops. No file is written between a bad step and the
//! next good one, and none with weights that are not finite: what was saved before stays good.

use anyhow::{Context, Result, bail};
use collectives::Comm;
use engine::{ParamId, ParamStore};
use models::lora::LoraNetwork;
use serde::{Deserialize, Serialize};

use crate::console;
use crate::gradients::Control;
use crate::loss_history::SampleLoss;
use crate::optimizer::OptimizerState;
use crate::optimizer::state::{Reader, Writer};

/// Images that a message names; the rest is counted.
const SHOWN_IMAGES: usize = 16;

/// Counts bad steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    limit: u32,
    in_a_row: u32,
    total: u32,
}

/// What one rank saw of a bad step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// Whether a loss of this rank is not finite.
    pub loss: bool,
    /// The first tensor of the backward pass whose gradient is not finite on this rank.
    pub tensor: Option<String>,
    /// Images whose loss is not finite; without any, all of this rank's part of the step.
    pub images: Vec<String>,
}

impl Sighting {
    /// What this rank has to tell about its samples and its own part of the gradient, whose first
    /// tensor that is not finite is `first`.
    pub fn new(samples: &[SampleLoss], network: &LoraNetwork, first: Option<ParamId>) -> Self {
        let bad: Vec<&SampleLoss> = samples.iter().filter(|s| !s.loss.is_finite()).collect();
        let name = |sample: &SampleLoss| sample.image.display().to_string();
        Self {
            loss: !bad.is_empty(),
            tensor: first.map(|id| network.key(id)),
            images: match bad.is_empty() {
                true => samples.iter().map(name).collect(),
                false => bad.into_iter().map(name).collect(),
            },
        }
    }
}

impl Watch {
    /// Allows `limit` bad steps in a row.
    pub fn new(limit: usize) -> Self {
        Self { limit: u32::try_from(limit).unwrap_or(u32::MAX), in_a_row: 0, total: 0 }
    }

    /// Whether a step may change the weights; the same on every rank.
    pub fn is_good(agreed: Control, norm: f64) -> bool {
        agreed.non_finite == 0. && agreed.loss.is_finite() && norm.is_finite()
    }

    /// A good step.
    pub fn pass(&mut self) {
        self.in_a_row = 0;
    }

    /// Whether the last step was left out.
    pub fn is_alarmed(&self) -> bool {
        self.in_a_row > 0
    }

    /// Steps left out so far.
    pub fn skipped(&self) -> u32 {
        self.total
    }

    /// Leaves out step `step` (from 1): says why, or ends the run. All ranks call it.
    ///
    /// `sum` names the first tensor of the gradient summed over the ranks that is not finite.
    pub fn skip(
        &mut self,
        comm: &Comm,
        step: usize,
        own: &Sighting,
        sum: Option<String>,
    ) -> Result<()> {
        self.in_a_row += 1;
        self.total += 1;
        let bytes = serde_json::to_vec(own).context("describe a step that is not finite")?;
        let all = comm.all_gather(&bytes).context("exchange what is not finite")?;
        let sightings: Vec<Sighting> = all
            .iter()
            .map(|bytes| serde_json::from_slice(bytes))
            .collect::<Result<_, _>>()
            .context("read what another rank saw")?;
        let story = describe(&sightings, sum);
        if self.in_a_row > self.limit {
            let count = match self.in_a_row {
                1 => "a step is".to_owned(),
                count => format!("{count} steps in a row are"),
            };
            bail!(
                "{count} not finite, the last is step {step}: {story}\n\
                 hint: lower `learning_rate`, look at the images, or use `mixed_precision = \"no\"`; \
                 files saved before are good"
            );
        }
        console::warn(&format!("step {step} is left out, it is not finite: {story}"));
        Ok(())
    }

    /// The counters, to go on from.
    pub fn state(&self) -> OptimizerState {
        let mut writer = Writer::default();
        writer.number("skipped_in_a_row", "", f64::from(self.in_a_row));
        writer.number("skipped_steps", "", f64::from(self.total));
        writer.finish()
    }

    /// Goes on from the counters of [`Watch::state`].
    pub fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let mut reader = Reader::new("the count of skipped steps", state);
        self.in_a_row = reader.count("skipped_in_a_row", "")?;
        self.total = reader.count("skipped_steps", "")?;
        reader.finish()
    }
}

/// What is wrong, where: one clause for each rank that saw something.
fn describe(sightings: &[Sighting], sum: Option<String>) -> String {
    let on = |rank: usize| match sightings.len() {
        1 => String::new(),
        _ => format!(" of rank {rank}"),
    };
    let mut clauses = Vec::new();
    for (rank, sighting) in sightings.iter().enumerate() {
        let what = match (sighting.loss, &sighting.tensor) {
            (true, _) => format!("the loss{}", on(rank)),
            (false, Some(tensor)) => format!("the gradient{} of `{tensor}`", on(rank)),
            (false, None) => continue,
        };
        clauses.push(format!("{what}, images: {}", list(&sighting.images)));
    }
    if clauses.is_empty() {
        // Finite parts whose sum is not.
        let images: Vec<String> = sightings.iter().flat_map(|s| s.images.clone()).collect();
        let tensor = sum.map_or_else(|| "loss".to_owned(), |tensor| format!("`{tensor}`"));
        clauses.push(format!("the sum over the batch at {tensor}, images: {}", list(&images)));
    }
    clauses.join("; ")
}

fn list(images: &[String]) -> String {
    let shown = images.iter().take(SHOWN_IMAGES).cloned().collect::<Vec<_>>().join(", ");
    match images.len().saturating_sub(SHOWN_IMAGES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Refuses weights that are not finite: called before a file is written, and when a step is bad,
/// because then leaving out steps cannot help. `step` is the number of finished steps.
pub fn require_finite(network: &LoraNetwork, params: &ParamStore, step: usize) -> Result<()> {
    let flat = params.flat().to_vec_f32()?;
    let bad = (0..params.count())
        .map(ParamId)
        .find(|id| flat[params.range(*id)].iter().any(|x| !x.is_finite()));
    match bad {
        None => Ok(()),
        Some(id) => bail!(
            "the weights are not finite after step {step}, the first: `{}`\n\
             hint: lower `learning_rate`; files saved before are good",
            network.key(id)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sighting(loss: bool, tensor: Option<&str>, images: &[&str]) -> Sighting {
        Sighting {
            loss,
            tensor: tensor.map(str::to_owned),
            images: images.iter().map(|image| (*image).to_owned()).collect(),
        }
    }

    #[test]
    fn bad_ranks_are_named_with_tensor_and_images() {
        let fine = sighting(false, None, &["a.png"]);
        let loss = sighting(true, Some("lora_x"), &["b.png", "c.png"]);
        let tensor = sighting(false, Some("lora_y.lora_up.weight"), &["d.png"]);
        assert_eq!(
            describe(&[fine.clone(), loss.clone(), tensor], None),
            "the loss of rank 1, images: b.png, c.png; the gradient of rank 2 of \
             `lora_y.lora_up.weight`, images: d.png"
        );
        assert_eq!(describe(&[loss], None), "the loss, images: b.png, c.png");
        assert_eq!(
            describe(&[fine.clone(), fine], Some("lora_z".to_owned())),
            "the sum over the batch at `lora_z`, images: a.png, a.png"
        );
        let many: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        assert!(list(&many).ends_with("15 and 4 more"));
    }

    #[test]
    fn the_run_ends_after_too_many_bad_steps_in_a_row() {
        let comm = Comm::single();
        let own = sighting(true, None, &["a.png"]);
        let mut watch = Watch::new(2);
        for step in [1, 2] {
            watch.skip(&comm, step, &own, None).unwrap();
        }
        assert!(watch.is_alarmed());
        watch.pass();
        for step in [4, 5] {
            watch.skip(&comm, step, &own, None).unwrap();
        }
        let mut resumed = Watch::new(2);
        resumed.load_state(watch.state()).unwrap();
        assert_eq!((resumed, resumed.skipped()), (watch, 4));
        let message = resumed.skip(&comm, 6, &own, None).unwrap_err().to_string();
        assert!(message.starts_with("3 steps in a row are not finite, the last is step 6"));
        let mut strict = Watch::new(0);
        assert!(
            strict.skip(&comm, 1, &own, None).unwrap_err().to_string().starts_with("a step is")
        );
    }

    #[test]
    fn a_step_is_good_if_all_of_it_is_finite() {
        let good = Control { loss: 1., non_finite: 0., stop: 0. };
        assert!(Watch::is_good(good, 1.));
        assert!(!Watch::is_good(good, f64::NAN));
        assert!(!Watch::is_good(Control { non_finite: 1., ..good }, 1.));
        assert!(!Watch::is_good(Control { loss: f32::INFINITY, ..good }, 1.));
    }
}
