//! `lorarun train --config-check`: what would stop a run, what is unusual, and what has no effect.
//!
//! Reads the config, the dataset description, folders and image headers; never the model, never a
//! pixel. The findings are data and go to standard output.

use std::path::Path;

use collectives::exit_code;

use crate::console;
use crate::data_plan::{dataset_defaults, dataset_input};
use crate::dataset::{ClipTokenizer, DatasetGroup, caption, plan_datasets};
use crate::options::{Options, Parsed, find_option, lint};
use crate::samples::SamplePlan;

/// What a check found, from worst to mildest.
#[derive(Debug, Default, PartialEq)]
pub struct Findings {
    /// These stop the run.
    pub problems: Vec<String>,
    /// These are probably not meant.
    pub warnings: Vec<String>,
    /// Worth knowing.
    pub notes: Vec<String>,
}

/// Prints the findings; the exit code is 0 unless something would stop the run.
pub fn report(parsed: &Parsed) -> i32 {
    let findings = check(parsed);
    let name = match &parsed.config_path {
        Some(path) => path.display().to_string(),
        None => "the command line".to_owned(),
    };
    for (kind, texts) in [
        ("problem", &findings.problems),
        ("warning", &findings.warnings),
        ("note", &findings.notes),
    ] {
        for text in texts {
            console::data(&format!("{kind}: {}", text.replace("\nhint:", "\n  hint:")));
        }
    }
    console::data(&format!(
        "{name}: {}, {}, {}",
        count(findings.problems.len(), "problem"),
        count(findings.warnings.len(), "warning"),
        count(findings.notes.len(), "note")
    ));
    if findings.problems.is_empty() { exit_code::DONE } else { exit_code::CONFIGURATION }
}

/// `1 note`, `2 notes`.
fn count(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

/// Everything there is to say about a config.
pub fn check(parsed: &Parsed) -> Findings {
    let options = &parsed.options;
    let mut findings = Findings { problems: parsed.problems.clone(), ..Findings::default() };
    for note in &parsed.notes {
        match note.strip_prefix("warning: ") {
            Some(warning) => findings.warnings.push(warning.to_owned()),
            None => findings.notes.push(note.clone()),
        }
    }
    check_files(options, &mut findings);
    check_samples(options, &mut findings);
    check_data(parsed, &mut findings);
    // What the rules have said already needs no advice.
    let said = |advice: &String| {
        let option = advice.split('`').find(|part| find_option(part).is_some());
        let idle = option.map(|option| format!("`{option}` has no effect"));
        idle.is_some_and(|idle| {
            advice.contains(&idle) && findings.notes.iter().any(|note| note.contains(&idle))
        })
    };
    let advice: Vec<String> = lint(options).into_iter().filter(|advice| !said(advice)).collect();
    findings.warnings.extend(advice);
    findings
}

/// Files that are named must be there; a file of the run's name will be replaced.
fn check_files(options: &Options, findings: &mut Findings) {
    let mut missing = |option: &str, path: &Path| {
        if !path.exists() {
            let mut text =
                format!("`{option}` names a file that does not exist: `{}`", path.display());
            if path.is_relative() {
                text += "\nhint: relative paths count from where the command is run";
            }
            findings.problems.push(text);
        }
    };
    for (option, path) in [("network_weights", &options.network_weights), ("vae", &options.vae)] {
        match path {
            Some(path) if !(option == "vae" && is_hub_id(&path.to_string_lossy())) => {
                missing(option, path);
            }
            _ => {}
        }
    }
    for path in options.base_weights.iter().flatten() {
        missing("base_weights", Path::new(path));
    }
    if let Some(model) = options.pretrained_model_name_or_path.as_deref() {
        match (Path::new(model).exists(), is_hub_id(model)) {
            (true, _) => {}
            (false, true) => findings.notes.push(format!(
                "`pretrained_model_name_or_path` is no file or folder here; it is looked up at the hub: `{model}`"
            )),
            (false, false) => missing("pretrained_model_name_or_path", Path::new(model)),
        }
    }
    let suffix = options.save_model_as.as_str();
    let name = options.output_name.as_deref().unwrap_or("last");
    if let Some(folder) = &options.output_dir {
        let path = folder.join(format!("{name}.{suffix}"));
        if path.exists() {
            findings.warnings.push(format!("the run will replace a file: `{}`", path.display()));
        }
    }
}

/// Reads the prompts of sample pictures; lengths are those of the embedded vocabulary.
fn check_samples(options: &Options, findings: &mut Findings) {
    let plan = match SamplePlan::read(options) {
        Ok(None) => return,
        Ok(Some(plan)) => plan,
        Err(fault) => return findings.problems.push(fault.to_string()),
    };
    findings.warnings.extend(plan.notes.iter().cloned());
    let too_long = ClipTokenizer::open(None, options.v2)
        .map(|tokenizer| plan.check_lengths(&tokenizer).err().map(|fault| fault.to_string()));
    findings.problems.extend(too_long.unwrap_or_else(|fault| Some(fault.to_string())));
}

/// `org/name`, as models are called at the hub.
fn is_hub_id(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let plain = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = [".safetensors", ".ckpt", ".pt"].iter().any(|suffix| name.ends_with(suffix));
    parts.len() == 2 && parts.iter().all(plain) && !is_file
}

/// Plans the datasets and opens their folders.
fn check_data(parsed: &Parsed, findings: &mut Findings) {
    let options = &parsed.options;
    let has_data = parsed.datasets.is_some()
        || options.dataset_config.is_some()
        || options.train_data_dir.is_some();
    // That nothing is named is a problem of the options already.
    if !has_data {
        return;
    }
    let planned = dataset_input(parsed).and_then(|input| {
        let defaults = dataset_defaults(options)?;
        Ok(plan_datasets(&input, &defaults)?)
    });
    let group = planned.and_then(|plan| Ok(DatasetGroup::open(plan, options.strict_data)?));
    match group {
        Err(fault) => findings.problems.push(format!("{fault:#}")),
        Ok(group) => {
            findings.warnings.extend(group.warnings.iter().cloned());
            if options.cache_text_encoder_outputs
                && let Err(fault) = caption::check_cacheable(&group)
            {
                findings.problems.push(fault.to_string());
            }
            let images: usize = group.datasets.iter().map(|dataset| dataset.images.len()).sum();
            let is_reg = |dataset: &crate::dataset::group::Dataset| {
                dataset.plan.subsets.iter().any(|subset| subset.is_reg())
            };
            if options.prior_loss_weight != 1. && !group.datasets.iter().any(is_reg) {
                findings
                    .warnings
                    .push("`prior_loss_weight` has no effect: no subset has `is_reg`".to_owned());
            }
            findings.notes.push(format!(
                "{} in {}",
                count(images, "image"),
                count(group.datasets.len(), "dataset")
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::parse;
    use std::ffi::OsString;

    fn findings(words: &[&str]) -> Findings {
        let words: Vec<OsString> =
            ["--config-check"].iter().chain(words).map(OsString::from).collect();
        check(&parse(&words).unwrap())
    }

    #[test]
    fn missing_files_and_folders_are_problems() {
        let found = findings(&[
            "--pretrained_model_name_or_path=/nowhere/m.safetensors",
            "--network_weights=/nowhere/w.safetensors",
            "--output_dir=/nowhere/out",
            "--train_data_dir=/nowhere/images",
            "--resolution=512",
        ]);
        let problems = found.problems.join("\n");
        for part in [
            "`pretrained_model_name_or_path` names a file that does not exist",
            "`network_weights` names a file that does not exist",
            "/nowhere/images",
        ] {
            assert!(problems.contains(part), "{part}\n{problems}");
        }
    }

    #[test]
    fn the_quickstart_has_no_problem() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let at = |path: &str| root.join(path).display().to_string();
        let found = findings(&[
            &at("examples/quickstart/config.toml"),
            "--pretrained_model_name_or_path",
            &at("examples/tiny-sd"),
            "--sample_prompts",
            &at("examples/quickstart/prompts.txt"),
            "--dataset_config",
            &at("tests/data/options/front_ends/colab_dataset.toml"),
        ]);
        // That dataset names a folder of another machine.
        assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
        assert!(found.problems[0].contains("/content/drive"), "{:?}", found.problems);
    }

    #[test]
    fn nothing_is_said_twice() {
        let found = findings(&["--log_prefix=x", "--lr_scheduler_power=2"]);
        let all: Vec<&String> = found.warnings.iter().chain(&found.notes).collect();
        for option in ["`log_prefix` has no effect", "`lr_scheduler_power` has no effect"] {
            let times = all.iter().filter(|text| text.contains(option)).count();
            assert_eq!(times, 1, "{option}: {all:?}");
        }
    }

    #[test]
    fn hub_ids() {
        assert!(is_hub_id("runwayml/stable-diffusion-v1-5"));
        assert!(!is_hub_id("models/base.safetensors") && !is_hub_id("/a/b") && !is_hub_id("a"));
        assert!(!is_hub_id("./model"));
    }
}
