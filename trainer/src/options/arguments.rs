//! Lists of `key=value`: the parts that the readers of network and optimizer settings share.

use super::suggest::closest;
use anyhow::{Result, bail};

/// Splits every `key=value`.
pub(super) fn split_pairs(option: &str, items: Option<&[String]>) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for item in items.unwrap_or_default() {
        let Some((key, value)) = item.split_once('=') else {
            bail!("`{option}` takes `key=value`, not: `{item}`");
        };
        let key = key.trim().to_owned();
        if pairs.iter().any(|(other, _)| *other == key) {
            bail!("`{option}` sets a key twice: `{key}`");
        }
        pairs.push((key, value.trim().to_owned()));
    }
    Ok(pairs)
}

/// Reads one number of a pair.
pub(super) fn read_number<T: std::str::FromStr>(option: &str, key: &str, value: &str) -> Result<T> {
    let kind = if key.ends_with("dim") { "a whole number" } else { "a number" };
    match value.parse() {
        Ok(number) if value.parse::<f64>().is_ok_and(f64::is_finite) => Ok(number),
        _ => bail!("`{key}` in `{option}` must be {kind}, not: `{value}`"),
    }
}

/// Refuses a key that nobody knows.
pub(super) fn refuse_key<T>(option: &str, key: &str, known: &[&str]) -> Result<T> {
    match closest(key, known) {
        Some(name) => bail!("unknown key in `{option}`: `{key}`\nhint: did you mean `{name}`?"),
        None => {
            bail!("unknown key in `{option}`: `{key}`\nhint: known keys are {}", known.join(", "))
        }
    }
}
