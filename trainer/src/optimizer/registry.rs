//! All optimizers by name: the reference's names, the paths of the classes it would load, and what
//! it writes about them into files. One line each.

use anyhow::{Result, bail};

use super::adafactor::AdafactorSettings;
use super::adam::AdamSettings;
use super::adamw::AdamWSettings;
use super::adamw_8bit::AdamW8bitSettings;
use super::ademamix::{AdEmaMixSettings, NEVER};
use super::came::CameSettings;
use super::dadapt_adagrad::DAdaptAdaGradSettings;
use super::dadapt_adam::DAdaptAdamSettings;
use super::dadapt_adam_preprint::DAdaptAdamPreprintSettings;
use super::dadapt_adan::{DAdaptAdanIpSettings, DAdaptAdanSettings};
use super::dadapt_lion::DAdaptLionSettings;
use super::dadapt_sgd::DAdaptSgdSettings;
use super::distance::one_rate;
use super::lion::LionSettings;
use super::lion_8bit::Lion8bitSettings;
use super::prodigy::ProdigySettings;
use super::radam::RAdamSettings;
use super::schedule_free::{
    AdamWScheduleFreeSettings, RAdamScheduleFreeSettings, SgdScheduleFreeSettings,
};
use super::sgd::SgdSettings;
use super::sgd_8bit::Sgd8bitSettings;
use super::{Pace, Recipe};
use crate::options::{Literal, closest};

/// An optimizer that can be chosen.
struct Entry {
    /// The reference's name.
    name: &'static str,
    /// Other names: class paths that the reference would load.
    also: &'static [&'static str],
    /// The class as the reference's metadata names it.
    class: &'static str,
    /// Settings that the reference adds and writes down when they are not given.
    added: Option<(&'static str, &'static str)>,
    recipe: fn() -> Box<dyn Recipe>,
    /// What the user should know.
    note: Option<&'static str>,
}

const PAGED: &str = "the paged optimizers keep their state in main memory where a GPU runs out of \
                     it; here they are the same as those that are not paged";

/// A line of the table.
macro_rules! entry {
    ($name:literal, [$($also:literal),*], $class:literal, $recipe:expr) => {
        Entry {
            name: $name,
            also: &[$($also),*],
            class: $class,
            added: None,
            recipe: || Box::new($recipe),
            note: None,
        }
    };
}

fn adamw_8bit(weight_decay: f64) -> AdamW8bitSettings {
    AdamW8bitSettings { weight_decay, ..AdamW8bitSettings::default() }
}

#[rustfmt::skip]
static ENTRIES: &[Entry] = &[
    entry!("AdamW", ["torch.optim.AdamW"], "torch.optim.adamw.AdamW", AdamWSettings::default()),
    entry!("AdamW8bit", ["bitsandbytes.optim.AdamW8bit"], "bitsandbytes.optim.adamw.AdamW8bit", adamw_8bit(0.01)),
    Entry { note: Some(PAGED), ..entry!("PagedAdamW8bit", ["bitsandbytes.optim.PagedAdamW8bit"], "bitsandbytes.optim.adamw.PagedAdamW8bit", adamw_8bit(0.01)) },
    Entry { note: Some(PAGED), ..entry!("PagedAdamW", ["bitsandbytes.optim.PagedAdamW"], "bitsandbytes.optim.adamw.PagedAdamW", AdamWSettings::default()) },
    Entry { note: Some(PAGED), ..entry!("PagedAdamW32bit", ["bitsandbytes.optim.PagedAdamW32bit"], "bitsandbytes.optim.adamw.PagedAdamW32bit", AdamWSettings::default()) },
    entry!("Adam", ["torch.optim.Adam"], "torch.optim.adam.Adam", AdamSettings::default()),
    entry!("Adam8bit", ["bitsandbytes.optim.Adam8bit"], "bitsandbytes.optim.adam.Adam8bit", adamw_8bit(0.)),
    entry!("RAdam", ["torch.optim.RAdam"], "torch.optim.radam.RAdam", RAdamSettings::default()),
    entry!("SGD", ["torch.optim.SGD"], "torch.optim.sgd.SGD", SgdSettings::default()),
    Entry { added: Some(("momentum", "0.9")), ..entry!("SGDNesterov", [], "torch.optim.sgd.SGD", SgdSettings { momentum: 0.9, nesterov: true, ..SgdSettings::default() }) },
    Entry { added: Some(("momentum", "0.9")), note: Some("bitsandbytes' 8-bit SGD takes no Nesterov step, and neither does this one: plain momentum"), ..entry!("SGDNesterov8bit", ["bitsandbytes.optim.SGD8bit"], "bitsandbytes.optim.sgd.SGD8bit", Sgd8bitSettings::default()) },
    entry!("Lion", ["lion_pytorch.Lion"], "lion_pytorch.lion_pytorch.Lion", LionSettings::default()),
    entry!("Lion8bit", ["bitsandbytes.optim.Lion8bit"], "bitsandbytes.optim.lion.Lion8bit", Lion8bitSettings::default()),
    Entry { note: Some(PAGED), ..entry!("PagedLion8bit", ["bitsandbytes.optim.PagedLion8bit"], "bitsandbytes.optim.lion.PagedLion8bit", Lion8bitSettings::default()) },
    Entry { added: Some(("relative_step", "True")), ..entry!("AdaFactor", ["transformers.Adafactor", "transformers.optimization.Adafactor"], "transformers.optimization.Adafactor", AdafactorSettings::default()) },
    entry!("AdEMAMix", ["bitsandbytes.optim.AdEMAMix"], "bitsandbytes.optim.ademamix.AdEMAMix", AdEmaMixSettings { min_8bit_size: NEVER, ..AdEmaMixSettings::default() }),
    entry!("AdEMAMix8bit", ["bitsandbytes.optim.AdEMAMix8bit"], "bitsandbytes.optim.ademamix.AdEMAMix8bit", AdEmaMixSettings::default()),
    Entry { note: Some(PAGED), ..entry!("PagedAdEMAMix8bit", ["bitsandbytes.optim.PagedAdEMAMix8bit"], "bitsandbytes.optim.ademamix.PagedAdEMAMix8bit", AdEmaMixSettings::default()) },
    entry!("CAME", ["came_pytorch.CAME", "pytorch_optimizer.CAME"], "pytorch_optimizer.optimizer.came.CAME", CameSettings::default()),
    entry!("DAdaptation", ["DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint"], "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", DAdaptAdamPreprintSettings::default()),
    entry!("DAdaptAdam", ["dadaptation.DAdaptAdam"], "dadaptation.dadapt_adam.DAdaptAdam", DAdaptAdamSettings::default()),
    entry!("DAdaptAdaGrad", ["dadaptation.DAdaptAdaGrad"], "dadaptation.dadapt_adagrad.DAdaptAdaGrad", DAdaptAdaGradSettings::default()),
    entry!("DAdaptAdan", ["dadaptation.DAdaptAdan"], "dadaptation.dadapt_adan.DAdaptAdan", DAdaptAdanSettings::default()),
    entry!("DAdaptAdanIP", ["dadaptation.experimental.DAdaptAdanIP"], "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP", DAdaptAdanIpSettings::default()),
    entry!("DAdaptLion", ["dadaptation.DAdaptLion"], "dadaptation.dadapt_lion.DAdaptLion", DAdaptLionSettings::default()),
    entry!("DAdaptSGD", ["dadaptation.DAdaptSGD"], "dadaptation.dadapt_sgd.DAdaptSGD", DAdaptSgdSettings::default()),
    entry!("Prodigy", ["prodigyopt.Prodigy"], "prodigyopt.prodigy.Prodigy", ProdigySettings::default()),
    entry!("AdamWScheduleFree", ["schedulefree.AdamWScheduleFree"], "schedulefree.adamw_schedulefree.AdamWScheduleFree", AdamWScheduleFreeSettings::default()),
    entry!("RAdamScheduleFree", ["schedulefree.RAdamScheduleFree"], "schedulefree.radam_schedulefree.RAdamScheduleFree", RAdamScheduleFreeSettings::default()),
    entry!("SGDScheduleFree", ["schedulefree.SGDScheduleFree"], "schedulefree.sgd_schedulefree.SGDScheduleFree", SgdScheduleFreeSettings::default()),
];

/// An optimizer with its settings, as the config chose them.
pub struct Choice {
    /// The reference's name.
    pub name: &'static str,
    /// The class in the reference's metadata.
    pub class: String,
    /// The settings that were written or added, as Python would print them.
    pub python_text: String,
    /// The settings.
    pub recipe: Box<dyn Recipe>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Choice {
    /// Refuses learning rates of groups, before the schedule, that the optimizer cannot have.
    pub fn check_rates(&self, rates: &[f64]) -> Result<()> {
        match self.recipe.pace() {
            Pace::Estimated => one_rate(self.name, rates.iter().copied()).map(|_| ()),
            Pace::Given | Pace::Relative | Pace::ScheduleFree => Ok(()),
        }
    }

    /// Name and settings, for people: `Prodigy (d_coef=2)`.
    pub fn describe(&self) -> String {
        match self.python_text.as_str() {
            "" => self.name.to_owned(),
            text => format!("{} ({text})", self.name),
        }
    }
}

/// The names of all optimizers.
pub fn names() -> Vec<&'static str> {
    ENTRIES.iter().map(|entry| entry.name).collect()
}

/// The optimizer of this name (in any case; empty: AdamW) with these settings, `(key, value)` as
/// they were written. The error names what is wrong and what there is.
pub fn choose(name: &str, arguments: &[(String, String)]) -> Result<Choice> {
    let name = if name.is_empty() { "AdamW" } else { name };
    let is = |other: &str| other.eq_ignore_ascii_case(name);
    let found = ENTRIES.iter().find(|entry| is(entry.name) || entry.also.iter().any(|n| is(n)));
    let Some(entry) = found else { return unknown(name) };
    let mut recipe = (entry.recipe)();
    let mut notes: Vec<String> = entry.note.iter().map(|note| (*note).to_owned()).collect();
    let mut written: Vec<(String, String)> = Vec::new();
    for (key, text) in arguments {
        let Some(value) = Literal::parse(text) else {
            bail!(
                "`{key}` in `optimizer_args` is not a value that Python would read: `{text}`\n\
                 hint: numbers, `True`, `False`, `None`, `0.9,0.999`, or text in quotes"
            );
        };
        match recipe.set(key, &value) {
            Some(Ok(())) => {}
            Some(Err(kind)) => {
                bail!(
                    "`{key}` in `optimizer_args` must be {kind} for {}, not: `{text}`",
                    entry.name
                )
            }
            None if recipe.idle_keys().contains(&key.as_str()) => notes.push(format!(
                "`{key}` in `optimizer_args` has no effect here: it changes nothing in what \
                 {} computes",
                entry.name
            )),
            None => return unknown_key(entry, &*recipe, key),
        }
        written.push((key.clone(), value.to_string()));
    }
    if let Some((key, value)) = entry.added.filter(|(key, _)| !has(&written, key)) {
        written.push((key.to_owned(), value.to_owned()));
    }
    for (key, value) in recipe.complete() {
        notes.push(format!("`{key}` becomes `{value}`, which another setting requires"));
        written.retain(|(other, _)| other != key);
        written.push((key.to_owned(), value.to_owned()));
    }
    if let Some(fault) = recipe.fault() {
        bail!("{fault} (`optimizer_args` of {})", entry.name);
    }
    let text: Vec<String> = written.iter().map(|(key, value)| format!("{key}={value}")).collect();
    Ok(Choice {
        name: entry.name,
        class: class_of(entry, name),
        python_text: text.join(","),
        recipe,
        notes,
    })
}

fn has(written: &[(String, String)], key: &str) -> bool {
    written.iter().any(|(other, _)| other == key)
}

/// Two packages have CAME under one name: the path says which.
fn class_of(entry: &Entry, name: &str) -> String {
    match name.eq_ignore_ascii_case("came_pytorch.CAME") {
        true => "came_pytorch.CAME.CAME".to_owned(),
        false => entry.class.to_owned(),
    }
}

fn unknown(name: &str) -> Result<Choice> {
    let all = names();
    let last = name.rsplit('.').next().unwrap_or(name);
    let lower: Vec<String> = all.iter().map(|name| name.to_ascii_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    let near =
        closest(last, &lower).and_then(|near| all.iter().find(|n| n.eq_ignore_ascii_case(near)));
    let guess = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
    bail!(
        "there is no optimizer of this name here: `{name}`\nhint: {guess}there are {}",
        all.join(", ")
    )
}

fn unknown_key(entry: &Entry, recipe: &dyn Recipe, key: &str) -> Result<Choice> {
    let keys = recipe.keys();
    let guess = match closest(key, keys) {
        Some(near) => format!("did you mean `{near}`? "),
        None => String::new(),
    };
    bail!(
        "unknown key in `optimizer_args`: `{key}`\nhint: {guess}{} has {}",
        entry.name,
        keys.join(", ")
    )
}
