//! The published models in full size: number of tensors and parameters, as PyTorch counts them.

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
