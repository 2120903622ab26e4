//! The models against what PyTorch computed from the same small models and inputs.
//!
//! `data/parity` is a model in SD1's layout, `data/parity-sd2` one in SD2's, `data/parity-sdxl` one in
//! SDXL's (in `parity_sdxl.rs`); their READMEs say how the numbers were made. Tolerances: forwards 1e-4 of the largest value, gradients 1e-3 of the norm and
//! a cosine of 0.99999, which leaves room for another order of sums and for nothing else.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]
#![expect(clippy::print_stdout, reason = "errors are shown with `--nocapture`")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{
    DType, Device, ElementLoss, Ids, LossSpec, ParamId, ParamStore, Tape, Tensor, Value, pool_stats,
};
use formats::{Dtype, Family, OpenOptions, TensorFile, open_base_model, open_tensor_file};
use models::lora::{
    Algorithm, FileRanks, LoraNetwork, Part, Rank, UniformRanks, text_encoder_targets, unet_targets,
};
use models::{
    ClipConfig, ClipTextModel, NoiseSchedule, ScheduleSettings, Unet, UnetConfig, UnetInput, Vae,
    VaeConfig, join_chunks, pixel_order, preset, token_factors,
};

mod parity_sdxl;

const FORWARD: f32 = 1e-4;
const SCALING: f32 = 0.18215;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

/// Numbers of a safetensors file.
struct Numbers(Arc<dyn TensorFile>);

impl Numbers {
    fn open(path: &Path) -> Self {
        Self(open_tensor_file(path).unwrap())
    }

    fn get(&self, name: &str) -> Vec<f32> {
        self.0.view(name).unwrap().to_f32()
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        let view = self.0.view(name).unwrap();
        assert_eq!(view.dtype, Dtype::I64);
        view.data.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.0.view(name).unwrap().shape
    }

    fn names(&self) -> Vec<String> {
        self.0.names().into_iter().map(str::to_owned).collect()
    }
}

/// The pool's figures are the process's: one fixture at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A parity folder and the models in it.
struct Fixture {
    _alone: MutexGuard<'static, ()>,
    root: PathBuf,
    inputs: Numbers,
    base: Numbers,
    clip: ClipTextModel,
    unet: Unet,
    vae: Vae,
    model: formats::BaseModel,
}

impl Fixture {
    fn open(name: &str, dtype: DType) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let root = folder(name);
        let path = root.join("model");
        let model = open_base_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
        let row = preset(model.family);
        let config = model.text_encoder_config.as_ref();
        let clip = ClipConfig::resolve(config, &*model.text_encoder, row).unwrap();
        let unet = UnetConfig::resolve(model.unet_config.as_ref(), &*model.unet, row).unwrap();
        let vae = VaeConfig::resolve(model.vae_config.as_ref(), &*model.vae, row).unwrap();
        assert_eq!(vae.scaling, SCALING);
        Self {
            _alone: alone,
            clip: ClipTextModel::load(&*model.text_encoder, &clip, Device::Cpu, dtype).unwrap(),
            unet: Unet::load(&*model.unet, &unet, Device::Cpu, dtype).unwrap(),
            vae: Vae::load(&*model.vae, &vae, Device::Cpu, dtype).unwrap(),
            inputs: Numbers::open(&root.join("inputs.safetensors")),
            base: Numbers::open(&root.join("base.safetensors")),
            root,
            model,
        }
    }

    fn ids(&self) -> Ids {
        let ids: Vec<u32> = self.inputs.get("input_ids").iter().map(|id| *id as u32).collect();
        Ids::new(Device::Cpu, &ids).unwrap()
    }

    fn timesteps(&self) -> Vec<f32> {
        self.inputs.get("timesteps")[..2].to_vec()
    }

    /// Noisy latents of step 0, NCHW.
    fn noisy_latents(&self) -> Vec<f32> {
        let schedule = NoiseSchedule::new(ScheduleSettings::default());
        let latents: Vec<f32> =
            self.inputs.get("latents_raw").iter().map(|x| x * SCALING).collect();
        let (noise, each) = (self.inputs.get("noise"), latents.len() / 2);
        let image = |i: usize, t: f32| {
            let part = i * each..(i + 1) * each;
            schedule.add_noise(&latents[part.clone()], &noise[part], t as usize).unwrap()
        };
        self.timesteps().iter().enumerate().flat_map(|(i, t)| image(i, *t)).collect()
    }

    fn latents(&self) -> Tensor {
        nhwc(&self.noisy_latents(), &self.inputs.shape("latents_raw"))
    }

    fn predict<'m>(&'m self, tape: &Tape<'m>, context: &Value) -> Value {
        let waves = self.unet.waves(Device::Cpu, &self.timesteps()).unwrap();
        let latents = &self.latents();
        let input = UnetInput { latents, waves: &waves, context, added: None };
        self.unet.forward(tape, input).unwrap()
    }

    /// The network of a case folder, with the values of its `init.safetensors`, installed.
    fn install(&mut self, case: &str) -> (LoraNetwork, ParamStore) {
        let path = self.root.join(case).join("init.safetensors");
        let file = formats::lora_file::read(&path).unwrap();
        let mut targets = text_encoder_targets(&*self.model.text_encoder);
        targets.extend(unet_targets(&*self.model.unet));
        let rank = Rank::new(4, 1.);
        let conv = (case == "c3lier").then_some(rank);
        let rule = UniformRanks { linear: rank, conv };
        let mut network = LoraNetwork::new(targets, &rule, Algorithm::LowRank).unwrap();
        let mut values = network.initial_values(&mut |_, n| vec![0.5; n]);
        let report = network.load_values(&mut values, &file.tensors).unwrap();
        assert_eq!(report.loaded, network.modules().len());
        assert!(report.missing.is_empty() && report.unused.is_empty(), "{report:?}");
        let params = network.parameters(Device::Cpu, values).unwrap();
        network.install(&mut self.clip, &mut self.unet, 1.).unwrap();
        (network, params)
    }
}

fn nhwc(data: &[f32], nchw: &[usize]) -> Tensor {
    let [b, c, h, w] = *nchw else { panic!("{nchw:?} is not NCHW") };
    let data = pixel_order::nhwc_from_nchw(data, c, h * w);
    Tensor::from_f32(Device::Cpu, &[b, h, w, c], &data, DType::F32).unwrap()
}

fn nchw(tensor: &Tensor) -> Vec<f32> {
    let [_, h, w, c] = *tensor.shape() else { panic!("{tensor:?} is not NHWC") };
    pixel_order::nchw_from_nhwc(&tensor.to_vec_f32().unwrap(), c, h * w)
}

/// Largest difference over largest value.
fn relative(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|x| x.is_finite()));
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    let error = relative(got, want);
    println!("{what}: {error:.1e}");
    assert!(error <= tolerance, "{what}: error {error:e}, tolerance {tolerance:e}");
}

const SKIPS: [(&str, Option<usize>); 3] = [("none", None), ("1", Some(1)), ("2", Some(2))];

fn base_forwards(name: &str) {
    let fixture = Fixture::open(name, DType::F32);
    assert_close("noisy", &fixture.noisy_latents(), &fixture.base.get("noisy_latents"), 1e-6);
    let tape = Tape::inference(None);
    for (key, clip_skip) in SKIPS {
        let text = fixture.clip.forward(&tape, &fixture.ids(), 77, clip_skip).unwrap();
        let want = fixture.base.get(&format!("te_clip_skip_{key}"));
        assert_close(key, &text.tensor().to_vec_f32().unwrap(), &want, FORWARD);
        let suffix = if clip_skip == Some(2) { "_clip_skip_2" } else { "" };
        let want = fixture.base.get(&format!("noise_pred{suffix}"));
        let got = nchw(fixture.predict(&tape, &text).tensor());
        assert_close("noise_pred", &got, &want, FORWARD);
    }
}

#[test]
fn sd1_without_lora() {
    base_forwards("parity");
}

#[test]
fn sd2_without_lora() {
    base_forwards("parity-sd2");
}

fn autoencoder(name: &str) {
    let fixture = Fixture::open(name, DType::F32);
    let (base, inputs) = (&fixture.base, &fixture.inputs);
    let moments = fixture.vae.encode(&nhwc(&inputs.get("image"), &inputs.shape("image"))).unwrap();
    let [_, h, w, c] = moments.shape;
    let file_order = |data: &[f32]| pixel_order::nchw_from_nhwc(data, c, h * w);
    assert_close("mean", &file_order(&moments.mean), &base.get("vae_mean"), FORWARD);
    assert_close("logvar", &file_order(&moments.logvar), &base.get("vae_logvar"), FORWARD);
    let noise = pixel_order::nhwc_from_nchw(&inputs.get("vae_noise"), c, h * w);
    let sample = moments.sample(&noise, SCALING);
    assert_close("sample", &file_order(&sample), &base.get("vae_sample_scaled"), FORWARD);
    let mean = nhwc(&base.get("vae_mean"), &base.shape("vae_mean"));
    let image = fixture.vae.decode(&mean).unwrap();
    assert_close("decode", &nchw(&image), &base.get("vae_decode_of_mean"), FORWARD);
}

#[test]
fn sd1_autoencoder() {
    autoencoder("parity");
}

#[test]
fn sd2_autoencoder() {
    autoencoder("parity-sd2");
}

/// What one training forward and backward gives.
struct Trained {
    text: Vec<f32>,
    prediction: Vec<f32>,
    loss: f32,
    /// By key of the file, in the order of files.
    gradients: BTreeMap<String, Vec<f32>>,
}

fn train(
    fixture: &Fixture,
    (network, params): (&LoraNetwork, &ParamStore),
    clip_skip: Option<usize>,
    checkpointing: bool,
) -> Trained {
    let tape = Tape::new(params, checkpointing);
    let text = fixture.clip.forward(&tape, &fixture.ids(), 77, clip_skip).unwrap();
    let prediction = fixture.predict(&tape, &text);
    let target = nhwc(
        &fixture.inputs.get("noise")[..fixture.noisy_latents().len()],
        &fixture.inputs.shape("latents_raw"),
    );
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &[0.; 2], &[0.5; 2]).unwrap();
    let loss = tape.loss(&prediction, &target, &spec).unwrap();
    let mut gradients = BTreeMap::new();
    let (text, prediction) = (text.tensor().to_vec_f32().unwrap(), nchw(prediction.tensor()));
    let value = loss.tensor().to_vec_f32().unwrap().iter().sum();
    tape.backward(&loss, &mut |id: ParamId, gradient| {
        let gradient = network.file_order(id, &gradient.to_vec_f32()?);
        assert!(gradients.insert(network.key(id), gradient).is_none());
        Ok(())
    })
    .unwrap();
    Trained { text, prediction, loss: value, gradients }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Relative difference of the norms, and one minus the cosine.
fn gradient_errors(got: &[f32], want: &[f32]) -> (f64, f64) {
    let dot: f64 = got.iter().zip(want).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let (a, b) = (norm(got), norm(want));
    ((a - b).abs() / b, 1. - dot / (a * b))
}

/// Float32 gradients of the reference differ from float64 ones by up to 3e-9 per number. On levels of
/// 32 channels the group norm cancels the time embedding: its gradients are such noise and no more.
const NOISE: f32 = 3e-9;

fn compare_gradients(got: &BTreeMap<String, Vec<f32>>, want: &Numbers) {
    let mut worst = (0f64, 0f64);
    for (key, got) in got {
        let want = want.get(&format!("grad/{key}"));
        let errors = gradient_errors(got, &want);
        let difference = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        if key.contains("time_emb_proj") && difference <= NOISE {
            continue;
        }
        assert!(errors.0 <= 1e-3 && errors.1 <= 1e-5, "{key}: {errors:?}, {difference:e}");
        worst = (worst.0.max(errors.0), worst.1.max(errors.1));
    }
    println!("{} gradients, worst norm and 1-cosine {worst:?}", got.len());
    let wanted = want.names().into_iter().filter(|name| name.starts_with("grad/")).count();
    assert_eq!(got.len(), wanted, "gradients that only one side has");
}

/// Loss and norm of all gradients of a case.
fn case_totals(fixture: &Fixture, case: &str, name: &str) -> (f32, f32) {
    case_totals_in(&fixture.root.join(case), name)
}

fn case_totals_in(folder: &Path, name: &str) -> (f32, f32) {
    let text = std::fs::read(folder.join("cases.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let cases = json["cases"].as_array().unwrap();
    let found = cases.iter().find(|entry| entry["name"] == name).unwrap();
    let number = |key: &str| found[key].as_f64().unwrap() as f32;
    (number("loss"), number("grad_norm"))
}

fn lora(name: &str, case: &str) {
    let mut fixture = Fixture::open(name, DType::F32);
    let (network, params) = fixture.install(case);
    let reference = Numbers::open(&fixture.root.join(case).join("ref.safetensors"));
    let skips = [("clip_skip_none", "", None), ("clip_skip_2", "clip_skip_2/", Some(2))];
    for (entry, prefix, clip_skip) in skips {
        let got = train(&fixture, (&network, &params), clip_skip, false);
        let want = |key: &str| reference.get(&format!("{prefix}{key}"));
        assert_close("te_out", &got.text, &want("te_out"), FORWARD);
        assert_close("noise_pred", &got.prediction, &want("noise_pred"), FORWARD);
        assert_close("loss", &[got.loss], &want("loss"), FORWARD);
        let (loss, total) = case_totals(&fixture, case, entry);
        assert_close("loss of the case", &[got.loss], &[loss], FORWARD);
        let all: Vec<f32> = got.gradients.values().flatten().copied().collect();
        assert_close("norm of all gradients", &[norm(&all) as f32], &[total], FORWARD);
        if clip_skip.is_none() {
            compare_gradients(&got.gradients, &reference);
        } else {
            // The layer that is not run has no gradients: not zeros, none.
            let last = format!("_layers_{}_", fixture.clip.config().layers - 1);
            let ran = |id: &usize| !network.key(ParamId(*id)).contains(&last);
            assert_eq!(got.gradients.len(), (0..network.param_count()).filter(ran).count());
            assert!(got.gradients.keys().all(|key| !key.contains(&last)));
        }

        let again = train(&fixture, (&network, &params), clip_skip, true);
        assert_eq!(got.loss.to_bits(), again.loss.to_bits());
        assert!(got.gradients == again.gradients, "checkpointing changes the gradients");
    }
}

#[test]
fn sd1_lierla() {
    lora("parity", "lierla");
}

#[test]
fn sd1_c3lier() {
    lora("parity", "c3lier");
}

#[test]
fn sd2_lierla() {
    lora("parity-sd2", "lierla");
}

#[test]
fn lora_on_the_unet_alone_trains_the_unet_alone() {
    let mut fixture = Fixture::open("parity", DType::F32);
    let rule = UniformRanks { linear: Rank::new(2, 1.), conv: None };
    let targets = unet_targets(&*fixture.model.unet);
    let network = LoraNetwork::new(targets, &rule, Algorithm::LowRank).unwrap();
    let values = network.initial_values(&mut |_, n| vec![0.75; n]);
    let params = network.parameters(Device::Cpu, values).unwrap();
    network.install(&mut fixture.clip, &mut fixture.unet, 1.).unwrap();
    let got = train(&fixture, (&network, &params), None, false);
    assert_eq!(got.gradients.len(), network.param_count());
    assert_close("te_out", &got.text, &fixture.base.get("te_clip_skip_none"), FORWARD);
    // A new LoRA changes nothing, and its `up` is the first to move.
    assert_close("noise_pred", &got.prediction, &fixture.base.get("noise_pred"), FORWARD);
    for (key, gradient) in &got.gradients {
        assert_eq!(norm(gradient) == 0., key.ends_with("lora_down.weight"), "{key}");
    }
}

#[test]
fn a_lora_file_is_read_and_written_back_bit_for_bit() {
    for (name, case) in [("parity", "lierla"), ("parity", "c3lier"), ("parity-sd2", "lierla")] {
        let mut fixture = Fixture::open(name, DType::F32);
        let (network, params) = fixture.install(case);
        let path = fixture.root.join(case).join("init.safetensors");
        let file = formats::lora_file::read(&path).unwrap();
        assert!(network.export(&params, Dtype::F32).unwrap() == file.tensors);

        let ranks = FileRanks::new(&file.tensors).unwrap();
        let mut targets = text_encoder_targets(&*fixture.model.text_encoder);
        targets.extend(unet_targets(&*fixture.model.unet));
        let same = LoraNetwork::new(targets, &ranks, Algorithm::LowRank).unwrap();
        assert_eq!(same.modules().len(), network.modules().len());
        assert_eq!(same.module_count(Part::TextEncoder), network.module_count(Part::TextEncoder));
    }
}

#[test]
fn bf16_stays_close_to_f32() {
    for name in ["parity", "parity-sd2"] {
        let run = |dtype| {
            let mut fixture = Fixture::open(name, dtype);
            let (network, params) = fixture.install("lierla");
            train(&fixture, (&network, &params), None, false)
        };
        let (want, got) = (run(DType::F32), run(DType::BF16));
        assert_close("te_out", &got.text, &want.text, 3e-2);
        assert_close("noise_pred", &got.prediction, &want.prediction, 5e-2);
        assert_close("loss", &[got.loss], &[want.loss], 1e-2);
        assert_eq!(got.gradients.len(), want.gradients.len());
        let flat =
            |x: &BTreeMap<String, Vec<f32>>| x.values().flatten().copied().collect::<Vec<_>>();
        let errors = gradient_errors(&flat(&got.gradients), &flat(&want.gradients));
        println!("{name}: all gradients in bf16 {errors:?}");
        assert!(errors.0 <= 5e-2 && errors.1 <= 2e-2, "{errors:?}");
    }
}

#[test]
fn checkpointing_lowers_the_memory() {
    let mut fixture = Fixture::open("parity", DType::F32);
    let (network, params) = fixture.install("lierla");
    // What the tape keeps when the prediction stands.
    let kept = |checkpointing| {
        let tape = Tape::new(&params, checkpointing);
        let before = pool_stats().live;
        let text = fixture.clip.forward(&tape, &fixture.ids(), 77, None).unwrap();
        let prediction = fixture.predict(&tape, &text);
        assert!(prediction.is_tracked());
        pool_stats().live.saturating_sub(before)
    };
    let (plain, lean) = (kept(false), kept(true));
    println!("{} modules: {plain} bytes kept, {lean} with checkpointing", network.modules().len());
    assert!(2 * lean < plain, "{lean} < {plain}");
}

#[test]
fn schedule_tables() {
    let tables = Numbers::open(&folder("parity").join("schedule_tables.safetensors"));
    for (prefix, zero_terminal_snr) in [("default", false), ("ztsnr", true)] {
        let schedule =
            NoiseSchedule::new(ScheduleSettings { zero_terminal_snr, ..Default::default() });
        let tables = |name: &str| tables.get(&format!("{prefix}/{name}"));
        if !zero_terminal_snr {
            assert_eq!(schedule.betas, tables("betas"));
            assert_eq!(schedule.alphas_cumprod, tables("alphas_cumprod"));
        }
        for (name, got) in [
            ("betas", &schedule.betas),
            ("alphas_cumprod", &schedule.alphas_cumprod),
            ("all_snr_as_used_by_sdscripts", &schedule.snr),
        ] {
            let want = tables(name);
            assert_eq!(got.len(), want.len());
            for (t, (a, b)) in got.iter().zip(&want).enumerate() {
                // PyTorch's vectorised square root is off by an ulp, which small differences show.
                let tolerance = 1e-6 * b.abs() + 4e-6 * f32::from(u8::from(name == "betas")) + 1e-7;
                assert!((a - b).abs() <= tolerance, "{prefix}/{name} at {t}: {a} and {b}");
            }
        }
    }
}

#[test]
fn long_prompts_are_joined_from_their_chunks() {
    let fixture = Fixture::open("parity", DType::F32);
    let tape = Tape::inference(None);
    let chunks = fixture.clip.forward(&tape, &fixture.ids(), 77, None).unwrap();
    let joined = join_chunks(&tape, &chunks, 2).unwrap();
    assert_eq!(joined.shape(), [1, 152, 32]);
    let (each, all) =
        (chunks.tensor().to_vec_f32().unwrap(), joined.tensor().to_vec_f32().unwrap());
    let row = |data: &[f32], i: usize| data[i * 32..(i + 1) * 32].to_vec();
    for (to, from) in [(0, 0), (1, 1), (75, 75), (76, 78), (150, 152), (151, 153)] {
        assert_eq!(row(&all, to), row(&each, from), "row {to}");
    }
    let weights: Vec<f32> = (0..154).map(|i| i as f32).collect();
    let factors = token_factors(&weights, 1, 2).unwrap();
    let factors = Tensor::from_f32(Device::Cpu, &[152], &factors, DType::F32).unwrap();
    let scaled = tape.scale_rows(&joined, &factors).unwrap().tensor().to_vec_f32().unwrap();
    for (to, factor) in [(0, 1.), (1, 1.), (75, 75.), (76, 78.), (150, 152.), (151, 1.)] {
        let want: Vec<f32> = row(&all, to).iter().map(|x| x * factor).collect();
        assert_eq!(row(&scaled, to), want, "row {to}");
    }
    assert!(join_chunks(&tape, &chunks, 3).is_err());
    assert!(token_factors(&weights[1..], 1, 2).is_err());
}

#[test]
fn families_are_told_apart() {
    assert_eq!(Fixture::open("parity", DType::F32).model.family, Family::Sd1);
    assert_eq!(Fixture::open("parity-sd2", DType::F32).model.family, Family::Sd2);
}
