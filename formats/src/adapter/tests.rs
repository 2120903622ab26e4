//! Files of every naming and kind beside what their makers mean by them, and files that cannot be.

use std::path::PathBuf;

use serde_json::Value;

use super::*;
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::{Dtype, OwnedTensor};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

fn numbers(file: &AdapterFile, key: &str) -> Vec<f32> {
    file.view(key).unwrap().to_f32()
}

/// `a [rows, r]` times `b [r, columns]`.
fn product(a: &[f32], b: &[f32], rank: usize) -> Vec<f32> {
    let (rows, columns) = (a.len() / rank, b.len() / rank);
    let cell = |row: usize, column: usize| {
        (0..rank).map(|r| a[row * rank + r] * b[r * columns + column]).sum::<f32>()
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| cell(row, column))).collect()
}

/// What a module adds, for the kinds that the fixtures have in matrix form.
fn delta(file: &AdapterFile, module: &AdapterModule) -> Option<Vec<f32>> {
    let rank = module.rank(file);
    let get = |key: &str| numbers(file, key);
    let values = match &module.kind {
        AdapterKind::LowRank { down, up, mid: None } => product(&get(up), &get(down), rank),
        AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1: None, .. } => {
            let (one, two) =
                (product(&get(w1_a), &get(w1_b), rank), product(&get(w2_a), &get(w2_b), rank));
            one.iter().zip(two).map(|(a, b)| a * b).collect()
        }
        AdapterKind::Kronecker { w1: KronFactor::Whole(w1), w2: KronFactor::Whole(w2), .. } => {
            // The order of the values does not matter to the sum of squares, their first does.
            let (w1, w2) = (get(w1), get(w2));
            w1.iter().flat_map(|a| w2.iter().map(move |b| a * b)).collect()
        }
        _ => return None,
    };
    Some(values.iter().map(|value| value * module.scale(file)).collect())
}

/// Each file that the libraries wrote: names, shapes and strengths are what the library computes.
#[test]
fn files_of_diffusers_and_peft_mean_what_they_mean_there() {
    let text = std::fs::read_to_string(data("adapters/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let expected = expected.as_object().unwrap();
    assert_eq!(expected.len(), 6);
    let mut compared = 0;
    for (name, layers) in expected {
        let file = AdapterFile::open(&data("adapters").join(name)).unwrap();
        assert!(file.unknown.is_empty(), "{:?}", file.unknown);
        let layers = layers.as_object().unwrap();
        let names: Vec<&str> = file.modules.iter().map(|module| module.name.as_str()).collect();
        let wanted: Vec<&str> = layers.keys().map(String::as_str).collect();
        assert_eq!(names, wanted, "{name}");
        for module in &file.modules {
            let wanted = &layers[&module.name];
            let shape: Vec<usize> = serde_json::from_value(wanted["shape"].clone()).unwrap();
            assert_eq!(module.layer_shape(&file), shape, "{name} {}", module.name);
            let Some(values) = delta(&file, module) else { continue };
            let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
            let exact = wanted["squares"].as_f64().unwrap();
            assert!(
                (squares / exact - 1.0).abs() < 1e-5,
                "{name} {}: {squares} {exact}",
                module.name
            );
            let first = wanted["first"][0].as_f64().unwrap();
            assert!((f64::from(values[0]) - first).abs() < 1e-6, "{name} {}", module.name);
            compared += 1;
        }
    }
    assert_eq!(compared, 25);
}

#[test]
fn namings_and_families_are_told() {
    let cases = [
        ("adapters/diffusers_metadata.safetensors", Naming::Peft, Some(Family::Sd1)),
        ("adapters/diffusers_before_peft.safetensors", Naming::Diffusers, Some(Family::Sd2)),
        ("adapters/diffusers_sdxl.safetensors", Naming::Peft, Some(Family::Sdxl)),
        ("adapters/peft_rslora/adapter_model.safetensors", Naming::Peft, Some(Family::Sd1)),
        ("adapters/peft_lokr/adapter_model.safetensors", Naming::Peft, None),
        ("lora/lierla_r4.safetensors", Naming::Kohya, Some(Family::Sd1)),
        ("formats/lora.pt", Naming::Kohya, Some(Family::Sd1)),
    ];
    for (name, naming, family) in cases {
        let file = AdapterFile::open(&data(name)).unwrap();
        assert_eq!((file.naming, file.family), (naming, family), "{name}");
    }
}

/// Tensors of zeros in memory.
fn file_of(
    tensors: &[(&str, &[usize])],
    metadata: &[(&str, &str)],
) -> Result<AdapterFile, FormatError> {
    let tensor = |shape: &[usize]| {
        OwnedTensor::from_f32(shape, &vec![0.5; shape.iter().product()], Dtype::F32).unwrap()
    };
    let tensors = tensors.iter().map(|(key, shape)| ((*key).to_owned(), tensor(shape))).collect();
    let metadata = metadata.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &tensors, Some(&metadata)).unwrap();
    let file = SafetensorsFile::from_bytes(Path::new("x.safetensors"), bytes).unwrap();
    AdapterFile::of(Arc::new(file))
}

/// The kinds as LyCORIS saves them; `adapters.safetensors` holds `<case>/file/<key>`.
#[test]
fn every_kind_of_lycoris_is_read() {
    let source = open_tensor_file(&data("lora/adapters.safetensors")).unwrap();
    let cases = [
        "locon_tucker",
        "locon_rs",
        "dora",
        "loha",
        "loha_tucker",
        "loha_dora",
        "lokr",
        "lokr_factor",
        "lokr_both",
        "lokr_full",
        "lokr_tucker",
        "lokr_dora",
    ];
    for case in cases {
        let prefix = format!("{case}/file/");
        let tensors = source.names().into_iter().filter_map(|name| {
            Some((
                name.strip_prefix(&prefix)?.to_owned(),
                source.view(name).unwrap().to_owned_tensor(),
            ))
        });
        let mut bytes = Vec::new();
        write_safetensors(&mut bytes, &tensors.collect(), None).unwrap();
        let file = SafetensorsFile::from_bytes(Path::new("x.safetensors"), bytes).unwrap();
        let file = AdapterFile::of(Arc::new(file)).unwrap();
        assert!(file.unknown.is_empty());
        let names: Vec<&str> = file.modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["lora_unet_conv1", "lora_unet_conv3", "lora_unet_linear"], "{case}");
        for (module, (out, columns)) in file.modules.iter().zip([(12, 16), (16, 108), (12, 16)]) {
            let shape = module.layer_shape(&file);
            let (rows, rest) = shape.split_first().unwrap();
            assert_eq!((*rows, rest.iter().product::<usize>()), (out, columns), "{case} {shape:?}");
            let dora = case.contains("dora");
            assert_eq!(module.dora_scale.is_some(), dora, "{case}");
            let kind = match &module.kind {
                AdapterKind::LowRank { .. } => "locon",
                AdapterKind::Hadamard { .. } => "loha",
                AdapterKind::Kronecker { .. } => "lokr",
                _ => "",
            };
            assert!(case.starts_with(kind) || (case == "dora" && kind == "locon"), "{case} {kind}");
            if module.rank(&file) == 0 {
                assert_eq!(module.scale(&file), 1.0, "{case}");
            }
            let keys = module.keys().len() + usize::from(module.rank(&file) > 0);
            assert!(keys >= 2, "{case}");
        }
    }
}

const A: &str = "lora_unet_down_blocks_0_attentions_0_proj_in";

#[test]
fn whole_differences_norms_and_biases() {
    let file = file_of(
        &[
            ("lora_unet_a.diff", &[4, 3]),
            ("lora_unet_a.diff_b", &[4]),
            ("lora_unet_b.w_norm", &[4]),
            ("lora_unet_b.b_norm", &[4]),
            ("lora_unet_c.diff_b", &[4]),
        ],
        &[],
    )
    .unwrap();
    assert_eq!(file.modules[0].kind, AdapterKind::Full { diff: "lora_unet_a.diff".to_owned() });
    assert_eq!(file.modules[0].bias.as_deref(), Some("lora_unet_a.diff_b"));
    assert_eq!(file.modules[0].keys(), ["lora_unet_a.diff", "lora_unet_a.diff_b"]);
    let only_bias =
        AdapterKind::Norm { w_norm: None, b_norm: Some("lora_unet_c.diff_b".to_owned()) };
    assert_eq!((&file.modules[2].kind, &file.modules[2].bias), (&only_bias, &None));
    assert_eq!(file.modules[1].layer_shape(&file), [4]);
}

#[test]
fn families_by_width_metadata_and_names() {
    let key = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    let family = |width: usize, metadata: &[(&str, &str)]| {
        let (down, up) = (
            format!("lora_unet_{key}.lora_down.weight"),
            format!("lora_unet_{key}.lora_up.weight"),
        );
        file_of(&[(&down, &[2, width]), (&up, &[4, 2])], metadata).unwrap().family
    };
    assert_eq!(family(768, &[]), Some(Family::Sd1));
    assert_eq!(family(1024, &[("ss_base_model_version", "sd_v1")]), Some(Family::Sd2));
    assert_eq!(family(2048, &[]), Some(Family::Sdxl));
    assert_eq!(family(32, &[]), None);
    assert_eq!(family(32, &[("ss_base_model_version", "sd_v2_v")]), Some(Family::Sd2));
    let spec = [("modelspec.architecture", "stable-diffusion-xl-v1-base/lora")];
    assert_eq!(family(32, &spec), Some(Family::Sdxl));
    // SDXL's modules under diffusers' names are known by the original ones.
    let file = file_of(
        &[
            ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", &[2, 4]),
            ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight", &[4, 2]),
            ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", &[2, 4]),
            ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", &[4, 2]),
        ],
        &spec,
    );
    let names: Vec<String> = file.unwrap().modules.into_iter().map(|module| module.name).collect();
    assert_eq!(
        names,
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_input_blocks_4_1_proj_in"]
    );
}

#[test]
fn keys_of_no_module_are_kept_apart() {
    let (down, up) = (format!("{A}.lora_down.weight"), format!("{A}.lora_up.weight"));
    let file = file_of(
        &[
            (&down, &[2, 4, 1, 1]),
            (&up, &[4, 2, 1, 1]),
            ("lora_unet_b.oft_blocks", &[2, 2]),
            ("lora_unet_b.alpha", &[]),
            ("emphasis", &[1]),
        ],
        &[],
    )
    .unwrap();
    assert_eq!(file.modules.len(), 1);
    assert_eq!(file.unknown, ["emphasis", "lora_unet_b.alpha", "lora_unet_b.oft_blocks"]);
}

#[test]
fn what_cannot_be_is_named() {
    type Case<'a> = (&'a [(&'a str, &'a [usize])], &'a str, &'a str);
    let cases: [Case<'_>; 13] = [
        (&[("lora_unet_a.lora_down.weight", &[2, 4])], "lora_down", "lacks its `lora_up`"),
        (&[("lora_unet_a.hada_w1_a", &[2, 4])], "hada_w1_a", "lacks its `hada_w1_b`"),
        (&[("lora_unet_a.lokr_w1_a", &[2, 4])], "lokr_w1_a", "lacks its `lokr_w1_b`"),
        (&[("lora_unet_a.alpha", &[])], "a.alpha", "belongs to no weights"),
        (
            &[("lora_unet_a.lora_down.weight", &[2, 4]), ("lora_unet_a.lora_up.weight", &[4, 3])],
            "lora_up",
            "different ranks, 2 and, of this key, 3",
        ),
        (
            &[
                ("lora_unet_a.lora_down.weight", &[2, 4, 3]),
                ("lora_unet_a.lora_up.weight", &[4, 2]),
            ],
            "lora_down",
            "has the shape [2, 4, 3]",
        ),
        (
            &[
                ("lora_unet_a.lora_down.weight", &[2, 4, 3, 3]),
                ("lora_unet_a.lora_up.weight", &[4, 2, 3, 3]),
            ],
            "lora_up",
            "1x1 kernel",
        ),
        (
            &[
                ("lora_unet_a.lora_down.weight", &[2, 4]),
                ("lora_unet_a.lora_up.weight", &[4, 2]),
                ("lora_unet_a.alpha", &[2]),
            ],
            "alpha",
            "one number, not 2",
        ),
        (
            &[
                ("lora_unet_a.lora_down.weight", &[2, 4]),
                ("lora_unet_a.lora_up.weight", &[4, 2]),
                ("lora_unet_a.diff", &[4, 4]),
            ],
            "a.diff",
            "two kinds",
        ),
        (
            &[
                ("lora_unet_a.lokr_w1", &[2, 4]),
                ("lora_unet_a.lokr_w2_a", &[2, 3]),
                ("lora_unet_a.lokr_w2_b", &[2, 4]),
            ],
            "lokr_w2_a",
            "different ranks",
        ),
        (&[("lora_unet_a.oft_blocks", &[2, 4])], "oft", "a kind that is not supported"),
        (
            &[("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", &[2, 4])],
            "single_transformer_blocks",
            "another family",
        ),
        (&[("model.diffusion_model.out.2.weight", &[2, 4])], "out.2", "it is a model"),
    ];
    for (tensors, key, reason) in cases {
        match file_of(tensors, &[]).unwrap_err() {
            FormatError::BadLora { key: got, reason: said, .. } => {
                assert!(got.contains(key) && said.contains(reason), "{key}: {got}, {said}");
            }
            other => panic!("{other}"),
        }
    }
    let text = file_of(&[], &[]).unwrap_err().to_string();
    assert!(text.contains("it holds no tensors"), "{text}");
    // One layer under two names.
    let double = file_of(
        &[
            ("lora_unet_down_blocks_1_attentions_0_proj_in.diff", &[4, 4]),
            ("lora_unet_input_blocks_4_1_proj_in.diff", &[4, 4]),
        ],
        &[],
    );
    assert!(double.unwrap_err().to_string().contains("two modules change one layer"));
    let config = [("lora_adapter_metadata", "[1]")];
    let text = file_of(&[("lora_unet_a.diff", &[4, 4])], &config).unwrap_err().to_string();
    assert!(text.contains("is no object"), "{text}");
}

#[test]
fn alphas_from_tensors_and_patterns() {
    let names =
        |key: &str| [format!("unet.{key}.lora_A.weight"), format!("unet.{key}.lora_B.weight")];
    let [a, b] = names("down_blocks.0.attentions.0.proj_in");
    let [c, d] = names("down_blocks.0.attentions.1.proj_in");
    let settings = r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.1.proj_in": 1}}"#;
    let shapes: [(&str, &[usize]); 4] =
        [(&a, &[4, 2, 1, 1]), (&b, &[2, 4, 1, 1]), (&c, &[4, 2, 1, 1]), (&d, &[2, 4, 1, 1])];
    let scales = |metadata: &[(&str, &str)]| {
        let file = file_of(&shapes, metadata).unwrap();
        let scales: Vec<f32> = file.modules.iter().map(|module| module.scale(&file)).collect();
        scales
    };
    assert_eq!(scales(&[]), [1.0, 1.0]);
    assert_eq!(scales(&[("lora_adapter_metadata", settings)]), [2.0, 0.25]);
    let stabilised = r#"{"unet.lora_alpha": 8, "unet.use_rslora": true}"#;
    assert_eq!(scales(&[("lora_adapter_metadata", stabilised)]), [4.0, 4.0]);
}
