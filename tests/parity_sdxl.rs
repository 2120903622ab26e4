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
    ClipConfig, ClipTextModel, NoiseSchedule, ScheduleSettings, SecondIds, SizeIds, TextEncoders,
    TextIds, TextOutput, Unet, UnetConfig, UnetInput, end_rows, preset, second_text_preset,
};

use super::{
    FORWARD, Numbers, assert_close, case_totals_in, compare_gradients, folder, nchw, nhwc, norm,
};

const SCALING: f32 = 0.13025;

struct Fixture {
    inputs: Numbers,
    texts: TextEncoders,
    unet: Unet,
    model: BaseModel,
}

/// What a forward pass gives.
struct Forward {
    context: Value,
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
            texts: TextEncoders {
                first: text(&model.text_encoder_config, &*model.text_encoder, row),
                second: Some(text(&model.text_encoder_2_config, second, second_row)),
            },
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

    /// What is added to the time embedding.
    fn added(&self, tape: &Tape, pooled: &Value) -> Value {
        let (width, sizes) = (pooled.shape()[1], self.sizes());
        let waves = self.unet.config().size_waves(width, &sizes).unwrap();
        let shape = [sizes.len(), waves.len() / sizes.len()];
        let waves = Tensor::from_f32(Device::Cpu, &shape, &waves, DType::F32).unwrap();
        self.unet.added(tape, pooled, &waves).unwrap()
    }

    fn forward<'m>(&'m self, tape: &Tape<'m>) -> Forward {
        let ids = |name: &str| Ids::new(Device::Cpu, &self.ids(name)).unwrap();
        let ends = end_rows(&self.ids("input_ids_2"), 1, 77);
        let ends = RowChoice::constant(Device::Cpu, &ends, 2 * 77).unwrap();
        let second = Some(SecondIds { ids: ids("input_ids_2"), ends });
        let text = TextIds { ids: ids("input_ids"), second, chunks: 1, length: 77 };
        let TextOutput { context, pooled } = self.texts.encode(tape, &text, None).unwrap();
        let pooled = pooled.unwrap();
        let added = self.added(tape, &pooled);
        let timesteps: Vec<f32> =
            self.inputs.integers("timesteps")[..2].iter().map(|t| *t as f32).collect();
        let latents = nhwc(&self.noisy_latents(), &self.inputs.shape("latents_raw"));
        let waves = self.unet.waves(Device::Cpu, &timesteps).unwrap();
        let input =
            UnetInput { latents: &latents, waves: &waves, context: &context, added: Some(&added) };
        let prediction = self.unet.forward(tape, input).unwrap();
        Forward { context, pooled, prediction }
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
        network.install_all(&mut self.texts, &mut self.unet, 1.).unwrap();
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
    let text = base.get("encoder_hidden_states");
    assert_close("text", &numbers(&got.context), &text, FORWARD);
    assert_close("pooled", &numbers(&got.pooled), &base.get("pooled"), FORWARD);
    let added = fixture.added(&tape, &got.pooled);
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
    let (first, second) = (reference.get("te1_out"), reference.get("te2_out"));
    let rows = first.chunks(8).zip(second.chunks(8));
    let text: Vec<f32> = rows.flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
    assert_close("text", &numbers(&forward.context), &text, FORWARD);
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
