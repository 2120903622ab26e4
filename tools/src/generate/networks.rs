//! The LoRA files of a run: opened and looked at before the model is loaded.

use std::path::{Path, PathBuf};

use formats::adapter::{AdapterFile, AdapterKind};
use formats::model_hash;

use super::options::LoraOptions;
use crate::Usage;
use crate::progress::tell;

/// Digits of a LoRA's hash in WebUI's text.
const HASH_DIGITS: usize = 12;

/// A LoRA file.
#[derive(Clone, Debug)]
pub(super) struct Network {
    pub path: PathBuf,
    /// The file's name without its ending: what `<lora:NAME:1>` calls it.
    pub name: String,
    /// How WebUI recognises it.
    pub hash: String,
}

/// All of them, with how many are merged into the model.
#[derive(Clone, Debug, Default)]
pub(super) struct Networks {
    pub all: Vec<Network>,
    /// The first so many are merged.
    pub merged: usize,
    /// Their multipliers as given on the command line, 1 where none was.
    pub multipliers: Vec<f32>,
}

impl Networks {
    /// Opens the files and checks that modules and multipliers fit them. With `is_grid` multipliers
    /// are the sheet's and may be as many as one likes.
    ///
    /// # Errors
    /// A [`Usage`] for options that do not fit each other, reading errors of the files.
    pub fn open(options: &LoraOptions, is_grid: bool) -> anyhow::Result<Self> {
        let count = options.weights.len();
        check_counts(options, is_grid)?;
        if options.args.is_some() {
            tell("`--network_args` has no effect: the files tell what they are");
        }
        let mut all = Vec::new();
        for (index, path) in options.weights.iter().enumerate() {
            let file = AdapterFile::open(path)?;
            let one_for_all = options.modules.first().filter(|_| options.modules.len() == 1);
            if let Some(module) = options.modules.get(index).or(one_for_all) {
                check_module(module, &file)?;
            }
            if options.show_meta {
                show_metadata(&file);
            }
            all.push(Network { name: name_of(path), hash: hash_of(&file)?, path: path.clone() });
        }
        let merged = match options.merge_n_models {
            Some(some) => some,
            None if options.merge => count,
            None => 0,
        };
        let mut multipliers = options.multipliers.clone();
        multipliers.resize(count, 1.);
        Ok(Self { all, merged, multipliers })
    }

    /// Those that are applied, whose multipliers can change.
    pub fn applied(&self) -> &[Network] {
        &self.all[self.merged..]
    }

    /// Their multipliers on the command line.
    pub fn applied_multipliers(&self) -> &[f32] {
        &self.multipliers[self.merged..]
    }
}

fn check_counts(options: &LoraOptions, is_grid: bool) -> Result<(), Usage> {
    let (weights, modules) = (options.weights.len(), options.modules.len());
    let multipliers = options.multipliers.len();
    if weights == 0 {
        let given = match () {
            () if modules > 0 => "network_module",
            () if multipliers > 0 => "network_mul",
            () if options.merge || options.merge_n_models.is_some() => "network_merge",
            () if options.pre_calc => "network_pre_calc",
            () => return Ok(()),
        };
        let hint = "hint: name the files, `--network_weights ring.safetensors`";
        return Err(Usage(format!("`--{given}` is given without `--network_weights`\n{hint}")));
    }
    if modules > 1 && modules != weights {
        return Err(Usage(format!(
            "`--network_weights` names {weights} files, `--network_module` should name one module or \
             as many, it names: {modules}"
        )));
    }
    if !is_grid && multipliers > 0 && multipliers != weights {
        return Err(Usage(format!(
            "`--network_weights` names {weights} files, `--network_mul` should give as many numbers, \
             it gives: {multipliers}\nhint: with `--grid` each number is a column of its own"
        )));
    }
    if let Some(number) = options.multipliers.iter().find(|number| !number.is_finite()) {
        return Err(Usage(format!("`--network_mul` should be numbers, one is: {number}")));
    }
    match options.merge_n_models {
        Some(some) if some > weights => Err(Usage(format!(
            "`--network_merge_n_models` should be at most the {weights} files of \
             `--network_weights`, it is: {some}"
        ))),
        _ => Ok(()),
    }
}

/// An error if a file cannot have come from a module of sd-scripts.
fn check_module(module: &str, file: &AdapterFile) -> Result<(), Usage> {
    let fits = |fits: fn(&AdapterKind) -> bool| file.modules.iter().all(|m| fits(&m.kind));
    let is_fit = match module.trim_start_matches("networks.").trim_start_matches("lycoris.") {
        "lora" | "dylora" | "lora_fa" | "lora_diffusers" => {
            fits(|kind| matches!(kind, AdapterKind::LowRank { .. }))
        }
        "loha" => fits(|kind| matches!(kind, AdapterKind::Hadamard { .. })),
        "lokr" => fits(|kind| matches!(kind, AdapterKind::Kronecker { .. })),
        // LyCORIS has all kinds.
        "kohya" => true,
        _ => {
            return Err(Usage(format!(
                "`--network_module` is unknown: `{module}`\nhint: `networks.lora`, \
                 `networks.dylora`, `networks.loha`, `networks.lokr` and `lycoris.kohya` are \
                 known; the option can be left out, the files tell"
            )));
        }
    };
    if is_fit {
        return Ok(());
    }
    Err(Usage(format!(
        "`{}` holds modules of another kind than `--network_module` says: `{module}`\n\
         hint: leave the option out, the file tells",
        file.path.display()
    )))
}

fn show_metadata(file: &AdapterFile) {
    tell(&format!("metadata of `{}`:", file.path.display()));
    if file.metadata.is_empty() {
        tell("  none");
    }
    file.metadata.iter().for_each(|(key, value)| tell(&format!("  {key}: {value}")));
}

/// The file's name without its ending.
pub(super) fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// As WebUI takes it: from the metadata, else of the bytes behind the header.
fn hash_of(file: &AdapterFile) -> anyhow::Result<String> {
    let mut hash = match file.metadata.get("sshs_model_hash") {
        Some(hash) if hash.len() >= HASH_DIGITS && hash.is_ascii() => hash.clone(),
        _ => model_hash::content_sha256(&file.path)?,
    };
    hash.truncate(HASH_DIGITS);
    Ok(hash)
}
