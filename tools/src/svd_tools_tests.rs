//! `svd-merge` and `resize-lora` with options as they are typed: beside sd-scripts' files, and what
//! they refuse. `extract` needs whole models: `tests/tools`.

use std::path::{Path, PathBuf};

use clap::Parser;
use formats::lora_file::{self, LoraFile, SaveAs};
use formats::{Dtype, OwnedTensor};

use crate::matrix::Matrix;
use crate::{Command, Usage, extract, resize_lora, svd_merge};

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

/// Runs a line in which `OUT` is a file in `folder`, `R4` and `R8` are LoRAs.
fn attempt(folder: &Path, line: &str) -> anyhow::Result<LoraFile> {
    let out = folder.join("out.safetensors");
    let word = |word: &str| match word {
        "OUT" => out.clone(),
        "R4" => data("lora/lierla_r4.safetensors"),
        "R8" => data("tools/in/lierla_r8.safetensors"),
        word => PathBuf::from(word),
    };
    let words = std::iter::once(PathBuf::from("tools")).chain(line.split(' ').map(word));
    let line = Line::try_parse_from(words)?;
    match &line.command {
        Command::SvdMerge(options) => svd_merge::run(options)?,
        Command::ResizeLora(options) => resize_lora::run(options)?,
        Command::Extract(options) => extract::run(options)?,
        other => panic!("not tested here: {other:?}"),
    }
    Ok(lora_file::read(&out)?)
}

/// `alpha / rank * up * down` of every module.
fn products(file: &LoraFile) -> Vec<(String, Matrix)> {
    let modules = file.modules().unwrap();
    let product = |module: &formats::LoraModule<'_>| {
        let matrix = |tensor: &OwnedTensor| {
            let values = tensor.to_f32();
            Matrix::new(tensor.shape[0], values.len() / tensor.shape[0], values)
        };
        let mut product = matrix(module.up).product(&matrix(module.down), faer::Par::Seq);
        product.values.iter_mut().for_each(|value| *value *= module.scale());
        (module.name.clone(), product)
    };
    modules.iter().map(product).collect()
}

/// `|a - b| / |b|` of the worst module.
fn difference(ours: &LoraFile, theirs: &[(String, Matrix)]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
    };
    let ours = products(ours);
    assert_eq!(ours.len(), theirs.len());
    let of_module = |((name, a), (other, b)): (&(String, Matrix), &(String, Matrix))| {
        assert_eq!(name, other);
        let pairs = a.values.iter().zip(&b.values);
        norm(&mut pairs.map(|(a, b)| a - b)) / norm(&mut b.values.iter().copied())
    };
    ours.iter().zip(theirs).map(of_module).fold(0.0, f64::max)
}

#[test]
fn resized_loras_are_the_references() {
    let folder = tempfile::tempdir().unwrap();
    let line = "resize-lora --model R8 --new_rank 8 --dynamic_method sv_fro --dynamic_param 0.9 \
                --save_to OUT";
    let ours = attempt(folder.path(), line).unwrap();
    let theirs = lora_file::read(&data("tools/resize_fro.safetensors")).unwrap();
    for (key, tensor) in &theirs.tensors {
        assert_eq!(ours.tensors[key].shape, tensor.shape, "{key}");
    }
    // The reference's SVD is in f32.
    assert!(difference(&ours, &products(&theirs)) < 1e-5);
    let mut expected = theirs.metadata.clone();
    expected.insert("sshs_model_hash".to_owned(), ours.metadata["sshs_model_hash"].clone());
    assert_eq!(ours.metadata, expected);
}

#[test]
fn a_resized_lora_in_halves_keeps_its_product_at_a_sufficient_rank() {
    let folder = tempfile::tempdir().unwrap();
    let line = "resize-lora --model R4 --new_rank 6 --save_precision fp16 --save_to OUT";
    let ours = attempt(folder.path(), line).unwrap();
    let theirs = lora_file::read(&data("lora/lierla_r4.safetensors")).unwrap();
    assert!(ours.tensors.values().all(|tensor| tensor.dtype == Dtype::F16));
    assert!(ours.modules().unwrap().iter().all(|module| module.rank == 6));
    assert!(difference(&ours, &products(&theirs)) < 1e-3);
    assert_eq!(ours.metadata["ss_network_dim"], "6");
}

#[test]
fn merged_loras_are_weighted_by_ratios_and_blocks() {
    let folder = tempfile::tempdir().unwrap();
    // The text encoder and the middle block half as much of one, not at all of the other.
    let list = |base: f32| {
        let mut weights = vec!["1".to_owned(); 26];
        weights[0] = base.to_string();
        weights[13] = base.to_string();
        format!("[{}]", weights.join(","))
    };
    let line = format!(
        "svd-merge --models R4 R8 --ratios 0.7 -0.3 --lbws {} {} --new_rank 12 \
         --clamp_quantile 1 --save_to OUT",
        list(0.5),
        list(0.0)
    );
    let ours = attempt(folder.path(), &line).unwrap();
    let read = |name: &str| products(&lora_file::read(&data(name)).unwrap());
    let mut sum = read("lora/lierla_r4.safetensors");
    for ((name, a), (_, b)) in sum.iter_mut().zip(read("tools/in/lierla_r8.safetensors")) {
        let is_weighted = name.contains("text_model") || name.contains("mid_block");
        let (left, right) = if is_weighted { (0.35, 0.0) } else { (0.7, -0.3) };
        for (a, b) in a.values.iter_mut().zip(&b.values) {
            *a = left * *a + right * b;
        }
    }
    assert!(difference(&ours, &sum) < 1e-6);
    let alpha = &ours.tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"];
    assert_eq!((alpha.dtype, alpha.to_f32()), (Dtype::F32, vec![12.0]));
    assert_eq!(ours.metadata["ss_network_args"], "{\"conv_dim\": 12, \"conv_alpha\": 12}");
    assert_eq!(ours.metadata["ss_network_dim"], "12");
}

#[test]
fn a_merge_at_a_smaller_rank_is_as_near_as_the_references_before_its_clamp() {
    let folder = tempfile::tempdir().unwrap();
    let line = "svd-merge --models R4 R8 --ratios 0.7 0.3 --new_rank 8 --clamp_quantile 1 \
                --save_to OUT";
    let ours = attempt(folder.path(), line).unwrap();
    let theirs = lora_file::read(&data("formats/sd_scripts_int_alpha.safetensors")).unwrap();
    let line = "svd-merge --models R4 R8 --ratios 0.7 0.3 --new_rank 12 --clamp_quantile 1 \
                --save_to OUT";
    let sums = products(&attempt(folder.path(), line).unwrap());
    let distance = |file: &LoraFile| -> Vec<f64> {
        let square = |((_, a), (_, b)): (&(String, Matrix), &(String, Matrix))| {
            a.values.iter().zip(&b.values).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        products(file).iter().zip(&sums).map(square).map(f64::sqrt).collect()
    };
    // The reference's file is clamped, which only adds to its distance.
    for (ours, theirs) in distance(&ours).into_iter().zip(distance(&theirs)) {
        assert!(ours <= 1.001 * theirs, "{ours} {theirs}");
    }
}

#[test]
fn adapters_of_other_kinds_become_loras() {
    let folder = tempfile::tempdir().unwrap();
    let loha = data("adapters/peft_loha/adapter_model.safetensors");
    let merge = |rank: usize| {
        let line = format!(
            "svd-merge --models {0} {0} --ratios 0.25 0.75 --new_rank {rank} --clamp_quantile 1 \
             --save_to OUT",
            loha.display()
        );
        attempt(folder.path(), &line).unwrap()
    };
    let file = formats::adapter::AdapterFile::open(&loha).unwrap();
    let made = products(&merge(64));
    assert_eq!(made.len(), file.modules.len());
    for (module, (name, product)) in file.modules.iter().zip(&made) {
        assert_eq!(*name, module.name);
        let delta = crate::delta::delta_of(&file, module, Default::default()).unwrap();
        let mut whole = vec![0.0; product.values.len()];
        delta.add_rows(0, &mut whole, 1.0);
        let most = whole.iter().fold(0_f32, |most, value| most.max(value.abs()));
        for (ours, expected) in product.values.iter().zip(&whole) {
            assert!((ours - expected).abs() <= 1e-5 * most, "{name}: {ours} {expected}");
        }
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let merge = "svd-merge --models R4 R8 --ratios 1 1 --save_to OUT";
    let resize = "resize-lora --model R4 --save_to OUT";
    let extract = "extract --model_org R4 --model_tuned R8 --save_to OUT";
    let ones = |count: usize| format!("[{}]", vec!["1"; count].join(","));
    let cases = [
        (format!("{merge} --new_rank 0"), "`new_rank`"),
        (format!("{merge} --new_conv_rank 0"), "`new_conv_rank`"),
        ("svd-merge --models R4 R8 --ratios 1 --save_to OUT".to_owned(), "2 and 1"),
        (format!("{merge} --lbws {}", ones(17)), "`lbws` should be equally many"),
        (format!("{merge} --lbws {} [1", ones(17)), "no JSON list"),
        (format!("{merge} --lbws {0} {0}", ones(5)), "it has: 5"),
        (format!("{merge} --lbws {0} {0}", ones(12)), "not for a LoRA of"),
        (format!("{merge} --clamp_quantile 0.3"), "`clamp_quantile`"),
        (format!("{resize} --new_rank 0"), "`new_rank`"),
        (format!("{resize} --dynamic_method sv_ratio"), "`dynamic_param`"),
        (format!("{resize} --dynamic_param 3"), "`dynamic_method`"),
        ("resize-lora --model R4 --save_to R4".to_owned(), "`save_to` is a file that is read"),
        (format!("{extract} --dim 0"), "`dim`"),
        (format!("{extract} --conv_dim 0"), "`conv_dim`"),
        (format!("{extract} --dynamic_method sv_fro --dynamic_param 7"), "`dynamic_param`"),
    ];
    for (line, words) in cases {
        let error = attempt(folder.path(), &line).unwrap_err();
        assert!(error.downcast_ref::<Usage>().is_some(), "{line}: {error:#}");
        assert!(error.to_string().contains(words), "{line}: {error:#}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{line}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let bad = tempfile::tempdir().unwrap();
    let mut nan = lora_file::read(&data("lora/lierla_r4.safetensors")).unwrap();
    let key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight";
    let mut values = nan.tensors[key].to_f32();
    values[3] = f32::NAN;
    let tensor = OwnedTensor::from_f32(&nan.tensors[key].shape, &values, Dtype::F32).unwrap();
    nan.tensors.insert(key.to_owned(), tensor);
    let path = |name: &str| bad.path().join(name);
    let write = |name: &str, file: &LoraFile| {
        lora_file::write(&path(name), &file.tensors, &file.metadata, SaveAs::Safetensors).unwrap();
    };
    write("nan.safetensors", &nan);
    let bytes = std::fs::read(data("lora/lierla_r4.safetensors")).unwrap();
    std::fs::write(path("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let v2 = data("parity-sd2/lierla/init.safetensors");
    let (nan, cut) = (path("nan.safetensors"), path("cut.safetensors"));
    let (nan, cut, v2) = (nan.display(), cut.display(), v2.display());
    let cases = [
        (format!("svd-merge --models R4 {nan} --ratios 1 1 --save_to OUT"), key.to_owned()),
        (format!("resize-lora --model {nan} --save_to OUT"), key.to_owned()),
        (format!("resize-lora --model {cut} --save_to OUT"), "cut.safetensors".to_owned()),
        (
            format!("svd-merge --models R4 {v2} --ratios 1 1 --save_to OUT"),
            "different families".to_owned(),
        ),
        ("extract --model_org R4 --model_tuned R4 --save_to OUT".to_owned(), "LoRA".to_owned()),
    ];
    for (line, words) in &cases {
        let error = attempt(folder.path(), line).unwrap_err();
        assert!(format!("{error:#}").contains(words), "{line}: {error:#}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{line}");
    }
    // Asked for, what is not a number counts as 0.
    let line = format!("resize-lora --model {nan} --allow_nan --new_rank 4 --save_to OUT");
    let file = attempt(folder.path(), &line).unwrap();
    assert!(file.tensors.values().all(|t| t.to_f32().iter().all(|value| value.is_finite())));
}
