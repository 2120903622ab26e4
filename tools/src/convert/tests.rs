//! Conversions there and back, configs, and what is refused.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use formats::model_files::{ComponentKind, ModelFiles};
use formats::stream::write_tensors;
use formats::{Dtype, FormatError, OwnedTensor, SaveAs, TensorSpec, open_tensor_file};
use serde_json::{Value, json};

use super::*;

type Tensors = BTreeMap<String, OwnedTensor>;
type Shapes = BTreeMap<String, Vec<usize>>;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

fn options(model: &Path, save_to: &Path) -> Options {
    Options {
        model: model.to_path_buf(),
        save_to: save_to.to_path_buf(),
        to: None,
        save_precision: None,
        prediction_type: None,
        finite: FiniteRule::default(),
    }
}

fn convert(model: &Path, save_to: &Path) {
    run(&options(model, save_to)).unwrap();
}

fn refusal(options: &Options) -> String {
    format!("{:#}", run(options).unwrap_err())
}

fn save(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(name, t)| t.spec(name)).collect();
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let save_as = SaveAs::of_path(path).unwrap();
    write_tensors(path, save_as, &specs, Some(&metadata), |index, sink| {
        sink.write(&tensors[&specs[index].name].data)
    })
    .map_err(|error: FormatError| error)
    .unwrap();
}

fn load(path: &Path) -> Tensors {
    let file = open_tensor_file(path).unwrap();
    let read = |name: &&str| ((*name).to_owned(), file.view(name).unwrap().to_owned_tensor());
    file.names().iter().map(read).collect()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Shapes of a family's full-size model in the LDM layout, as sd-scripts writes it.
fn full_size(family: &str) -> Shapes {
    let mut shapes = Shapes::new();
    for line in fs::read_to_string(data(&format!("layouts/{family}.txt"))).unwrap().lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let shape: Vec<usize> = fields[2].split('x').map(|n| n.parse().unwrap()).collect();
        let mut names = vec![fields[0].to_owned()];
        if fields.get(3) == Some(&"bias") {
            names.push(format!("{}bias", fields[0].strip_suffix("weight").unwrap()));
        }
        for (name, axes) in names.into_iter().zip([shape.len(), 1]) {
            let shape = shape[..axes].to_vec();
            // The layer that SD2 does not use.
            if family == "sd2" && name.contains(".resblocks.22.") {
                shapes.insert(name.replace(".22.", ".23."), shape.clone());
            }
            shapes.insert(name, shape);
        }
    }
    if family == "sd2" {
        shapes.insert("cond_stage_model.model.text_projection".into(), vec![1024, 1024]);
        shapes.insert("cond_stage_model.model.logit_scale".into(), vec![]);
    }
    shapes
}

/// The same model with every width a 32nd.
fn small(family: &str) -> Tensors {
    let mut next = 0_u32;
    let tensors = full_size(family).into_iter().map(|(name, mut shape)| {
        for size in shape.iter_mut().filter(|size| **size % 32 == 0) {
            *size /= 32;
        }
        let count: usize = shape.iter().product();
        // Any bytes: what they mean as numbers is of no matter here.
        let bytes = (0..count).flat_map(|_| {
            next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Exponents below the largest: no infinities.
            [(next >> 16) as u8, (next >> 24) as u8 & 0x3F]
        });
        let data = bytes.collect();
        (name, OwnedTensor { dtype: Dtype::F16, shape, data })
    });
    tensors.collect()
}

/// A full-size single file that takes no space.
fn hollow(path: &Path, family: &str) {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    for (name, shape) in full_size(family) {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

/// Parts that a folder of SD2 lacks and that are made up.
fn is_made_up(name: &str) -> bool {
    let Some(name) = name.strip_prefix("cond_stage_model.model.") else { return false };
    name.contains(".23.") || matches!(name, "text_projection" | "logit_scale")
}

#[test]
fn file_to_folder_to_file_keeps_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["sd1", "sd2", "sdxl"] {
        let at = |name: &str| folder.path().join(format!("{family}{name}"));
        let tensors = small(family);
        save(&at(".safetensors"), &tensors, &[]);
        convert(&at(".safetensors"), &at("-folder"));
        convert(&at("-folder"), &at("-back.safetensors"));
        let back = load(&at("-back.safetensors"));
        assert!(back.keys().eq(tensors.keys()), "{family}");
        for (name, tensor) in tensors.iter().filter(|(name, _)| !is_made_up(name)) {
            assert!(back[name] == *tensor, "{family}: {name}");
        }
        // By way of a torch checkpoint.
        convert(&at("-folder"), &at("-back.ckpt"));
        assert!(load(&at("-back.ckpt")) == back, "{family}");
        convert(&at("-back.ckpt"), &at("-folder2"));
        for component in ["unet", "vae"] {
            let file = format!("{component}/diffusion_pytorch_model.safetensors");
            let (a, b) = (at("-folder").join(&file), at("-folder2").join(&file));
            assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{family} {component}");
        }
    }
}

#[test]
fn made_up_layers_of_sd2_are_those_of_sd_scripts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.safetensors");
    convert(&data("parity-sd2/model"), &file);
    let tensors = load(&file);
    let prefix = "cond_stage_model.model.";
    let ones = &tensors[&format!("{prefix}text_projection")];
    assert_eq!(ones.shape, [32, 32]);
    assert!(ones.to_f32().iter().all(|value| *value == 1.0));
    assert_eq!(tensors[&format!("{prefix}logit_scale")].to_f32(), [1.0]);
    let mut repeated = 0;
    for (name, tensor) in &tensors {
        if name.contains(".resblocks.4.") {
            assert!(*tensor == tensors[&name.replace(".4.", ".3.")], "{name}");
            repeated += 1;
        }
    }
    assert_eq!(repeated, 12);
    // Reading it leaves the made-up layer out again.
    let model = ModelFiles::open(&file).unwrap();
    let text = model.component(ComponentKind::TextEncoder).unwrap();
    let expected = data("parity-sd2/model/text_encoder/model.safetensors");
    let expected = load(&expected);
    let names = formats::Weights::names(text);
    assert!(names.iter().eq(expected.keys()));
}

#[test]
fn a_file_in_the_same_layout_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut tensors = small("sd1");
    let ids: Vec<u8> = (0..77_i64).flat_map(i64::to_le_bytes).collect();
    let ids = OwnedTensor { dtype: Dtype::I64, shape: vec![1, 77], data: ids };
    tensors.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".into(), ids);
    let ema = OwnedTensor::from_f32(&[2], &[0.1, 0.2], Dtype::F32).unwrap();
    tensors.insert("model_ema.diffusion_modelout2bias".into(), ema);
    let metadata = [("a", "b"), ("modelspec.hash_sha256", "0x00")];
    save(&at("x.safetensors"), &tensors, &metadata);
    convert(&at("x.safetensors"), &at("x.ckpt"));
    assert!(load(&at("x.ckpt")) == tensors);
    convert(&at("x.ckpt"), &at("y.safetensors"));
    assert!(load(&at("y.safetensors")) == tensors);
    convert(&at("x.safetensors"), &at("z.safetensors"));
    assert!(fs::read(at("x.safetensors")).unwrap() == fs::read(at("z.safetensors")).unwrap());

    // In another precision: floats alone change, and the hash is none of the new file's.
    let precise = Options {
        save_precision: Some(Precision::Bf16),
        ..options(&at("x.safetensors"), &at("b.safetensors"))
    };
    run(&precise).unwrap();
    let file = open_tensor_file(&at("b.safetensors")).unwrap();
    assert_eq!(file.metadata().keys().collect::<Vec<_>>(), ["a"]);
    for (name, tensor) in load(&at("b.safetensors")) {
        assert!(tensor == tensors[&name].cast(Dtype::BF16).unwrap(), "{name}");
    }
    // What is no model at all, too.
    let vae = data("parity/model/vae/diffusion_pytorch_model.safetensors");
    convert(&vae, &at("vae.ckpt"));
    assert!(load(&at("vae.ckpt")) == load(&vae));
}

#[test]
fn configs_of_full_size_models_are_the_published_ones() {
    let folder = tempfile::tempdir().unwrap();
    let config = |family: &str, kind| {
        let file = folder.path().join(format!("{family}.safetensors"));
        if !file.exists() {
            hollow(&file, family);
        }
        shapes::config(&ModelFiles::open(&file).unwrap(), kind).unwrap()
    };
    let assert_has = |config: &Value, expected: &Value| {
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&config[key], value, "{key}");
        }
    };
    let cross = "CrossAttnDownBlock2D";
    let up = "CrossAttnUpBlock2D";
    let sd = json!({
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [cross, cross, cross, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", up, up, up],
        "layers_per_block": 2, "in_channels": 4, "out_channels": 4,
        "transformer_layers_per_block": 1,
    });
    let unet = config("sd1", ComponentKind::Unet);
    assert_has(&unet, &sd);
    let expected = json!({
        "cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": false,
        "sample_size": 64,
    });
    assert_has(&unet, &expected);
    assert!(unet.get("addition_embed_type").is_none());
    let unet = config("sd2", ComponentKind::Unet);
    assert_has(&unet, &sd);
    let expected = json!({
        "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": true, "sample_size": 96,
    });
    assert_has(&unet, &expected);
    let expected = json!({
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D", cross, cross],
        "up_block_types": [up, up, "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": true,
        "layers_per_block": 2, "sample_size": 128,
    });
    assert_has(&config("sdxl", ComponentKind::Unet), &expected);

    let vae = json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "in_channels": 3, "out_channels": 3, "scaling_factor": 0.18215, "use_quant_conv": true,
    });
    assert_has(&config("sd1", ComponentKind::Vae), &vae);
    assert_eq!(config("sdxl", ComponentKind::Vae)["scaling_factor"], json!(0.13025));
    let text = |width: usize, layers: usize, heads: usize, act: &str, class: &str| {
        json!({
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "hidden_act": act, "architectures": [class],
            "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": width,
        })
    };
    let kind = ComponentKind::TextEncoder;
    let clip = text(768, 12, 12, "quick_gelu", "CLIPTextModel");
    assert_has(&config("sd1", kind), &clip);
    assert_has(&config("sdxl", kind), &clip);
    assert_has(&config("sd2", kind), &text(1024, 23, 16, "gelu", "CLIPTextModel"));
    let second = text(1280, 32, 20, "gelu", "CLIPTextModelWithProjection");
    assert_has(&config("sdxl", ComponentKind::TextEncoder2), &second);
}

#[test]
fn a_new_folder_has_all_that_diffusers_loads() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("xl.safetensors");
    save(&file, &small("sdxl"), &[]);
    let dir = folder.path().join("deep/xl");
    convert(&file, &dir);
    let index = json_of(&dir.join("model_index.json"));
    assert_eq!(index["_class_name"], "StableDiffusionXLPipeline");
    for (part, pair) in index.as_object().unwrap() {
        let Some([library, _]) = pair.as_array().map(Vec::as_slice) else { continue };
        assert_eq!(dir.join(part).is_dir(), !library.is_null(), "{part}");
    }
    for (name, pad) in [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")] {
        let vocabulary = json_of(&dir.join(name).join("vocab.json"));
        assert_eq!(vocabulary.as_object().unwrap().len(), 49408);
        assert_eq!(vocabulary["<|endoftext|>"], 49407);
        let merges = fs::read_to_string(dir.join(name).join("merges.txt")).unwrap();
        assert_eq!(merges.lines().count(), 48894 + 1);
        assert_eq!(json_of(&dir.join(name).join("tokenizer_config.json"))["pad_token"], pad);
    }
    let unet = dir.join("unet/diffusion_pytorch_model.safetensors");
    let unet = open_tensor_file(&unet).unwrap();
    assert_eq!(unet.metadata().get("format").map(String::as_str), Some("pt"));
    let names: Vec<_> = fs::read_dir(folder.path().join("deep")).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing else is left");
    assert!(ModelFiles::open(&dir).unwrap().notes.is_empty());
}

#[test]
fn a_folder_keeps_what_it_has_beside_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    for part in ["unet", "text_encoder", "vae", "scheduler"] {
        fs::create_dir_all(source.join(part)).unwrap();
        for entry in fs::read_dir(data(&format!("parity/model/{part}"))).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), source.join(part).join(entry.file_name())).unwrap();
        }
    }
    fs::create_dir(source.join("tokenizer")).unwrap();
    fs::write(source.join("tokenizer/vocab.json"), "{\"mine\": 0}").unwrap();
    let mut index = json_of(&data("parity/model/model_index.json"));
    index["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    index["tokenizer"] = json!(["transformers", "MyTokenizer"]);
    fs::write(source.join("model_index.json"), index.to_string()).unwrap();
    let to = folder.path().join("half");
    let half = Options { save_precision: Some(Precision::Float), ..options(&source, &to) };
    run(&half).unwrap();
    let vocabulary = fs::read_to_string(to.join("tokenizer/vocab.json")).unwrap();
    assert_eq!(vocabulary, "{\"mine\": 0}");
    let index = json_of(&to.join("model_index.json"));
    assert_eq!(index["tokenizer"], json!(["transformers", "MyTokenizer"]));
    assert_eq!(index["safety_checker"], json!([null, null]));
    let config = |dir: &Path, part: &str| json_of(&dir.join(part));
    for part in ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"] {
        assert_eq!(config(&to, part), config(&source, part), "{part}");
    }
    assert_eq!(config(&to, "text_encoder/config.json")["torch_dtype"], "float32");
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let stored = load(&source.join(weights));
    for (name, tensor) in load(&to.join(weights)) {
        assert!(tensor == stored[&name].cast(Dtype::F32).unwrap(), "{name}");
    }
}

#[test]
fn what_a_model_predicts_is_kept_and_can_be_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let told = |dir: &Path| json_of(&dir.join("scheduler/scheduler_config.json"));
    // The folder's own word goes into the file, and back.
    convert(&data("parity-sd2/model"), &at("v.safetensors"));
    let file = open_tensor_file(&at("v.safetensors")).unwrap();
    assert_eq!(file.metadata()["modelspec.architecture"], "stable-diffusion-v2-768-v");
    convert(&at("v.safetensors"), &at("v"));
    assert_eq!(told(&at("v"))["prediction_type"], "v_prediction");
    // A file that says nothing: its family's.
    convert(&at("v.safetensors"), &at("v.ckpt"));
    convert(&at("v.ckpt"), &at("v2"));
    assert_eq!(told(&at("v2"))["prediction_type"], "v_prediction");
    convert(&data("parity/model"), &at("e.ckpt"));
    convert(&at("e.ckpt"), &at("e"));
    assert_eq!(told(&at("e"))["prediction_type"], "epsilon");
    // The user's word goes before all.
    let said = Options {
        prediction_type: Some(Prediction::Epsilon),
        ..options(&at("v.safetensors"), &at("said"))
    };
    run(&said).unwrap();
    assert_eq!(told(&at("said"))["prediction_type"], "epsilon");
    // Marks of SDXL models.
    let mut tensors = small("sdxl");
    let mark = OwnedTensor { dtype: Dtype::F32, shape: vec![0], data: Vec::new() };
    for name in ["v_pred", "ztsnr"] {
        tensors.insert(name.to_owned(), mark.clone());
    }
    save(&at("xl.safetensors"), &tensors, &[]);
    convert(&at("xl.safetensors"), &at("xl"));
    let scheduler = told(&at("xl"));
    assert_eq!(scheduler["prediction_type"], "v_prediction");
    assert_eq!(scheduler["rescale_betas_zero_snr"], true);
}

#[test]
fn destinations_that_cannot_be_meant_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = data("parity/model");
    convert(&model, &at("x.safetensors"));
    let before = fs::read(at("x.safetensors")).unwrap();
    let text = refusal(&options(&at("x.safetensors"), &at("x.safetensors")));
    assert!(text.starts_with("`save_to` is a file that is read"), "{text}");
    let text = refusal(&options(&at("x.safetensors"), &at("x.gguf")));
    assert!(text.starts_with("`save_to` has an ending that names no kind of file"), "{text}");
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/mine.txt"), "mine").unwrap();
    let text = refusal(&options(&at("x.safetensors"), &at("full")));
    assert!(text.starts_with("`save_to` is a folder that is not empty"), "{text}");
    fs::write(at("plain"), "mine").unwrap();
    let text = refusal(&options(&at("x.safetensors"), &at("plain")));
    assert!(text.starts_with("`save_to` is a file that is there already"), "{text}");
    convert(&at("x.safetensors"), &at("folder"));
    for inside in ["folder/unet/new", "folder/new.safetensors", "folder/a/b/c.ckpt"] {
        let text = refusal(&options(&at("folder"), &at(inside)));
        assert!(text.starts_with("`save_to` lies in the folder that is read"), "{text}");
    }
    assert!(!at("folder/a").exists());
    assert!(fs::read(at("x.safetensors")).unwrap() == before);
    assert_eq!(fs::read_to_string(at("full/mine.txt")).unwrap(), "mine");
    // An empty folder is as good as none; a slash makes a folder of any name.
    fs::create_dir(at("empty")).unwrap();
    convert(&at("x.safetensors"), &at("empty"));
    convert(&at("x.safetensors"), &at("sd-v1.5/"));
    assert!(at("empty/unet/config.json").is_file() && at("sd-v1.5/vae/config.json").is_file());
}

#[test]
fn damaged_and_incomplete_models_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let clean = |text: &str| {
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(
            names.iter().all(|name| name.to_string_lossy().starts_with("in")),
            "{names:?} {text}"
        );
    };
    convert(&data("parity/model"), &at("in.safetensors"));
    let bytes = fs::read(at("in.safetensors")).unwrap();
    fs::write(at("in-cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    for to in ["out", "out.ckpt"] {
        let text = refusal(&options(&at("in-cut.safetensors"), &at(to)));
        assert!(text.contains("in-cut.safetensors` is not a valid safetensors file"), "{text}");
        clean(&text);
        let text = refusal(&options(&data("formats/evil.ckpt"), &at(to)));
        assert!(text.contains("evil.ckpt` was refused: its pickle asks for"), "{text}");
        clean(&text);
    }
    convert(&at("in.safetensors"), &at("in-folder"));
    fs::rename(at("in-folder/vae"), at("in-vae")).unwrap();
    let text = refusal(&options(&at("in-folder"), &at("out.safetensors")));
    assert!(text.contains("lacks `vae/diffusion_pytorch_model.safetensors`"), "{text}");
    clean(&text);
    let mut tensors = load(&at("in.safetensors"));
    tensors.retain(|name, _| !name.starts_with("first_stage_model."));
    save(&at("in-no-vae.safetensors"), &tensors, &[]);
    let text = refusal(&options(&at("in-no-vae.safetensors"), &at("out")));
    assert!(text.contains("holds no VAE"), "{text}");
    clean(&text);
    // Models whose transformers were cut to other depths.
    let mut tensors = load(&at("in.safetensors"));
    tensors.retain(|name, _| !name.contains(".output_blocks.5.1.transformer_blocks."));
    save(&at("in-cut-out.safetensors"), &tensors, &[]);
    let text = refusal(&options(&at("in-cut-out.safetensors"), &at("out")));
    let expected = "`up_blocks.1.attentions.2` has 0 transformer blocks instead of 1";
    assert!(text.contains(expected), "{text}");
    clean(&text);
    // A value that the smaller type cannot hold.
    let name = "model.diffusion_model.out.2.bias";
    let large = OwnedTensor::from_f32(&[4], &[0.0, 65519.0, 7e4, 0.0], Dtype::F32).unwrap();
    let tensors = Tensors::from([(name.to_owned(), large)]);
    save(&at("in-large.safetensors"), &tensors, &[]);
    let mut half = Options {
        save_precision: Some(Precision::Fp16),
        ..options(&at("in-large.safetensors"), &at("out.safetensors"))
    };
    let text = refusal(&half);
    assert!(text.contains(&format!("`{name}` that fp16 cannot hold: 70000")), "{text}");
    clean(&text);
    half.finite.allow_nan = true;
    run(&half).unwrap();
    let values = load(&at("out.safetensors"))[name].to_f32();
    assert_eq!(values, [0.0, 65504.0, f32::INFINITY, 0.0]);
}
