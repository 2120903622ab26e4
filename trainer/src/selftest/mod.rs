//! `lorarun selftest`: does this machine compute what the PyTorch reference computed?
//!
//! A reference is a folder with inputs, a small model, and results; see `tests/data/parity`. Nothing
//! here knows a case by name beyond the layout of that folder.

mod compare;
mod embedded;
mod operations;
mod random_model;
mod reference;
mod two_files;

use std::path::Path;

use anyhow::{Context, Result};
use engine::{DType, Device, ParamId, ParamStore, Tape, Tensor};
use formats::{OpenOptions, TensorFile, open_base_model};
use models::lora::{Algorithm, LoraNetwork, Part, Rank, UniformRanks, unet_targets};
use models::pixel_order::{nchw_from_nhwc, nhwc_from_nchw};
use models::{SizeIds, Vae};

use crate::base::Base;
use crate::gradients::Gradients;
use crate::inputs::{CHUNK, MicroBatch, Prompts, SecondPrompts, StepInputs};
use crate::noise::Draw;
use crate::objective::Objective;
use crate::optimizer::{AdamWSettings, Build, Recipe, StepInput, TensorForm, TensorStep};
use crate::step::{Models, Setting, encode_text, forward_backward, predict};

pub use compare::Report;
use compare::{FORWARD, GRADIENT, GRADIENT_NORM, WEIGHTS};
pub use embedded::run_embedded;
pub use operations::run_operations;
pub use random_model::write_random_model;
use reference::{Case, Reference, options_from_json, read, read_integers};
pub use two_files::compare_pair;

/// The inputs of a reference, in the engine's order of axes.
struct Inputs {
    ids: Vec<u32>,
    /// NHWC, scaled.
    latents: Vec<f32>,
    shape: [usize; 4],
    /// Per step and sample, NHWC.
    noise: Vec<f32>,
    offset: Vec<f32>,
    timesteps: Vec<usize>,
    /// SDXL's part of the prompts.
    second: Option<SecondPrompts>,
}

/// A reference with the model it was made with.
struct Bench {
    reference: Reference,
    base: Base,
    inputs: Inputs,
    models: Models,
    checkpointing: bool,
}

/// Compares everything in a reference; the report says what failed.
pub fn run(case: &Path, base: &Path, device: Device, checkpointing: bool) -> Result<Report> {
    let reference = Reference::open(case, base)?;
    let model = reference.model.display().to_string();
    let mut opened =
        Base::from_files(open_base_model(&model, &OpenOptions::default())?, DType::F32)?;
    opened.device = device;
    let inputs = Inputs::read(&*reference.inputs, opened.vae.scaling, opened.pooled_width())?;
    let models =
        Models { text_encoder: Some(opened.load_text_encoder()?), unet: opened.load_unet()? };
    let mut bench = Bench { reference, base: opened, inputs, models, checkpointing };
    let mut report = Report::default();
    bench.check_base(&mut report)?;
    let vae = bench.base.load_vae()?;
    bench.check_vae(&vae, &mut report)?;
    drop(vae);
    let (network, params) = bench.install_lora(&mut report)?;
    for case in &bench.reference.cases.cases {
        bench.check_case(case, &network, &params, &mut report)?;
    }
    bench.check_optimizer(&network, params, &mut report)?;
    Ok(report)
}

/// `[n,c,h,w]` to `[n,h,w,c]`, for any number of images.
fn to_nhwc(shape: &[usize], data: &[f32]) -> Vec<f32> {
    let (channels, pixels) =
        (shape[shape.len() - 3], shape[shape.len() - 2] * shape[shape.len() - 1]);
    data.chunks(channels * pixels)
        .flat_map(|image| nhwc_from_nchw(image, channels, pixels))
        .collect()
}

fn to_nchw(shape: &[usize], data: &[f32]) -> Vec<f32> {
    let (channels, pixels) = (shape[3], shape[1] * shape[2]);
    data.chunks(channels * pixels)
        .flat_map(|image| nchw_from_nhwc(image, channels, pixels))
        .collect()
}

/// SDXL's second ids and the sizes that it is told.
fn read_second(file: &dyn TensorFile, pooled: usize) -> Result<SecondPrompts> {
    let ids = read_integers(file, "input_ids_2")?.1.into_iter().map(|id| id as u32).collect();
    let pairs = |name: &str| -> Result<Vec<[f32; 2]>> {
        let numbers = read_integers(file, name)?.1;
        Ok(numbers.as_chunks::<2>().0.iter().map(|pair| pair.map(|n| n as f32)).collect())
    };
    let (original, crop) = (pairs("original_sizes_hw")?, pairs("crop_top_lefts")?);
    let target = pairs("target_sizes_hw")?;
    let sizes = original.into_iter().zip(crop).zip(target);
    let sizes =
        sizes.map(|((original, crop), target)| SizeIds { original, crop, target }).collect();
    Ok(SecondPrompts { ids, pooled, sizes })
}

impl Inputs {
    fn read(file: &dyn TensorFile, scaling: f32, pooled: Option<usize>) -> Result<Self> {
        let (shape, latents) = read(file, "latents_raw")?;
        let [batch, channels, height, width] = shape[..] else {
            anyhow::bail!("`latents_raw` should be [B,C,h,w], it is: {shape:?}");
        };
        let (_, ids) = read_integers(file, "input_ids")?;
        let (noise_shape, noise) = read(file, "noise")?;
        let latents = to_nhwc(&shape, &latents).iter().map(|x| x * scaling).collect();
        Ok(Self {
            ids: ids.into_iter().map(|id| id as u32).collect(),
            latents,
            shape: [batch, height, width, channels],
            noise: to_nhwc(&noise_shape, &noise),
            offset: read(file, "offset_randn")?.1,
            timesteps: read_integers(file, "timesteps")?.1,
            second: pooled.map(|pooled| read_second(file, pooled)).transpose()?,
        })
    }

    fn draws(&self, step: usize) -> Result<Vec<Draw>> {
        let [batch, height, width, channels] = self.shape;
        let len = height * width * channels;
        let sample = |b: usize| {
            let at = step * batch + b;
            Some(Draw::plain(
                self.noise.get(at * len..(at + 1) * len)?.to_vec(),
                self.offset.get(b * channels..(b + 1) * channels)?.to_vec(),
                *self.timesteps.get(at)?,
            ))
        };
        let draws: Option<Vec<Draw>> = (0..batch).map(sample).collect();
        draws.with_context(|| format!("the reference has no inputs for step {step}"))
    }

    fn prompts(&self) -> Prompts {
        Prompts {
            ids: self.ids.clone(),
            weights: None,
            chunks: self.ids.len() / CHUNK / self.shape[0],
            second: self.second.clone(),
        }
    }
}

impl Bench {
    fn objective(&self, case: Option<&Case>) -> Result<Objective> {
        Objective::from_options(&options_from_json(case.map(|case| &case.options))?)
    }

    fn inputs(&self, objective: &Objective, step: usize) -> Result<StepInputs> {
        let weights = &self.reference.cases.loss_weights;
        let batch = self.inputs.shape[0] as f32;
        let weights: Vec<f32> = weights.iter().map(|w| w / batch).collect();
        let draws = self.inputs.draws(step)?;
        let shape = self.inputs.shape;
        let noised = objective.prepare(&self.inputs.latents, shape, &draws, &weights)?;
        let micro = MicroBatch { noised, prompts: self.inputs.prompts(), encoded: None };
        StepInputs::new(self.base.device, self.models.unet.config(), &micro)
    }

    fn check_against(
        &self,
        report: &mut Report,
        file: &dyn TensorFile,
        names: (&str, &str),
        got: &Tensor,
    ) -> Result<()> {
        let (key, shown) = names;
        if file.shape(key).is_none() {
            return Ok(());
        }
        let values = got.to_vec_f32()?;
        let values = if got.shape().len() == 4 { to_nchw(got.shape(), &values) } else { values };
        report.check(shown, &values, &read(file, key)?.1, FORWARD, 0.);
        Ok(())
    }

    /// The models without LoRA.
    fn check_base(&self, report: &mut Report) -> Result<()> {
        let inputs = self.inputs(&self.objective(None)?, 0)?;
        let file = &*self.reference.base;
        self.check_against(report, file, ("noisy_latents", "base/noisy_latents"), &inputs.latents)?;
        for (clip_skip, suffix) in [(None, "none"), (Some(1), "1"), (Some(2), "2")] {
            let tape = Tape::inference(None);
            let text_encoder = self.models.text_encoder.as_ref();
            let text = encode_text(&tape, text_encoder, clip_skip, &inputs.text)?;
            let key = match self.base.pooled_width() {
                None => format!("te_clip_skip_{suffix}"),
                Some(_) => "encoder_hidden_states".to_owned(),
            };
            let shown = format!("base/{key}");
            self.check_against(report, file, (&key, &shown), text.context.tensor())?;
            if let Some(pooled) = &text.pooled {
                self.check_against(report, file, ("pooled", "base/pooled"), pooled.tensor())?;
            }
            let key = match clip_skip {
                None => "noise_pred".to_owned(),
                Some(n) => format!("noise_pred_clip_skip_{n}"),
            };
            if file.shape(&key).is_some() {
                let prediction = predict(&tape, &self.models.unet, &inputs, &text)?;
                let shown = format!("base/{key}");
                self.check_against(report, file, (&key, &shown), prediction.tensor())?;
            }
        }
        Ok(())
    }

    fn check_vae(&self, vae: &Vae, report: &mut Report) -> Result<()> {
        let file = &*self.reference.base;
        let (shape, image) = read(&*self.reference.inputs, "image")?;
        let [batch, channels, height, width] = shape[..] else {
            anyhow::bail!("`image` should be [B,3,H,W], it is: {shape:?}");
        };
        let image = to_nhwc(&shape, &image);
        let shape = [batch, height, width, channels];
        let image = Tensor::from_f32(self.base.device, &shape, &image, DType::F32)?;
        let moments = vae.encode(&image)?;
        let (noise_shape, noise) = read(&*self.reference.inputs, "vae_noise")?;
        let sample = moments.sample(&to_nhwc(&noise_shape, &noise), self.base.vae.scaling);
        let tensor =
            |data: &[f32]| Tensor::from_f32(self.base.device, &moments.shape, data, DType::F32);
        let mean = tensor(&moments.mean)?;
        self.check_against(report, file, ("vae_mean", "base/vae_mean"), &mean)?;
        let logvar = tensor(&moments.logvar)?;
        self.check_against(report, file, ("vae_logvar", "base/vae_logvar"), &logvar)?;
        let sample = tensor(&sample)?;
        self.check_against(report, file, ("vae_sample_scaled", "base/vae_sample_scaled"), &sample)?;
        let decoded = vae.decode(&mean)?;
        self.check_against(
            report,
            file,
            ("vae_decode_of_mean", "base/vae_decode_of_mean"),
            &decoded,
        )
    }

    /// Builds the network from its settings and takes the values of `init.safetensors`.
    fn install_lora(&mut self, report: &mut Report) -> Result<(LoraNetwork, ParamStore)> {
        let options = options_from_json([&self.reference.cases.network])?;
        let args = options.read_network_args()?;
        let rule = UniformRanks {
            linear: Rank::new(options.network_rank(), options.network_alpha as f32),
            conv: args.conv_dim.map(|dim| Rank::new(dim, args.conv_alpha as f32)),
        };
        let mut targets = self.base.text_targets();
        targets.extend(unet_targets(&*self.base.files.unet));
        let mut network = LoraNetwork::new(targets, &rule, Algorithm::LowRank)?;
        let mut values = network.initial_values(&mut |_, count| vec![0.; count]);
        let loaded = network.load_values(&mut values, &self.reference.init.tensors)?;
        for module in loaded.missing.iter().chain(&loaded.unused) {
            report.fail(module, "only one of network and init.safetensors has this module");
        }
        let params = network.parameters(self.base.device, values)?;
        self.models.install(&network)?;
        Ok((network, params))
    }

    fn setting(&self, clip_skip: Option<usize>) -> Setting {
        Setting { clip_skip, checkpointing: self.checkpointing.into(), draws: None }
    }

    fn check_case(
        &self,
        case: &Case,
        network: &LoraNetwork,
        params: &ParamStore,
        report: &mut Report,
    ) -> Result<()> {
        let name = &case.name;
        let inputs = self.inputs(&self.objective(Some(case))?, case.step)?;
        let setting = self.setting(case.clip_skip);
        let mut gradients = Gradients::new(params);
        let mut found: Vec<Option<Vec<f32>>> = vec![None; params.count()];
        let forward = forward_backward((&self.models, params), setting, &inputs, &mut |id, g| {
            found[id.0] = Some(network.file_order(id, &g.to_vec_f32()?));
            gradients.add(id, &g)
        })?;
        let loss: f32 = forward.losses.to_vec_f32()?.iter().sum();
        report.check(&format!("{name}/loss"), &[loss], &[case.loss], FORWARD, 0.);
        let norm = gradients.norm() as f32;
        report.check(&format!("{name}/grad_norm"), &[norm], &[case.grad_norm], GRADIENT_NORM, 0.);

        let variant = name.rsplit_once("_step").map_or(name.as_str(), |(variant, _)| variant);
        let prefix = match (name.as_str(), name == variant) {
            ("clip_skip_none", _) => String::new(),
            (_, true) => format!("{name}/"),
            (_, false) => format!("variant/{variant}/"),
        };
        let file = &*self.reference.results;
        if let Some(pooled) = &forward.pooled {
            let key = format!("{prefix}pooled");
            self.check_against(report, file, (&key, &format!("{name}/pooled")), pooled)?;
        }
        for (key, tensor) in [
            ("te_out", &forward.context),
            ("noise_pred", &forward.prediction),
            ("target", &inputs.target),
        ] {
            let shown = format!("{name}/{key}");
            self.check_against(report, file, (&format!("{prefix}{key}"), &shown), tensor)?;
        }
        let noise = self.reference.noise(&format!("lora/{name}/grad"));
        let gradients = (format!("{prefix}grad/"), &found[..]);
        check_gradients(report, file, &gradients, network, noise)?;
        if file.names().iter().any(|key| key.starts_with(&gradients.0)) {
            check_absent(report, file, &gradients, network);
        }
        if let Some(file) = &self.reference.variant_gradients {
            let noise = self.reference.noise(&format!("vgrad/{variant}"));
            let gradients = (format!("{variant}/grad/"), &found[..]);
            check_gradients(report, &**file, &gradients, network, noise)?;
        }
        Ok(())
    }

    /// Five steps of AdamW on five steps' inputs.
    fn check_optimizer(
        &self,
        network: &LoraNetwork,
        mut params: ParamStore,
        report: &mut Report,
    ) -> Result<()> {
        let adamw = &self.reference.cases.adamw;
        let settings = AdamWSettings {
            betas: adamw.betas,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
            ..AdamWSettings::default()
        };
        let forms = TensorForm::of(network);
        let build = Build { params: &params, forms: &forms, learning_rate: 0. };
        let mut optimizer = settings.build(&build)?;
        let objective = self.objective(None)?;
        let mut tensors: Vec<TensorStep> = Vec::new();
        for group in network.groups() {
            let lr = adamw.lr[usize::from(group.part == Part::Unet)] as f32;
            let ids = group.params.iter().copied();
            tensors.extend(ids.map(|id| TensorStep { id, range: params.range(id), lr }));
        }
        let figures = adamw.losses.iter().zip(&adamw.grad_norm_before_clip).enumerate();
        for (step, (loss, grad_norm)) in figures {
            let inputs = self.inputs(&objective, step)?;
            let mut gradients = Gradients::new(&params);
            let models = (&self.models, &params);
            let setting = self.setting(None);
            let forward =
                forward_backward(models, setting, &inputs, &mut |id, g| gradients.add(id, &g))?;
            let got: f32 = forward.losses.to_vec_f32()?.iter().sum();
            report.check(&format!("adamw/{step}/loss"), &[got], &[*loss], FORWARD, 0.);
            let norm = gradients.clip(adamw.max_grad_norm) as f32;
            let name = format!("adamw/{step}/grad_norm");
            report.check(&name, &[norm], &[*grad_norm], GRADIENT_NORM, 0.);
            let gradient = gradients.flat();
            let input = StepInput { gradient, tensors: &tensors, schedule_factor: 1. };
            optimizer.step(&mut params, &input)?;
        }
        for id in (0..params.count()).map(ParamId) {
            let key = network.key(id);
            let name = format!("after5/{key}");
            if self.reference.cases.gradient_is_rounding_only.contains(&key) {
                crate::console::data(&format!("skip {name}: its gradient is rounding only"));
                continue;
            }
            let Some(want) = self.reference.after.tensors.get(&key) else {
                report.fail(&name, "missing in the reference");
                continue;
            };
            let got = network.file_order(id, &params.tensor(id)?.to_vec_f32()?);
            report.check(&name, &got, &want.to_f32(), WEIGHTS, 0.);
        }
        Ok(())
    }
}

/// Where a file keeps gradients, and ours, one per parameter.
type Found<'a> = (String, &'a [Option<Vec<f32>>]);

/// Compares all gradients that the file has.
fn check_gradients(
    report: &mut Report,
    file: &dyn TensorFile,
    (prefix, found): &Found,
    network: &LoraNetwork,
    noise: f64,
) -> Result<()> {
    for (index, gradient) in found.iter().enumerate() {
        let key = format!("{prefix}{}", network.key(ParamId(index)));
        if file.shape(&key).is_none() {
            continue;
        }
        match gradient {
            Some(gradient) => report.check(&key, gradient, &read(file, &key)?.1, GRADIENT, noise),
            None => report.fail(&key, "no gradient reached this parameter"),
        }
    }
    Ok(())
}

/// Parameters without a gradient in a complete reference have none here.
fn check_absent(
    report: &mut Report,
    file: &dyn TensorFile,
    (prefix, found): &Found,
    network: &LoraNetwork,
) {
    for (index, _) in found.iter().enumerate().filter(|(_, gradient)| gradient.is_some()) {
        let key = format!("{prefix}{}", network.key(ParamId(index)));
        if file.shape(&key).is_none() {
            report.fail(&key, "the reference has no gradient here");
        }
    }
}
