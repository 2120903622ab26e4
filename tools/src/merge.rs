//! `merge`: adapters merged into a model, or LoRAs into one LoRA.
//!
//! sd-scripts' `merge_lora.py` and `sdxl_merge_lora.py`, for SD1, SD2 and SDXL alike. Beyond them:
//! diffusers folders, adapters of every kind and naming, layers outside of the reference's targets
//! (where LyCORIS has modules for them), sums that are exact.

mod change;
mod folder;
pub(crate) mod input;
mod into_model;
mod loras;
pub(crate) mod metadata;
mod plan;
mod shuffle;

use std::path::{Path, PathBuf};

use clap::Args;
use formats::model_files::{Container, ModelFiles};
use formats::{Family, lora_file};

use crate::finite::FiniteRule;
use crate::precision::Precision;
use crate::progress::{Progress, tell};
use crate::{Usage, output};
use input::Mix;
use into_model::Merge;
use loras::{Request, Way};
use plan::Plan;

/// Options of `merge`.
#[derive(Debug, Args)]
pub struct Options {
    /// The model to merge into: a `.safetensors` or `.ckpt` file, or a diffusers folder; without it
    /// the LoRAs are merged into one LoRA
    #[arg(long = "sd_model", value_name = "MODEL")]
    sd_model: Option<PathBuf>,
    /// Where to write: `.safetensors` or `.ckpt`; a folder when the model is one
    #[arg(long = "save_to", value_name = "PATH")]
    save_to: PathBuf,
    #[command(flatten)]
    mix: Mix,
    /// The number type that the merge is made in; all but `float` round every step
    #[arg(long = "precision", value_name = "TYPE", default_value = "float")]
    precision: Precision,
    /// The number type that is written; that of `precision` when left out
    #[arg(long = "save_precision", value_name = "TYPE")]
    save_precision: Option<Precision>,
    /// The model is a Stable Diffusion 2.x; it tells so itself, this is only checked
    #[arg(long = "v2")]
    v2: bool,
    /// Write no ModelSpec metadata (a LoRA keeps its least `ss_` keys)
    #[arg(long = "no_metadata")]
    no_metadata: bool,
    /// LoRAs into one: stack the ranks of all files, which gives exactly the sum of ratio times LoRA
    /// at the sum of the ranks
    #[arg(long = "concat")]
    concat: bool,
    /// LoRAs into one: write the ranks of each module in another order; what the LoRA does stays
    #[arg(long = "shuffle")]
    shuffle: bool,
    /// The order that `shuffle` draws; the same number gives the same file
    #[arg(long = "seed", value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    /// LoRAs into one: exactly sd-scripts' arithmetic, whose `concat` squares the ratios and keeps
    /// the first file's alpha
    #[arg(long = "reference_arithmetic")]
    reference_arithmetic: bool,
    #[command(flatten)]
    finite: FiniteRule,
}

impl Options {
    /// The type that sd-scripts' steps are rounded to.
    fn rounding(&self) -> Option<formats::Dtype> {
        (self.precision != Precision::Float).then(|| self.precision.dtype())
    }

    fn save_type(&self) -> formats::Dtype {
        self.save_precision.unwrap_or(self.precision).dtype()
    }

    fn read_paths(&self) -> Vec<&Path> {
        self.sd_model.as_deref().into_iter().chain(self.mix.paths()).collect()
    }
}

/// Does the work.
///
/// # Errors
/// Options that cannot be meant, files that cannot be read or do not fit each other, what cannot be
/// written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    options.mix.check()?;
    match &options.sd_model {
        Some(model) => merge_into_model(options, model),
        None => merge_loras(options),
    }
}

fn merge_into_model(options: &Options, path: &Path) -> anyhow::Result<()> {
    for (given, name) in [
        (options.concat, "concat"),
        (options.shuffle, "shuffle"),
        (options.reference_arithmetic, "reference_arithmetic"),
    ] {
        if given {
            tell(&format!("`{name}` means nothing with `sd_model`, which is merged exactly"));
        }
    }
    output::refuse_input(&options.save_to, &options.read_paths())?;
    let model = ModelFiles::open(path)?;
    model.notes.iter().for_each(|note| tell(note));
    if options.v2 && model.family != Family::Sd2 {
        return Err(Usage(format!(
            "`v2` is set, and `{}` is a model of: {}\nhint: leave `v2` out, the model tells",
            path.display(),
            model.family.title()
        ))
        .into());
    }
    let save_as = match model.container {
        Container::SingleFile => Some(output::prepare(&options.save_to, &options.read_paths())?),
        Container::Folder => {
            folder::check_target(&options.save_to, path, &options.read_paths())?;
            None
        }
    };
    let inputs = options.mix.open()?;
    let rounding = options.rounding();
    let (plan, told) = Plan::new(&model, &inputs, rounding, options.finite)?;
    told.iter().for_each(|line| tell(line));
    let save = options.save_type();
    let progress = Progress::of_bytes(Merge::total_bytes(&model, save));
    let merge =
        Merge { model: &model, plan, save, rounding, finite: options.finite, progress: &progress };
    match save_as {
        None => folder::write(&merge, &options.save_to)?,
        Some(save_as) => {
            let (metadata, note) = metadata::of_model(&model, &inputs, &options.save_to);
            let metadata = (!options.no_metadata).then_some(metadata);
            if let (Some(note), Some(_)) = (note, &metadata) {
                progress.tell(note);
            }
            merge.write_file(0, &options.save_to, save_as, metadata.as_ref())?;
        }
    }
    drop(progress);
    tell(&format!("written: {}", options.save_to.display()));
    Ok(())
}

fn merge_loras(options: &Options) -> anyhow::Result<()> {
    let save_as = output::prepare(&options.save_to, &options.read_paths())?;
    let way = match (options.concat, options.reference_arithmetic) {
        (true, false) => Way::Stack,
        (true, true) => Way::ReferenceStack,
        (false, _) => Way::Add,
    };
    let inputs = options.mix.open()?;
    let request = Request {
        way,
        shuffle: options.shuffle.then_some(options.seed),
        rounding: options.rounding(),
        finite: options.finite,
    };
    let merged = loras::merge(&inputs, request)?;
    let with_model_spec = !options.no_metadata;
    let (metadata, note) =
        metadata::of_lora(&inputs, &merged.ranks, &options.save_to, with_model_spec);
    let cast = |(name, tensor): (&String, &formats::OwnedTensor)| {
        Ok((name.clone(), tensor.cast(options.save_type())?))
    };
    let tensors = merged.tensors.iter().map(cast).collect::<anyhow::Result<_>>()?;
    lora_file::write(&options.save_to, &tensors, &metadata, save_as)?;
    note.into_iter().for_each(tell);
    tell(&format!("{} modules: {}", merged.ranks.len(), said_of(way)));
    tell(&format!("written: {}", options.save_to.display()));
    Ok(())
}

/// What was computed.
fn said_of(way: Way) -> &'static str {
    match way {
        Way::Stack => "ranks stacked, the result is exactly the sum of ratio times LoRA",
        Way::ReferenceStack => {
            "ranks stacked with sd-scripts' scales: ratios squared, the first file's alpha"
        }
        Way::Add => {
            "up and down were added each by itself, as sd-scripts does: ratios count squared, and \
             products of one LoRA's up with another's down are added\nhint: `--concat` gives \
             exactly the sum of ratio times LoRA; `lorarun svd-merge` comes closest at a given rank"
        }
    }
}
