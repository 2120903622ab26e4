//! Options as TOML: what `--output_config` writes and `--dry_run` shows.

use super::{Group, OPTIONS, Options};
use std::fmt::Write;

/// Where a config is written to is no part of it, and access keys do not belong into files that are
/// passed on.
pub(crate) const PRIVATE: [&str; 5] =
    ["config_file", "output_config", "dry_run", "wandb_api_key", "huggingface_token"];

impl Options {
    /// The options that differ from their defaults, as a config file with one comment per group.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut group: Option<Group> = None;
        for spec in OPTIONS {
            if spec.is_default(self) || PRIVATE.contains(&spec.name) {
                continue;
            }
            let Some(value) = (spec.read)(self) else { continue };
            if group != Some(spec.group) {
                let gap = if group.is_some() { "\n" } else { "" };
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{gap}# {}", spec.group.title());
                group = Some(spec.group);
            }
            let _ = writeln!(text, "{} = {value}", spec.name);
        }
        text
    }

    /// Whether the user wrote this option, in the config or on the command line.
    pub fn is_written(&self, name: &str) -> bool {
        self.written.contains_key(name)
    }
}
