//! Networks over models in full size, from shapes alone, against what sd-scripts made of them.

use std::collections::BTreeMap;

use engine::Device;
use formats::{Dtype, FormatError, OwnedTensor, TensorView, Weights};
use serde_json::Value;

use super::*;
use crate::{ClipConfig, ClipTextModel, ModelError, Unet, UnetConfig};

mod lycoris;

/// Shapes of a model without its numbers.
struct Shapes(BTreeMap<String, Vec<usize>>);

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

fn text_encoder(config: &ClipConfig) -> Shapes {
    Shapes(ClipTextModel::tensor_shapes(config).unwrap().into_iter().collect())
}

fn unet(config: &UnetConfig) -> Shapes {
    Shapes(Unet::tensor_shapes(config).unwrap().into_iter().collect())
}

fn sd1_targets() -> Vec<Target> {
    let mut targets = text_encoder_targets(&text_encoder(&ClipConfig::sd1()));
    targets.extend(unet_targets(&unet(&UnetConfig::sd1())));
    targets
}

fn network(targets: Vec<Target>, dim: usize, conv: bool) -> LoraNetwork {
    let linear = Rank::new(dim, 1.);
    let rule = UniformRanks { linear, conv: conv.then_some(linear) };
    LoraNetwork::new(targets, &rule, Algorithm::LowRank).unwrap()
}

/// A file of `n` thousandths, so that every number is told apart.
fn filled(network: &LoraNetwork) -> BTreeMap<String, OwnedTensor> {
    let values = (0..network.param_count())
        .map(|id| {
            let len = network.file_shape(ParamId(id)).iter().product();
            (0..len).map(|n| n as f32 / 1000.).collect()
        })
        .collect();
    let params = network.parameters(Device::Cpu, values).unwrap();
    network.export(&params, Dtype::F32).unwrap()
}

fn reference(file: &str) -> Value {
    let path = format!("{}/../tests/data/keys/{file}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn compare_with_sd_scripts(network: &LoraNetwork, want: &Value) {
    let count = |key: &str| want[key].as_u64().unwrap() as usize;
    assert_eq!(network.module_count(Part::TextEncoder), count("n_te_modules"));
    assert_eq!(network.module_count(Part::Unet), count("n_unet_modules"));
    // sd-scripts counts the alphas, one number a module, as well.
    assert_eq!(network.element_count() + network.modules().len(), count("n_params"));

    // The dump keeps the order in which sd-scripts made the modules.
    let alphas = want["alphas"].as_object().unwrap();
    let order: Vec<&String> = alphas.keys().collect();
    assert_eq!(network.modules().iter().map(|m| &m.target.name).collect::<Vec<_>>(), order);
    for module in network.modules() {
        assert_eq!(alphas[&module.target.name].as_f64(), Some(f64::from(module.rank.alpha)));
    }
    compare_groups(network, want);

    let shapes = want["shapes"].as_object().unwrap();
    let mut seen = 0;
    for module in network.modules() {
        for (plan, _) in module.parts() {
            let key = format!("{}.{}", module.target.name, plan.suffix);
            let want: Vec<usize> = serde_json::from_value(shapes[&key].clone()).unwrap();
            assert_eq!(plan.file_shape, want, "{key}");
            seen += 1;
        }
    }
    assert_eq!(seen + network.modules().len(), shapes.len());
}

/// Names, learning rates and sizes of the optimizer groups, with the rates of the dumps.
fn compare_groups(network: &LoraNetwork, want: &Value) {
    let mut params = vec![false; network.param_count()];
    let mut groups = Vec::new();
    for group in network.groups() {
        let rate = match group.part {
            Part::TextEncoder | Part::TextEncoder2 => 5e-5,
            Part::Unet => 1e-4,
        };
        // The reference makes a parameter of every rank that can be trained alone.
        let unit = |id: &ParamId| {
            let (module, part) = (network.modules(), network.file_shape(*id));
            let module = module.iter().find(|m| m.params().contains(&id.0)).unwrap();
            let whole: usize = module.tensors[0].parts;
            if whole > 1 { part.iter().take(2).min().copied().unwrap() } else { 1 }
        };
        let count: usize = group.params.iter().map(unit).sum();
        groups.push(serde_json::json!([group.label, rate * group.lr_factor, count]));
        for id in group.params {
            assert!(!std::mem::replace(&mut params[id.0], true), "{id:?} is in two groups");
        }
    }
    assert_eq!(Value::from(groups), want["optimizer_groups"]);
    assert!(params.iter().all(|seen| *seen));
}

#[test]
fn lierla_of_sd1_is_that_of_sd_scripts() {
    compare_with_sd_scripts(&network(sd1_targets(), 4, false), &reference("lierla_r4"));
}

#[test]
fn c3lier_of_sd1_is_that_of_sd_scripts() {
    compare_with_sd_scripts(&network(sd1_targets(), 4, true), &reference("c3lier_r4_conv4"));
}

#[test]
fn ranks_and_rates_by_block_are_those_of_sd_scripts() {
    let want = reference("block_lr_dims");
    let text = |key: &str| want["settings"]["network_args"][key].as_str().map(str::to_owned);
    let lr = BlockLrText {
        down: text("down_lr_weight"),
        mid: text("mid_lr_weight"),
        up: text("up_lr_weight"),
        zero_threshold: 0.,
    };
    let rates = BlockRates::read(BlockLayout::Sd, &lr, &mut Vec::new()).unwrap();
    let lists = BlockRankText {
        dims: text("block_dims"),
        alphas: text("block_alphas"),
        ..BlockRankText::default()
    };
    let uniform = UniformRank { dim: 8, alpha: 4., conv_dim: None, conv_alpha: 1. };
    let ranks = BlockRanks::read(BlockLayout::Sd, &lists, uniform, rates.as_ref()).unwrap();
    let mut network = LoraNetwork::new(sd1_targets(), &ranks, Algorithm::LowRank).unwrap();
    network.set_rates(rates, LoraPlus::default());
    compare_with_sd_scripts(&network, &want);

    // With LoRA+ every group falls into two.
    let groups = network.groups();
    network.set_rates(
        network.rates.blocks.clone(),
        LoraPlus { all: Some(16.), unet: Some(4.), text_encoder: None },
    );
    let halves = network.groups();
    assert_eq!(halves.len(), 2 * groups.len());
    let shown = |n: usize| (halves[n].label.as_str(), halves[n].lr_factor, halves[n].params.len());
    assert_eq!(shown(0), ("textencoder", 1., 72));
    assert_eq!(shown(1), ("textencoder plus", 16., 72));
    assert_eq!(shown(7), ("unet_block4 plus", 2., 12));
    assert!(network.key(halves[7].params[0]).ends_with("lora_up.weight"));
}

/// sd-scripts counts a parameter for every rank: ours, of four ranks each, count as four.
#[test]
fn dylora_of_sd1_is_that_of_sd_scripts() {
    let rule = UniformRanks { linear: Rank::new(16, 8.), conv: None };
    let algorithm = Algorithm::DyLora { unit: 4 };
    let network = LoraNetwork::new(sd1_targets(), &rule, algorithm).unwrap();
    compare_with_sd_scripts(&network, &reference("dylora_r16_u4"));
    assert!(
        network.key(ParamId(1)).ends_with("lora_down.weight[4..8]"),
        "{:?}",
        network.key(ParamId(1))
    );
    assert_eq!(network.file_shape(ParamId(5)), [768, 4]);
    let odd = LoraNetwork::new(sd1_targets(), &rule, Algorithm::DyLora { unit: 5 });
    assert!(odd.unwrap_err().to_string().contains("does not divide the rank: 16"));
}

#[test]
fn dylora_writes_and_reads_the_files_of_a_lora() {
    let rule = UniformRanks { linear: Rank::new(4, 1.), conv: Some(Rank::new(4, 1.)) };
    let kernel = Target {
        part: Part::Unet,
        path: "down_blocks.0.resnets.0.conv1".to_owned(),
        name: "lora_unet_down_blocks_0_resnets_0_conv1".to_owned(),
        kind: LayerKind::Conv { kernel: (3, 3) },
        out: 5,
        input: 3,
        in_transformer: false,
    };
    let targets = || [small_targets(), vec![kernel.clone()]].concat();
    let plain = LoraNetwork::new(targets(), &rule, Algorithm::LowRank).unwrap();
    let file = filled(&plain);
    let algorithm = Algorithm::DyLora { unit: 2 };
    let mut nested = LoraNetwork::new(targets(), &rule, algorithm).unwrap();
    assert_eq!(nested.param_count(), 2 * plain.param_count());
    let mut values = nested.initial_values(&mut |_, n| vec![0.; n]);
    nested.load_values(&mut values, &file).unwrap();
    // The second block of the first `down` are its last two rows, of `up` its last two columns.
    assert_eq!(values[1][..2], [0.032, 0.033]);
    assert_eq!(values[3][..2], [0.002, 0.006]);
    assert_eq!(nested.file_order(ParamId(3), &values[3])[..4], [0.002, 0.003, 0.006, 0.007]);
    let params = nested.parameters(Device::Cpu, values).unwrap();
    assert!(nested.export(&params, Dtype::F32).unwrap() == file);
}

#[test]
fn norms_above_the_limit_come_down_to_it() {
    let network = network(small_targets(), 4, false);
    let values: Vec<Vec<f32>> = network
        .initial_values(&mut |key, n| (0..n).map(|i| ((i + key.len()) % 7) as f32 / 7.).collect())
        .into_iter()
        .enumerate()
        .map(|(id, value)| match id % 2 {
            0 => value,
            // `up`, of another size in every module.
            _ => value.iter().enumerate().map(|(i, _)| ((i % 5) * (id + 1)) as f32 / 50.).collect(),
        })
        .collect();
    let mut params = network.parameters(Device::Cpu, values.clone()).unwrap();
    // By the definition: all numbers of `alpha/dim · up·down`.
    let norms = |values: &[Vec<f32>]| -> Vec<f64> {
        let norm = |module: &LoraModule| {
            let (down, up) = (&values[module.params().start], &values[module.params().start + 1]);
            let square = up.chunks(4).map(|row| {
                let n = down.len() / 4;
                (0..n)
                    .map(|j| {
                        let sum: f64 = (0..4).map(|k| f64::from(row[k] * down[k * n + j])).sum();
                        sum * sum
                    })
                    .sum::<f64>()
            });
            square.sum::<f64>().sqrt() / 4.
        };
        network.modules().iter().map(norm).collect()
    };
    let before = norms(&values);
    let limit = before.iter().sum::<f64>() / before.len() as f64;
    let report = network.limit_norms(&mut params, limit).unwrap();
    let flat = params.flat().to_vec_f32().unwrap();
    let after: Vec<Vec<f32>> =
        (0..network.param_count()).map(|id| flat[params.range(ParamId(id))].to_vec()).collect();
    let close = |a: f64, b: f64| (a - b).abs() < 1e-5 * b;
    for (before, after) in before.iter().zip(norms(&after)) {
        assert!(close(after, before.min(limit)), "{before} became {after}, not {limit}");
    }
    let clamped: Vec<f64> = before.iter().map(|norm| norm.min(limit)).collect();
    assert_eq!(report.scaled, before.iter().filter(|norm| **norm > limit).count());
    assert!(report.scaled > 0 && report.scaled < before.len());
    assert!(
        close(report.max, limit)
            && close(report.mean, clamped.iter().sum::<f64>() / clamped.len() as f64)
    );
    // Both halves by the root of the ratio; modules below the limit keep every bit.
    for (module, norm) in network.modules().iter().zip(&before) {
        let root = (limit / norm).min(1.).sqrt() as f32;
        for id in module.params() {
            let want = values[id].iter().map(|x| x * root);
            assert!(after[id].iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs()));
            assert!(*norm > limit || after[id] == values[id]);
        }
    }
}

/// Weights in memory.
struct Held(BTreeMap<String, OwnedTensor>);

impl Weights for Held {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let tensor = &self.0[name];
        let data = std::borrow::Cow::Borrowed(&tensor.data[..]);
        Ok(TensorView { dtype: tensor.dtype, shape: tensor.shape.clone(), data })
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.0.get(name)?.shape.clone())
    }
}

#[test]
fn files_are_added_to_the_weights_that_they_name() {
    let target = |kind, out, input, path: &str| Target {
        part: Part::Unet,
        path: path.to_owned(),
        name: format!("lora_unet_{path}"),
        kind,
        out,
        input,
        in_transformer: true,
    };
    let conv = LayerKind::Conv { kernel: (1, 2) };
    let targets = [target(LayerKind::Linear, 2, 3, "a"), target(conv, 2, 1, "b")];
    let tensor =
        |shape: &[usize], data: &[f32]| OwnedTensor::from_f32(shape, data, Dtype::F32).unwrap();
    let weights = Held(BTreeMap::from([
        ("a.weight".to_owned(), tensor(&[2, 3], &[1., 2., 3., 4., 5., 6.])),
        ("b.weight".to_owned(), tensor(&[2, 1, 1, 2], &[1., 2., 3., 4.])),
        ("a.bias".to_owned(), tensor(&[2], &[1., 2.])),
    ]));
    let file = BTreeMap::from([
        ("lora_unet_a.lora_down.weight".to_owned(), tensor(&[1, 3], &[1., 0., -1.])),
        ("lora_unet_a.lora_up.weight".to_owned(), tensor(&[2, 1], &[1., 2.])),
        ("lora_unet_a.alpha".to_owned(), tensor(&[], &[0.5])),
        ("lora_unet_b.lora_down.weight".to_owned(), tensor(&[2, 1, 1, 2], &[1., 2., 3., 4.])),
        ("lora_unet_b.lora_up.weight".to_owned(), tensor(&[2, 2, 1, 1], &[1., 0., 0., 1.])),
        ("lora_unet_c.alpha".to_owned(), tensor(&[], &[1.])),
    ]);
    let mut merge = BaseMerge::default();
    let report = merge.add(&file, 2., &targets).unwrap();
    assert_eq!((report.merged, report.unused), (2, vec!["lora_unet_c".to_owned()]));
    let merged = merge.over(Part::Unet, &weights);
    assert_eq!(merged.get("a.weight").unwrap().to_f32(), [2., 2., 2., 6., 5., 4.]);
    assert_eq!(merged.get("b.weight").unwrap().to_f32(), [3., 6., 9., 12.]);
    assert_eq!(merged.get("b.weight").unwrap().shape, [2, 1, 1, 2]);
    assert_eq!(merged.get("a.bias").unwrap().to_f32(), [1., 2.]);
    // A second file comes on top; the other part of the model has weights of the same name.
    merge.add(&file, -1., &targets).unwrap();
    assert_eq!(
        merge.over(Part::Unet, &weights).get("b.weight").unwrap().to_f32(),
        [2., 4., 6., 8.]
    );
    let other = merge.over(Part::TextEncoder, &weights);
    assert_eq!(other.get("b.weight").unwrap().to_f32(), [1., 2., 3., 4.]);

    let wide = target(LayerKind::Linear, 2, 4, "a");
    let error = BaseMerge::default().add(&file, 1., &[wide]).unwrap_err();
    assert!(matches!(error, ModelError::LoraShape { .. }), "{error}");
    let foreign = target(LayerKind::Linear, 2, 4, "x");
    let error = BaseMerge::default().add(&file, 1., &[foreign]).unwrap_err();
    assert!(matches!(error, ModelError::LoraForeign { .. }), "{error}");
}

#[test]
fn ranks_of_blocks_hold_for_convolutions_too() {
    let mut dims = ["2"; 25];
    dims[5] = "0";
    let lists = BlockRankText { dims: Some(dims.join(",")), ..BlockRankText::default() };
    let uniform = UniformRank { dim: 8, alpha: 0., conv_dim: None, conv_alpha: 1. };
    let make = |lists: &BlockRankText, uniform: UniformRank| {
        let ranks = BlockRanks::read(BlockLayout::Sd, lists, uniform, None).unwrap();
        LoraNetwork::new(sd1_targets(), &ranks, Algorithm::LowRank).unwrap()
    };
    // Twelve layers to a transformer.
    let network = make(&lists, uniform);
    assert_eq!(network.module_count(Part::Unet), 192 - 12);
    assert_eq!(network.modules()[0].rank, Rank::new(8, 8.));
    assert_eq!(network.modules()[100].rank, Rank::new(2, 2.));
    // Of the fifth block's residual block only the 3x3 convolutions remain.
    let network = make(&lists, UniformRank { conv_dim: Some(4), ..uniform });
    assert_eq!(network.module_count(Part::Unet), 278 - 12 - 1);
    let conv = |name: &str| network.modules().iter().find(|m| m.target.path == name).unwrap().rank;
    assert_eq!(conv("down_blocks.1.resnets.1.conv1"), Rank::new(4, 1.));
    let conv_dims = Some(["3"; 25].join(","));
    let network = make(&BlockRankText { conv_dims, ..lists }, uniform);
    assert_eq!(network.module_count(Part::Unet), 278 - 12 - 1);
    let conv = |name: &str| network.modules().iter().find(|m| m.target.path == name).unwrap().rank;
    assert_eq!(conv("up_blocks.0.upsamplers.0.conv"), Rank::new(3, 1.));
}

#[test]
fn sd2_has_as_many_modules_with_linear_projections() {
    let mut targets = text_encoder_targets(&text_encoder(&ClipConfig::sd2()));
    targets.extend(unet_targets(&unet(&UnetConfig::sd2())));
    let network = network(targets, 4, false);
    assert_eq!(network.module_count(Part::TextEncoder), 138);
    assert_eq!(network.module_count(Part::Unet), 192);
    let projection = |m: &&LoraModule| m.target.path.ends_with("proj_in");
    let module = network.modules().iter().find(projection).unwrap();
    assert_eq!(network.file_shape(ParamId(module.params().start)), [4, 320]);
}

#[test]
fn sizes_follow_from_the_shapes_of_full_size_models() {
    let row = crate::preset(formats::Family::Sd1);
    let shapes = unet(&UnetConfig::sd1());
    assert_eq!(UnetConfig::from_shapes(&shapes, row).unwrap(), UnetConfig::sd1());
    let shapes = text_encoder(&ClipConfig::sd1());
    assert_eq!(ClipConfig::resolve(None, &shapes, row).unwrap(), ClipConfig::sd1());
    let row = crate::preset(formats::Family::Sd2);
    let shapes = unet(&UnetConfig::sd2());
    assert_eq!(UnetConfig::from_shapes(&shapes, row).unwrap(), UnetConfig::sd2());
    let shapes = text_encoder(&ClipConfig::sd2());
    assert_eq!(ClipConfig::resolve(None, &shapes, row).unwrap(), ClipConfig::sd2());
}

/// A text encoder of two small layers.
fn small_targets() -> Vec<Target> {
    let config = ClipConfig { vocabulary: 8, width: 16, inner: 32, layers: 2, ..ClipConfig::sd1() };
    text_encoder_targets(&text_encoder(&config))
}

#[test]
fn new_values_are_uniform_below_and_zero_above() {
    let network = network(small_targets(), 4, false);
    let mut asked = Vec::new();
    let values = network.initial_values(&mut |key, n| {
        asked.push(key.to_owned());
        (0..n).map(|i| i as f32 / n as f32).collect()
    });
    assert_eq!(asked.len(), network.modules().len());
    assert!(asked.iter().all(|key| key.ends_with(".lora_down.weight")));
    // 16 inputs: the bound is a quarter.
    assert_eq!(values[0][0], -0.25);
    assert_eq!(values[0][32], 0.);
    assert!(values[1].iter().all(|x| *x == 0.));
}

#[test]
fn another_shape_in_a_file_is_named() {
    let mut tensors = filled(&network(small_targets(), 8, false));
    let mut network = network(small_targets(), 4, false);
    let mut values = network.initial_values(&mut |_, n| vec![0.; n]);
    let error = network.load_values(&mut values, &tensors).unwrap_err();
    let ModelError::LoraShape { key, expected, got } = error else { panic!("{error}") };
    assert!(key.ends_with("k_proj.lora_down.weight"), "{key}");
    assert_eq!((expected, got), (vec![4, 16], vec![8, 16]));

    tensors.retain(|key, _| !key.ends_with("lora_up.weight"));
    let error = network.load_values(&mut values, &tensors).unwrap_err();
    assert!(matches!(error, ModelError::LoraHalf { .. }), "{error}");
}

#[test]
fn a_file_of_another_architecture_is_refused() {
    let mut network = network(small_targets(), 4, false);
    let mut values = network.initial_values(&mut |_, n| vec![0.; n]);
    let tensor = OwnedTensor::from_f32(&[1], &[0.], Dtype::F32).unwrap();
    let foreign = BTreeMap::from([("lora_te1_x.lora_down.weight".to_owned(), tensor)]);
    for tensors in [foreign, BTreeMap::new()] {
        let error = network.load_values(&mut values, &tensors).unwrap_err();
        assert!(matches!(error, ModelError::LoraForeign { .. }), "{error}");
    }
}

#[test]
fn missing_unused_and_other_alphas_are_reported() {
    let whole = network(small_targets(), 4, false);
    let mut tensors = filled(&whole);
    let (first, second) = (&whole.modules()[0].target.name, &whole.modules()[1].target.name);
    let alpha = OwnedTensor::scalar(2., Dtype::F32).unwrap();
    tensors.insert(format!("{first}.alpha"), alpha.clone());
    tensors.retain(|key, _| !key.starts_with(second.as_str()));
    tensors.insert("lora_unet_x.alpha".to_owned(), alpha);
    let mut network = network(small_targets(), 4, false);
    let mut values = network.initial_values(&mut |_, n| vec![0.; n]);
    let report = network.load_values(&mut values, &tensors).unwrap();
    assert_eq!(report.loaded, 11);
    assert_eq!(report.missing, std::slice::from_ref(second));
    assert_eq!(report.unused, ["lora_unet_x"]);
    assert_eq!(report.alphas, [(first.clone(), 1., 2.)]);
    assert_eq!(network.modules()[0].rank, Rank::new(4, 2.));
    assert_eq!(values[0][7], 0.007);
}

#[test]
fn ranks_of_a_file_make_the_same_network() {
    let whole = network(small_targets(), 4, false);
    let mut tensors = filled(&whole);
    let (first, second) = (&whole.modules()[0].target.name, &whole.modules()[1].target.name);
    tensors.retain(|key, _| !key.starts_with(second.as_str()));
    // Without an alpha the update is not scaled.
    tensors.remove(&format!("{first}.alpha"));
    let ranks = FileRanks::new(&tensors).unwrap();
    assert_eq!(ranks.names().count(), 11);
    let network = LoraNetwork::new(small_targets(), &ranks, Algorithm::LowRank).unwrap();
    assert_eq!(network.modules().len(), 11);
    assert_eq!(network.modules()[0].rank, Rank::new(4, 4.));
    assert_eq!(network.modules()[0].rank.scale(), 1.);
    assert!(FileRanks::new(&BTreeMap::new()).is_err());
}

#[test]
fn a_rank_of_zero_and_an_empty_network_are_errors() {
    let zero = UniformRanks { linear: Rank::new(0, 1.), conv: None };
    assert!(LoraNetwork::new(small_targets(), &zero, Algorithm::LowRank).is_err());
    let some = UniformRanks { linear: Rank::new(4, 1.), conv: None };
    assert!(LoraNetwork::new(Vec::new(), &some, Algorithm::LowRank).is_err());
}
