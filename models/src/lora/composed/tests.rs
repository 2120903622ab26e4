//! Outputs, gradients, keys and shapes against LyCORIS' modules
//! (`tests/data/reference_scripts/make_adapters.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use engine::{
    Conv2d, ConvGeometry, DType, Device, Dropouts, ElementLoss, Linear, LossSpec, ParamId,
    ParamStore, Tape, Tensor,
};
use formats::{Dtype, FormatError, OwnedTensor, TensorFile, TensorView, Weights, open_tensor_file};

use super::*;
use crate::ModelError;
use crate::lora::{Algorithm, FileRanks, LoraNetwork, Part, RankRule, RootRanks, UniformRanks};

const ALPHA: f32 = 1.5;

struct Reference(Arc<dyn TensorFile>);

impl Reference {
    fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/lora/adapters.safetensors");
        Self(open_tensor_file(path.as_ref()).unwrap())
    }

    fn owned(&self, name: &str) -> OwnedTensor {
        self.0.view(name).unwrap().to_owned_tensor()
    }

    fn tensor(&self, name: &str) -> Tensor {
        let owned = self.owned(name);
        Tensor::from_f32(Device::Cpu, &owned.shape, &owned.to_f32(), DType::F32).unwrap()
    }

    /// The tensors under `start`, without it.
    fn under(&self, start: &str) -> BTreeMap<String, OwnedTensor> {
        let names = self.0.names();
        let names = names.into_iter().filter_map(|name| Some((name, name.strip_prefix(start)?)));
        names.map(|(name, rest)| (rest.to_owned(), self.owned(name))).collect()
    }
}

fn target(name: &str) -> Target {
    let (kind, out, input) = match name {
        "linear" => (LayerKind::Linear, 12, 16),
        "conv3" => (LayerKind::Conv { kernel: (3, 3) }, 16, 12),
        _ => (LayerKind::Conv { kernel: (1, 1) }, 12, 16),
    };
    Target {
        part: Part::Unet,
        path: name.to_owned(),
        name: format!("lora_unet_{name}"),
        kind,
        out,
        input,
        in_transformer: true,
    }
}

const LAYERS: [&str; 3] = ["linear", "conv3", "conv1"];

/// Name of a case, what it trains, its rank, and whether alpha counts by the root of the rank.
fn cases() -> Vec<(&'static str, Algorithm, usize, bool)> {
    let make =
        |form, tucker, magnitude| Algorithm::Composed(Composition { form, tucker, magnitude });
    let kron = |split| Form::Kronecker(split);
    let whole = Split::default();
    let both = Split { factor: 4, decompose_both: true, ..whole };
    let two = Split { factor: 2, ..whole };
    vec![
        ("locon_tucker", make(Form::LowRank, true, false), 2, false),
        ("locon_rs", Algorithm::LowRank, 2, true),
        ("dora", make(Form::LowRank, false, true), 2, false),
        ("loha", make(Form::Hadamard, false, false), 2, false),
        ("loha_tucker", make(Form::Hadamard, true, false), 2, false),
        ("loha_dora", make(Form::Hadamard, false, true), 2, true),
        ("lokr", make(kron(whole), false, false), 2, false),
        ("lokr_factor", make(kron(two), false, false), 2, false),
        ("lokr_both", make(kron(both), false, false), 1, false),
        ("lokr_full", make(kron(Split { full_matrix: true, ..whole }), false, false), 2, false),
        ("lokr_tucker", make(kron(two), true, false), 2, false),
        ("lokr_dora", make(kron(Split { unbalanced: true, ..whole }), false, true), 2, false),
    ]
}

fn network(algorithm: Algorithm, dim: usize, root: bool) -> LoraNetwork {
    let rank = Rank::new(dim, ALPHA);
    let ranks = UniformRanks { linear: rank, conv: Some(rank) };
    let rule: Box<dyn RankRule> =
        if root { Box::new(RootRanks(Box::new(ranks))) } else { Box::new(ranks) };
    LoraNetwork::new(LAYERS.map(target).to_vec(), &*rule, algorithm).unwrap()
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-5 * scale, "{what}: {got}, not {want} (of {scale})");
    }
}

/// Runs one layer of a case with the file's numbers and compares all that comes out.
fn compare_layer(
    reference: &Reference,
    case: &str,
    network: &LoraNetwork,
    store: &ParamStore,
    layer: &str,
) {
    let module = network.modules().iter().find(|m| m.target.path == layer).unwrap();
    let adapter = network.algorithm.adapter(module, 1., Dropouts::default());
    let (weight, want) = (
        reference.tensor(&format!("{layer}/weight")),
        reference.tensor(&format!("{layer}/target")),
    );
    let input = LAYERS.iter().position(|name| *name == layer).unwrap();
    let tape = Tape::new(store, false);
    let x = tape.param(ParamId(network.param_count() + input)).unwrap();
    // The models run 1x1 convolutions as linear layers over pixels.
    let y = if module.target.is_pointwise() {
        let weight = weight.reshape(&[module.target.out, module.target.input]).unwrap();
        let layer = Linear { weight, bias: None, adapter: Some(adapter) };
        layer.forward(&tape, &x).unwrap()
    } else {
        let geometry = ConvGeometry::square(3, 2, 1);
        let layer = Conv2d { weight, bias: None, geometry, adapter: Some(adapter) };
        layer.forward(&tape, &x).unwrap()
    };
    let numbers = y.tensor().to_vec_f32().unwrap();
    assert_close(
        &format!("{case} {layer}"),
        &numbers,
        &reference.owned(&format!("{case}/y/{layer}")).to_f32(),
    );
    let batch = y.shape()[0];
    let (delta, weight) = (vec![1.; batch], vec![1. / batch as f32; batch]);
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &delta, &weight).unwrap();
    let loss = tape.loss(&y, &want, &spec).unwrap();
    let mut seen = BTreeSet::new();
    tape.backward(&loss, &mut |id, gradient| {
        let gradient = gradient.to_vec_f32()?;
        let (name, gradient) = if id.0 < network.param_count() {
            (format!("{case}/grad/{}", network.key(id)), network.file_order(id, &gradient))
        } else {
            (format!("{case}/dx/{layer}"), gradient)
        };
        assert_close(&name, &gradient, &reference.owned(&name).to_f32());
        seen.insert(name);
        Ok(())
    })
    .unwrap();
    let wanted = reference.under(&format!("{case}/grad/lora_unet_{layer}.")).len();
    assert_eq!(seen.len(), wanted + 1, "{case} {layer}");
}

#[test]
fn modules_compute_what_those_of_lycoris_compute() {
    let reference = Reference::open();
    for (case, algorithm, dim, root) in cases() {
        let mut network = network(algorithm, dim, root);
        let file = reference.under(&format!("{case}/file/"));
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        let report = network.load_values(&mut values, &file).unwrap();
        assert_eq!((report.loaded, report.alphas), (3, vec![]), "{case}");

        let own = network.parameters(Device::Cpu, values.clone()).unwrap();
        let mut tensors: Vec<(Vec<usize>, Vec<f32>)> = Vec::new();
        for (id, value) in values.into_iter().enumerate() {
            tensors.push((own.shape(ParamId(id)).to_vec(), value));
        }
        for layer in LAYERS {
            let x = reference.owned(&format!("{layer}/x"));
            tensors.push((x.shape.clone(), x.to_f32()));
        }
        let store = ParamStore::new(Device::Cpu, &tensors).unwrap();
        for layer in LAYERS {
            compare_layer(&reference, case, &network, &store, layer);
        }
    }
}

#[test]
fn files_are_those_of_lycoris() {
    let reference = Reference::open();
    for (case, algorithm, dim, root) in cases() {
        let mut network = network(algorithm, dim, root);
        let file = reference.under(&format!("{case}/file/"));
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        // The alphas of a new network are those that LyCORIS gives it.
        let params = network.parameters(Device::Cpu, values.clone()).unwrap();
        let fresh = network.export(&params, Dtype::F32).unwrap();
        for layer in LAYERS {
            let key = format!("lora_unet_{layer}.alpha");
            assert_eq!(fresh[&key].to_f32(), file[&key].to_f32(), "{case}");
        }
        network.load_values(&mut values, &file).unwrap();
        let params = network.parameters(Device::Cpu, values).unwrap();
        assert_eq!(network.export(&params, Dtype::F32).unwrap(), file, "{case}");
    }
}

#[test]
fn ranks_of_files_make_the_same_networks() {
    let reference = Reference::open();
    for (case, algorithm, dim, _) in cases() {
        let file = reference.under(&format!("{case}/file/"));
        let ranks = FileRanks::new(&file).unwrap();
        let mut network = LoraNetwork::new(LAYERS.map(target).to_vec(), &ranks, algorithm).unwrap();
        assert!(network.modules().iter().all(|module| module.rank.dim == dim), "{case}");
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        let report = network.load_values(&mut values, &file).unwrap();
        assert_eq!((report.loaded, report.alphas), (3, vec![]), "{case}");
    }
}

#[test]
fn a_kronecker_product_of_whole_matrices_is_not_scaled_by_any_alpha() {
    let algorithm = Algorithm::Composed(Composition {
        form: Form::Kronecker(Split { full_matrix: true, ..Split::default() }),
        tucker: false,
        magnitude: false,
    });
    // Programs that read the file do not scale it either, whatever rsLoRA would say.
    for root in [false, true] {
        let network = network(algorithm, 2, root);
        assert!(network.modules().iter().all(|module| module.rank == Rank::new(2, 2.)));
    }
    let mut file = Reference::open().under("lokr_full/file/");
    for layer in LAYERS {
        let alpha = OwnedTensor::scalar(0.25, Dtype::F32).unwrap();
        file.insert(format!("lora_unet_{layer}.alpha"), alpha);
    }
    let mut network = network(algorithm, 2, false);
    let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
    network.load_values(&mut values, &file).unwrap();
    assert!(network.modules().iter().all(|module| module.rank.scale() == 1.));
}

/// Weights of the reference's layers, `[out,kh,kw,in]`: the norms of rows are the same.
struct Layers(Reference);

impl Weights for Layers {
    fn names(&self) -> Vec<String> {
        LAYERS.map(|layer| format!("{layer}.weight")).to_vec()
    }

    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        self.0.0.view(&name.replace('.', "/"))
    }

    fn shape(&self, _: &str) -> Option<Vec<usize>> {
        None
    }
}

#[test]
fn new_modules_start_as_those_of_lycoris() {
    let reference = Layers(Reference::open());
    for (case, algorithm, dim, root) in cases() {
        let network = network(algorithm, dim, root);
        // Uniform numbers evenly spread; pairs for the normal ones.
        let mut values = network.initial_values(&mut |_, n| {
            (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.).collect()
        });
        let parts = BTreeMap::from([
            (Part::TextEncoder, &reference as &dyn Weights),
            (Part::Unet, &reference),
        ]);
        network.set_magnitudes(&mut values, &parts).unwrap();
        for (id, value) in values.iter().enumerate() {
            let key = network.key(ParamId(id));
            let (module, suffix) = key.split_once('.').unwrap();
            let layer = module.trim_start_matches("lora_unet_");
            let zero = value.iter().all(|x| *x == 0.);
            match suffix {
                "dora_scale" => {
                    let want = reference.0.owned(&format!("{case}/start/{layer}")).to_f32();
                    assert_close(&key, value, &want);
                }
                "lora_up.weight" | "hada_w2_a" | "lokr_w2" => assert!(zero, "{case} {key}"),
                "lokr_w2_b" => assert!(zero, "{case} {key}"),
                _ => assert!(!zero && value.iter().all(|x| x.is_finite()), "{case} {key}"),
            }
        }
    }
}

#[test]
fn normal_numbers_have_the_deviation_asked_for() {
    let algorithm =
        Algorithm::Composed(Composition { form: Form::Hadamard, tucker: false, magnitude: false });
    let big = Target { out: 400, input: 600, ..target("linear") };
    let rule = UniformRanks { linear: Rank::new(16, 1.), conv: None };
    let network = LoraNetwork::new(vec![big], &rule, algorithm).unwrap();
    let mut state = 1u32;
    let values = network.initial_values(&mut |_, n| {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| next()).collect()
    });
    let moments = |x: &[f32]| {
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        (mean, (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt())
    };
    for (value, want) in values.iter().zip([0.1, 1., 0., 1.]) {
        let (mean, deviation) = moments(value);
        assert!(mean.abs() <= 0.05 * want && (deviation - want).abs() <= 0.03 * want, "{want}");
    }
}

#[test]
fn files_of_another_kind_are_refused_by_the_tensor_that_does_not_fit() {
    let reference = Reference::open();
    let load = |file: &str, algorithm: Algorithm| {
        let mut network = network(algorithm, 2, false);
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        network.load_values(&mut values, &reference.under(&format!("{file}/file/"))).unwrap_err()
    };
    let algorithm = |case: &str| cases().into_iter().find(|(name, ..)| *name == case).unwrap().1;
    let key = |error: ModelError| match error {
        ModelError::LoraKind { key } => key,
        other => panic!("{other}"),
    };
    let conv1 = "lora_unet_linear";
    assert_eq!(key(load("dora", Algorithm::LowRank)), format!("{conv1}.dora_scale"));
    assert!(key(load("loha", Algorithm::LowRank)).contains("hada_w1_a"));
    assert!(key(load("locon_rs", algorithm("loha"))).contains("lora_down"));
    assert!(key(load("loha_tucker", algorithm("loha"))).contains("hada_t"));
    // A file without magnitudes does not say where they should start.
    let error = load("locon_rs", algorithm("dora"));
    assert!(matches!(error, ModelError::LoraHalf { .. }), "{error}");
    // The same kind, split otherwise.
    let error = load("lokr_factor", algorithm("lokr_full"));
    assert!(matches!(error, ModelError::LoraShape { .. } | ModelError::LoraKind { .. }), "{error}");
}
