//! The published models in full size: number of tensors and parameters, as PyTorch counts them.

use std::collections::HashMap;

use engine::DType;
use engine::cuda::driver::CardFacts;
use engine::cuda::recorder;
use formats::{FormatError, TensorView, Weights};

use crate::{ClipConfig, ClipTextModel, TensorShape, Unet, UnetConfig, Vae, VaeConfig};

fn totals(shapes: Vec<TensorShape>) -> (usize, usize) {
    let elements = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    (shapes.len(), elements)
}

#[test]
fn stable_diffusion_1_has_its_size() {
    let unet = Unet::tensor_shapes(&UnetConfig::sd1()).unwrap();
    assert_eq!(totals(unet), (686, 859_520_964));
    let text = ClipTextModel::tensor_shapes(&ClipConfig::sd1()).unwrap();
    assert_eq!(totals(text), (196, 123_060_480));
    let vae = Vae::tensor_shapes(&VaeConfig::sd1()).unwrap();
    assert_eq!(totals(vae), (248, 83_653_863));
}

#[test]
fn stable_diffusion_2_has_its_size() {
    let unet = Unet::tensor_shapes(&UnetConfig::sd2()).unwrap();
    assert_eq!(totals(unet), (686, 865_910_724));
    let text = ClipTextModel::tensor_shapes(&ClipConfig::sd2()).unwrap();
    assert_eq!(totals(text), (372, 340_387_840));
}

/// The numbers of diffusers' `UNet2DConditionModel` and transformers' `CLIPTextModelWithProjection` with
/// the configs of `stabilityai/stable-diffusion-xl-base-1.0`.
#[test]
fn stable_diffusion_xl_has_its_size() {
    let unet = Unet::tensor_shapes(&UnetConfig::sdxl()).unwrap();
    assert_eq!(totals(unet), (1680, 2_567_463_684));
    let text = ClipTextModel::tensor_shapes(&ClipConfig::sdxl_second()).unwrap();
    assert_eq!(totals(text), (517, 694_659_840));
}

/// Names and shapes without a byte: what a card that only records may ask for.
struct Shapes(HashMap<String, Vec<usize>>);

impl Weights for Shapes {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let path = "no file".into();
        Err(FormatError::MissingTensor { path, name: name.to_owned() })
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }
}

/// Bytes on a recording card of the U-Net of SD1 with weights kept as `stored`.
fn recorded_bytes(stored: DType) -> usize {
    let facts = CardFacts {
        name: "recorder".into(),
        label: "recorder".into(),
        capability: (8, 6),
        processors: 28,
        memory: 1 << 34,
        shared_memory: 100 << 10,
        computes: true,
    };
    let device = recorder::open(facts, 1 << 34).unwrap();
    let shapes = Shapes(Unet::tensor_shapes(&UnetConfig::sd1()).unwrap().into_iter().collect());
    let unet = Unet::load_stored(&shapes, &UnetConfig::sd1(), device, (DType::BF16, stored));
    let live = device.card().unwrap().memory_stats().live;
    drop(unet.unwrap());
    live
}

#[test]
fn a_recording_card_counts_a_model_without_reading_it() {
    let parameters = 859_520_964;
    let plain = recorded_bytes(DType::BF16);
    // Norms are f32; each tensor is rounded up to 256 bytes.
    assert!((2 * parameters..2 * parameters + (1 << 20)).contains(&plain), "{plain}");
    let packed = recorded_bytes(DType::F8);
    // All but the time embedding, the outer convolutions, biases and norms take half.
    assert!((parameters..parameters + (6 << 20)).contains(&packed), "{packed}");
}
