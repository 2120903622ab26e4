//! What a LoRA file of ours holds beside one of sd-scripts: the same keys, shapes, alphas and
//! metadata, and every number of a LoRA that training was told not to move.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use engine::Device;
use formats::lora_file::{self, LoraFile, SaveAs};
use formats::{Dtype, FormatError, TensorView, Weights};
use models::lora::{
    Algorithm, BlockLayout, BlockLrText, BlockRankText, BlockRanks, BlockRates, LoraNetwork, Rank,
    RankRule, UniformRank, UniformRanks, text_encoder_targets, unet_targets,
};
use models::{ClipConfig, ClipTextModel, Unet, UnetConfig};
use serde_json::Value;

use crate::harness::{Scene, data, quoted, text};

/// Shapes of a model without its numbers.
pub struct Shapes(pub BTreeMap<String, Vec<usize>>);

impl Weights for Shapes {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        Err(FormatError::MissingTensor { path: "shapes".into(), name: name.to_owned() })
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }
}

/// A LoRA over Stable Diffusion 1.5 in full size.
pub fn full_size(conv: bool) -> LoraNetwork {
    full_size_by(&*uniform(4, 1., conv), Algorithm::LowRank)
}

fn uniform(dim: usize, alpha: f32, conv: bool) -> Box<dyn RankRule> {
    let linear = Rank::new(dim, alpha);
    Box::new(UniformRanks { linear, conv: conv.then_some(linear) })
}

fn full_size_by(rule: &dyn RankRule, algorithm: Algorithm) -> LoraNetwork {
    let clip = ClipTextModel::tensor_shapes(&ClipConfig::sd1()).expect("shapes");
    let unet = Unet::tensor_shapes(&UnetConfig::sd1()).expect("shapes");
    let mut targets = text_encoder_targets(&Shapes(clip.into_iter().collect()));
    targets.extend(unet_targets(&Shapes(unet.into_iter().collect())));
    LoraNetwork::new(targets, rule, algorithm).expect("a network")
}

/// A new one, each tensor drawn in rising order.
fn write_full_size(path: &Path, rule: &dyn RankRule, algorithm: Algorithm) {
    let network = full_size_by(rule, algorithm);
    let values = network
        .initial_values(&mut |_, count| (0..count).map(|n| n as f32 / count as f32).collect());
    let params = network.parameters(Device::Cpu, values).expect("parameters");
    let tensors = network.export(&params, Dtype::F32).expect("tensors");
    lora_file::write(path, &tensors, &BTreeMap::new(), SaveAs::Safetensors).expect("a file");
}

#[test]
fn full_size_files_have_the_tensors_of_sd_scripts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("full.safetensors");
    let (plain, nested) = (Algorithm::LowRank, Algorithm::DyLora { unit: 4 });
    for (name, rule, algorithm) in [
        ("lierla_r4", uniform(4, 1., false), plain),
        ("c3lier_r4_conv4", uniform(4, 1., true), plain),
        ("block_lr_dims", by_block(), plain),
        ("dylora_r16_u4", uniform(16, 8., false), nested),
    ] {
        write_full_size(&path, &*rule, algorithm);
        let file = lora_file::read(&path).expect("a LoRA file");
        let dump = std::fs::read(data(&format!("keys/{name}.json"))).expect("the dump");
        let dump: Value = serde_json::from_slice(&dump).expect("JSON");

        let shapes: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(dump["shapes"].clone()).expect("shapes");
        let written: BTreeMap<String, Vec<usize>> =
            file.tensors.iter().map(|(key, tensor)| (key.clone(), tensor.shape.clone())).collect();
        assert_eq!(written, shapes, "{name}");

        let alphas: BTreeMap<String, f32> =
            serde_json::from_value(dump["alphas"].clone()).expect("alphas");
        let alpha = |key: &str| Some((key.strip_suffix(".alpha")?.to_owned(), first(&file, key)));
        let written: BTreeMap<String, f32> =
            file.tensors.keys().filter_map(|key| alpha(key)).collect();
        assert_eq!(written, alphas, "{name}");

        // The order within a tensor is PyTorch's, whatever it is in memory.
        for (key, tensor) in file.tensors.iter().filter(|(key, _)| key.ends_with("down.weight")) {
            assert!(tensor.to_f32().is_sorted_by(|a, b| a < b), "{name}: {key}");
        }
    }
}

/// The ranks and learning rates of `block_lr_dims`, as its dump has them.
fn by_block() -> Box<dyn RankRule> {
    let dump = std::fs::read(data("keys/block_lr_dims.json")).expect("the dump");
    let dump: Value = serde_json::from_slice(&dump).expect("JSON");
    let text = |key: &str| dump["settings"]["network_args"][key].as_str().map(str::to_owned);
    let rates = BlockLrText {
        down: text("down_lr_weight"),
        mid: text("mid_lr_weight"),
        up: text("up_lr_weight"),
        zero_threshold: 0.,
    };
    let rates = BlockRates::read(BlockLayout::Sd, &rates, &mut Vec::new()).expect("rates");
    let lists = BlockRankText {
        dims: text("block_dims"),
        alphas: text("block_alphas"),
        ..BlockRankText::default()
    };
    let uniform = UniformRank { dim: 8, alpha: 4., conv_dim: None, conv_alpha: 1. };
    let ranks = BlockRanks::read(BlockLayout::Sd, &lists, uniform, rates.as_ref());
    Box::new(ranks.expect("ranks"))
}

fn first(file: &LoraFile, key: &str) -> f32 {
    file.tensors[key].to_f32()[0]
}

#[test]
fn a_run_writes_the_metadata_of_sd_scripts() {
    let mut scene = Scene::new();
    scene
        .set("network_args", "['conv_dim=4', 'conv_alpha=1']")
        .set("learning_rate", "1e-4")
        .set("max_train_steps", "2");
    let mut ours = scene.trained(&[]).metadata;
    let reference = std::fs::read(data("lora/train_c3lier.json")).expect("the dump");
    let mut reference: BTreeMap<String, String> = serde_json::from_slice(&reference).expect("JSON");
    // The base model of this run is a folder, which has no hash.
    for key in ["ss_sd_model_hash", "ss_new_sd_model_hash"] {
        assert!(reference.remove(key).is_some() && !ours.contains_key(key), "{key}");
    }
    let keys = |metadata: &BTreeMap<String, String>| metadata.keys().cloned().collect();
    let (written, expected): (BTreeSet<String>, BTreeSet<String>) = (keys(&ours), keys(&reference));
    assert_eq!(written, expected);

    // Names, pictures, sizes, times and the hashes of the numbers are this run's own.
    let own = [
        "modelspec.date",
        "modelspec.implementation_version",
        "modelspec.resolution",
        "modelspec.title",
        "ss_dataset_dirs",
        "ss_datasets",
        "ss_num_batches_per_epoch",
        "ss_num_train_images",
        "ss_output_name",
        "ss_sd_model_name",
        "ss_session_id",
        "ss_tag_frequency",
        "ss_training_finished_at",
        "ss_training_started_at",
        "sshs_legacy_hash",
        "sshs_model_hash",
    ];
    for key in own {
        ours.remove(key);
        reference.remove(key);
    }
    assert_eq!(ours, reference);
}

#[test]
fn a_lora_of_sd_scripts_goes_through_training_at_rate_zero_unchanged() {
    let before = data("lora/lierla_r4.safetensors");
    let mut scene = Scene::new();
    scene
        .set("network_weights", quoted(&before.display().to_string()))
        .set("learning_rate", "0.0")
        .set("optimizer_args", "['weight_decay=0']")
        .set("max_train_steps", "1");
    let output = scene.train(&[], &[]);
    assert!(output.status.success(), "{}", text(&output));
    let path = scene.output_dir().join("small.safetensors");
    let after = lora_file::read(&path).expect("a LoRA file");
    let before = lora_file::read(&before).expect("a LoRA file");
    assert!(after.tensors.keys().eq(before.tensors.keys()), "other keys");
    for (key, tensor) in &before.tensors {
        assert!(after.tensors[key] == *tensor, "{key} changed");
    }

    // Our own file, read and written again, is the same file.
    let copy = scene.folder.path().join("copy.safetensors");
    lora_file::write(&copy, &after.tensors, &after.metadata, SaveAs::Safetensors).expect("a file");
    let bytes = |path: &Path| std::fs::read(path).expect("a file");
    assert!(bytes(&copy) == bytes(&path), "the copy differs");
}
