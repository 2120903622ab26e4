//! `extract-dylora`: a DyLoRA cut into ordinary LoRAs, one for every multiple of `unit`.
//!
//! sd-scripts' `extract_lora_from_dylora.py`; that leaves the full rank out and writes hashes of
//! another file, here it is written too and the hashes are right.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use formats::OwnedTensor;
use formats::lora_file::{self, LoraFile, SaveAs, Tensors};

use crate::finite::FiniteRule;
use crate::progress::tell;
use crate::{Usage, output};

/// Options of `extract-dylora`.
#[derive(Debug, Args)]
pub struct Options {
    /// The DyLoRA to cut: `.safetensors`, `.ckpt` or `.pt`
    #[arg(long = "model", value_name = "FILE")]
    model: PathBuf,
    /// Where to write: `NAME.safetensors` makes `NAME-0004.safetensors`, `NAME-0008.safetensors`, ...
    #[arg(long = "save_to", value_name = "FILE")]
    save_to: PathBuf,
    /// Ranks between one file and the next; the unit it was trained with, or a multiple
    #[arg(long = "unit", value_name = "RANKS")]
    unit: usize,
    #[command(flatten)]
    finite: FiniteRule,
}

/// Does the work.
///
/// # Errors
/// A unit that does not divide the rank, what cannot be read, what cannot be written.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if options.unit == 0 {
        return Err(Usage("`unit` should be 1 or more, it is: 0".to_owned()).into());
    }
    let save_as = output::prepare(&options.save_to, &[&options.model])?;
    let file = lora_file::read(&options.model)?;
    for (name, tensor) in &file.tensors {
        options.finite.check(&file.path, name, &tensor.to_f32())?;
    }
    let rank = file.modules()?.iter().map(|module| module.rank).max().unwrap_or_default();
    if !rank.is_multiple_of(options.unit) {
        let divisors: Vec<String> =
            (1..=rank).filter(|n| rank.is_multiple_of(*n)).map(|n| n.to_string()).collect();
        return Err(Usage(format!(
            "`unit` does not divide the rank of `{}`, which is {rank}: {}\nhint: one of these does: {}",
            options.model.display(),
            options.unit,
            divisors.join(", ")
        ))
        .into());
    }
    let paths: Vec<(usize, PathBuf)> = (options.unit..=rank)
        .step_by(options.unit)
        .map(|rank| Ok((rank, path_of_rank(options, rank)?)))
        .collect::<anyhow::Result<_>>()?;
    for (_, path) in &paths {
        output::refuse_input(path, &[&options.model])?;
    }
    for (new_rank, path) in paths {
        write_rank(&file, rank, new_rank, &path, save_as)?;
        tell(&format!("rank {new_rank}: {}", path.display()));
    }
    Ok(())
}

/// `NAME-0004.safetensors`.
fn path_of_rank(options: &Options, rank: usize) -> anyhow::Result<PathBuf> {
    let stem = options.save_to.file_stem().context("`save_to` names no file")?;
    let extension = options.save_to.extension().context("`save_to` has no ending")?;
    let name = format!("{}-{rank:04}.{}", stem.to_string_lossy(), extension.to_string_lossy());
    Ok(options.save_to.with_file_name(name))
}

fn write_rank(
    file: &LoraFile,
    rank: usize,
    new_rank: usize,
    path: &std::path::Path,
    save_as: SaveAs,
) -> anyhow::Result<()> {
    let tensors = cut(&file.tensors, new_rank)?;
    let mut metadata = file.metadata.clone();
    let comment = metadata.get("ss_training_comment").cloned().unwrap_or_default();
    let comment = format!("split from DyLoRA, rank {rank} to {new_rank}; {comment}");
    metadata.insert("ss_training_comment".to_owned(), comment);
    metadata.insert("ss_network_dim".to_owned(), new_rank.to_string());
    lora_file::write(path, &tensors, &metadata, save_as)?;
    Ok(())
}

/// The first `rank` ranks of every module; alphas stay, which is how DyLoRA was trained.
fn cut(tensors: &Tensors, rank: usize) -> anyhow::Result<Tensors> {
    let mut out = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = if name.ends_with(".lora_down.weight") {
            first_rows(tensor, rank)
        } else if name.ends_with(".lora_up.weight") {
            first_columns(tensor, rank)
        } else if name.ends_with(".alpha") {
            tensor.clone()
        } else {
            bail!("this key belongs to no LoRA: `{name}`");
        };
        out.insert(name.clone(), tensor);
    }
    Ok(out)
}

/// `[r, ...]` -> `[rank, ...]`.
fn first_rows(tensor: &OwnedTensor, rank: usize) -> OwnedTensor {
    let rows = tensor.shape[0];
    let keep = rank.min(rows);
    let mut shape = tensor.shape.clone();
    shape[0] = keep;
    let data = tensor.data[..tensor.data.len() / rows * keep].to_vec();
    OwnedTensor { dtype: tensor.dtype, shape, data }
}

/// `[out, r]` or `[out, r, 1, 1]` -> `[out, rank, ...]`.
fn first_columns(tensor: &OwnedTensor, rank: usize) -> OwnedTensor {
    let columns = tensor.shape[1];
    let keep = rank.min(columns);
    let mut shape = tensor.shape.clone();
    shape[1] = keep;
    let element = tensor.dtype.size();
    let rows = tensor.data.chunks_exact(columns * element);
    let data = rows.flat_map(|row| &row[..keep * element]).copied().collect();
    OwnedTensor { dtype: tensor.dtype, shape, data }
}

#[cfg(test)]
mod tests {
    use formats::Dtype;

    use super::*;

    #[test]
    fn ranks_are_cut_from_rows_and_columns() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let tensor = OwnedTensor::from_f32(&[3, 4, 1, 1], &values, Dtype::F16).unwrap();
        let rows = first_rows(&tensor, 2);
        assert_eq!(rows.shape, [2, 4, 1, 1]);
        assert_eq!(rows.to_f32(), values[..8]);
        let columns = first_columns(&tensor, 2);
        assert_eq!(columns.shape, [3, 2, 1, 1]);
        assert_eq!(columns.to_f32(), [0., 1., 4., 5., 8., 9.]);
        // A module of a smaller rank stays whole.
        assert_eq!(first_rows(&tensor, 7), tensor);
    }
}
