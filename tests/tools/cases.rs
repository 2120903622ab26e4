//! sd-scripts' tools on the small model: the same arguments give the same keys and numbers.

use std::path::Path;

use formats::OwnedTensor;
use formats::lora_file::Tensors;

use super::{digest, inputs, read, run_in, scene};
use crate::harness::data;

/// The arguments of a case as the reference took them.
fn arguments(name: &str) -> (String, String) {
    let text = std::fs::read_to_string(data("tools/cases.json")).expect("the list of cases");
    let cases: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let case = cases.as_array().expect("a list").iter().find(|case| case["name"] == name);
    let case = case.unwrap_or_else(|| panic!("no case: {name}"));
    let tool = match case["script"].as_str().expect("a script") {
        "extract_lora_from_dylora" => "extract-dylora",
        "extract_lora_from_models" => "extract",
        "merge_lora" => "merge",
        "resize_lora" => "resize-lora",
        "svd_merge_lora" => "svd-merge",
        other => panic!("no tool for the script: {other}"),
    };
    (tool.to_owned(), case["args"].as_str().expect("arguments").to_owned())
}

/// Runs a case with more arguments behind its own; gives what it wrote.
fn result_of(name: &str, more: &str) -> Tensors {
    let (tool, arguments) = arguments(name);
    let scene = scene();
    run_in(scene.path(), &format!("{tool} {arguments} {more}"));
    read(&scene.path().join(format!("{name}.safetensors")))
}

fn reference(name: &str) -> Tensors {
    let path = match name {
        "resize_r2" => "formats/sd_scripts_resized.safetensors".to_owned(),
        "svd_merge_r8" => "formats/sd_scripts_int_alpha.safetensors".to_owned(),
        name => format!("tools/{name}.safetensors"),
    };
    read(&data(&path))
}

fn same_keys(ours: &Tensors, theirs: &Tensors) {
    let keys = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(ours), keys(theirs));
}

/// Largest difference relative to the largest value.
fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let most = theirs.iter().fold(0_f32, |most, value| most.max(value.abs()));
    let differs = ours.iter().zip(theirs).fold(0_f32, |most, (a, b)| most.max((a - b).abs()));
    if most == 0.0 { differs } else { differs / most }
}

fn assert_tensors_close(ours: &Tensors, theirs: &Tensors, tolerance: f32) {
    for (name, expected) in theirs {
        let tensor = &ours[name];
        assert_eq!(tensor.shape, expected.shape, "{name}");
        let differs = difference(&tensor.to_f32(), &expected.to_f32());
        assert!(differs <= tolerance, "{name} differs by {differs}");
    }
}

/// `alpha/rank * up * down` of every module, `[out, in*kernel]`.
fn products(tensors: &Tensors) -> Vec<(String, Vec<f32>)> {
    let modules = tensors.keys().filter_map(|key| key.strip_suffix(".lora_down.weight"));
    let product = |module: &str| {
        let get = |suffix: &str| -> &OwnedTensor { &tensors[&format!("{module}.{suffix}")] };
        let (up, down) = (get("lora_up.weight"), get("lora_down.weight"));
        let (rank, out) = (down.shape[0], up.shape[0]);
        let scale = get("alpha").to_f32()[0] / rank as f32;
        let (up, down) = (up.to_f32(), down.to_f32());
        let columns = down.len() / rank;
        let mut sum = vec![0_f64; out * columns];
        for (row, up) in sum.chunks_mut(columns).zip(up.chunks(rank)) {
            for (factor, down) in up.iter().zip(down.chunks(columns)) {
                for (sum, value) in row.iter_mut().zip(down) {
                    *sum += f64::from(scale * factor) * f64::from(*value);
                }
            }
        }
        sum.into_iter().map(|value| value as f32).collect()
    };
    modules.map(|module| (module.to_owned(), product(module))).collect()
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Every module's product is that of the reference, in the sense of the Frobenius norm.
fn assert_products_close(ours: &Tensors, theirs: &Tensors, tolerance: f64) {
    let (ours, theirs) = (products(ours), products(theirs));
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (expected_name, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(name, expected_name);
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let differs = norm(ours.iter().zip(theirs).map(|(a, b)| a - b));
        let differs = differs / norm(theirs.iter().copied()).max(1e-12);
        assert!(differs <= tolerance, "{name} differs by {differs}");
    }
}

/// As [`assert_products_close`] for factors that were cut off at a quantile of their values. The
/// reference takes it of values with signs, and singular vectors have theirs at random: the limit is
/// another for the same matrix. So both are cut off at the lower of the two limits first, which
/// leaves them the same where they were before.
fn assert_clamped_products_close(ours: &Tensors, theirs: &Tensors, tolerance: f64) {
    let modules: Vec<&str> =
        theirs.keys().filter_map(|key| key.strip_suffix(".lora_down.weight")).collect();
    let keys =
        |module: &str| [format!("{module}.lora_up.weight"), format!("{module}.lora_down.weight")];
    let limit = |tensors: &Tensors, module: &str| {
        let values = keys(module).into_iter().flat_map(|key| tensors[&key].to_f32());
        values.fold(0_f32, |most, value| most.max(value.abs()))
    };
    let (mut ours, mut theirs) = (ours.clone(), theirs.clone());
    let (mut differ, modules_count) = (0.0, modules.len() as f32);
    for module in modules.iter().map(|module| (*module).to_owned()).collect::<Vec<_>>() {
        let (a, b) = (limit(&ours, &module), limit(&theirs, &module));
        differ += (a / b).ln();
        for tensors in [&mut ours, &mut theirs] {
            for key in keys(&module) {
                let tensor = &tensors[&key];
                let values =
                    tensor.to_f32().into_iter().map(|value| value.clamp(-a.min(b), a.min(b)));
                let values: Vec<f32> = values.collect();
                let cut = OwnedTensor::from_f32(&tensor.shape, &values, tensor.dtype);
                tensors.insert(key, cut.expect("floats"));
            }
        }
    }
    assert_products_close(&ours, &theirs, tolerance);
    // The limits are the same in the mean, or the rule is another.
    let differ = differ / modules_count;
    assert!(differ.abs() < 0.05, "limits differ by {differ} in the mean");
}

#[test]
fn the_converted_model_is_the_references_file() {
    // Of sorted names, types, shapes and bytes of what sd-scripts' cases were run with.
    let expected = [
        ("tiny_ldm", "570eec6b36655fd11b7e8855323cd6d21a5c12e4d4809aeb970d278cedf43843"),
        ("tiny_ldm_perturbed", "e53525daa4299f18bbbb1cb88d173d4338e0eea1024120138e5916af17ba762f"),
    ];
    for (name, expected) in expected {
        let file = inputs().join(format!("{name}.safetensors"));
        assert_eq!(digest(&read(&file)), expected, "{name}");
    }
}

#[test]
fn a_dylora_is_cut_like_the_reference_and_its_full_rank_is_written_too() {
    let (tool, arguments) = arguments("dylora_split-0008");
    let scene = scene();
    run_in(scene.path(), &format!("{tool} {arguments}"));
    let file = |rank: &str| scene.path().join(format!("dylora_split-{rank}.safetensors"));
    let cut = formats::lora_file::read(&file("0008")).expect("a LoRA");
    let expected = "3cd6c48bfea5ff173416146807d1cf85c43a4b313fed0dcfaf6c4a0cb37ac994";
    assert_eq!(digest(&cut.tensors), expected);
    assert_eq!(cut.metadata["ss_network_dim"], "8");
    assert_eq!(cut.metadata["ss_training_comment"], "split from DyLoRA, rank 16 to 8; None");
    assert!(file("0004").is_file() && file("0012").is_file());
    assert_eq!(read(&file("0016")), read(&scene.path().join("in/dylora_r16.safetensors")));
}

#[test]
fn a_lora_merged_into_a_model() {
    let ours = result_of("sdmerge_lierla", "");
    let theirs = reference("sdmerge_lierla");
    let model = read(&inputs().join("tiny_ldm.safetensors"));
    same_keys(&ours, &model);
    assert_tensors_close(&ours, &theirs, 1e-6);
}

#[test]
fn loras_added_with_the_references_arithmetic() {
    for name in ["merge_r4_r4", "merge_concat"] {
        let ours = result_of(name, "--reference_arithmetic");
        let theirs = reference(name);
        same_keys(&ours, &theirs);
        assert_tensors_close(&ours, &theirs, 1e-6);
    }
}

#[test]
fn shuffled_ranks_give_the_same_product() {
    let ours = result_of("merge_concat_shuffle", "--reference_arithmetic");
    let straight = reference("merge_concat");
    same_keys(&ours, &straight);
    // The sum over the ranks has another order: rounding alone.
    assert_products_close(&ours, &straight, 1e-6);
    assert_ne!(ours, straight);
    let again = result_of("merge_concat_shuffle", "--reference_arithmetic --seed 7");
    assert_ne!(ours, again);
    assert_eq!(again, result_of("merge_concat_shuffle", "--reference_arithmetic --seed 7"));
}

#[test]
fn concatenated_loras_are_the_sum_of_their_products() {
    for more in ["", "--ratios -0.7 1.3", "--shuffle"] {
        let ours = products(&result_of("merge_concat", more));
        let ratios = if more.starts_with("--ratios") { [-0.7, 1.3] } else { [0.7, 0.3] };
        let of = |name: &str| products(&read(&inputs().join(format!("{name}.safetensors"))));
        for ((ours, a), b) in ours.iter().zip(of("lierla_r4")).zip(of("lierla_r4b")) {
            assert_eq!((&ours.0, &ours.0), (&a.0, &b.0));
            let sum: Vec<f32> =
                a.1.iter().zip(&b.1).map(|(a, b)| ratios[0] * a + ratios[1] * b).collect();
            let differs = difference(&ours.1, &sum);
            assert!(differs <= 1e-6, "{more} {} differs by {differs}", ours.0);
        }
    }
}

// What follows comes out of an SVD. The reference's is in f32; 2e-3 leaves room for that and notices
// any wrong rule.

#[test]
fn loras_of_different_ranks_merged_by_svd() {
    let ours = result_of("svd_merge_r8", "");
    let theirs = reference("svd_merge_r8");
    same_keys(&ours, &theirs);
    assert_clamped_products_close(&ours, &theirs, 2e-3);
}

#[test]
fn a_svd_merge_of_sufficient_rank_is_exact_without_the_clamp() {
    let scene = scene();
    let models = "--models in/lierla_r4.safetensors in/lierla_r8.safetensors --ratios 0.7 -0.3";
    let options = "--new_rank 12 --clamp_quantile 1 --save_to out.safetensors";
    run_in(scene.path(), &format!("svd-merge {models} {options}"));
    let of = |name: &Path| products(&read(name));
    let ours = of(&scene.path().join("out.safetensors"));
    let a = of(&inputs().join("lierla_r4.safetensors"));
    let b = of(&inputs().join("lierla_r8.safetensors"));
    for ((ours, a), b) in ours.iter().zip(a).zip(b) {
        let sum: Vec<f32> = a.1.iter().zip(&b.1).map(|(a, b)| 0.7 * a - 0.3 * b).collect();
        let differs = difference(&ours.1, &sum);
        assert!(differs <= 2e-6, "{} differs by {differs}", ours.0);
    }
}

#[test]
fn loras_resized() {
    for name in ["resize_r2", "resize_fro"] {
        let ours = result_of(name, "");
        let theirs = reference(name);
        same_keys(&ours, &theirs);
        for (key, tensor) in &theirs {
            assert_eq!(ours[key].shape, tensor.shape, "{name} {key}");
        }
        assert_products_close(&ours, &theirs, 2e-3);
    }
}

#[test]
fn loras_extracted_from_models() {
    let theirs = reference("extract_d4");
    for more in ["", "--exact"] {
        let ours = result_of("extract_d4", more);
        same_keys(&ours, &theirs);
        assert_clamped_products_close(&ours, &theirs, 2e-3);
    }
    // With this threshold the text encoders count as the same; the U-Net's modules do not change.
    let ours = result_of("extract_d4_mindiff1", "");
    let theirs: Tensors =
        theirs.into_iter().filter(|(key, _)| key.starts_with("lora_unet_")).collect();
    assert_eq!(theirs.len(), 576);
    same_keys(&ours, &theirs);
    assert_clamped_products_close(&ours, &theirs, 2e-3);
}
