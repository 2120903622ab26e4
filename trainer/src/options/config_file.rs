//! Reads a config file: flat or sectioned TOML, with the line of every key for error messages.
//!
//! Section names carry no meaning (as in sd-scripts). `[[datasets]]`, and `[general]` beside it,
//! are handed over as they stand: the dataset reader owns their keys.

use super::front_ends::flatten_easy_scripts;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use toml::de::DeTable;

/// One `key = value` of a config file.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigEntry {
    /// The key as written.
    pub key: String,
    /// Its value.
    pub value: toml::Value,
    /// Line of the key, from 1.
    pub line: usize,
}

/// A config file taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigFile {
    /// The file it was read from.
    pub path: PathBuf,
    /// Options in the order of the file, sections flattened.
    pub entries: Vec<ConfigEntry>,
    /// `general` and `datasets`, when the file holds `[[datasets]]`.
    pub datasets: Option<toml::Table>,
}

/// Finds the file that `name` stands for: `name` itself, or `name.toml`.
pub fn find_config(name: &Path) -> Result<PathBuf> {
    if name.is_file() {
        if name.extension().is_some_and(|suffix| suffix == "json") {
            bail!(
                "the config file is not TOML: `{}`\nhint: a JSON file holds the settings of a GUI; use the TOML file that the GUI writes when training starts, in its output folder",
                name.display()
            );
        }
        return Ok(name.to_path_buf());
    }
    let with_suffix = add_toml_suffix(name);
    if with_suffix.is_file() {
        return Ok(with_suffix);
    }
    if name.is_dir() {
        bail!("the config file is a folder: `{}`", name.display());
    }
    bail!(
        "the config file does not exist: `{}`\nhint: the command line is `lorarun train config.toml [--option value ...]`",
        name.display()
    )
}

/// `name` with `.toml` added unless it ends so already.
pub fn add_toml_suffix(name: &Path) -> PathBuf {
    if name.extension().is_some_and(|suffix| suffix == "toml") {
        return name.to_path_buf();
    }
    let mut text = name.as_os_str().to_owned();
    text.push(".toml");
    PathBuf::from(text)
}

/// Reads and takes apart a config file.
pub fn read_config(path: &Path) -> Result<ConfigFile> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the config file as text: `{}`", path.display()))?;
    take_apart(path, text.strip_prefix('\u{feff}').unwrap_or(&text))
}

/// Takes the text of a config file apart.
fn take_apart(path: &Path, text: &str) -> Result<ConfigFile> {
    let shown = path.display();
    let lines = LineIndex(text);
    let syntax = |error: toml::de::Error| {
        let (line, column) = lines.place(error.span().map_or(0, |span| span.start));
        anyhow::anyhow!("{shown}:{line}:{column}: not valid TOML: {}", error.message().trim())
    };
    let spanned = DeTable::parse(text).map_err(syntax)?;
    let mut table: toml::Table = toml::from_str(text).map_err(syntax)?;
    if table.is_empty() {
        bail!(
            "{shown}:1:1: the config file is empty\nhint: `lorarun train --help` lists the options"
        );
    }
    flatten_easy_scripts(&mut table);
    let datasets = take_datasets(path, &mut table)?;
    let mut entries: Vec<ConfigEntry> = Vec::new();
    for (key, place) in spanned.get_ref().iter() {
        // What is not there any more was part of the datasets.
        let Some(value) = table.remove(key.get_ref().as_ref()) else { continue };
        let line = lines.place(key.span().start).0;
        let toml::Value::Table(section) = value else {
            push_entry(
                path,
                &mut entries,
                ConfigEntry { key: key.get_ref().to_string(), value, line },
            )?;
            continue;
        };
        for (inner, value) in section {
            let line = place
                .get_ref()
                .as_table()
                .and_then(|table| table.iter().find(|(name, _)| name.get_ref().as_ref() == inner))
                .map_or(line, |(name, _)| lines.place(name.span().start).0);
            push_entry(path, &mut entries, ConfigEntry { key: inner, value, line })?;
        }
    }
    Ok(ConfigFile { path: path.to_path_buf(), entries, datasets })
}

/// Moves the dataset tables out of the config.
fn take_datasets(path: &Path, table: &mut toml::Table) -> Result<Option<toml::Table>> {
    let Some(datasets) = table.remove("datasets") else { return Ok(None) };
    if !datasets.is_array() {
        bail!("{}: `datasets` must be a list of tables, written as `[[datasets]]`", path.display());
    }
    let mut taken = toml::Table::new();
    if let Some(general) = table.remove("general") {
        taken.insert("general".to_owned(), general);
    }
    taken.insert("datasets".to_owned(), datasets);
    Ok(Some(taken))
}

/// Adds an entry; the same option in two sections is refused, since only one value can count.
fn push_entry(path: &Path, entries: &mut Vec<ConfigEntry>, entry: ConfigEntry) -> Result<()> {
    if let Some(first) = entries.iter().find(|other| other.key == entry.key) {
        bail!(
            "{}:{}: `{}` is set twice, the first time in line {}",
            path.display(),
            entry.line,
            entry.key,
            first.line
        );
    }
    entries.push(entry);
    Ok(())
}

/// Line and column of byte offsets in a text.
struct LineIndex<'a>(&'a str);

impl LineIndex<'_> {
    /// Line and column, from 1, of a byte offset.
    fn place(&self, offset: usize) -> (usize, usize) {
        let mut end = offset.min(self.0.len());
        while !self.0.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.0[..end];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ConfigFile> {
        take_apart(Path::new("c.toml"), text)
    }

    #[test]
    fn sections_are_flattened_and_lines_kept() {
        let config = read("seed = 1\n\n[any]\nlearning_rate = 1e-4\nv2 = false\n").unwrap();
        let seen: Vec<_> = config.entries.iter().map(|e| (e.key.as_str(), e.line)).collect();
        assert_eq!(seen, [("seed", 1), ("learning_rate", 4), ("v2", 5)]);
        assert!(config.datasets.is_none());
    }

    #[test]
    fn dataset_tables_are_handed_over_whole() {
        let text = "seed=1\n[general]\nshuffle_caption=true\n[[datasets]]\nresolution=512\n[[datasets.subsets]]\nimage_dir='a'\n";
        let config = read(text).unwrap();
        assert_eq!(config.entries.len(), 1);
        let datasets = config.datasets.unwrap();
        assert_eq!(datasets["general"]["shuffle_caption"].as_bool(), Some(true));
        assert_eq!(datasets["datasets"][0]["subsets"][0]["image_dir"].as_str(), Some("a"));
    }

    #[test]
    fn general_without_datasets_is_a_section() {
        let config = read("[general]\nenable_bucket = true\n").unwrap();
        assert_eq!(config.entries[0].key, "enable_bucket");
    }

    #[test]
    fn faults_name_their_place() {
        let message = |text| read(text).unwrap_err().to_string();
        assert!(message("").starts_with("c.toml:1:1: the config file is empty"));
        assert!(message("# only a comment\n").contains("is empty"));
        assert!(
            message("seed = 1\nlr = = 2\n").starts_with("c.toml:2:"),
            "{}",
            message("seed = 1\nlr = = 2\n")
        );
        assert!(message("--seed 1").starts_with("c.toml:1:"));
        assert_eq!(
            message("[a]\nseed = 1\n[b]\nseed = 2\n"),
            "c.toml:4: `seed` is set twice, the first time in line 2"
        );
        assert!(message("datasets = 3").contains("[[datasets]]"));
    }
}
