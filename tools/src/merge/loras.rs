//! LoRAs put together into one LoRA.
//!
//! Three ways. Stacked exactly (`--concat`): the ranks of all files side by side, scaled so that the
//! product is the sum of `ratio * alpha/rank * up * down`. Added as sd-scripts adds (no option):
//! both factors are multiplied by the ratio and added up, which squares the ratio and adds products
//! of one file's up with another's down. Stacked as sd-scripts stacks
//! (`--concat --reference_arithmetic`): ratios squared, alpha that of the first file.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule};
use formats::lora_file::Tensors;
use formats::{Dtype, OwnedTensor};
use rayon::prelude::*;

use super::change::round;
use super::input::Input;
use super::shuffle::shuffled;
use crate::delta::{Delta, delta_of};
use crate::finite::FiniteRule;
use crate::matrix::Matrix;

/// How the files are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Stacked, the exact sum.
    Stack,
    /// Stacked with the reference's scales.
    ReferenceStack,
    /// Factors added, the reference's arithmetic.
    Add,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    /// How the files are put together.
    pub way: Way,
    /// Seed of the order of the ranks; `None` keeps it.
    pub shuffle: Option<u64>,
    /// The type that the reference's arithmetic is made in; `None` is f32.
    pub rounding: Option<Dtype>,
    /// What to do with NaN.
    pub finite: FiniteRule,
}

/// The new LoRA, in f32.
#[derive(Debug)]
pub(super) struct Merged {
    /// All tensors.
    pub tensors: Tensors,
    /// Rank and alpha of every module.
    pub ranks: Vec<(usize, f32)>,
}

/// One module of one file.
struct Part {
    up: Matrix,
    down: Matrix,
    alpha: f32,
    input: usize,
}

/// A module of the new file.
struct Made {
    name: String,
    up: Matrix,
    down: Matrix,
    alpha: f32,
    /// `[out, in]` or `[out, in, kh, kw]`
    shape: Vec<usize>,
}

/// Puts the files together.
///
/// # Errors
/// Modules of other kinds than LoRA, of different shapes or (when factors are added) ranks, files
/// for different families.
pub(super) fn merge(inputs: &[Input], request: Request) -> anyhow::Result<Merged> {
    let mut names: BTreeMap<&str, Vec<(usize, &AdapterModule)>> = BTreeMap::new();
    for (index, input) in inputs.iter().enumerate() {
        for module in &input.file.modules {
            names.entry(&module.name).or_default().push((index, module));
        }
    }
    check_same_shapes(inputs, &names)?;
    check_same_family(inputs)?;
    let names: Vec<_> = names.into_iter().collect();
    let made: Vec<Made> = names
        .par_iter()
        .map(|(name, places)| make(inputs, name, places, request))
        .collect::<anyhow::Result<_>>()?;
    let mut tensors = Tensors::new();
    let mut ranks = Vec::new();
    for module in made {
        let Made { name, up, down, alpha, shape } = module;
        ranks.push((down.rows, alpha));
        let (up_shape, down_shape) = match shape.get(2..) {
            Some(window) if !window.is_empty() => {
                (vec![up.rows, up.cols, 1, 1], [&[down.rows, shape[1]], window].concat())
            }
            _ => (vec![up.rows, up.cols], vec![down.rows, down.cols]),
        };
        let mut add = |suffix: &str, shape: &[usize], values: &[f32]| -> anyhow::Result<()> {
            let tensor = OwnedTensor::from_f32(shape, values, Dtype::F32)?;
            tensors.insert(format!("{name}.{suffix}"), tensor);
            Ok(())
        };
        add("lora_down.weight", &down_shape, &down.values)?;
        add("lora_up.weight", &up_shape, &up.values)?;
        add("alpha", &[], &[alpha])?;
    }
    Ok(Merged { tensors, ranks })
}

fn make(
    inputs: &[Input],
    name: &str,
    places: &[(usize, &AdapterModule)],
    request: Request,
) -> anyhow::Result<Made> {
    let part = |(input, module): &(usize, &AdapterModule)| -> anyhow::Result<Part> {
        read_part(&inputs[*input].file, *input, module, request)
    };
    let parts: Vec<Part> = places.iter().map(part).collect::<anyhow::Result<_>>()?;
    let (mut up, mut down, alpha) = match request.way {
        Way::Stack => stack_exactly(inputs, name, &parts),
        Way::ReferenceStack | Way::Add => by_reference(inputs, name, parts, request)?,
    };
    if let Some(seed) = request.shuffle {
        (up, down) = shuffled(&up, &down, seed, name);
    }
    // The fullest shape: a Linear of one file may be a 1x1 convolution in another.
    let shape =
        places.iter().map(|(input, module)| module.layer_shape(&inputs[*input].file)).next();
    Ok(Made { name: name.to_owned(), up, down, alpha, shape: shape.context("no shape")? })
}

fn read_part(
    file: &AdapterFile,
    input: usize,
    module: &AdapterModule,
    request: Request,
) -> anyhow::Result<Part> {
    refuse_others(file, module)?;
    let mut delta = delta_of(file, module, request.finite)?;
    if let (Some(dtype), true) = (request.rounding, request.way != Way::Stack) {
        delta.round(dtype)?;
    }
    let Delta::LowRank { up, down, scale } = delta else {
        bail!("`{}`: `{}` is no LoRA", file.path.display(), module.name)
    };
    let alpha = scale * down.rows as f32;
    Ok(Part { up, down, alpha, input })
}

/// What has no form as a LoRA of the same numbers.
fn refuse_others(file: &AdapterFile, module: &AdapterModule) -> anyhow::Result<()> {
    let path = file.path.display();
    let kind = match &module.kind {
        AdapterKind::LowRank { .. } => None,
        AdapterKind::Hadamard { .. } => Some("a LoHa"),
        AdapterKind::Kronecker { .. } => Some("a LoKr"),
        AdapterKind::Full { .. } => Some("a whole difference"),
        AdapterKind::Norm { .. } => Some("of a normalisation"),
    };
    if let Some(kind) = kind {
        bail!(
            "`{path}` has a module that cannot be added to LoRAs as it is, `{}` is: {kind}\n\
             hint: `lorarun svd-merge` makes a LoRA of every kind; `--sd_model` merges every kind \
             into a model",
            module.name
        );
    }
    let extra = match (&module.dora_scale, &module.bias) {
        (Some(_), _) => "trained lengths (DoRA)",
        (None, Some(_)) => "a bias",
        (None, None) => return Ok(()),
    };
    bail!(
        "`{path}` has a module that is more than a LoRA, `{}` has: {extra}\nhint: it can be merged \
         into a model with `--sd_model`",
        module.name
    )
}

/// Side by side; both factors take the root of their scale, so that neither is too small for half
/// precision. Alpha is the rank: every loader then multiplies by 1.
fn stack_exactly(inputs: &[Input], name: &str, parts: &[Part]) -> (Matrix, Matrix, f32) {
    let factors = parts.iter().map(|part| {
        let scale = inputs[part.input].ratio_of(name) * part.alpha / part.down.rows as f32;
        let root = scale.abs().sqrt();
        (root.copysign(scale), root)
    });
    let factors: Vec<(f32, f32)> = factors.collect();
    let (up, down) = stacked(parts, &factors);
    let rank = down.rows as f32;
    (up, down, rank)
}

/// sd-scripts' scales: `sqrt(alpha/alpha of the first) * ratio` on both factors.
fn by_reference(
    inputs: &[Input],
    name: &str,
    mut parts: Vec<Part>,
    request: Request,
) -> anyhow::Result<(Matrix, Matrix, f32)> {
    let base = parts.first().context("a module of no file")?.alpha;
    let factors: Vec<(f32, f32)> = parts
        .iter()
        .map(|part| {
            let alphas = f64::from(part.alpha) / f64::from(base);
            inputs[part.input].reference_factors(name, alphas.sqrt())
        })
        .collect();
    if request.way == Way::Add {
        check_ranks(inputs, name, &parts)?;
    }
    let Some(dtype) = request.rounding else {
        let (up, down) = match request.way {
            Way::Add => added(&parts, &factors, None)?,
            Way::Stack | Way::ReferenceStack => stacked(&parts, &factors),
        };
        return Ok((up, down, base));
    };
    // Each product and each sum is rounded.
    let ones = vec![(1.0, 1.0); parts.len()];
    for (part, (up, down)) in parts.iter_mut().zip(factors) {
        for (matrix, factor) in [(&mut part.up, up), (&mut part.down, down)] {
            matrix.values.iter_mut().for_each(|value| *value *= factor);
            round(&mut matrix.values, dtype)?;
        }
    }
    let (up, down) = match request.way {
        Way::Add => added(&parts, &ones, Some(dtype))?,
        Way::Stack | Way::ReferenceStack => stacked(&parts, &ones),
    };
    Ok((up, down, base))
}

fn stacked(parts: &[Part], factors: &[(f32, f32)]) -> (Matrix, Matrix) {
    let rank: usize = parts.iter().map(|part| part.down.rows).sum();
    let (out, columns) = parts.first().map_or((0, 0), |part| (part.up.rows, part.down.cols));
    let mut up = Vec::with_capacity(out * rank);
    for row in 0..out {
        for (part, (factor, _)) in parts.iter().zip(factors) {
            up.extend(part.up.row(row).iter().map(|value| value * factor));
        }
    }
    let mut down = Vec::with_capacity(rank * columns);
    for (part, (_, factor)) in parts.iter().zip(factors) {
        down.extend(part.down.values.iter().map(|value| value * factor));
    }
    (Matrix::new(out, rank, up), Matrix::new(rank, columns, down))
}

fn added(
    parts: &[Part],
    factors: &[(f32, f32)],
    rounding: Option<Dtype>,
) -> anyhow::Result<(Matrix, Matrix)> {
    let first = parts.first().context("a module of no file")?;
    let mut up = Matrix::zeros(first.up.rows, first.up.cols);
    let mut down = Matrix::zeros(first.down.rows, first.down.cols);
    for (part, (up_factor, down_factor)) in parts.iter().zip(factors) {
        let halves = [(&mut up, &part.up, up_factor), (&mut down, &part.down, down_factor)];
        for (sum, matrix, factor) in halves {
            for (sum, value) in sum.values.iter_mut().zip(&matrix.values) {
                *sum += value * factor;
            }
            if let Some(dtype) = rounding {
                round(&mut sum.values, dtype)?;
            }
        }
    }
    Ok((up, down))
}

fn check_ranks(inputs: &[Input], name: &str, parts: &[Part]) -> anyhow::Result<()> {
    let Some(first) = parts.first() else { return Ok(()) };
    let Some(other) = parts.iter().find(|part| part.down.rows != first.down.rows) else {
        return Ok(());
    };
    let path = |part: &Part| inputs[part.input].file.path.display();
    bail!(
        "factors of different ranks cannot be added, `{name}` has rank {} in `{}` and in `{}`: {}\n\
         hint: `--concat` stacks them, which is exact; `lorarun svd-merge` gives any rank",
        first.down.rows,
        path(first),
        path(other),
        other.down.rows
    )
}

/// One module is for one layer, whatever the file.
fn check_same_shapes(
    inputs: &[Input],
    names: &BTreeMap<&str, Vec<(usize, &AdapterModule)>>,
) -> anyhow::Result<()> {
    for (name, places) in names {
        let mut shapes = places.iter().map(|(input, module)| {
            let file = &inputs[*input].file;
            (file, module.layer_shape(file))
        });
        let Some((first_file, first)) = shapes.next() else { continue };
        for (file, shape) in shapes {
            let columns = |shape: &[usize]| shape.iter().skip(1).product::<usize>();
            ensure!(
                first.first() == shape.first() && columns(&first) == columns(&shape),
                "these are for models of different families, `{name}` is for a weight of shape \
                 {first:?} in `{}`, and in `{}` of shape: {shape:?}\nhint: LoRAs for v1 and v2 (or \
                 SDXL) cannot be merged",
                first_file.path.display(),
                file.path.display()
            );
        }
    }
    Ok(())
}

fn check_same_family(inputs: &[Input]) -> anyhow::Result<()> {
    let mut known = inputs.iter().filter_map(|input| Some((&input.file, input.file.family?)));
    let Some((first, family)) = known.next() else { return Ok(()) };
    if let Some((file, other)) = known.find(|(_, other)| *other != family) {
        let module = |file: &AdapterFile| {
            file.modules.first().map_or_else(String::new, |module| module.name.clone())
        };
        bail!(
            "these are for models of different families, `{}` with `{}` is for {}, `{}` with `{}` \
             for: {}\nhint: LoRAs for v1 and v2 (or SDXL) cannot be merged",
            first.path.display(),
            module(first),
            family.title(),
            file.path.display(),
            module(file),
            other.title()
        );
    }
    Ok(())
}
