//! Merged weights beside LyCORIS' for a module of every kind; rounding beside PyTorch's.
//! `tests/data/reference_scripts/make_merged_layers.py` made the data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::adapter::AdapterFile;
use formats::{Dtype, TensorFile, open_tensor_file};

use super::{Change, Stored, apply_all, measure_inputs};
use crate::finite::FiniteRule;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tools/merged_layers").join(name)
}

struct Scene {
    layers: Arc<dyn TensorFile>,
    merged: Arc<dyn TensorFile>,
    adapter: AdapterFile,
}

impl Scene {
    fn open() -> Self {
        Self {
            layers: open_tensor_file(&data("layers.safetensors")).unwrap(),
            merged: open_tensor_file(&data("merged.safetensors")).unwrap(),
            adapter: AdapterFile::open(&data("adapter.safetensors")).unwrap(),
        }
    }

    /// The weight of a layer with the modules of it at these ratios, `rows` rows at a time.
    fn sum(&self, layer: &str, modules: &[(&str, f32)], rows: usize) -> Vec<f32> {
        let view = self.layers.view(&format!("{layer}.weight")).unwrap();
        let read = |(name, ratio): &(&str, f32)| {
            let module = self.adapter.modules.iter().find(|module| module.name == *name).unwrap();
            let finite = FiniteRule::default();
            Change::read(&self.adapter, module, &view.shape, (*ratio, None), finite).unwrap()
        };
        let mut changes: Vec<Change> = modules.iter().map(read).collect();
        let cols = view.len() / view.shape[0];
        let stored = Stored { dtype: view.dtype, bytes: &view.data, cols };
        measure_inputs(&mut changes, stored).unwrap();
        let mut sum = view.to_f32();
        for (index, block) in sum.chunks_mut(rows * cols).enumerate() {
            apply_all(&changes, index * rows, block).unwrap();
        }
        sum
    }
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(0_f32, |most, value| most.max(value.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-6 * most, "{what}: {got}, not {want}");
    }
}

#[test]
fn every_kind_is_merged_as_by_lycoris() {
    let scene = Scene::open();
    assert_eq!(scene.adapter.modules.len(), 20);
    assert!(scene.adapter.unknown.is_empty());
    for module in &scene.adapter.modules {
        let name = module.name.as_str();
        let want = scene.merged.view(&format!("{name}.weight")).unwrap().to_f32();
        for rows in [1, 3, 10] {
            assert_close(name, &scene.sum(name, &[(name, 1.0)], rows), &want);
        }
        // A ratio leads evenly from the layer to the merged one, for DoRA too.
        let own = scene.layers.view(&format!("{name}.weight")).unwrap().to_f32();
        for ratio in [0.0, 0.25, -0.5] {
            let want: Vec<f32> = own.iter().zip(&want).map(|(a, b)| a + ratio * (b - a)).collect();
            assert_close(name, &scene.sum(name, &[(name, ratio)], 4), &want);
        }
    }
}

#[test]
fn adapters_follow_each_other() {
    let scene = Scene::open();
    let layer = "lora_unet_dora_conv";
    let two = [("lora_unet_lora_conv", 0.5), ("lora_unet_loha_conv", -1.0)];
    let plain = scene.sum(layer, &two, 10);
    let own = scene.layers.view(&format!("{layer}.weight")).unwrap().to_f32();
    let each = two.map(|one| scene.sum(layer, &[one], 10));
    let want: Vec<f32> = (0..own.len()).map(|i| each[0][i] + each[1][i] - own[i]).collect();
    assert_close("two", &plain, &want);
    // A DoRA after a LoRA has lengths of its own: those of the rows are then its magnitudes.
    let then = [two[0], ("lora_unet_dora_conv", 1.0)];
    let sum = scene.sum(layer, &then, 3);
    let lengths = scene.adapter.view("lora_unet_dora_conv.dora_scale").unwrap().to_f32();
    let got: Vec<f32> = sum
        .chunks(sum.len() / lengths.len())
        .map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt())
        .collect();
    assert_close("lengths of rows", &got, &lengths);
    // The same for inputs, whose lengths need all rows at once.
    let then = [two[0], ("lora_unet_dora_conv_in", 1.0)];
    let sum = scene.sum(layer, &then, 3);
    let lengths = scene.adapter.view("lora_unet_dora_conv_in.dora_scale").unwrap().to_f32();
    let cells: Vec<&[f32]> = sum.chunks(9).collect();
    let got: Vec<f32> = (0..lengths.len())
        .map(|input| {
            let of_input = cells.iter().skip(input).step_by(lengths.len());
            of_input.flat_map(|cell| cell.iter()).map(|x| x * x).sum::<f32>().sqrt()
        })
        .collect();
    assert_close("lengths of inputs", &got, &lengths);
}

#[test]
fn magnitudes_that_fit_nothing_are_an_error() {
    let scene = Scene::open();
    let find = |name: &str| scene.adapter.modules.iter().find(|m| m.name == name).unwrap();
    let module = find("lora_unet_dora_linear");
    let error = Change::read(&scene.adapter, module, &[11, 12], (1.0, None), FiniteRule::default());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("`lora_unet_dora_linear.dora_scale`"), "{text}");
    assert!(text.ends_with("[10, 1]"), "{text}");
}

/// PyTorch 2.11 on a CPU: `W + ratio * (up @ down) * scale` with tensors of the type.
#[test]
fn narrow_types_round_every_step() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let f32s = |shape: &[usize], values: &[f32]| {
        formats::OwnedTensor::from_f32(shape, values, Dtype::F32).unwrap()
    };
    let tensors = formats::lora_file::Tensors::from([
        ("lora_unet_a.lora_up.weight".to_owned(), f32s(&[2, 1], &[1.0007, -0.333])),
        ("lora_unet_a.lora_down.weight".to_owned(), f32s(&[1, 2], &[0.7003, 2.1415])),
        ("lora_unet_a.alpha".to_owned(), f32s(&[], &[0.3])),
    ]);
    formats::lora_file::write(&path, &tensors, &Default::default(), formats::SaveAs::Safetensors)
        .unwrap();
    let file = AdapterFile::open(&path).unwrap();
    let expected = [
        (Dtype::F16, [0.270_263_67, -4.109_375, 7.839_843_8, -0.148_803_71]),
        (Dtype::BF16, [0.269_531_25, -4.125, 7.812_5, -0.148_437_5]),
    ];
    for (dtype, want) in expected {
        let module = &file.modules[0];
        let how = (0.7, Some(dtype));
        let change = Change::read(&file, module, &[2, 2], how, FiniteRule::default()).unwrap();
        let mut weight = [0.123, -4.56, 7.89, 0.001];
        super::round(&mut weight, dtype).unwrap();
        apply_all(&[change], 0, &mut weight).unwrap();
        assert_eq!(weight, want, "{dtype}");
    }
}
