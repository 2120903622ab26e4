//! `resize-lora`: a LoRA cut to a smaller rank, module by module, at the best that the rank allows.
//!
//! sd-scripts' `resize_lora.py`, its rules of ranks, alphas, metadata and report; the names of the
//! file's keys stay, whatever their form. Singular values come from the two factors: the product is
//! never formed.

mod pairs;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use formats::lora_file::{self, Metadata, Tensors};
use formats::{Dtype, OwnedTensor, open_tensor_file};
use rayon::prelude::*;

use crate::dynamic_rank::{DynamicMethod, Rule, Spectrum};
use crate::finite::FiniteRule;
use crate::linalg::{Product, of_low_rank_sum};
use crate::matrix::Matrix;
use crate::precision::Precision;
use crate::progress::{Progress, tell};
use crate::{Usage, output};

use pairs::Pair;
use report::Line;

/// Options of `resize-lora`.
#[derive(Debug, Args)]
pub struct Options {
    /// The LoRA to resize: `.safetensors`, `.ckpt` or `.pt`; names of sd-scripts, PEFT or ControlLoRA
    #[arg(long = "model", value_name = "FILE")]
    model: PathBuf,
    /// Where to write
    #[arg(long = "save_to", value_name = "FILE")]
    save_to: PathBuf,
    /// Rank of the new LoRA; with `--dynamic_method` the most that a module gets
    #[arg(long = "new_rank", value_name = "RANK", default_value_t = 4)]
    new_rank: usize,
    /// The same for convolutions, 1x1 ones too [default: `new_rank`]
    #[arg(long = "new_conv_rank", value_name = "RANK")]
    new_conv_rank: Option<usize>,
    /// Choose each module's rank by its singular values
    #[arg(long = "dynamic_method", value_name = "METHOD", value_enum)]
    dynamic_method: Option<DynamicMethod>,
    /// How much `--dynamic_method` keeps: a share (0.9), for `sv_ratio` the largest ratio (20)
    #[arg(long = "dynamic_param", value_name = "NUMBER")]
    dynamic_param: Option<f64>,
    /// Report what each module keeps, on stdout
    #[arg(long = "verbose")]
    verbose: bool,
    /// Number type of the file
    #[arg(long = "save_precision", value_enum, default_value = "float")]
    save_precision: Precision,
    /// Accepted as sd-scripts' scripts have it; the work is done on the CPU
    #[arg(long = "device", value_name = "DEVICE")]
    device: Option<String>,
    #[command(flatten)]
    finite: FiniteRule,
}

/// Does the work.
///
/// # Errors
/// Options that cannot be meant, what cannot be read, holds no LoRA or cannot be written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    for (name, rank) in
        [("new_rank", Some(options.new_rank)), ("new_conv_rank", options.new_conv_rank)]
    {
        if rank == Some(0) {
            return Err(Usage(format!("`{name}` should be 1 or more, it is: 0")).into());
        }
    }
    let rule = Rule::from_options(options.dynamic_method, options.dynamic_param)?;
    let save_as = output::prepare(&options.save_to, &[&options.model])?;
    if options.device.is_some() {
        tell("`--device` is not needed here: the work is done on the CPU");
    }
    let file = open_tensor_file(&options.model)?;
    let pairs = pairs::find(&file)?;
    let dtype = options.save_precision.dtype();
    let progress = Progress::of_pieces("modules", pairs.len());
    let resize = |pair: &Pair| {
        let resized = resize(&options.model, file.as_ref(), pair, options, rule);
        progress.advance(1);
        resized.with_context(|| format!("`{}`, module `{}`", file.path().display(), pair.name))
    };
    let resized: Vec<Resized> =
        pairs.par_iter().with_max_len(1).map(resize).collect::<anyhow::Result<_>>()?;
    drop(progress);

    let mut tensors = Tensors::new();
    for name in file.names() {
        let tensor = file.view(name)?.to_owned_tensor();
        options.finite.check(&options.model, name, &tensor.to_f32())?;
        tensors.insert(name.to_owned(), tensor.cast(dtype)?);
    }
    for (pair, resized) in pairs.iter().zip(&resized) {
        resized.insert_into(&mut tensors, pair, dtype)?;
    }
    let metadata = new_metadata(file.metadata(), options, rule, &pairs, &resized);
    lora_file::write(&options.save_to, &tensors, &metadata, save_as)?;
    if options.verbose {
        let lines: Vec<Line> = resized.into_iter().map(|resized| resized.line).collect();
        report::print_lines(&lines, rule.is_some());
    }
    tell(&format!("{} modules: {}", pairs.len(), options.save_to.display()));
    Ok(())
}

/// A module cut to its new rank.
struct Resized {
    up: Matrix,
    down: Matrix,
    alpha: f32,
    line: Line,
}

fn resize(
    path: &Path,
    file: &dyn formats::TensorFile,
    pair: &Pair,
    options: &Options,
    rule: Option<Rule>,
) -> anyhow::Result<Resized> {
    let read = |key: &str| -> anyhow::Result<Matrix> {
        let view = file.view(key)?;
        let mut values = view.to_f32();
        options.finite.check(path, key, &values)?;
        // What is not finite has no singular values; it got here by `--allow_nan`.
        values.iter_mut().filter(|value| !value.is_finite()).for_each(|value| *value = 0.0);
        let rows = view.shape[0];
        Ok(Matrix::new(rows, values.len() / rows, values))
    };
    let (up, down) = (read(&pair.up)?, read(&pair.down)?);
    if up.cols != down.rows {
        bail!("its halves have different ranks: {} and {}", down.rows, up.cols);
    }
    let svd = of_low_rank_sum(&[Product { up: &up, down: &down, factor: 1.0 }])?;
    let most = match pair.is_convolution {
        true => options.new_conv_rank.unwrap_or(options.new_rank),
        false => options.new_rank,
    };
    let spectrum = Spectrum {
        leading: &svd.s,
        length: up.rows.min(down.cols),
        energy: svd.energy,
        sum: svd.s.iter().sum(),
    };
    let rank = spectrum.rank(rule, most);
    let alpha = pair.scale * rank as f32;
    let (sum, norm, ratio) = spectrum.kept(rank);
    let line = Line { module: pair.name.clone(), sum, norm, ratio, rank, alpha };
    let svd = svd.padded(rank);
    Ok(Resized { up: svd.up(rank), down: svd.down(rank), alpha, line })
}

impl Resized {
    fn insert_into(&self, tensors: &mut Tensors, pair: &Pair, dtype: Dtype) -> anyhow::Result<()> {
        let rank = self.down.rows;
        // Shapes as they were, but for the rank.
        let mut set = |key: &str, axis: usize, values: &[f32]| -> anyhow::Result<()> {
            let mut shape = tensors.get(key).context("a tensor is gone")?.shape.clone();
            shape[axis] = rank;
            tensors.insert(key.to_owned(), OwnedTensor::from_f32(&shape, values, dtype)?);
            Ok(())
        };
        set(&pair.up, 1, &self.up.values)?;
        set(&pair.down, 0, &self.down.values)?;
        tensors.insert(pair.alpha.clone(), OwnedTensor::scalar(self.alpha, dtype)?);
        Ok(())
    }
}

fn new_metadata(
    old: &Metadata,
    options: &Options,
    rule: Option<Rule>,
    pairs: &[Pair],
    resized: &[Resized],
) -> Metadata {
    let mut metadata = old.clone();
    let old_rank = pairs.iter().map(|pair| pair.rank).max().unwrap_or_default();
    let comment = old.get("ss_training_comment").cloned().unwrap_or_default();
    let (change, dim, alpha) = match rule {
        Some(Rule { method, target }) => (
            format!("Dynamic resize with {}: {target:?} from {old_rank}", method.name()),
            "Dynamic".to_owned(),
            "Dynamic".to_owned(),
        ),
        None => {
            let conv = match options.new_conv_rank {
                Some(rank) if rank != options.new_rank => format!(" (conv: {rank})"),
                _ => String::new(),
            };
            // As there: that of the last module.
            let alpha = resized.last().map_or(0.0, |resized| resized.alpha);
            (
                format!("dimension is resized from {old_rank} to {}{conv}", options.new_rank),
                options.new_rank.to_string(),
                format!("{alpha:?}"),
            )
        }
    };
    metadata.insert("ss_training_comment".to_owned(), format!("{change}; {comment}"));
    metadata.insert("ss_network_dim".to_owned(), dim);
    metadata.insert("ss_network_alpha".to_owned(), alpha);
    metadata
}
