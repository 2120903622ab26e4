//! `lorarun train --help`: every option by group, or those that match a word.

use super::{Kind, OPTIONS, OptionSpec, Support};
use anyhow::{Result, bail};

/// The help text, wrapped to the terminal. With `search`, only options whose name or help holds the
/// word; an error when there is none.
pub fn help_text(search: Option<&str>) -> Result<String> {
    let chosen: Vec<&OptionSpec> = match search {
        None => OPTIONS.iter().collect(),
        Some(word) => find_options(word),
    };
    if let (Some(word), true) = (search, chosen.is_empty()) {
        bail!("no option matches: `{word}`\nhint: `lorarun train --help` lists all options");
    }
    let mut command = clap::Command::new("lorarun train")
        .disable_help_flag(true)
        .override_usage("lorarun [--num_processes N] train CONFIG.toml [--option value ...]")
        .help_template("{about}\n\nUsage: {usage}\n\n{all-args}");
    command = match search {
        Some(word) => command.about(format!("Options that match `{word}`")),
        None => command.about(
            "Train a LoRA. Every option may stand in the config file as `name = value` or on the \
             command line as `--name value`, which wins. `--help WORD` shows matching options.",
        ),
    };
    for spec in chosen {
        command = command.arg(argument(spec));
    }
    Ok(command.render_long_help().to_string())
}

/// Options whose name holds the word; where there are none, those whose help does.
fn find_options(word: &str) -> Vec<&'static OptionSpec> {
    let word = word.trim_start_matches('-').replace('-', "_").to_lowercase();
    let by_name: Vec<_> = OPTIONS.iter().filter(|spec| spec.name.contains(&word)).collect();
    if !by_name.is_empty() {
        return by_name;
    }
    OPTIONS.iter().filter(|spec| spec.help.to_lowercase().contains(&word)).collect()
}

/// One option as clap prints it.
fn argument(spec: &OptionSpec) -> clap::Arg {
    let argument = clap::Arg::new(spec.name)
        .long(spec.name)
        .help(describe_option(spec))
        .help_heading(spec.group.title());
    match spec.kind {
        Kind::Flag => argument.action(clap::ArgAction::SetTrue),
        kind => argument.value_name(kind.placeholder()).action(clap::ArgAction::Set),
    }
}

/// Help of one option in one line, with what is not built named as such.
fn describe_option(spec: &OptionSpec) -> String {
    let mut text = spec.help.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Kind::Choice(words) = spec.kind
        && words.len() > 4
    {
        text += &format!(" Words: {}.", words.join(", "));
    }
    match spec.support {
        Support::Supported => text,
        Support::NoEffect(reason) => format!("{text} [accepted without effect: {reason}]"),
        Support::Refused(reason) => format!("{text} [refused: {reason}]"),
        Support::NotYet(advice) => format!("{text} [not supported yet: {advice}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_every_option() {
        let text = help_text(None).unwrap();
        for spec in OPTIONS {
            assert!(text.contains(&format!("--{}", spec.name)), "{} is missing", spec.name);
        }
        assert!(text.contains("Optimizer and learning rate:"));
        assert!(text.lines().all(|line| line.chars().count() <= 120));
    }

    #[test]
    fn searches_names_then_texts() {
        let text = help_text(Some("--unet-lr")).unwrap();
        assert!(text.contains("--unet_lr") && !text.contains("--seed"));
        assert!(help_text(Some("velocity")).unwrap().contains("--v_parameterization"));
        assert!(help_text(Some("zebra")).unwrap_err().to_string().contains("no option matches"));
    }
}
