//! The offline tools on SDXL: a model in one file and as a folder, LoRAs beside it.

use std::path::Path;

use formats::lora_file;
use formats::open_tensor_file;

use super::pictures::{c3lier_of_keys, generate};
use crate::harness::{data, lorarun, text};

fn run(folder: &Path, arguments: &str) -> String {
    let output = lorarun().current_dir(folder).args(arguments.split_whitespace()).output();
    let output = output.expect("lorarun runs");
    assert!(output.status.success(), "{arguments}: {}", text(&output));
    text(&output)
}

/// Largest difference of two files' tensors over the largest number, and the tensors' number.
fn apart(one: &Path, other: &Path) -> (f32, usize) {
    let [one, other] = [one, other].map(|path| open_tensor_file(path).expect("a file"));
    assert_eq!(one.names(), other.names());
    let mut most = 0_f32;
    for name in one.names() {
        let [a, b] = [&one, &other].map(|file| file.view(name).expect("a tensor").to_f32());
        let largest = a.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
        most = a.iter().zip(&b).fold(most, |most, (a, b)| most.max((a - b).abs() / largest));
    }
    (most, one.names().len())
}

#[test]
fn a_merged_lora_is_extracted_again_and_resized() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    let model = data("parity-sdxl/model").display().to_string();
    let lora = c3lier_of_keys(here).display().to_string();
    run(here, &format!("convert --model {model} --save_to base.safetensors"));
    let merge = format!("merge --ratios 0.5 --models {lora}");
    run(here, &format!("{merge} --sd_model base.safetensors --save_to tuned.safetensors"));
    // The folder and the file are the same model.
    run(here, &format!("{merge} --sd_model {model} --save_to folder"));
    run(here, "convert --model folder --save_to folder.safetensors");
    let tuned = here.join("tuned.safetensors");
    assert_eq!(apart(&tuned, &here.join("folder.safetensors")).0, 0.);

    // What was added has rank 2: an extraction of that rank gives it back.
    let both = "--model_org base.safetensors --model_tuned tuned.safetensors";
    run(
        here,
        &format!(
            "extract {both} --dim 2 --conv_dim 2 --clamp_quantile 1 --min_diff 1e-6 --save_to again.safetensors"
        ),
    );
    let again = lora_file::read(&here.join("again.safetensors")).expect("a LoRA file");
    let want = lora_file::read(Path::new(&lora)).expect("a LoRA file");
    assert!(again.tensors.keys().eq(want.tensors.keys()), "other modules");
    let merge = "merge --ratios 1 --sd_model base.safetensors --models again.safetensors";
    run(here, &format!("{merge} --save_to twice.safetensors"));
    let (most, count) = apart(&tuned, &here.join("twice.safetensors"));
    assert!(most < 2e-3 && count > 1000, "{most} of {count} tensors");

    // Nothing is lost where there is no more rank than that.
    run(here, "resize-lora --model again.safetensors --new_rank 1 --save_to small.safetensors");
    let small = lora_file::read(&here.join("small.safetensors")).expect("a LoRA file");
    assert!(small.tensors.keys().eq(again.tensors.keys()), "other modules");
    let merge = format!(
        "svd-merge --models again.safetensors {lora} --ratios 0.5 0.25 --new_rank 2 --new_conv_rank 2 \
         --clamp_quantile 1"
    );
    run(here, &format!("{merge} --save_to sum.safetensors"));
    let merge = "merge --ratios 1 --sd_model base.safetensors --models sum.safetensors";
    run(here, &format!("{merge} --save_to summed.safetensors"));
    let (most, _) = apart(&tuned, &here.join("summed.safetensors"));
    assert!(most < 5e-3, "{most}");
    run(
        here,
        &format!(
            "merge --models again.safetensors {lora} --ratios 1 1 --concat --save_to c.safetensors"
        ),
    );

    // The model's own text says what it is, and a sound file stays one.
    let said = run(here, "inspect again.safetensors");
    assert!(said.contains("Stable Diffusion XL"), "{said}");
    let said = run(here, "inspect tuned.safetensors");
    assert!(said.contains("Stable Diffusion XL"), "{said}");
    run(here, &format!("verify {lora}"));
    let size = ["--prompt", "a --d 1", "--W", "64", "--H", "64", "--scale", "1"];
    let (paths, _) = generate(&here.join("out"), &size);
    assert_eq!(paths.len(), 1);
}
