//! `verify`: whether files are whole, and their numbers finite and consistent.
//!
//! Opening checks the layout, the halves and ranks of adapters, the parts of models; then every value
//! is looked at, in blocks on all cores. All that is wrong with a file is told, not the first alone.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule};
use formats::{Dtype, FormatError, TensorFile};
use rayon::prelude::*;

use crate::inspect::{Opened, expand, open, sshs};
use crate::progress::{Progress, print};

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct Options {
    /// LoRAs and other adapters, checkpoints, diffusers folders; of another folder, the files in it
    #[arg(value_name = "FILE_OR_FOLDER", required = true)]
    paths: Vec<PathBuf>,
}

/// What is to be said of one path.
#[derive(Debug, Default, PartialEq)]
struct Findings {
    /// What is wrong.
    problems: Vec<String>,
    /// What is odd and may be meant.
    notes: Vec<String>,
}

/// Looks at every path, and prints `ok` or what is wrong.
///
/// # Errors
/// When something is wrong with a path.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let paths = expand(&options.paths)?;
    let mut bad = 0;
    for path in &paths {
        let Findings { problems, notes } = check(path);
        print(&format!("{:<4}{}", if problems.is_empty() { "ok" } else { "bad" }, path.display()));
        for problem in &problems {
            print(&format!("    {}", problem.replace('\n', "\n    ")));
        }
        for note in &notes {
            print(&format!("    note: {note}"));
        }
        bad += usize::from(!problems.is_empty());
    }
    if bad > 0 {
        bail!("something is wrong with {bad} of {} files", paths.len());
    }
    Ok(())
}

fn check(path: &Path) -> Findings {
    let mut findings = Findings::default();
    let opened = match open(path) {
        Ok(opened) => opened,
        Err(error) => {
            findings.problems.push(error.to_string());
            // An adapter with half a pair may hold bad numbers as well.
            if matches!(error, FormatError::BadLora { .. })
                && let Ok(file) = formats::open_tensor_file(path)
            {
                check_numbers(&[file.as_ref()], &mut findings);
            }
            return findings;
        }
    };
    match opened {
        Opened::Adapter(file) => {
            check_numbers(&[file.file.as_ref()], &mut findings);
            check_adapter(&file, &mut findings);
        }
        Opened::Model(model) => {
            let files: Vec<&dyn TensorFile> =
                model.files.iter().map(|stored| stored.file.as_ref()).collect();
            check_numbers(&files, &mut findings);
            findings.notes.extend(model.notes.iter().cloned());
        }
        Opened::Tensors(file, _) => {
            check_numbers(&[file.as_ref()], &mut findings);
            findings.notes.push("it is neither an adapter nor a whole model".to_owned());
        }
    }
    findings
}

/// Every value of every tensor.
fn check_numbers(files: &[&dyn TensorFile], findings: &mut Findings) {
    let tensors: Vec<(&dyn TensorFile, &str)> =
        files.iter().flat_map(|file| file.names().into_iter().map(|name| (*file, name))).collect();
    let bytes = |file: &dyn TensorFile, name: &str| {
        let (dtype, shape) = file.describe(name)?;
        Some(dtype.size() as u64 * shape.iter().map(|size| *size as u64).product::<u64>())
    };
    let total = tensors.iter().filter_map(|(file, name)| bytes(*file, name)).sum();
    let progress = Progress::of_bytes(total);
    let look = |(file, name): &(&dyn TensorFile, &str)| -> Option<String> {
        let problem = match file.view(name) {
            Ok(view) => not_finite(view.dtype, &view.data).map(|(count, first)| {
                let value = value_at(view.dtype, &view.data, first);
                format!(
                    "{count} of {} values of `{name}` are not finite, the first at {first}: {value}",
                    view.len()
                )
            }),
            Err(error) => Some(error.to_string()),
        };
        progress.advance(bytes(*file, name).unwrap_or_default());
        problem
    };
    // One at a time from each thread's share: tensors differ much in size.
    findings
        .problems
        .extend(tensors.par_iter().with_max_len(1).filter_map(look).collect::<Vec<String>>());
}

/// (how many, place of the first) of the values that are NaN or infinite, seen from their bits.
fn not_finite(dtype: Dtype, data: &[u8]) -> Option<(usize, usize)> {
    fn scan<const N: usize>(
        data: &[u8],
        bad: impl Fn([u8; N]) -> bool + Sync,
    ) -> Option<(usize, usize)> {
        // Blocks of a few cache lines' worth of work for each thread; nearly all are clean.
        const BLOCK: usize = 1 << 16;
        let (values, _) = data.as_chunks::<N>();
        let counts: Vec<(usize, usize)> = values
            .par_chunks(BLOCK)
            .enumerate()
            .filter_map(|(block, values)| {
                // No early exit within a block, so that the loop is vectorised.
                let count = values.iter().map(|value| usize::from(bad(*value))).sum::<usize>();
                let first = (count > 0).then(|| values.iter().position(|value| bad(*value)))??;
                Some((count, block * BLOCK + first))
            })
            .collect();
        let (_, first) = *counts.first()?;
        Some((counts.iter().map(|(count, _)| count).sum(), first))
    }
    match dtype {
        Dtype::F64 => scan(data, |b: [u8; 8]| u64::from_le_bytes(b) >> 52 & 0x7ff == 0x7ff),
        Dtype::F32 => scan(data, |b: [u8; 4]| u32::from_le_bytes(b) >> 23 & 0xff == 0xff),
        Dtype::F16 => scan(data, |b: [u8; 2]| u16::from_le_bytes(b) >> 10 & 0x1f == 0x1f),
        Dtype::BF16 => scan(data, |b: [u8; 2]| u16::from_le_bytes(b) >> 7 & 0xff == 0xff),
        // One NaN of either sign, no infinity.
        Dtype::F8E4M3 => scan(data, |[b]: [u8; 1]| b & 0x7f == 0x7f),
        Dtype::F8E5M2 => scan(data, |[b]: [u8; 1]| b & 0x7c == 0x7c),
        Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::I8 | Dtype::U8 | Dtype::Bool => None,
    }
}

fn value_at(dtype: Dtype, data: &[u8], place: usize) -> f32 {
    let size = dtype.size();
    let mut value = Vec::new();
    formats::extend_f32(dtype, &data[place * size..(place + 1) * size], &mut value);
    value.first().copied().unwrap_or(f32::NAN)
}

/// What the modules, the metadata and the hashes of an adapter say of each other.
fn check_adapter(file: &AdapterFile, findings: &mut Findings) {
    if let Some(first) = file.unknown.first() {
        findings.problems.push(format!(
            "{} keys belong to no module that a program reads, the first: `{first}`",
            file.unknown.len()
        ));
    }
    let idle: Vec<&AdapterModule> =
        file.modules.par_iter().filter(|module| is_idle(file, module)).collect();
    if let Some(first) = idle.first() {
        findings.notes.push(format!(
            "{} of {} modules change nothing, a factor of each is all zeros, the first: `{}`",
            idle.len(),
            file.modules.len(),
            first.name
        ));
    }
    check_dora(file, findings);
    check_told_rank(file, findings);
    let Some(stored) = file.metadata.get("sshs_model_hash") else { return };
    match sshs(file) {
        Err(error) => findings.problems.push(format!("{error:#}")),
        Ok((model, legacy)) => {
            if *stored != model {
                findings.problems.push(format!(
                    "`sshs_model_hash` of the header is that of other numbers, here it is: {model}\n\
                     hint: the file was changed after it was written, or it is a DyLoRA split or a \
                     merge in another precision by sd-scripts, which hashes what it had before"
                ));
            }
            let told = file.metadata.get("sshs_legacy_hash");
            if told.is_some_and(|told| *told != legacy) {
                findings.problems.push(format!(
                    "`sshs_legacy_hash` of the header is that of another file, here it is: {legacy}"
                ));
            }
        }
    }
}

/// DoRA's magnitudes must be those of the layer's outputs or inputs.
fn check_dora(file: &AdapterFile, findings: &mut Findings) {
    for module in &file.modules {
        let Some(key) = &module.dora_scale else { continue };
        let count = file.file.shape(key).map_or(0, |shape| shape.iter().product::<usize>());
        let layer = module.layer_shape(file);
        if !layer.iter().take(2).any(|size| *size == count) {
            findings.problems.push(format!(
                "`{key}` holds {count} magnitudes for a layer of {} outputs",
                layer.first().copied().unwrap_or_default()
            ));
        }
    }
}

/// `ss_network_dim` beside the ranks. Files of several ranks (blocks, resized) say one of them or
/// none.
fn check_told_rank(file: &AdapterFile, findings: &mut Findings) {
    let told = file.metadata.get("ss_network_dim").and_then(|text| text.parse::<usize>().ok());
    let Some(told) = told else { return };
    let low = |module: &&AdapterModule| matches!(module.kind, AdapterKind::LowRank { .. });
    let ranks: Vec<usize> =
        file.modules.iter().filter(low).map(|module| module.rank(file)).collect();
    if let (Some(least), Some(most)) = (ranks.iter().min(), ranks.iter().max())
        && !ranks.contains(&told)
    {
        findings.notes.push(format!(
            "`ss_network_dim` is {told}, no module has this rank: they have {least} to {most}"
        ));
    }
}

/// A factor of the module is all zeros.
fn is_idle(file: &AdapterFile, module: &AdapterModule) -> bool {
    let is_zero =
        |key: &str| file.view(key).is_ok_and(|view| view.data.iter().all(|byte| *byte == 0));
    let keys = module.keys();
    let weights = keys.iter().filter(|key| {
        Some(**key) != module.dora_scale.as_deref() && Some(**key) != module.bias.as_deref()
    });
    let mut zeros = weights.map(|key| is_zero(key));
    let idle = match module.kind {
        // Sums: idle when all parts are.
        AdapterKind::Norm { .. } => zeros.all(|zero| zero),
        _ => zeros.any(|zero| zero),
    };
    idle && module.dora_scale.is_none() && module.bias.as_deref().is_none_or(is_zero)
}

#[cfg(test)]
mod tests {
    use formats::OwnedTensor;
    use formats::lora_file::{self, Metadata, SaveAs, Tensors};

    use super::*;

    #[test]
    fn values_that_are_not_finite_are_found_in_every_type() {
        let cases: [(Dtype, f32); 4] = [
            (Dtype::F64, f32::NAN),
            (Dtype::F32, f32::NEG_INFINITY),
            (Dtype::F16, f32::INFINITY),
            (Dtype::BF16, f32::NAN),
        ];
        for (dtype, value) in cases {
            let mut values = vec![-65504.0_f32; 200_000];
            let clean = OwnedTensor::from_f32(&[values.len()], &values, dtype).unwrap();
            assert_eq!(not_finite(dtype, &clean.data), None, "{dtype}");
            values[150_001] = value;
            values[199_999] = value;
            let tensor = OwnedTensor::from_f32(&[values.len()], &values, dtype).unwrap();
            assert_eq!(not_finite(dtype, &tensor.data), Some((2, 150_001)), "{dtype}");
        }
        assert_eq!(not_finite(Dtype::F8E4M3, &[0x7e, 0x00, 0xff]), Some((1, 2)));
        assert_eq!(not_finite(Dtype::F8E5M2, &[0x7b, 0x7c, 0xfd]), Some((2, 1)));
        assert_eq!(not_finite(Dtype::I32, &[0xff; 8]), None);
    }

    /// A pair of rank 2 with the values given, and its findings.
    fn findings_of(up: f32, extra: &[(&str, f32)], metadata: &[(&str, &str)]) -> Findings {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = |shape: &[usize], value: f32| {
            OwnedTensor::from_f32(shape, &vec![value; shape.iter().product()], Dtype::F32).unwrap()
        };
        let mut tensors = Tensors::from([
            ("lora_unet_a.lora_down.weight".to_owned(), tensor(&[2, 3], 1.0)),
            ("lora_unet_a.lora_up.weight".to_owned(), tensor(&[3, 2], up)),
        ]);
        for (key, value) in extra {
            tensors.insert((*key).to_owned(), tensor(&[2], *value));
        }
        let metadata: Metadata =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        lora_file::write(&path, &tensors, &metadata, SaveAs::Safetensors).unwrap();
        check(&path)
    }

    #[test]
    fn a_sound_file_has_no_findings() {
        assert_eq!(findings_of(1.0, &[], &[("ss_network_dim", "2")]), Findings::default());
    }

    #[test]
    fn what_is_wrong_or_odd_is_named() {
        let nan = findings_of(f32::NAN, &[], &[]);
        assert_eq!(nan.problems.len(), 1);
        assert!(
            nan.problems[0].contains("6 of 6 values of `lora_unet_a.lora_up.weight`"),
            "{nan:?}"
        );
        let unknown = findings_of(1.0, &[("stranger", 1.0)], &[]);
        assert!(unknown.problems[0].contains("`stranger`"), "{unknown:?}");
        let dora = findings_of(1.0, &[("lora_unet_a.dora_scale", 1.0)], &[]);
        assert!(dora.problems[0].contains("2 magnitudes for a layer of 3 outputs"), "{dora:?}");
        let idle = findings_of(0.0, &[], &[("ss_network_dim", "7")]);
        assert!(idle.problems.is_empty());
        assert!(idle.notes[0].contains("1 of 1 modules change nothing"), "{idle:?}");
        assert!(idle.notes[1].contains("`ss_network_dim` is 7"), "{idle:?}");
        // Half a pair, and a NaN in what is there.
        let half = findings_of(f32::NAN, &[("lora_unet_b.lora_down.weight", f32::NAN)], &[]);
        assert_eq!(half.problems.len(), 3, "{half:?}");
    }

    #[test]
    fn hashes_of_other_numbers_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = OwnedTensor::from_f32(&[1, 1], &[0.5], Dtype::F32).unwrap();
        let tensors = Tensors::from([
            ("lora_unet_a.lora_down.weight".to_owned(), tensor.clone()),
            ("lora_unet_a.lora_up.weight".to_owned(), tensor),
        ]);
        lora_file::write(&path, &tensors, &Metadata::new(), SaveAs::Safetensors).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        // The lowest bit of the last value.
        let place = bytes.len() - 4;
        bytes[place] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let findings = check(&path);
        assert!(findings.problems[0].contains("sshs_model_hash"), "{findings:?}");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let findings = check(&path);
        assert!(findings.problems[0].contains("truncated"), "{findings:?}");
    }

    #[test]
    fn files_that_cannot_be_read_are_findings_too() {
        let data =
            |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name);
        let evil = check(&data("formats/evil.ckpt"));
        assert!(evil.problems[0].contains("was refused"), "{evil:?}");
        let missing = check(&data("formats/no-such-file.safetensors"));
        assert!(missing.problems[0].contains("no-such-file"), "{missing:?}");
        let sound = [
            "formats/sd_scripts_resized.safetensors",
            "adapters/diffusers_sdxl.safetensors",
            "adapters/peft_lokr/adapter_model.safetensors",
            "formats/lora.pt",
            "parity/model",
        ];
        for name in sound {
            let findings = check(&data(name));
            assert!(findings.problems.is_empty(), "{name}: {findings:?}");
        }
        // The whole tool: one bad path makes it fail, a folder without files is no silent success.
        let paths = vec![data("formats/evil.ckpt"), data("formats/lora.pt")];
        let error = run(&Options { paths }).unwrap_err().to_string();
        assert_eq!(error, "something is wrong with 1 of 2 files");
        let empty = tempfile::tempdir().unwrap();
        assert!(run(&Options { paths: vec![empty.path().to_path_buf()] }).is_err());
    }
}
