//! Configs, names of old files, and inputs that do not fit; the numbers are held by `tests/parity.rs`.

use std::path::Path;

use formats::{BaseModel, FormatError, OpenOptions, TensorView, open_base_model};
use serde_json::json;

use super::*;
use crate::preset;

fn open_model() -> BaseModel {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/parity/model");
    open_base_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

#[test]
fn shapes_tell_what_the_config_says() {
    let model = open_model();
    let row = preset(model.family);
    let config = VaeConfig::resolve(model.vae_config.as_ref(), &*model.vae, row).unwrap();
    assert_eq!(VaeConfig::resolve(None, &*model.vae, row).unwrap(), config);
    let mut names = Vae::tensor_shapes(&config).unwrap();
    names.sort();
    let names: Vec<String> = names.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, model.vae.names());
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let model = open_model();
    let row = preset(model.family);
    for (key, value) in [
        ("shift_factor", json!(0.1)),
        ("latents_mean", json!([0.5])),
        ("down_block_types", json!(["DownEncoderBlock2D"])),
        ("norm_num_groups", json!(5)),
        ("out_channels", json!(1)),
    ] {
        let mut config = model.vae_config.clone().unwrap();
        config[key] = value;
        let message = VaeConfig::from_json(&config, row).unwrap_err().to_string();
        assert!(message.contains(&format!("`{key}`")), "{message}");
    }
}

/// The attention under the names that diffusers gave it before 0.18.
struct OldNames(BaseModel);

impl OldNames {
    fn new_name(name: &str) -> String {
        [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]
            .iter()
            .fold(name.to_owned(), |name, (old, new)| {
                name.replace(&format!("attentions.0.{old}."), &format!("attentions.0.{new}."))
            })
    }
}

impl Weights for OldNames {
    fn names(&self) -> Vec<String> {
        self.0.vae.names()
    }

    fn get(&self, name: &str) -> std::result::Result<TensorView<'_>, FormatError> {
        match name.contains(".to_") {
            true => Err(FormatError::MissingTensor { path: "x".into(), name: name.to_owned() }),
            false => self.0.vae.get(&Self::new_name(name)),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name).ok().map(|view| view.shape)
    }
}

#[test]
fn old_names_of_the_attention_are_read() {
    let weights = OldNames(open_model());
    let config = VaeConfig::resolve(None, &weights, preset(weights.0.family)).unwrap();
    let old = Vae::load(&weights, &config, Device::Cpu, DType::F32).unwrap();
    let new = Vae::load(&*weights.0.vae, &config, Device::Cpu, DType::F32).unwrap();
    let image: Vec<f32> = (0..16 * 16 * 3).map(|i| (i as f32).sin()).collect();
    let image = Tensor::from_f32(Device::Cpu, &[1, 16, 16, 3], &image, DType::F32).unwrap();
    assert_eq!(old.encode(&image).unwrap(), new.encode(&image).unwrap());

    let message = new.decode(&image).unwrap_err().to_string();
    assert!(message.contains("[B,H,W,4]"), "{message}");
}

#[test]
fn a_sample_is_scaled_after_the_noise() {
    let moments = Moments { shape: [1, 1, 1, 2], mean: vec![1., 2.], logvar: vec![0., 4f32.ln()] };
    assert_eq!(moments.sample(&[3., -1.], 0.5), [2., 0.]);
}
