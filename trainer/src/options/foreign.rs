//! Applies the keys of front ends that a config file holds, once its options are set.

use super::front_ends::{self, Meaning};
use super::parse::assign;
use super::{Options, Origin, Parsed, find_option};
use toml::Value;

/// Keys of front ends that were met, until all options of the file are set.
#[derive(Default)]
pub(super) struct Foreign {
    ignored: Vec<(&'static str, Vec<String>)>,
    read: Vec<(String, Value, Meaning, Origin)>,
}

impl Foreign {
    /// Takes a key; a fault where it says that the config is for another trainer.
    pub(super) fn take(
        &mut self,
        key: &str,
        value: &Value,
        meaning: Meaning,
        origin: Origin,
    ) -> Option<String> {
        if let Some(fault) = front_ends::other_trainer(key, value) {
            return Some(fault);
        }
        match meaning {
            _ if front_ends::is_nothing(value) => {}
            Meaning::Ignored(reason) => {
                let name = format!("`{key}`");
                match self.ignored.iter_mut().find(|(other, _)| *other == reason) {
                    Some((_, names)) => names.push(name),
                    None => self.ignored.push((reason, vec![name])),
                }
            }
            _ => self.read.push((key.to_owned(), value.clone(), meaning, origin)),
        }
        None
    }

    /// Reports the ignored keys and sets the options that others stand for; gives the faults.
    pub(super) fn apply(self, parsed: &mut Parsed) -> Vec<String> {
        let mut faults = Vec::new();
        for (reason, names) in &self.ignored {
            parsed.notes.push(format!("ignored: {}; {reason}", names.join(", ")));
        }
        for (key, value, meaning, origin) in self.read {
            let place = origin.name_option(&key);
            match meaning {
                Meaning::Ignored(_) => {}
                Meaning::Unread(advice) => {
                    parsed.notes.push(format!("warning: {place} is ignored: {advice}"));
                }
                Meaning::Named(name) if parsed.options.is_written(name) => {
                    parsed.notes.push(format!("{place} is ignored, since `{name}` is given"));
                }
                Meaning::Named(name) => {
                    parsed.notes.push(format!("{place} is read as `{name}`"));
                    let Some(spec) = find_option(name) else { continue };
                    if let Err(fault) = assign(&mut parsed.options, spec, &value, origin) {
                        faults.push(fault.to_string());
                    }
                }
                Meaning::Argument(option, argument) => {
                    parsed.notes.push(format!("{place} is read as a part of `{option}`"));
                    let items = front_ends::argument_items(argument, &value);
                    add_items(&mut parsed.options, option, items);
                    parsed.options.written.entry(option).or_insert(origin);
                }
            }
        }
        faults
    }
}

/// Adds `key=value` items to a list option, except for keys that it holds.
fn add_items(options: &mut Options, option: &str, items: Vec<String>) {
    let list = match option {
        "network_args" => options.network_args.get_or_insert_default(),
        _ => options.optimizer_args.get_or_insert_default(),
    };
    let key_of = |item: &str| item.split('=').next().unwrap_or_default().trim().to_owned();
    for item in items {
        if !list.iter().any(|other| key_of(other) == key_of(&item)) {
            list.push(item);
        }
    }
}
