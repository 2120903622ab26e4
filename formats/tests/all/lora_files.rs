//! LoRA files: lossless reading of what sd-scripts wrote, hashes, determinism, bad keys.

use std::collections::BTreeMap;
use std::path::Path;

use formats::lora_file::{self, Metadata, SaveAs, Tensors, sshs_hashes};
use formats::model_spec::{ModelSpec, OptionalSpec, civil_time, iso_date, thumbnail_url};
use formats::{Dtype, Family, FormatError, OwnedTensor, SavePrecision, group_modules};

use crate::support::{data, load};

#[test]
fn hashes_equal_those_that_sd_scripts_wrote() {
    // `int_alpha` mixes types, so it shows the layout, too.
    for name in ["sd_scripts_resized.safetensors", "sd_scripts_int_alpha.safetensors"] {
        let lora = lora_file::read(&data(&format!("formats/{name}"))).unwrap();
        let (model, legacy) = sshs_hashes(&lora.tensors, &lora.metadata).unwrap();
        assert_eq!(Some(&model), lora.metadata.get("sshs_model_hash"), "{name}");
        assert_eq!(Some(&legacy), lora.metadata.get("sshs_legacy_hash"), "{name}");
    }
}

/// The reference library, as an oracle for our writer.
fn by_the_library(tensors: &Tensors, metadata: &Metadata) -> Vec<u8> {
    let dtype = |dtype| match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::BF16 => safetensors::Dtype::BF16,
        Dtype::I64 => safetensors::Dtype::I64,
        Dtype::U8 => safetensors::Dtype::U8,
        other => panic!("{other}"),
    };
    let views = tensors.iter().map(|(name, t)| {
        let view =
            safetensors::tensor::TensorView::new(dtype(t.dtype), t.shape.clone(), &t.data).unwrap();
        (name.clone(), view)
    });
    let metadata = metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

/// Larger than the window of the legacy hash, with mixed types.
fn large() -> (Tensors, Metadata) {
    let mut tensors = Tensors::new();
    for (index, dtype) in [Dtype::F16, Dtype::F32, Dtype::BF16].into_iter().enumerate() {
        let values: Vec<f32> =
            (0..200_000).map(|i| ((i * 7 + index) % 1000) as f32 / 64.0).collect();
        let tensor = OwnedTensor::from_f32(&[400, 500], &values, dtype).unwrap();
        tensors.insert(format!("tensor.{}", 9 - index), tensor);
    }
    let metadata = [("ss_a", "\"quoted\" \u{8a9e}\n"), ("ss_b", "x"), ("other", "y")];
    let metadata = metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    (tensors, metadata)
}

#[test]
fn hashes_of_a_large_file_equal_those_of_the_library_bytes() {
    use sha2::{Digest, Sha256};
    let (tensors, mut metadata) = large();
    let (model, legacy) = sshs_hashes(&tensors, &metadata).unwrap();
    metadata.remove("other");
    let bytes = by_the_library(&tensors, &metadata);
    assert!(bytes.len() > 0x11_0000);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let hex = |bytes: &[u8]| -> String {
        Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
    };
    assert_eq!(model, hex(&bytes[header..]));
    assert_eq!(legacy, hex(&bytes[0x10_0000..0x11_0000])[..8]);
}

#[test]
fn the_library_reads_what_we_write() {
    let (tensors, metadata) = large();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    lora_file::write(&path, &tensors, &metadata, SaveAs::Safetensors).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), tensors.len());
    for (name, tensor) in &tensors {
        assert_eq!(read.tensor(name).unwrap().data(), tensor.data, "{name}");
    }
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let texts = header.metadata().clone().unwrap();
    assert_eq!(texts["ss_a"], metadata["ss_a"]);
    assert_eq!(texts["sshs_legacy_hash"].len(), 8);
    // Alignment of every tensor to its own size.
    for (name, info) in header.tensors() {
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name}");
    }
}

#[test]
fn keys_and_metadata_are_sorted_and_bytes_repeat() {
    let (tensors, metadata) = large();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let path = folder.path().join(name);
        lora_file::write(&path, &tensors, &metadata, SaveAs::Safetensors).unwrap();
        std::fs::read(path).unwrap()
    };
    let bytes = write("a.safetensors");
    assert_eq!(bytes, write("b.safetensors"));
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(length % 8, 0);
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    // serde_json keeps the order of the text.
    let keys: Vec<_> = header.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["__metadata__", "tensor.7", "tensor.8", "tensor.9"]);
    let keys: Vec<_> = header["__metadata__"].as_object().unwrap().keys().collect();
    assert!(keys.is_sorted(), "{keys:?}");
}

#[test]
fn loras_of_sd_scripts_survive_reading_and_writing() {
    let files = [
        "lora/lierla_r4.safetensors",
        "formats/sd_scripts_resized.safetensors",
        "formats/sd_scripts_int_alpha.safetensors",
        "parity/lierla/init.safetensors",
    ];
    let folder = tempfile::tempdir().unwrap();
    for name in files {
        let lora = lora_file::read(&data(name)).unwrap();
        for (save_as, extension) in [(SaveAs::Safetensors, "safetensors"), (SaveAs::Pickle, "pt")] {
            let path = folder.path().join(format!("copy.{extension}"));
            lora_file::write(&path, &lora.tensors, &lora.metadata, save_as).unwrap();
            let copy = lora_file::read(&path).unwrap();
            assert_eq!(copy.tensors, lora.tensors, "{name} {extension}");
            if save_as == SaveAs::Safetensors {
                for (key, value) in &lora.metadata {
                    // The hashes of this file are of other tensors.
                    if name != "lora/lierla_r4.safetensors" || !key.starts_with("sshs_") {
                        assert_eq!(copy.metadata.get(key), Some(value), "{name} {key}");
                    }
                }
            } else {
                assert!(copy.metadata.is_empty());
            }
        }
    }
}

#[test]
fn modules_carry_rank_alpha_and_kernel() {
    let lora = lora_file::read(&data("lora/lierla_r4.safetensors")).unwrap();
    let modules = lora.modules().unwrap();
    assert_eq!(modules.len() * 3, lora.tensors.len());
    for module in &modules {
        assert_eq!((module.rank, module.alpha, module.scale()), (4, 1.0, 0.25), "{}", module.name);
        let is_proj =
            module.name.ends_with("_proj_in") || module.name.ends_with("_attentions_0_proj_out");
        if is_proj {
            assert_eq!(module.kernel, Some((1, 1)), "{}", module.name);
        }
    }
    // int64 alphas, and a file saved by torch.
    let lora = lora_file::read(&data("formats/sd_scripts_int_alpha.safetensors")).unwrap();
    assert!(lora.modules().unwrap().iter().all(|m| m.alpha == 8.0 && m.rank == 8));
    let lora = lora_file::read(&data("formats/lora.pt")).unwrap();
    assert_eq!(lora.tensors, load(&data("formats/lora_expected.safetensors")));
    assert_eq!(lora.modules().unwrap().len(), 2);
}

fn tensor(shape: &[usize]) -> OwnedTensor {
    let values = vec![0.5; shape.iter().product()];
    OwnedTensor::from_f32(shape, &values, Dtype::F32).unwrap()
}

type Entry = (&'static str, OwnedTensor);

fn lora(entries: &[Entry]) -> Tensors {
    entries.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect()
}

#[test]
fn alpha_is_the_rank_where_it_is_missing_or_zero() {
    let pair = [
        ("m.lora_down.weight", tensor(&[2, 5, 3, 3])),
        ("m.lora_up.weight", tensor(&[7, 2, 1, 1])),
    ];
    let mut tensors = lora(&pair);
    let modules = group_modules(&tensors, Path::new("x")).unwrap();
    assert_eq!((modules[0].alpha, modules[0].has_alpha), (2.0, false));
    assert_eq!(modules[0].kernel, Some((3, 3)));
    tensors.insert("m.alpha".into(), OwnedTensor::scalar(0.0, Dtype::F32).unwrap());
    let modules = group_modules(&tensors, Path::new("x")).unwrap();
    assert_eq!((modules[0].alpha, modules[0].has_alpha), (2.0, true));
}

#[test]
fn bad_keys_are_named() {
    let down = || ("m.lora_down.weight", tensor(&[2, 5]));
    let up = || ("m.lora_up.weight", tensor(&[7, 2]));
    let cases: Vec<(Vec<Entry>, &str, &str)> = vec![
        (vec![down()], "lacks its `lora_up.weight`", "m.lora_down.weight"),
        (vec![up()], "lacks its `lora_down.weight`", "m.lora_up.weight"),
        (vec![("m.alpha", tensor(&[]))], "belongs to no weights", "m.alpha"),
        (
            vec![down(), ("m.lora_up.weight", tensor(&[7, 3]))],
            "different ranks, 2",
            "m.lora_up.weight",
        ),
        (
            vec![down(), ("m.lora_up.weight", tensor(&[7, 2, 1, 1]))],
            "differ in dimensions",
            "m.lora_up.weight",
        ),
        (vec![down(), up(), ("m.alpha", tensor(&[2]))], "one number, not 2", "m.alpha"),
        (vec![down(), up(), ("m.weird", tensor(&[]))], "unknown ending", "m.weird"),
        (vec![down(), up(), ("m.hada_w1_a", tensor(&[2, 2]))], "LyCORIS", "m.hada_w1_a"),
        (vec![("unet.x.lora_A.weight", tensor(&[2, 2]))], "PEFT", "unet.x.lora_A.weight"),
        (vec![("m.lora_down.weight", tensor(&[2])), up()], "the shape [2]", "m.lora_down.weight"),
    ];
    for (entries, reason, key) in cases {
        let error = group_modules(&lora(&entries), Path::new("bad.safetensors")).unwrap_err();
        assert!(matches!(error, FormatError::BadLora { .. }));
        let text = error.to_string();
        assert!(text.starts_with("`bad.safetensors`") && text.contains(reason), "{text}");
        assert!(text.ends_with(&format!(": `{key}`")), "{text}");
    }
}

#[test]
fn precisions_cast_every_float_and_nothing_else() {
    let lora = lora_file::read(&data("formats/sd_scripts_int_alpha.safetensors")).unwrap();
    let cast = lora_file::cast(&lora.tensors, SavePrecision::Fp16).unwrap();
    for (name, tensor) in &cast {
        let expected = if name.ends_with(".alpha") { Dtype::I64 } else { Dtype::F16 };
        assert_eq!(tensor.dtype, expected, "{name}");
        assert_eq!(tensor.shape, lora.tensors[name].shape);
    }
}

#[test]
fn model_spec_equals_the_reference() {
    let text = std::fs::read_to_string(data("lora/train_c3lier.json")).unwrap();
    let reference: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    let expected: BTreeMap<_, _> =
        reference.into_iter().filter(|(key, _)| key.starts_with("modelspec.")).collect();
    let mut spec = ModelSpec {
        family: Family::Sd1,
        v_parameterization: false,
        title: "lora".to_owned(),
        resolution: Some((512, 512)),
        // 2026-11-22T16:19:16 in UTC, where the reference was made.
        timestamp: 1_795_364_356,
        timestep_range: None,
        clip_skip: None,
        implementation_version: "sd-scripts/unknown".to_owned(),
        optional: OptionalSpec::default(),
    };
    assert_eq!(spec.to_metadata(), expected);
    spec.resolution = None;
    spec.family = Family::Sd2;
    let get = |spec: &ModelSpec, key: &str| spec.to_metadata()[&format!("modelspec.{key}")].clone();
    assert_eq!(get(&spec, "architecture"), "stable-diffusion-v2-512/lora");
    spec.v_parameterization = true;
    spec.clip_skip = Some(2);
    spec.timestep_range = Some((0, 500));
    spec.optional.trigger_phrase = Some("sks dog".to_owned());
    assert_eq!(get(&spec, "architecture"), "stable-diffusion-v2-768-v/lora");
    assert_eq!(get(&spec, "resolution"), "768x768");
    assert_eq!(get(&spec, "prediction_type"), "v");
    assert_eq!(get(&spec, "encoder_layer"), "2");
    assert_eq!(get(&spec, "timestep_range"), "0,500");
    assert_eq!(get(&spec, "trigger_phrase"), "sks dog");
}

#[test]
fn dates_and_thumbnails() {
    assert_eq!(iso_date(0), "1970-01-01T00:00:00");
    assert_eq!(iso_date(951_782_399), "2000-02-28T23:59:59");
    assert_eq!(iso_date(951_782_400), "2000-02-29T00:00:00");
    assert_eq!(iso_date(4_107_542_400), "2100-03-01T00:00:00");
    assert_eq!(iso_date(-1), "1969-12-31T23:59:59");
    assert_eq!(civil_time(1_795_364_356), [2026, 11, 22, 16, 19, 16]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thumb.PNG");
    for (bytes, digits) in
        [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
    {
        std::fs::write(&path, bytes).unwrap();
        let url = thumbnail_url(path.to_str().unwrap()).unwrap();
        assert_eq!(url, format!("data:image/png;base64,{digits}"));
    }
    assert_eq!(thumbnail_url("data:image/png;base64,AA==").unwrap(), "data:image/png;base64,AA==");
    assert!(thumbnail_url("/no/such.png").unwrap_err().to_string().contains("/no/such.png"));
}
