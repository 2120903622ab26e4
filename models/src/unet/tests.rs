//! The U-Net by itself: sizes that do not halve, the time embedding, the order of its layers, and
//! files that do not fit. `models/data/unet.safetensors` was computed by diffusers 0.39 on the
//! model of `tests/data/parity`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{
    BaseModel, FormatError, OpenOptions, OwnedTensor, TensorFile, TensorView, open_base_model,
    open_tensor_file,
};

use super::*;
use crate::lora::{outer_targets, unet_targets};
use crate::{ModelError, pixel_order, preset};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn open_model() -> BaseModel {
    let path = data("../tests/data/parity/model");
    open_base_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

fn config(model: &BaseModel) -> UnetConfig {
    let row = preset(model.family);
    UnetConfig::resolve(model.unet_config.as_ref(), &*model.unet, row).unwrap()
}

fn open_unet() -> Unet {
    let model = open_model();
    Unet::load(&*model.unet, &config(&model), Device::Cpu, DType::F32).unwrap()
}

fn golden(name: &str) -> Vec<f32> {
    let file: Arc<dyn TensorFile> = open_tensor_file(&data("data/unet.safetensors")).unwrap();
    file.view(name).unwrap().to_f32()
}

fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} and {b}");
    }
}

#[test]
fn the_time_embedding_is_that_of_diffusers() {
    let unet = open_unet();
    let tape = Tape::inference(None);
    let waves = unet.waves(Device::Cpu, &[1., 981.]).unwrap();
    // The time signal looks at nothing else.
    let (latents, context) = (&waves, &Value::constant(waves.clone()));
    let input = UnetInput { latents, waves: &waves, context, added: None };
    let signal = unet.time_signal(&tape, &input).unwrap();
    assert_close(&signal.tensor().to_vec_f32().unwrap(), &golden("time_signal"));
}

#[test]
fn odd_sizes_come_back_as_they_were() {
    let unet = open_unet();
    let parity = |file: &str, name: &str| {
        let path = data("../tests/data/parity").join(file);
        open_tensor_file(&path).unwrap().view(name).unwrap().to_f32()
    };
    // The upper left 9x13 of the noise of step 0, [2,4,16,24].
    let noise = parity("inputs.safetensors", "noise");
    let row = |plane: usize, y: usize| noise[(plane * 16 + y) * 24..][..13].to_vec();
    let cut: Vec<f32> = (0..8 * 9).flat_map(|i| row(i / 9, i % 9)).collect();
    let latents = pixel_order::nhwc_from_nchw(&cut, 4, 9 * 13);
    let latents = Tensor::from_f32(Device::Cpu, &[2, 9, 13, 4], &latents, DType::F32).unwrap();
    let text = parity("base.safetensors", "te_clip_skip_none");
    let text = Tensor::from_f32(Device::Cpu, &[2, 77, 32], &text, DType::F32).unwrap();
    let context = Value::constant(text);
    let waves = unet.waves(Device::Cpu, &[37., 981.]).unwrap();
    let input = UnetInput { latents: &latents, waves: &waves, context: &context, added: None };
    let tape = Tape::inference(None);
    let got = unet.forward(&tape, input).unwrap();
    assert_eq!(got.shape(), [2, 9, 13, 4]);
    let got = pixel_order::nchw_from_nhwc(&got.tensor().to_vec_f32().unwrap(), 4, 9 * 13);
    assert_close(&got, &golden("noise_pred_9x13"));

    let one = unet.waves(Device::Cpu, &[37.]).unwrap();
    let wrong = UnetInput { waves: &one, ..input };
    let message = unet.forward(&tape, wrong).unwrap_err().to_string();
    assert!(message.contains("time [1, "), "{message}");
}

#[test]
fn layers_are_visited_in_the_order_of_targets() {
    let model = open_model();
    let mut unet = Unet::load(&*model.unet, &config(&model), Device::Cpu, DType::F32).unwrap();
    let mut visited = Vec::new();
    unet.visit_slots(&mut |path, _| visited.push(path.to_owned()));
    // The layers outside of the blocks are targets of their own.
    let outer = outer_targets(&*model.unet);
    assert_eq!(outer.len(), 4);
    visited.retain(|path| outer.iter().all(|target| target.path != *path));
    let targets = unet_targets(&*model.unet);
    // The middle block is registered after the way up.
    let (middle, rest): (Vec<_>, Vec<_>) =
        visited.into_iter().partition(|path| path.starts_with("mid_block"));
    let visited: Vec<String> = rest.into_iter().chain(middle).collect();
    assert_eq!(visited, targets.iter().map(|t| t.path.clone()).collect::<Vec<_>>());
}

#[test]
fn shapes_tell_what_the_config_says() {
    let model = open_model();
    let row = preset(model.family);
    assert_eq!(UnetConfig::from_shapes(&*model.unet, row).unwrap(), config(&model));
    let mut names: Vec<_> = Unet::tensor_shapes(&config(&model)).unwrap().into_iter().collect();
    names.sort();
    let found: Vec<_> = model
        .unet
        .names()
        .into_iter()
        .map(|name| {
            let shape = model.unet.shape(&name).unwrap();
            (name, shape)
        })
        .collect();
    assert_eq!(names, found);
}

/// A model with one tensor replaced or taken away.
struct Changed {
    model: BaseModel,
    name: &'static str,
    tensor: Option<OwnedTensor>,
}

impl Weights for Changed {
    fn names(&self) -> Vec<String> {
        self.model.unet.names()
    }

    fn get(&self, name: &str) -> std::result::Result<TensorView<'_>, FormatError> {
        match &self.tensor {
            _ if name != self.name => self.model.unet.get(name),
            Some(tensor) => Ok(tensor.view()),
            None => Err(FormatError::MissingTensor { path: "x".into(), name: name.to_owned() }),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name).ok().map(|view| view.shape)
    }
}

#[test]
fn wrong_and_missing_tensors_are_named() {
    let name = "up_blocks.3.resnets.0.conv1.weight";
    let tensor = OwnedTensor::from_f32(&[2], &[0., 0.], formats::Dtype::F32).unwrap();
    for tensor in [Some(tensor), None] {
        let weights = Changed { model: open_model(), name, tensor };
        let config = config(&weights.model);
        let error = Unet::load(&weights, &config, Device::Cpu, DType::F32).err().unwrap();
        let message = error.to_string();
        assert!(message.contains(&format!("`{name}`")), "{message}");
        if let ModelError::Shape { expected, got, .. } = error {
            assert_eq!((expected, got), (vec![32, 64, 3, 3], vec![2]));
        } else {
            assert!(weights.tensor.is_none(), "{message}");
        }
    }
    let weights = Changed { model: open_model(), name: "conv_in.weight", tensor: None };
    let row = preset(weights.model.family);
    let message = UnetConfig::from_shapes(&weights, row).unwrap_err().to_string();
    assert!(message.contains("`conv_in.weight`"), "{message}");
}
