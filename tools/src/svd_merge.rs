//! `svd-merge`: the sum of any adapters as one LoRA of a given rank, the closest there is.
//!
//! sd-scripts' `svd_merge_lora.py`: linear in the ratios, files of any ranks. Here adapters of every
//! kind and naming can be summed, the sum of low-rank ones is never formed, and alphas are floats.

mod kernel;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use formats::adapter::{AdapterKind, AdapterModule};
use formats::lora_file::{self, Metadata, Tensors};
use rayon::prelude::*;

use crate::delta::{Delta, delta_of};
use crate::factors::{Factors, Quantile};
use crate::finite::FiniteRule;
use crate::linalg::{Dense, Method, Product, Svd, of_low_rank_sum, truncated};
use crate::merge::input::{Input, Mix};
use crate::merge::metadata::of_lora;
use crate::precision::Precision;
use crate::progress::{Progress, tell};
use crate::{Usage, output};

/// Starts the random vectors of every dense sum: the same files give the same LoRA.
const SEED: u64 = 0;

/// Options of `svd-merge`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    mix: Mix,
    /// Where to write
    #[arg(long = "save_to", value_name = "FILE")]
    save_to: PathBuf,
    /// Rank of the new LoRA; where it is as high as the ranks together, nothing is lost
    #[arg(long = "new_rank", value_name = "RANK", default_value_t = 4)]
    new_rank: usize,
    /// The same for 3x3 convolutions [default: `new_rank`]
    #[arg(long = "new_conv_rank", value_name = "RANK")]
    new_conv_rank: Option<usize>,
    /// Cut values of the factors off beyond this quantile, as sd-scripts does, which loses up to a
    /// tenth of a module; 1 keeps them as they are
    #[arg(long = "clamp_quantile", value_name = "SHARE", default_value_t = 0.99)]
    clamp_quantile: f64,
    /// The number type that the adapters are rounded to first
    #[arg(long = "precision", value_name = "TYPE", default_value = "float")]
    precision: Precision,
    /// The number type that is written; that of `precision` when left out
    #[arg(long = "save_precision", value_name = "TYPE")]
    save_precision: Option<Precision>,
    /// Leave the `modelspec.` metadata out
    #[arg(long = "no_metadata")]
    no_metadata: bool,
    /// Accepted as sd-scripts' script has it; the work is done on the CPU
    #[arg(long = "device", value_name = "DEVICE")]
    device: Option<String>,
    #[command(flatten)]
    finite: FiniteRule,
}

/// Does the work.
///
/// # Errors
/// Options that cannot be meant, files that cannot be read or do not fit each other, what cannot be
/// written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    check(options)?;
    let quantile = Quantile::new(options.clamp_quantile)?;
    let read: Vec<&Path> = options.mix.paths().collect();
    let save_as = output::prepare(&options.save_to, &read)?;
    if options.device.is_some() {
        tell("`--device` is not needed here: the work is done on the CPU");
    }
    let inputs = options.mix.open()?;
    check_families(&inputs)?;
    let layers = layers(&inputs)?;
    let progress = Progress::of_pieces("modules", layers.len());
    let cut = |(name, parts): &(&str, Vec<Part<'_>>)| {
        let cut = cut(&inputs, name, parts, options);
        progress.advance(1);
        let (shape, mut factors) = cut.with_context(|| format!("module `{name}`"))?;
        factors.clamp(quantile);
        Ok((shape, factors))
    };
    let made: Vec<(Vec<usize>, Factors)> =
        layers.par_iter().with_max_len(1).map(cut).collect::<anyhow::Result<_>>()?;
    drop(progress);

    let dtype = options.save_precision.unwrap_or(options.precision).dtype();
    let mut tensors = Tensors::new();
    for ((name, _), (shape, factors)) in layers.iter().zip(&made) {
        factors.insert_into(&mut tensors, name, shape, dtype)?;
    }
    let metadata = metadata(options, &inputs);
    lora_file::write(&options.save_to, &tensors, &metadata, save_as)?;
    tell(&format!("{} modules: {}", made.len(), options.save_to.display()));
    Ok(())
}

fn check(options: &Options) -> Result<(), Usage> {
    options.mix.check()?;
    for (name, rank) in
        [("new_rank", Some(options.new_rank)), ("new_conv_rank", options.new_conv_rank)]
    {
        if rank == Some(0) {
            return Err(Usage(format!("`{name}` should be 1 or more, it is: 0")));
        }
    }
    Ok(())
}

fn check_families(inputs: &[Input]) -> anyhow::Result<()> {
    let mut known = inputs.iter().filter_map(|input| Some((input, input.file.family?)));
    let Some((first, family)) = known.next() else { return Ok(()) };
    if let Some((other, found)) = known.find(|(_, other)| *other != family) {
        bail!(
            "the adapters are for different families, `{}` and `{}`: {} and {}",
            first.file.path.display(),
            other.file.path.display(),
            family.title(),
            found.title()
        );
    }
    Ok(())
}

/// A module of one file: index of the file, the module.
type Part<'a> = (usize, &'a AdapterModule);

/// The layers that get a module, each with what the files have for it. What no LoRA can hold is
/// told.
fn layers(inputs: &[Input]) -> anyhow::Result<Vec<(&str, Vec<Part<'_>>)>> {
    let mut layers: BTreeMap<&str, Vec<Part<'_>>> = BTreeMap::new();
    for (index, input) in inputs.iter().enumerate() {
        let path = input.file.path.display();
        let mut left_out = 0;
        for module in &input.file.modules {
            ensure!(
                module.dora_scale.is_none(),
                "`{path}` has a module with trained lengths (DoRA), which no LoRA can hold: `{}`\n\
                 hint: merge it into a model with `lorarun merge`, then extract a LoRA",
                module.name
            );
            left_out += usize::from(module.bias.is_some());
            if matches!(module.kind, AdapterKind::Norm { .. }) {
                left_out += 1;
                continue;
            }
            layers.entry(&module.name).or_default().push((index, module));
        }
        if left_out > 0 {
            tell(&format!(
                "`{path}`: differences of biases and normalisations are left out, which no LoRA can \
                 hold: {left_out}"
            ));
        }
    }
    ensure!(!layers.is_empty(), "nothing is left that a LoRA can hold");
    Ok(layers.into_iter().collect())
}

/// The layer's shape and the factors of the sum.
fn cut(
    inputs: &[Input],
    name: &str,
    parts: &[Part<'_>],
    options: &Options,
) -> anyhow::Result<(Vec<usize>, Factors)> {
    let read = |(index, module): &Part<'_>| -> anyhow::Result<(Delta, f64)> {
        let input = &inputs[*index];
        let mut delta = delta_of(&input.file, module, options.finite)?;
        if options.precision != Precision::Float {
            delta.round(options.precision.dtype())?;
        }
        if options.finite.allow_nan {
            without_nan(&mut delta);
        }
        Ok((delta, input.ratio * input.block_weight(name)))
    };
    let deltas: Vec<(Delta, f64)> = parts.iter().map(read).collect::<anyhow::Result<_>>()?;
    let shapes: Vec<Vec<usize>> =
        parts.iter().map(|(index, module)| module.layer_shape(&inputs[*index].file)).collect();
    let size = deltas.first().context("a module of no file")?.0.size();
    for ((index, _), (delta, _)) in parts.iter().zip(&deltas) {
        ensure!(
            delta.size() == size,
            "`{}` and `{}` have it in different sizes: {size:?} and {:?}",
            inputs[parts[0].0].file.path.display(),
            inputs[*index].file.path.display(),
            delta.size()
        );
    }
    let family = parts.iter().find_map(|(index, _)| inputs[*index].file.family);
    let shape = kernel::shape_of(name, family, &shapes);
    let is_window = shape[2..].iter().any(|size| *size != 1);
    let rank = if is_window { options.new_conv_rank } else { None };
    let rank = rank.unwrap_or(options.new_rank).min(shape[0]).min(shape[1]);
    let svd = decompose(&deltas, size, rank)?.padded(rank);
    Ok((shape, Factors::of_svd(&svd, rank, rank as f32)))
}

/// At least the leading `rank` values of the sum of `factor * delta`.
fn decompose(
    deltas: &[(Delta, f64)],
    (rows, cols): (usize, usize),
    rank: usize,
) -> anyhow::Result<Svd> {
    let products: Option<Vec<Product<'_>>> = deltas.iter().map(low_rank).collect();
    if let Some(products) = products {
        return of_low_rank_sum(&products);
    }
    let mut sum = vec![0.0; rows * cols];
    for (delta, factor) in deltas {
        delta.add_rows(0, &mut sum, *factor as f32);
    }
    truncated(&Dense { rows, cols, values: &sum }, rank, Method::Fast, SEED)
}

fn low_rank((delta, factor): &(Delta, f64)) -> Option<Product<'_>> {
    match delta {
        Delta::LowRank { up, down, scale } => {
            Some(Product { up, down, factor: factor * f64::from(*scale) })
        }
        Delta::Dense { .. } => None,
    }
}

/// What is not finite counts as 0, where it is not refused: it has no singular values.
fn without_nan(delta: &mut Delta) {
    let matrices = match delta {
        Delta::LowRank { up, down, .. } => vec![up, down],
        Delta::Dense { values, .. } => vec![values],
    };
    for value in matrices.into_iter().flat_map(|matrix| &mut matrix.values) {
        if !value.is_finite() {
            *value = 0.0;
        }
    }
}

fn metadata(options: &Options, inputs: &[Input]) -> Metadata {
    let ranks = [(options.new_rank, options.new_rank as f32)];
    let (mut metadata, note) = of_lora(inputs, &ranks, &options.save_to, !options.no_metadata);
    note.into_iter().for_each(tell);
    let conv = options.new_conv_rank.unwrap_or(options.new_rank);
    let args = format!("{{\"conv_dim\": {conv}, \"conv_alpha\": {conv}}}");
    metadata.insert("ss_network_args".to_owned(), args);
    metadata.insert("ss_network_alpha".to_owned(), options.new_rank.to_string());
    metadata
}
