//! Rules across options: what is not built yet, what contradicts, what must not be zero.
//!
//! All broken rules are reported at once, each with the place where the option was written.

mod dataset;
mod lycoris;
mod model;
mod network;
mod neutral;
mod objective;
mod optimizer;
mod optimizer_type;
mod output;
mod scheduler;
mod values;

use super::front_ends::is_nothing;
use super::{MixedPrecision, OPTIONS, Options, Origin, Support};
use anyhow::{Result, bail};

/// What the rules say about a set of options.
pub(super) struct Review {
    /// Remarks for the user.
    pub notes: Vec<String>,
    /// Broken rules, each with its hint.
    pub problems: Vec<String>,
}

/// Completes options that follow from others, then checks all rules.
pub(super) fn check_and_complete(options: &mut Options, inline_datasets: bool) -> Review {
    let mut notes = Vec::new();
    if let Err(fault) = complete(options, &mut notes) {
        return Review { notes, problems: vec![fault.to_string()] };
    }
    let mut check = Check { options, problems: Vec::new() };
    check.support(&mut notes);
    check.values();
    check.model();
    check.network(&mut notes);
    check.dataset(inline_datasets, &mut notes);
    check.optimizer(&mut notes);
    check.schedule(&mut notes);
    check.objective(&mut notes);
    check.output(&mut notes);
    Review { problems: check.problems, notes }
}

/// Old spellings, and options that others imply.
fn complete(options: &mut Options, notes: &mut Vec<String>) -> Result<()> {
    if let Some(extension) = options.caption_extention.take() {
        options.caption_extension = extension;
        if let Some(origin) = options.written.remove("caption_extention") {
            options.written.insert("caption_extension", origin);
        }
        notes.push("`caption_extention` is an old spelling of `caption_extension`".to_owned());
    }
    for (old, new) in [("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")] {
        let set =
            if old == "use_8bit_adam" { options.use_8bit_adam } else { options.use_lion_optimizer };
        if !set {
            continue;
        }
        if options.use_8bit_adam && options.use_lion_optimizer {
            bail!(
                "`use_8bit_adam` and `use_lion_optimizer` both choose an optimizer\nhint: give only `optimizer_type`"
            );
        }
        if !options.optimizer_type.is_empty() {
            bail!(
                "`{old}` and `optimizer_type` both choose an optimizer: `{}`\nhint: give only `optimizer_type`",
                options.optimizer_type
            );
        }
        options.optimizer_type = new.to_owned();
        if let Some(origin) = options.written.get(old).cloned() {
            options.written.insert("optimizer_type", origin);
        }
    }
    if options.cache_latents_to_disk && !options.cache_latents {
        options.cache_latents = true;
        notes.push("`cache_latents_to_disk` turns `cache_latents` on".to_owned());
    }
    if options.cache_text_encoder_outputs_to_disk && !options.cache_text_encoder_outputs {
        options.cache_text_encoder_outputs = true;
        notes.push(
            "`cache_text_encoder_outputs_to_disk` turns `cache_text_encoder_outputs` on".to_owned(),
        );
    }
    if let (Some(low), Some(high)) = (options.min_timestep, options.max_timestep)
        && low == high
        && high < 1000
    {
        // As in the reference, where the end is otherwise not included.
        options.max_timestep = Some(high + 1);
        notes.push(format!("only timestep {low} is trained"));
    }
    for (set, option, needed) in [
        (options.full_fp16, "full_fp16", MixedPrecision::Fp16),
        (options.full_bf16, "full_bf16", MixedPrecision::Bf16),
    ] {
        if set && options.mixed_precision != needed {
            let word = needed.as_str();
            bail!(
                "`{option}` needs `mixed_precision = \"{word}\"`, which is: `{}`\nhint: set it, or \
                 take `{option}` out",
                options.mixed_precision.as_str()
            );
        }
    }
    neutral::unset_neutral(options, notes);
    Ok(())
}

/// The rules, each of which may add a problem.
struct Check<'a> {
    options: &'a Options,
    problems: Vec<String>,
}

impl Check<'_> {
    /// The option as it was written, for the start of a sentence.
    fn name(&self, option: &str) -> String {
        match self.options.written.get(option) {
            Some(origin) => origin.name_option(option),
            // It was not written, and that is what is wrong.
            None => format!("`{option}`"),
        }
    }

    /// Adds a problem with an option and, unless empty, a hint.
    fn problem(&mut self, option: &str, fault: &str, hint: &str) {
        let hint = if hint.is_empty() { String::new() } else { format!("\nhint: {hint}") };
        self.problems.push(format!("{} {fault}{hint}", self.name(option)));
    }

    /// Adds a problem where `broken`.
    fn forbid(&mut self, broken: bool, option: &str, fault: &str, hint: &str) {
        if broken {
            self.problem(option, fault, hint);
        }
    }

    /// Options that are known but not built, and options without effect.
    fn support(&mut self, notes: &mut Vec<String>) {
        // Options with the same reason share a line.
        let mut idle: Vec<(&str, Vec<String>)> = Vec::new();
        for spec in OPTIONS.iter().filter(|spec| !spec.is_default(self.options)) {
            match spec.support {
                // Configs written by programs carry every key: empty and zero ask for nothing.
                _ if (spec.read)(self.options).is_some_and(|v| is_nothing(&v)) => {}
                Support::Supported => {}
                Support::NotYet(advice) => {
                    self.problem(spec.name, "is not supported yet", advice);
                }
                Support::Refused(reason) => {
                    self.problems.push(format!("{} is refused: {reason}", self.name(spec.name)));
                }
                Support::NoEffect(reason) => {
                    let name = match self.options.written.get(spec.name) {
                        Some(Origin::CommandLine) => format!("`--{}`", spec.name),
                        _ => format!("`{}`", spec.name),
                    };
                    match idle.iter_mut().find(|(other, _)| *other == reason) {
                        Some((_, names)) => names.push(name),
                        None => idle.push((reason, vec![name])),
                    }
                }
            }
        }
        for (reason, names) in idle {
            let have = if names.len() == 1 { "has" } else { "have" };
            notes.push(format!("{} {have} no effect here: {reason}", names.join(", ")));
        }
    }
}
