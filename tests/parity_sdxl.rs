//! SDXL: both text encoders, pooled text, sizes, noise prediction, loss and every LoRA gradient.

use std::collections::BTreeMap;

use engine::{
    DType, Device, ElementLoss, Ids, LossSpec, ParamId, ParamStore, RowChoice, Tape, Tensor, Value,
};
use formats::{BaseModel, Family, OpenOptions, open_base_model};
use models::lora::{
    Algorithm, LoraNetwork, Part, Rank, UniformRanks, sdxl_text_encoder_targets, unet_targets,
};
use models::{
    ClipConfig, ClipTextModel, NoiseSchedule, ScheduleSettings, SizeIds, Unet, UnetConfig,
    UnetInput, end_rows, preset, second_text_preset,
};

use super::{
    FORWARD, Numbers, assert_close, case_totals_in, compare_gradients, folder, nchw, nhwc, norm,
};

const SCALING: f32 = 0.13025;

struct Fixture {
    inputs: Numbers,
    first: ClipTextModel,
    second: ClipTextModel,
    unet: Unet,
    model: BaseModel,
}

/// What a forward pass gives.
struct Forward {
    texts: [Value; 2],
    pooled: Value,
    prediction: Value,
}

impl Fixture {
    fn open(dtype: DType) -> Self {
        let root = folder("parity-sdxl");
        let path = root.join("model");
        let model = open_base_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
        assert_eq!(model.family, Family::Sdxl);
        let row = preset(model.family);
        assert_eq!(row.vae_scaling, SCALING);
        let text = |config: &Option<_>, weights: &dyn formats::Weights, row| {
            let clip = ClipConfig::resolve(config.as_ref(), weights, row).unwrap();
            ClipTextModel::load(weights, &clip, Device::Cpu, dtype).unwrap()
        };
        let second = model.text_encoder_2.as_deref().unwrap();
        let second_row = second_text_preset(model.family).unwrap();
        let unet = UnetConfig::resolve(model.unet_config.as_ref(), &*model.unet, row).unwrap();
        Self {
            inputs: Numbers::open(&root.join("inputs.safetensors")),
            first: text(&model.text_encoder_config, &*model.text_encoder, row),
            second: text(&model.text_encoder_2_config, second, second_row),
            unet: Unet::load(&*model.unet, &unet, Device::Cpu, dtype).unwrap(),
            model,
        }
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.inputs.integers(name).iter().map(|id| *id as u32).collect()
    }

    fn sizes(&self) -> Vec<SizeIds> {
        let pairs = |name: &str| -> Vec<[f32; 2]> {
            self.inputs.integers(name).chunks(2).map(|p| [p[0] as f32, p[1] as f32]).collect()
        };
        let (original, crop) = (pairs("original_sizes_hw"), pairs("crop_top_lefts"));
        let target = pairs("target_sizes_hw");
        let of = |i: usize| SizeIds { original: original[i], crop: crop[i], target: target[i] };
        (0..original.len()).map(of).collect()
    }

    fn noisy_latents(&self) -> Vec<f32> {
        let schedule = NoiseSchedule::new(ScheduleSettings::default());
        let latents: Vec<f32> =
            self.inputs.get("latents_raw").iter().map(|x| x * SCALING).collect();
        let (noise, each) = (self.inputs.get("noise"), latents.len() / 2);
        let image = |(i, t): (usize, &i64)| {
            let part = i * each..(i + 1) * each;
            schedule.add_noise(&latents[part.clone()], &noise[part], *t as usize).unwrap()
        };
        self.inputs.integers("timesteps")[..2].iter().enumerate().flat_map(image).collect()
    }

    fn forward<'m>(&'m self, tape: &Tape<'m>) -> Forward {
        let ids = |name: &str| Ids::new(Device::Cpu, &self.ids(name)).unwrap();
        let first = self.first.penultimate(tape, &ids("input_ids"), 77).unwrap();
        let second = self.second.penultimate(tape, &ids("input_ids_2"), 77).unwrap();
        let ends = end_rows(&self.ids("input_ids_2"), 1, 77);
        let ends = RowChoice::constant(Device::Cpu, &ends, 2 * 77).unwrap();
        let pooled = self.second.pooled(tape, &second, &ends).unwrap();
        let context = tape.concat_last(&first, &second).unwrap();
        let added = self.unet.added(tape, &pooled, &self.sizes()).unwrap();
        let timesteps: Vec<f32> =
            self.inputs.integers("timesteps")[..2].iter().map(|t| *t as f32).collect();
        let latents = nhwc(&self.noisy_latents(), &self.inputs.shape("latents_raw"));
        let waves = self.unet.waves(Device::Cpu, &timesteps).unwrap();
        let input =
            UnetInput { latents: &latents, waves: &waves, context: &context, added: Some(&added) };
        let prediction = self.unet.forward(tape, input).unwrap();
        Forward { texts: [first, second], pooled, prediction }
    }

    /// The network of `init.safetensors`, installed.
    fn install(&mut self) -> (LoraNetwork, ParamStore) {
        let path = folder("parity-sdxl/lierla/init.safetensors");
        let file = formats::lora_file::read(&path).unwrap();
        let second = self.model.text_encoder_2.as_deref().unwrap();
        let mut targets = sdxl_text_encoder_targets(&*self.model.text_encoder, second);
        targets.extend(unet_targets(&*self.model.unet));
        let rule = UniformRanks { linear: Rank::new(4, 1.), conv: None };
        let mut network = LoraNetwork::new(targets, &rule, Algorithm::LowRank).unwrap();
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        let report = network.load_values(&mut values, &file.tensors).unwrap();
        assert!(report.missing.is_empty() && report.unused.is_empty(), "{report:?}");
        let counts = [Part::TextEncoder, Part::TextEncoder2, Part::Unet]
            .map(|part| network.module_count(part));
        assert_eq!(counts, [72, 24, 192]);
        let params = network.parameters(Device::Cpu, values).unwrap();
        network.install_all((&mut self.first, Some(&mut self.second)), &mut self.unet, 1.).unwrap();
        (network, params)
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.tensor().to_vec_f32().unwrap()
}

#[test]
fn sdxl_without_lora() {
    let fixture = Fixture::open(DType::F32);
    let base = Numbers::open(&folder("parity-sdxl").join("base.safetensors"));
    assert_close("noisy", &fixture.noisy_latents(), &base.get("noisy_latents"), 1e-6);
    let tape = Tape::inference(None);
    let got = fixture.forward(&tape);
    assert_close("te1", &numbers(&got.texts[0]), &base.get("te1_out"), FORWARD);
    assert_close("te2", &numbers(&got.texts[1]), &base.get("te2_out"), FORWARD);
    assert_close("pooled", &numbers(&got.pooled), &base.get("pooled"), FORWARD);
    let added = fixture.unet.added(&tape, &got.pooled, &fixture.sizes()).unwrap();
    assert_close("added", &numbers(&added), &base.get("vector_embedding"), FORWARD);
    let got = nchw(got.prediction.tensor());
    assert_close("noise_pred", &got, &base.get("noise_pred"), FORWARD);
}

fn train(
    fixture: &Fixture,
    (network, params): (&LoraNetwork, &ParamStore),
    checkpointing: bool,
) -> (Forward, f32, BTreeMap<String, Vec<f32>>) {
    let tape = Tape::new(params, checkpointing);
    let forward = fixture.forward(&tape);
    let noise = &fixture.inputs.get("noise")[..fixture.noisy_latents().len()];
    let target = nhwc(noise, &fixture.inputs.shape("latents_raw"));
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &[0.; 2], &[0.5; 2]).unwrap();
    let loss = tape.loss(&forward.prediction, &target, &spec).unwrap();
    let value = numbers(&loss).iter().sum();
    let mut gradients = BTreeMap::new();
    tape.backward(&loss, &mut |id: ParamId, gradient: Tensor| {
        let gradient = network.file_order(id, &gradient.to_vec_f32()?);
        assert!(gradients.insert(network.key(id), gradient).is_none());
        Ok(())
    })
    .unwrap();
    (forward, value, gradients)
}

#[test]
fn sdxl_lierla() {
    let mut fixture = Fixture::open(DType::F32);
    let (network, params) = fixture.install();
    let reference = Numbers::open(&folder("parity-sdxl/lierla/ref.safetensors"));
    let (forward, loss, gradients) = train(&fixture, (&network, &params), false);
    assert_close("te1", &numbers(&forward.texts[0]), &reference.get("te1_out"), FORWARD);
    assert_close("te2", &numbers(&forward.texts[1]), &reference.get("te2_out"), FORWARD);
    assert_close("pooled", &numbers(&forward.pooled), &reference.get("pooled"), FORWARD);
    let prediction = nchw(forward.prediction.tensor());
    assert_close("noise_pred", &prediction, &reference.get("noise_pred"), FORWARD);
    assert_close("loss", &[loss], &reference.get("loss"), FORWARD);
    let (want, total) = case_totals_in(&folder("parity-sdxl/lierla"), "clip_skip_none");
    assert_close("loss of the case", &[loss], &[want], FORWARD);
    let all: Vec<f32> = gradients.values().flatten().copied().collect();
    assert_close("norm of all gradients", &[norm(&all) as f32], &[total], FORWARD);
    compare_gradients(&gradients, &reference);
    // The first encoder's last layer is not run; the second's serves the pooled output alone.
    assert!(gradients.keys().all(|key| !key.starts_with("lora_te1_text_model_encoder_layers_11_")));
    assert!(gradients.keys().any(|key| key.starts_with("lora_te2_text_model_encoder_layers_3_")));

    let (_, again, checkpointed) = train(&fixture, (&network, &params), true);
    assert_eq!(loss.to_bits(), again.to_bits());
    assert!(gradients == checkpointed, "checkpointing changes the gradients");
}
