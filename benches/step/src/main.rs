//! One training step of the full-size Stable Diffusion 1.5 or SDXL U-Net on random weights, timed.
//!
//! The step is the product's own (`trainer::step`, gradients, clipping, AdamW). Options and the
//! printed JSON are those of `pytorch_step.py` beside it, so that `run.sh` can put both side by side.
#![expect(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use engine::{DType, Device, ParamId};
use formats::{Dtype, FormatError, TensorView, Weights};
use models::lora::{
    Algorithm, Composition, Form, LoraNetwork, Part, Rank, Split, UniformRanks,
    text_encoder_targets, unet_targets,
};
use models::{ClipConfig, ClipTextModel, SizeIds, TextEncoders, Unet, UnetConfig};
use trainer::gradients::Gradients;
use trainer::inputs::{EncodedPrompts, MicroBatch, Prompts, SecondPrompts, StepInputs};
use trainer::memory::peak_resident;
use trainer::objective::Objective;
use trainer::optimizer::{AdamWSettings, Build, Recipe, StepInput, TensorForm, TensorStep};
use trainer::options::Options;
use trainer::step::{Models, Setting, forward_backward};

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    Fp32,
    Bf16,
}

/// Model that is trained.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    Sd1,
    /// The U-Net alone, beside cached outputs of the text encoders.
    Sdxl,
}

/// Network of the trained layers.
#[derive(Clone, Copy, ValueEnum)]
enum Network {
    Lora,
    Loha,
    Lokr,
    Dora,
}

impl Network {
    fn algorithm(self) -> Algorithm {
        let composed =
            |form, magnitude| Algorithm::Composed(Composition { form, tucker: false, magnitude });
        match self {
            Network::Lora => Algorithm::LowRank,
            Network::Loha => composed(Form::Hadamard, false),
            Network::Lokr => composed(Form::Kronecker(Split::default()), false),
            Network::Dora => composed(Form::LowRank, true),
        }
    }
}

/// Times a training step; prints one JSON object.
#[derive(Parser)]
#[command(rename_all = "snake_case")]
struct Args {
    /// Model
    #[arg(long, value_enum, default_value = "sd1")]
    family: Family,
    /// Type of the arithmetic.
    #[arg(long, value_enum, default_value = "fp32")]
    precision: Precision,
    /// Recompute blocks in the backward pass.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Train the text encoder too.
    #[arg(long)]
    text_encoder: bool,
    /// Pixels, a multiple of 64.
    #[arg(long, default_value_t = 512)]
    resolution: usize,
    /// Samples.
    #[arg(long, default_value_t = 1)]
    batch_size: usize,
    /// LoRA rank.
    #[arg(long, default_value_t = 4)]
    rank: usize,
    /// Kind of network.
    #[arg(long, value_enum, default_value = "lora")]
    network: Network,
    /// CPU threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Steps that are not counted.
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// Steps that are.
    #[arg(long, default_value_t = 5)]
    steps: usize,
}

/// Weights made up on demand, in half precision: as large a file as the real one, without the file.
struct RandomWeights {
    shapes: BTreeMap<String, Vec<usize>>,
}

impl RandomWeights {
    fn new(shapes: Vec<models::TensorShape>) -> Self {
        Self { shapes: shapes.into_iter().collect() }
    }
}

impl Weights for RandomWeights {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let shape = self.shapes.get(name).cloned().unwrap_or_default();
        let len: usize = shape.iter().product();
        let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
        let is_norm = shape.len() == 1 && name.ends_with(".weight");
        let scale = if shape.len() == 1 { 0. } else { (3. / fan_in).sqrt() };
        let mut state = name.bytes().fold(1_u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
        let mut data = Vec::with_capacity(len * 2);
        for _ in 0..len {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let unit = (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.;
            let value = if is_norm { 1. } else { unit * scale };
            data.extend(half::f16::from_f32(value).to_le_bytes());
        }
        Ok(TensorView { dtype: Dtype::F16, shape, data: Cow::Owned(data) })
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }
}

/// Width of what SDXL's second text encoder says of a whole prompt.
const POOLED: usize = 1280;

fn prompts(args: &Args) -> Prompts {
    let ids: Vec<u32> =
        (0..77).map(|i| if i == 0 { 49406 } else { 49407 - (i % 5) * 900 }).collect();
    let ids = ids.repeat(args.batch_size);
    let side = args.resolution as f32;
    let size = SizeIds { original: [side; 2], crop: [0.; 2], target: [side; 2] };
    let second = (args.family == Family::Sdxl).then(|| SecondPrompts {
        ids: ids.clone(),
        pooled: POOLED,
        sizes: vec![size; args.batch_size],
    });
    Prompts { ids, weights: None, chunks: 1, second }
}

/// Made-up outputs of text encoders.
fn encoded(args: &Args, unet: &UnetConfig) -> EncodedPrompts {
    let waves = |shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        (shape, (0..count).map(|i| (i as f32).sin()).collect())
    };
    EncodedPrompts {
        context: waves(vec![args.batch_size, 77, unet.context_width]),
        pooled: Some(waves(vec![args.batch_size, POOLED])),
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let dtype = match args.precision {
        Precision::Fp32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let is_sdxl = args.family == Family::Sdxl;
    anyhow::ensure!(!(is_sdxl && args.text_encoder), "`--text_encoder` is for SD1");
    let unet_config = if is_sdxl { UnetConfig::sdxl() } else { UnetConfig::sd1() };
    let text_config = ClipConfig::sd1();
    let unet_weights = RandomWeights::new(Unet::tensor_shapes(&unet_config)?);
    let text_weights = RandomWeights::new(ClipTextModel::tensor_shapes(&text_config)?);
    let loading = Instant::now();
    let mut models = Models {
        text_encoder: match args.family {
            Family::Sdxl => None,
            Family::Sd1 => Some(TextEncoders {
                first: ClipTextModel::load(&text_weights, &text_config, Device::Cpu, dtype)?,
                second: None,
            }),
        },
        unet: Unet::load(&unet_weights, &unet_config, Device::Cpu, dtype)?,
    };
    eprintln!("weights made in {:.1} s", loading.elapsed().as_secs_f64());

    let mut targets = Vec::new();
    if args.text_encoder {
        targets.extend(text_encoder_targets(&text_weights));
    }
    targets.extend(unet_targets(&unet_weights));
    let rule = UniformRanks { linear: Rank::new(args.rank, 1.), conv: None };
    let network = LoraNetwork::new(targets, &rule, args.network.algorithm())?;
    let mut state = 1_u64;
    let mut values = network.initial_values(&mut |_, count| {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1_u64 << 24) as f32
        };
        (0..count).map(|_| next()).collect()
    });
    let frozen = BTreeMap::from([
        (Part::TextEncoder, &text_weights as &dyn Weights),
        (Part::Unet, &unet_weights),
    ]);
    network.set_magnitudes(&mut values, &frozen)?;
    let mut params = network.parameters(Device::Cpu, values)?;
    match args.family {
        Family::Sd1 => models.install(&network)?,
        Family::Sdxl => network.install_unet(&mut models.unet, 1.)?,
    }
    let forms = TensorForm::of(&network);
    let build = Build { params: &params, forms: &forms, learning_rate: 1e-4 };
    let mut optimizer = AdamWSettings::default().build(&build)?;
    let tensors: Vec<TensorStep> = (0..params.count())
        .map(|id| TensorStep { id: ParamId(id), range: params.range(ParamId(id)), lr: 1e-4 })
        .collect();

    let objective = Objective::from_options(&Options::default())?;
    let side = args.resolution / 8;
    let shape = [args.batch_size, side, side, 4];
    let prompts = prompts(&args);
    let setting =
        Setting { clip_skip: None, checkpointing: args.gradient_checkpointing.into(), draws: None };
    let weights = vec![1. / args.batch_size as f32; args.batch_size];

    let mut seconds = Vec::new();
    let mut last_loss = 0.;
    for step in 0..args.warmup + args.steps {
        let started = Instant::now();
        let draws: Vec<_> = (0..args.batch_size)
            .map(|b| objective.draw(1, (step * 64 + b) as u64, [side, side, 4]))
            .collect();
        let latents: Vec<f32> =
            objective.draw(2, step as u64, [args.batch_size * side, side, 4]).noise;
        let noised = objective.prepare(&latents, shape, &draws, &weights)?;
        let encoded = is_sdxl.then(|| encoded(&args, &unet_config));
        let micro = MicroBatch { noised, prompts: prompts.clone(), encoded };
        let inputs = StepInputs::new(Device::Cpu, models.unet.config(), &micro)?;
        let mut gradients = Gradients::new(&params);
        let mut ready = |id: ParamId, g: engine::Tensor| gradients.add(id, &g);
        let forward = forward_backward((&models, &params), setting.clone(), &inputs, &mut ready)?;
        last_loss = forward.losses.to_vec_f32()?.iter().sum();
        drop(forward);
        gradients.clip(1.);
        let input =
            StepInput { gradient: gradients.flat(), tensors: &tensors, schedule_factor: 1. };
        optimizer.step(&mut params, &input)?;
        let took = started.elapsed().as_secs_f64();
        eprintln!("step {step}: {took:.2} s, loss {last_loss:.4}");
        if step >= args.warmup {
            seconds.push(took);
        }
    }
    report(&seconds, last_loss)
}

fn report(seconds: &[f64], last_loss: f32) -> Result<()> {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).context("no steps were timed")?;
    let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
    let pool = engine::pool_stats();
    println!(
        "{}",
        serde_json::json!({
            "engine": "lorarun",
            "median_step_s": median,
            "step_s": seconds,
            "peak_rss_gib": peak_resident().map(gib),
            "peak_tensor_gib": gib(pool.peak),
            "last_loss": last_loss,
        })
    );
    Ok(())
}
