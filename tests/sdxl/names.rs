//! Modules of SDXL in full size beside those of sd-scripts and LyCORIS for the same settings
//! (`tests/data/keys/sdxl.json`): names, ranks, alphas and layers, nothing missed, nothing left over.

use std::collections::BTreeMap;

use models::lora::{
    Algorithm, BlockLayout, BlockLrText, BlockRankText, BlockRanks, BlockRates, LayerKind,
    LoraNetwork, Preset, PresetRanks, Rank, RankRule, Target, UniformRank, UniformRanks,
    sdxl_text_encoder_targets, unet_targets,
};
use models::{ClipConfig, ClipTextModel, TensorShape, Unet, UnetConfig};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::harness::data;
use crate::keys::Shapes;

fn shapes_of(shapes: Vec<TensorShape>) -> Shapes {
    Shapes(shapes.into_iter().collect())
}

/// Every layer of the full-size model that the trainer offers to a rule.
fn targets() -> Vec<Target> {
    let text = |config| shapes_of(ClipTextModel::tensor_shapes(&config).expect("shapes"));
    let unet = shapes_of(Unet::tensor_shapes(&UnetConfig::sdxl()).expect("shapes"));
    let mut targets =
        sdxl_text_encoder_targets(&text(ClipConfig::sd1()), &text(ClipConfig::sdxl_second()));
    targets.extend(unet_targets(&unet));
    targets
}

fn reference() -> Value {
    let file = std::fs::read(data("keys/sdxl.json")).expect("the names");
    serde_json::from_slice(&file).expect("JSON")
}

fn shape(target: &Target) -> String {
    let Target { out, input, .. } = target;
    match target.kind {
        LayerKind::Linear => format!("{out}x{input}"),
        LayerKind::Conv { kernel: (height, width) } => format!("{out}x{input}x{height}x{width}"),
    }
}

/// What `network_args` of the reference's settings mean.
struct Settings<'a>(&'a Value);

impl Settings<'_> {
    fn text(&self, key: &str) -> Option<String> {
        self.0[key].as_str().map(str::to_owned)
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    fn rule(&self) -> Box<dyn RankRule> {
        let dim = self.0["dim"].as_u64().expect("a rank") as usize;
        let alpha = self.0["alpha"].as_f64().expect("an alpha") as f32;
        let conv_dim: Option<usize> = self.number("conv_dim");
        let conv_alpha: f32 = self.number("conv_alpha").unwrap_or(1.);
        let lists = BlockRankText {
            dims: self.text("block_dims"),
            alphas: self.text("block_alphas"),
            conv_dims: self.text("conv_block_dims"),
            conv_alphas: self.text("conv_block_alphas"),
        };
        let rates = BlockLrText {
            down: self.text("down_lr_weight"),
            mid: self.text("mid_lr_weight"),
            up: self.text("up_lr_weight"),
            zero_threshold: 0.,
        };
        let mut notes = Vec::new();
        let rates = BlockRates::read(BlockLayout::Sdxl, &rates, &mut notes).expect("rates");
        assert!(notes.is_empty(), "{notes:?}");
        if lists.is_empty() && rates.is_none() {
            let conv = conv_dim.map(|dim| Rank::new(dim, conv_alpha));
            return Box::new(UniformRanks { linear: Rank::new(dim, alpha), conv });
        }
        let uniform = UniformRank { dim, alpha, conv_dim, conv_alpha };
        let ranks = BlockRanks::read(BlockLayout::Sdxl, &lists, uniform, rates.as_ref());
        Box::new(ranks.expect("ranks"))
    }
}

/// Compares modules, given as lines, with those of the reference.
fn compare(name: &str, want: &Value, mut lines: Vec<String>) {
    lines.sort();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for line in &lines {
        *counts.entry(line.split('_').nth(1).unwrap_or_default().to_owned()).or_default() += 1;
    }
    let modules: BTreeMap<String, u64> =
        serde_json::from_value(want["modules"].clone()).expect("counts");
    assert_eq!(counts, modules, "{name}");
    let mut hash = Sha256::new();
    lines.iter().for_each(|line| hash.update(format!("{line}\n")));
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hash, want["sha256"], "{name}: {:#?} and so on", &lines[..8]);
}

#[test]
fn networks_have_the_modules_of_sd_scripts() {
    let reference = reference();
    for name in ["lierla", "c3lier", "blocks", "rates", "dylora", "dylora_conv"] {
        let want = &reference[name];
        let settings = Settings(&want["settings"]);
        let is_nested = name.starts_with("dylora");
        let algorithm = match settings.number("unit") {
            Some(unit) => Algorithm::DyLora { unit },
            None => Algorithm::LowRank,
        };
        assert_eq!(is_nested, matches!(algorithm, Algorithm::DyLora { .. }));
        let mut targets = targets();
        // sd-scripts' DyLoRA calls the modules of both text encoders the same, so that one of two is
        // lost in its files; here both are kept, under the names of its plain LoRA.
        targets.retain(|target| !is_nested || !target.part.is_text());
        let network = LoraNetwork::new(targets, &*settings.rule(), algorithm).expect("a network");
        let lines = network.modules().iter().map(|module| {
            let Rank { dim, mut alpha } = module.rank;
            // sd-scripts' `conv_alpha` is read by LoRA alone.
            if is_nested {
                alpha = 4.;
            }
            format!("{} {dim} {alpha} {}", module.target.name, shape(&module.target))
        });
        compare(name, want, lines.collect());
    }
}

#[test]
fn presets_have_the_modules_of_lycoris() {
    let reference = reference();
    let (linear, conv) = (Rank::new(8, 4.), Rank::new(4, 1.));
    for (name, preset) in Preset::NAMES {
        let targets = targets();
        let rule = PresetRanks { preset, linear, conv };
        let network = LoraNetwork::new(targets, &rule, Algorithm::LowRank).expect("a network");
        let names = network.modules().iter().map(|module| module.target.name.clone());
        compare(name, &reference[format!("preset {name}")], names.collect());
    }
}
