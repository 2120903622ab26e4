//! `extract`: what a fine-tuned model differs from its original by, as a LoRA.
//!
//! sd-scripts' `extract_lora_from_models.py`, for SD1, SD2 and SDXL, checkpoints and diffusers
//! folders in any mix. Both models stay in their mapped files; memory is that of the layers in work,
//! one for each core, and of the LoRA.

mod difference;

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use formats::Family;
use formats::lora_file::{self, Metadata, Tensors};
use formats::model_files::{ComponentKind, Layer, LayerTarget, ModelFiles};
use rayon::prelude::*;

use crate::dynamic_rank::{DynamicMethod, Rule, Spectrum};
use crate::factors::{Factors, Quantile};
use crate::finite::FiniteRule;
use crate::linalg::{Dense, Method, singular_values, truncated};
use crate::model_spec::model_spec;
use crate::precision::Precision;
use crate::progress::{Progress, tell};
use crate::{Usage, output};

use difference::Models;

/// Starts the random vectors of every layer: the same files give the same LoRA.
const SEED: u64 = 0;

/// Options of `extract`.
#[derive(Debug, Args)]
pub struct Options {
    /// The original model: `.safetensors`, `.ckpt` or a diffusers folder
    #[arg(long = "model_org", value_name = "PATH")]
    model_org: PathBuf,
    /// The fine-tuned model; the LoRA is what leads from the original to it
    #[arg(long = "model_tuned", value_name = "PATH")]
    model_tuned: PathBuf,
    /// Where to write
    #[arg(long = "save_to", value_name = "FILE")]
    save_to: PathBuf,
    /// Rank of the LoRA; with `--dynamic_method` the most that a layer gets
    #[arg(long = "dim", value_name = "RANK", default_value_t = 4)]
    dim: usize,
    /// Rank for 3x3 convolutions; without it the layers between the attentions are left out
    #[arg(long = "conv_dim", value_name = "RANK")]
    conv_dim: Option<usize>,
    /// Choose each layer's rank by its singular values
    #[arg(long = "dynamic_method", value_name = "METHOD", value_enum)]
    dynamic_method: Option<DynamicMethod>,
    /// How much `--dynamic_method` keeps: a share (0.9), for `sv_ratio` the largest ratio (20)
    #[arg(long = "dynamic_param", value_name = "NUMBER")]
    dynamic_param: Option<f64>,
    /// Cut values of the factors off beyond this quantile; 1 keeps them as they are
    #[arg(long = "clamp_quantile", value_name = "SHARE", default_value_t = 0.99)]
    clamp_quantile: f64,
    /// Leave the text encoders out when none of their weights differs by more than this
    #[arg(long = "min_diff", value_name = "NUMBER", default_value_t = 0.01)]
    min_diff: f32,
    /// Both are Stable Diffusion 2.x models; the files tell it too, and must agree
    #[arg(long = "v2", conflicts_with = "sdxl")]
    v2: bool,
    /// Both are SDXL models; the files tell it too, and must agree
    #[arg(long = "sdxl")]
    sdxl: bool,
    /// The models predict v (metadata alone) [default: as `--v2`]
    #[arg(long = "v_parameterization")]
    v_parameterization: bool,
    /// Round the weights to this type before they are compared
    #[arg(long = "load_precision", value_enum)]
    load_precision: Option<Precision>,
    /// Number type of the file
    #[arg(long = "save_precision", value_enum, default_value = "float")]
    save_precision: Precision,
    /// Leave the `modelspec.` metadata out
    #[arg(long = "no_metadata")]
    no_metadata: bool,
    /// All layers by the exact way, which takes several times as long
    #[arg(long = "exact")]
    exact: bool,
    /// Accepted as sd-scripts' script has it; the work is done on the CPU
    #[arg(long = "device", value_name = "DEVICE")]
    device: Option<String>,
    /// Accepted as sd-scripts' script has it; models are not loaded but read in place
    #[arg(long = "load_original_model_to", value_name = "DEVICE")]
    load_original_model_to: Option<String>,
    /// Accepted as sd-scripts' script has it; models are not loaded but read in place
    #[arg(long = "load_tuned_model_to", value_name = "DEVICE")]
    load_tuned_model_to: Option<String>,
    #[command(flatten)]
    finite: FiniteRule,
}

/// Does the work.
///
/// # Errors
/// Options that cannot be meant, models of different families or shapes, weights that are not
/// finite, what cannot be read or written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    for (name, rank) in [("dim", Some(options.dim)), ("conv_dim", options.conv_dim)] {
        if rank == Some(0) {
            return Err(Usage(format!("`{name}` should be 1 or more, it is: 0")).into());
        }
    }
    let rule = Rule::from_options(options.dynamic_method, options.dynamic_param)?;
    let quantile = Quantile::new(options.clamp_quantile)?;
    let save_as = output::prepare(&options.save_to, &[&options.model_org, &options.model_tuned])?;
    let unused = [
        ("device", &options.device),
        ("load_original_model_to", &options.load_original_model_to),
        ("load_tuned_model_to", &options.load_tuned_model_to),
    ];
    for (name, _) in unused.iter().filter(|(_, value)| value.is_some()) {
        tell(&format!("`--{name}` is not needed here: the work is done on the CPU, in place"));
    }
    let models = Models {
        original: ModelFiles::open(&options.model_org)?,
        tuned: ModelFiles::open(&options.model_tuned)?,
        rounding: options.load_precision.map(Precision::dtype),
        finite: options.finite,
    };
    let family = check_families(&models, options)?;
    let layers = chosen_layers(&models, options)?;
    let progress = Progress::of_pieces("layers", layers.len());
    let cut = |layer: &&Layer| {
        let cut = cut(&models, layer, options, (rule, quantile));
        progress.advance(1);
        cut.with_context(|| format!("layer `{}`", layer.name))
    };
    let factors: Vec<Factors> =
        layers.par_iter().with_max_len(1).map(cut).collect::<anyhow::Result<_>>()?;
    drop(progress);

    let dtype = options.save_precision.dtype();
    let mut tensors = Tensors::new();
    for (layer, factors) in layers.iter().zip(factors) {
        factors.insert_into(&mut tensors, &layer.name, &layer.shape, dtype)?;
    }
    let metadata = metadata(options, family, rule);
    lora_file::write(&options.save_to, &tensors, &metadata, save_as)?;
    tell(&format!("{} layers: {}", layers.len(), options.save_to.display()));
    Ok(())
}

/// The family of both models.
fn check_families(models: &Models, options: &Options) -> anyhow::Result<Family> {
    let (original, tuned) = (&models.original, &models.tuned);
    if original.family != tuned.family {
        bail!(
            "the models are of different families, `{}` and `{}`: {} and {}",
            original.path.display(),
            tuned.path.display(),
            original.family.title(),
            tuned.family.title()
        );
    }
    let family = original.family;
    let wrong = [("v2", options.v2, Family::Sd2), ("sdxl", options.sdxl, Family::Sdxl)]
        .into_iter()
        .find(|(_, given, meant)| *given && *meant != family);
    if let Some((name, _, _)) = wrong {
        return Err(Usage(format!(
            "`--{name}` is given, but `{}` is: {}\nhint: leave `--{name}` out, the files tell",
            original.path.display(),
            family.title()
        ))
        .into());
    }
    for note in original.notes.iter().chain(&tuned.notes) {
        tell(note);
    }
    Ok(family)
}

/// The layers that get a module, the largest first, so that no core is left with one at the end.
fn chosen_layers<'m>(models: &'m Models, options: &Options) -> anyhow::Result<Vec<&'m Layer>> {
    let (original, tuned) = (&models.original, &models.tuned);
    let is_target = |layer: &&Layer| match layer.target {
        LayerTarget::Attention => true,
        LayerTarget::Resnet => options.conv_dim.is_some(),
        LayerTarget::Outer => false,
    };
    let mut layers: Vec<&Layer> = original.layers().iter().filter(is_target).collect();
    let counterpart = |layer: &Layer| {
        let Some(other) = tuned.layer(&layer.name) else {
            bail!("`{}` lacks a layer: `{}`", tuned.path.display(), layer.name);
        };
        ensure!(
            other.shape == layer.shape,
            "the layer `{}` has different shapes, in `{}` and `{}`: {:?} and {:?}",
            layer.name,
            original.path.display(),
            tuned.path.display(),
            layer.shape,
            other.shape
        );
        Ok(())
    };
    layers.iter().try_for_each(|layer| counterpart(layer))?;
    if let Some(extra) =
        tuned.layers().iter().filter(is_target).find(|layer| original.layer(&layer.name).is_none())
    {
        bail!("`{}` lacks a layer: `{}`", original.path.display(), extra.name);
    }
    let is_text = |layer: &&Layer| layer.component != ComponentKind::Unet;
    let text: Vec<&Layer> = layers.iter().copied().filter(is_text).collect();
    // NaN, which comes so far with `--allow_nan` alone, counts as no difference.
    let most = text
        .par_iter()
        .with_max_len(1)
        .map(|layer| models.largest_difference(layer))
        .try_reduce(|| 0.0_f32, |a, b| Ok(a.max(b)))?;
    if most <= options.min_diff {
        tell(&format!(
            "the text encoders differ by {most} at most (`min_diff` is {}): they are left out",
            options.min_diff
        ));
        layers.retain(|layer| !is_text(layer));
    }
    layers.sort_by_key(|layer| std::cmp::Reverse(layer.shape.iter().product::<usize>()));
    Ok(layers)
}

/// The factors of one layer's difference.
fn cut(
    models: &Models,
    layer: &Layer,
    options: &Options,
    (rule, quantile): (Option<Rule>, Quantile),
) -> anyhow::Result<Factors> {
    let values = models.difference(layer)?;
    let (out, inputs) = (layer.shape[0], layer.shape[1]);
    let is_window = layer.shape[2..].iter().any(|size| *size != 1);
    let most = match options.conv_dim {
        Some(dim) if is_window => dim,
        _ => options.dim,
    };
    let matrix = Dense { rows: out, cols: values.len() / out, values: &values };
    let most = most.min(out).min(inputs);
    let method = if options.exact { Method::Exact } else { Method::Fast };
    let svd = truncated(&matrix, most, method, SEED)?;
    let sum = match rule {
        // The one rule that asks for every singular value.
        Some(Rule { method: DynamicMethod::Cumulative, .. }) if svd.energy > 0.0 => {
            singular_values(&matrix)?.iter().sum()
        }
        _ => svd.s.iter().sum(),
    };
    let length = matrix.rows.min(matrix.cols);
    let spectrum = Spectrum { leading: &svd.s, length, energy: svd.energy, sum };
    // Without a rule the dim stays, also where there is no difference.
    let rank = rule.map_or(most, |rule| spectrum.rank(Some(rule), most));
    let mut factors = Factors::of_svd(&svd, rank, rank as f32);
    factors.clamp(quantile);
    Ok(factors)
}

fn metadata(options: &Options, family: Family, rule: Option<Rule>) -> Metadata {
    let v2 = family == Family::Sd2;
    let v_parameterization = options.v_parameterization || v2;
    let network_args = options.conv_dim.map_or_else(
        || "{}".to_owned(),
        |dim| format!("{{\"conv_dim\": \"{dim}\", \"conv_alpha\": \"{dim}.0\"}}"),
    );
    let (dim, alpha) = match rule {
        Some(_) => ("Dynamic".to_owned(), "Dynamic".to_owned()),
        None => (options.dim.to_string(), format!("{}.0", options.dim)),
    };
    let mut metadata = Metadata::new();
    let mut set = |key: &str, value: &str| metadata.insert(key.to_owned(), value.to_owned());
    set("ss_v2", if v2 { "True" } else { "False" });
    set("ss_base_model_version", family.version_tag(v_parameterization));
    set("ss_network_module", "networks.lora");
    set("ss_network_dim", &dim);
    set("ss_network_alpha", &alpha);
    set("ss_network_args", &network_args);
    if !options.no_metadata {
        let spec = model_spec(&options.save_to, family, v_parameterization, None);
        metadata.extend(spec.to_metadata());
    }
    metadata
}
