//! LoRA files on a pipeline: against the networks of training, which compute them in another way.

use std::collections::BTreeMap;
use std::path::PathBuf;

use formats::lora_file::{self, SaveAs};
use formats::{Dtype, OwnedTensor};

use super::*;
use crate::lora::{
    Algorithm, Composition, Form, LoraNetwork, Part, Rank, Split, UniformRanks,
    text_encoder_targets, unet_targets,
};
use crate::sampler::SamplerKind;
use crate::{ModelError, Tiling};

fn request() -> Request {
    Request {
        prompt: "a red circle".into(),
        negative_prompt: "blurry".into(),
        width: 64,
        height: 64,
        seed: 3,
        sampler: SamplerKind::Euler,
        options: SamplerOptions::new(2),
        guidance_scale: 3.,
        ..Request::default()
    }
}

fn picture(pipeline: &Pipeline) -> Picture {
    make(pipeline, &request()).expect("a picture")
}

/// Largest difference of two pictures' numbers.
fn apart(one: &Picture, other: &Picture) -> f32 {
    one.rgb.iter().zip(&other.rgb).map(|(x, y)| (x - y).abs()).fold(0., f32::max)
}

/// Numbers in -1..1 that depend on the name alone.
fn numbers(name: &str, len: usize) -> Vec<f32> {
    let mut state = crate::lora::name_key(name) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.
    };
    (0..len).map(|_| next()).collect()
}

/// A network over the pipeline's layers, its numbers, and its file.
fn network(
    pipeline: &Pipeline,
    algorithm: Algorithm,
    name: &str,
    folder: &Path,
) -> (LoraNetwork, Vec<Vec<f32>>, PathBuf) {
    let files = &pipeline.files;
    let mut targets = text_encoder_targets(&*files.text_encoder);
    targets.extend(unet_targets(&*files.unet));
    let rank = Rank::new(4, 2.);
    let rule = UniformRanks { linear: rank, conv: Some(rank) };
    let network = LoraNetwork::new(targets, &rule, algorithm).expect("a network");
    let mut draw = |key: &str, len: usize| {
        numbers(&format!("{name}{key}"), len).iter().map(|x| x / 2. + 0.5).collect()
    };
    let mut values = network.initial_values(&mut draw);
    let frozen =
        BTreeMap::from([(Part::TextEncoder, &*files.text_encoder), (Part::Unet, &*files.unet)]);
    network.set_magnitudes(&mut values, &frozen).expect("magnitudes");
    for (id, value) in values.iter_mut().enumerate() {
        let drawn = numbers(&format!("{name} {id}"), value.len());
        value.iter_mut().zip(drawn).for_each(|(x, drawn)| *x += 0.1 * drawn);
    }
    let params = network.parameters(Device::Cpu, values.clone()).expect("parameters");
    let tensors = network.export(&params, Dtype::F32).expect("tensors");
    let path = folder.join(format!("{name}.safetensors"));
    lora_file::write(&path, &tensors, &Default::default(), SaveAs::Safetensors).expect("a file");
    (network, values, path)
}

fn kinds() -> Vec<(&'static str, Algorithm)> {
    let make =
        |form, tucker, magnitude| Algorithm::Composed(Composition { form, tucker, magnitude });
    let kron = Form::Kronecker(Split { factor: 2, ..Split::default() });
    vec![
        ("lora", Algorithm::LowRank),
        ("lora_2", Algorithm::LowRank),
        ("lora_3", Algorithm::LowRank),
        ("dylora", Algorithm::DyLora { unit: 2 }),
        ("locon_tucker", make(Form::LowRank, true, false)),
        ("dora", make(Form::LowRank, false, true)),
        ("loha", make(Form::Hadamard, false, false)),
        ("loha_tucker", make(Form::Hadamard, true, false)),
        ("lokr", make(kron, false, false)),
        ("lokr_dora", make(kron, false, true)),
    ]
}

/// The picture that the trainer would show of a network.
fn picture_in_training(
    pipeline: &mut Pipeline,
    network: &LoraNetwork,
    values: Vec<Vec<f32>>,
) -> Picture {
    network.install_all(&mut pipeline.text_encoders, &mut pipeline.unet, 1.).expect("adapters");
    let params = network.parameters(Device::Cpu, values).expect("parameters");
    let request = request();
    let reader = TextReader {
        tokenizers: &pipeline.tokenizers,
        encoders: &pipeline.text_encoders,
        params: Some(&params),
        clip_skip: None,
        most_chunks: 1,
    };
    let prompts = [request.prompt.as_str(), request.negative_prompt.as_str()];
    let [prompt, negative] = &reader.read(&prompts).expect("prompts")[..] else { panic!("two") };
    let noise = TorchNoise::new(request.seed);
    let how = Denoising {
        size: [8, 8],
        sampler: request.sampler,
        options: request.options,
        guidance_scale: request.guidance_scale,
        sizes: None,
    };
    let predictor = Predictor { unet: &pipeline.unet, params: Some(&params) };
    let mut subjects = [Subject { prompt, negative, noise, start: None, mask: None }];
    let mut watch = |_| ControlFlow::Continue(());
    let latents = predictor.denoise(&mut subjects, &how, &mut watch).expect("latents");
    decode(&pipeline.vae, &latents, how.size, Tiling::Never).expect("a picture").remove(0)
}

/// The same numbers in other sums. The small model makes much of rounding: one unit in the last place of
/// its weights moves a picture by 2e-5, and here whole products are rounded otherwise. A wrong factor
/// anywhere would be of the order of the change.
#[test]
fn files_of_every_kind_give_the_pictures_of_training() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = picture(&load());
    for (name, algorithm) in kinds() {
        let mut applied = load();
        let (network, values, path) = network(&applied, algorithm, name, folder.path());
        let handle = applied.add_lora(&path, 1.).expect(name);
        let report = applied.lora_report(handle).expect("a report");
        assert_eq!(report.text_encoder + report.unet, network.modules().len());
        assert!(report.text_encoder > 0 && report.unused.is_empty() && report.unknown.is_empty());
        let ours = picture(&applied);
        let trained = picture_in_training(&mut load(), &network, values);
        let (changed, off) = (apart(&ours, &base), apart(&ours, &trained));
        eprintln!("{name}: changes {changed:.2e}, off by {off:.2e}");
        assert!(changed > 0.02 && off < changed / 50., "{name}: {changed:e}, off by {off:e}");
    }
}

#[test]
fn multipliers_lead_to_the_base_picture_and_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut pipeline = load();
    let base = picture(&pipeline);
    let mut handles = Vec::new();
    for ((name, algorithm), multiplier) in kinds().into_iter().skip(4).zip([0.5, 0.7, 0.5]) {
        let (.., path) = network(&pipeline, algorithm, name, folder.path());
        handles.push(pipeline.add_lora(&path, multiplier).expect("a LoRA"));
    }
    let all = picture(&pipeline);
    assert!(apart(&all, &base) > 0.02);
    assert_eq!(pipeline.multiplier(handles[1]).expect("a multiplier"), 0.7);
    // A second look at the same prompts reads nothing anew; a change does.
    assert_eq!(pipeline.texts.len(), 2);
    pipeline.set_multiplier(handles[1], 0.).expect("a multiplier");
    assert_eq!(pipeline.texts.len(), 0);
    assert!(apart(&picture(&pipeline), &all) > 0.01);
    pipeline.set_multiplier(handles[0], 0.).expect("a multiplier");
    pipeline.set_multiplier(handles[2], 0.).expect("a multiplier");
    assert_eq!(picture(&pipeline), base);
    for (handle, multiplier) in handles.iter().zip([0.5, 0.7, 0.5]) {
        pipeline.set_multiplier(*handle, multiplier).expect("a multiplier");
    }
    assert_eq!(picture(&pipeline), all);
    pipeline.merge_loras();
    assert_eq!(picture(&pipeline), all);
    let error = pipeline.set_multiplier(handles[0], 1.).expect_err("it is merged");
    assert!(matches!(error, PipelineError::NoSuchLora), "{error}");
    // Another on top of the merged ones, and back.
    let (.., path) = network(&pipeline, Algorithm::LowRank, "late", folder.path());
    let late = pipeline.add_lora(&path, 1.).expect("a LoRA");
    assert!(apart(&picture(&pipeline), &all) > 0.01);
    pipeline.set_multiplier(late, 0.).expect("a multiplier");
    assert_eq!(picture(&pipeline), all);
}

/// Two LoRAs are the one whose ranks are those of both.
#[test]
fn plain_loras_add_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut twice = load();
    let (.., path) = network(&twice, Algorithm::LowRank, "one", folder.path());
    twice.add_lora(&path, 0.25).expect("a LoRA");
    twice.add_lora(&path, 0.5).expect("a LoRA");
    let mut once = load();
    once.add_lora(&path, 0.75).expect("a LoRA");
    let off = apart(&picture(&twice), &picture(&once));
    // Each weight is rounded once more, see above.
    assert!(off < 2e-4, "{off:e}");
}

/// diffusers' names of today, without alphas: their scale is in the numbers.
#[test]
fn a_file_in_pefts_names_is_the_same_lora() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kohya = load();
    let (network, _, path) = network(&kohya, Algorithm::LowRank, "lora_3", folder.path());
    kohya.add_lora(&path, 1.).expect("a LoRA");
    let file = lora_file::read(&path).expect("the file");
    let mut tensors = lora_file::Tensors::new();
    for module in network.modules() {
        let (target, scale) = (&module.target, module.rank.scale());
        let part = match target.part {
            Part::TextEncoder | Part::TextEncoder2 => "text_encoder",
            Part::Unet => "unet",
        };
        for (ours, theirs, factor) in [("lora_down", "lora_A", 1.), ("lora_up", "lora_B", scale)] {
            let tensor = &file.tensors[&format!("{}.{ours}.weight", target.name)];
            let values: Vec<f32> = tensor.to_f32().iter().map(|x| x * factor).collect();
            let tensor = OwnedTensor::from_f32(&tensor.shape, &values, Dtype::F32);
            let key = format!("{part}.{}.{theirs}.weight", target.path);
            tensors.insert(key, tensor.expect("a tensor"));
        }
    }
    let path = folder.path().join("peft.safetensors");
    lora_file::write(&path, &tensors, &Default::default(), SaveAs::Safetensors).expect("a file");
    let mut peft = load();
    let handle = peft.add_lora(&path, 1.).expect("a LoRA");
    let report = peft.lora_report(handle).expect("a report");
    assert_eq!(report.text_encoder + report.unet, network.modules().len());
    let off = apart(&picture(&peft), &picture(&kohya));
    assert!(off < 1e-4, "{off:e}");
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut pipeline = load();
    let base = picture(&pipeline);
    let (.., path) = network(&pipeline, Algorithm::LowRank, "one", folder.path());
    let file = lora_file::read(&path).expect("the file");
    let mut refused = |what: &str, change: &dyn Fn(&mut lora_file::LoraFile)| {
        let mut file = file.clone();
        change(&mut file);
        let path = folder.path().join("changed.safetensors");
        lora_file::write(&path, &file.tensors, &file.metadata, SaveAs::Safetensors).expect(what);
        let error = pipeline.add_lora(&path, 1.).expect_err(what).to_string();
        assert_eq!(picture(&pipeline), base, "{what}");
        error
    };
    let family = refused("family", &|file| {
        file.metadata.insert("ss_base_model_version".into(), "sd_v2".into());
    });
    assert!(family.contains("was trained on Stable Diffusion 2.x"), "{family}");
    assert!(family.contains("hint: "), "{family}");
    let shape = refused("shape", &|file| {
        let key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight";
        let wide = OwnedTensor::from_f32(&[4, 5], &[0.; 20], Dtype::F32).expect("a tensor");
        assert!(file.tensors.insert(key.into(), wide).is_some());
    });
    assert!(shape.contains("lora_te_text_model_encoder_layers_0_mlp_fc1"), "{shape}");
    let nan = refused("a number that is none", &|file| {
        let tensor = file.tensors.values_mut().last().expect("a tensor");
        let values = vec![f32::NAN; tensor.shape.iter().product()];
        *tensor = OwnedTensor::from_f32(&tensor.shape, &values, Dtype::F32).expect("a tensor");
    });
    assert!(nan.contains("not finite"), "{nan}");
    let norm = refused("a normalisation", &|file| {
        let norm = OwnedTensor::from_f32(&[8], &[0.; 8], Dtype::F32).expect("a tensor");
        file.tensors.insert("lora_unet_conv_norm_out.w_norm".into(), norm);
    });
    assert!(norm.contains("changes a normalisation"), "{norm}");
    let sdxl = data("adapters/diffusers_sdxl.safetensors");
    let sdxl = pipeline.add_lora(&sdxl, 1.).expect_err("another family").to_string();
    assert!(sdxl.contains("Stable Diffusion XL") && sdxl.contains("hint: "), "{sdxl}");
    let error = pipeline.add_lora(&path, f32::NAN).expect_err("no number");
    assert!(matches!(error, PipelineError::Model(ModelError::Network(_))), "{error}");
}
