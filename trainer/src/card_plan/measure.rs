//! What a run takes of a card, to the byte: its models and steps on a card that only records.
//!
//! Nothing of the base model's files is read but shapes, and nothing is computed: the host code of a
//! step runs as it would, asks for memory as it would, and a second suffices for a full-size model.

use anyhow::{Context, Result};
use engine::cuda::driver::CardFacts;
use engine::cuda::flat::clip_factor;
use engine::cuda::recorder::{self, Counter};
use engine::cuda::{Arena, Card, Trace};
use engine::{Checkpointing, DType, Device, ElementLoss, Ids, ParamId, ParamStore, Tape, Tensor};
use formats::Weights;
use models::lora::LoraNetwork;
use models::{
    ClipConfig, ClipTextModel, SizeIds, TextEncoders, Tiling, Unet, UnetConfig, Vae, VaeConfig,
};

use crate::inputs::{CHUNK, EncodedPrompts, MicroBatch, Prompts, SecondPrompts, StepInputs, Text};
use crate::objective::Noised;
use crate::optimizer::{Build, Choice, Optimize, TensorForm, TensorStep};
use crate::step::{Models, Setting, encode_text, forward_backward};

/// The parts of a base model: sizes, and weights of which only shapes are asked for.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The U-Net.
    pub unet: (&'a UnetConfig, &'a dyn Weights),
    /// The text encoder.
    pub text_encoder: (&'a ClipConfig, &'a dyn Weights),
    /// SDXL's second.
    pub text_encoder_2: Option<(&'a ClipConfig, &'a dyn Weights)>,
    /// The autoencoder.
    pub vae: (&'a VaeConfig, &'a dyn Weights),
}

/// What a run does, as far as memory depends on it.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The base model.
    pub parts: Parts<'a>,
    /// What is trained.
    pub network: &'a LoraNetwork,
    /// Its values.
    pub values: &'a [Vec<f32>],
    /// Type of the arithmetic.
    pub dtype: DType,
    /// Type of the VAE's arithmetic.
    pub vae_dtype: DType,
    /// Layers of the text encoder to leave out.
    pub clip_skip: Option<usize>,
    /// Captions are encoded before the training, and the text encoder leaves the card.
    pub encoded: bool,
    /// Captions that are encoded together then, and chunks of each.
    pub captions: [usize; 2],
    /// Words have weights.
    pub weighted: bool,
    /// Pixels have weights.
    pub masked: bool,
}

/// A batch of one shape on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StepShape {
    /// Samples.
    pub batch: usize,
    /// Latent pixels from top to bottom.
    pub height: usize,
    /// Latent pixels from left to right.
    pub width: usize,
    /// Chunks of a prompt.
    pub chunks: usize,
}

impl StepShape {
    /// Latent pixels of the batch.
    pub fn pixels(&self) -> usize {
        self.batch * self.height * self.width
    }
}

/// Bytes of what stays on the card for the whole training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// The text encoder's weights.
    pub text_encoder: usize,
    /// The U-Net's weights.
    pub unet: usize,
    /// Trained weights, f32.
    pub trained: usize,
    /// Their copy in the type of the arithmetic.
    pub working: usize,
    /// Their gradient.
    pub gradient: usize,
    /// The optimizer's state.
    pub optimizer: usize,
}

impl Resident {
    /// All of it.
    pub fn total(&self) -> usize {
        let Self { text_encoder, unet, trained, working, gradient, optimizer } = *self;
        text_encoder + unet + trained + working + gradient + optimizer
    }
}

/// A run on a recording card.
pub struct Recording<'a> {
    subject: Subject<'a>,
    device: Device,
    card: &'static Card,
    counter: Counter,
    models: Models,
    params: ParamStore,
    gradient: Tensor,
    touched: Tensor,
    inverse_scale: Tensor,
    optimizer: Box<dyn Optimize>,
    /// What stays on the card.
    pub resident: Resident,
    /// Most bytes while captions are encoded before the U-Net is there, where they are.
    pub captions: Option<usize>,
}

/// Bytes on the card before and after.
struct Meter(&'static Card, usize);

impl Meter {
    /// Bytes taken since the last call.
    fn lap(&mut self) -> usize {
        let live = self.0.memory_stats().live;
        let taken = live.saturating_sub(self.1);
        self.1 = live;
        taken
    }
}

impl<'a> Recording<'a> {
    /// Builds what the run keeps on a card like `facts`, the U-Net's weights kept as `stored`.
    pub fn new(
        subject: Subject<'a>,
        facts: &CardFacts,
        stored: DType,
        optimizer: &Choice,
    ) -> Result<Self> {
        // What does not fit shall be known, too.
        Self::on(recorder::open_counted(facts.clone(), usize::MAX)?, subject, stored, optimizer)
    }

    /// The same on a card that is open.
    pub fn on(
        (device, counter): (Device, Counter),
        subject: Subject<'a>,
        stored: DType,
        optimizer: &Choice,
    ) -> Result<Self> {
        let card = device.card().context("a recording card is a card")?;
        let mut meter = Meter(card, card.memory_stats().live);
        let mut resident = Resident::default();
        let dtype = subject.dtype;
        let load = |(config, weights)| ClipTextModel::load(weights, config, device, dtype);
        let text_encoder = TextEncoders {
            first: load(subject.parts.text_encoder)?,
            second: subject.parts.text_encoder_2.map(load).transpose()?,
        };
        resident.text_encoder = meter.lap();
        let mut text_encoder = Some(text_encoder);
        let mut captions = None;
        if subject.encoded {
            // What reads the captions is gone before the U-Net comes.
            let reading = read_captions(&subject, card, text_encoder.as_ref())?;
            captions = Some(std::mem::take(&mut resident.text_encoder) + reading);
            text_encoder = None;
            card.release_idle();
            meter = Meter(card, card.memory_stats().live);
        }
        let (config, weights) = subject.parts.unet;
        let unet = Unet::load_stored(weights, config, device, (dtype, stored))?;
        resident.unet = meter.lap();
        let mut params = subject.network.parameters(device, subject.values.to_vec())?;
        resident.trained = meter.lap();
        let mut models = Models { text_encoder, unet };
        models.install(subject.network)?;
        params.keep_working(dtype, &subject.network.factors(1.))?;
        resident.working = meter.lap();
        let gradient = Tensor::zeros(device, &[params.len()], DType::F32)?;
        let touched = Tensor::zeros(device, &[params.count().max(1)], DType::F32)?;
        let inverse_scale = Tensor::zeros(device, &[1], DType::F32)?;
        resident.gradient = meter.lap();
        let forms = TensorForm::of(subject.network);
        let build = Build { params: &params, forms: &forms, learning_rate: 1e-4 };
        let optimizer = optimizer.recipe.build(&build)?;
        resident.optimizer = meter.lap();
        let mut recording = Self {
            subject,
            device,
            card,
            counter,
            models,
            params,
            gradient,
            touched,
            inverse_scale,
            optimizer,
            resident,
            captions,
        };
        recording.prepare_optimizer()?;
        Ok(recording)
    }

    fn prepare_optimizer(&mut self) -> Result<()> {
        let step =
            |id| TensorStep { id: ParamId(id), range: self.params.range(ParamId(id)), lr: 0. };
        let every: Vec<TensorStep> = (0..self.params.count()).map(step).collect();
        match self.optimizer.on_card() {
            Some(optimizer) => optimizer.prepare(&every),
            None => Ok(()),
        }
    }

    fn inputs(&self, shape: StepShape) -> Result<StepInputs> {
        let StepShape { batch, height, width, chunks } = shape;
        let numbers = batch * height * width * 4;
        let noised = Noised {
            shape: [batch, height, width, 4],
            noisy: vec![0.; numbers],
            target: vec![0.; numbers],
            timesteps: vec![1.; batch],
            element: ElementLoss::L2,
            delta: vec![1.; batch],
            weight: vec![1.; batch],
            mask: self.subject.masked.then(|| vec![1.; numbers]),
        };
        let tokens = batch * chunks * CHUNK;
        let weights = self.subject.weighted.then(|| vec![1.; tokens]);
        let Parts { text_encoder, text_encoder_2, .. } = self.subject.parts;
        let pooled = text_encoder_2.and_then(|(config, _)| config.pooled);
        let size = SizeIds { original: [0.; 2], crop: [0.; 2], target: [0.; 2] };
        let second = pooled.map(|pooled| SecondPrompts {
            ids: vec![0; tokens],
            pooled,
            sizes: vec![size; batch],
        });
        let prompts = Prompts { ids: vec![0; tokens], weights, chunks, second };
        let width = text_encoder.0.width + text_encoder_2.map_or(0, |(config, _)| config.width);
        let zeros = |shape: Vec<usize>| {
            let count = shape.iter().product();
            (shape, vec![0.; count])
        };
        let encoded = self.subject.encoded.then(|| EncodedPrompts {
            context: zeros(vec![batch, chunks * (CHUNK - 2) + 2, width]),
            pooled: pooled.map(|width| zeros(vec![batch, width])),
        });
        let micro = MicroBatch { noised, prompts, encoded };
        StepInputs::new(self.device, self.models.unet.config(), &micro)
    }

    /// A whole step of this shape, and the bytes of its inputs.
    pub fn step(&mut self, shape: StepShape, how: &Checkpointing) -> Result<(Trace, usize)> {
        let mut meter = Meter(self.card, self.card.memory_stats().live);
        let inputs = self.inputs(shape)?;
        let bytes = meter.lap();
        let card = self.card;
        let (trace, ()) = card.trace(|| self.give(&inputs, how).map_err(into_engine_error))?;
        Ok((trace, bytes))
    }

    /// Floating-point operations of the products and convolutions of a step.
    pub fn flops(&mut self, shape: StepShape, how: &Checkpointing) -> Result<f64> {
        let before = self.counter.read().flops;
        let inputs = self.inputs(shape)?;
        self.give(&inputs, how)?;
        Ok(self.counter.read().flops - before)
    }

    /// Two steps as a run takes them on its card: the inputs of two batches are there, the first takes
    /// its memory as it comes, the second in one arena.
    pub fn rehearse(&mut self, shape: StepShape, how: &Checkpointing) -> Result<()> {
        let inputs = [self.inputs(shape)?, self.inputs(shape)?];
        let card = self.card;
        let (trace, ()) = card.trace(|| self.give(&inputs[0], how).map_err(into_engine_error))?;
        card.release_idle();
        let layout = trace.layout();
        let arena = Arena::new(card, layout.total())?;
        let second = || self.give(&inputs[1], how).map_err(into_engine_error);
        Ok(card.within(&arena, &layout, second)?)
    }

    /// The work of a step, in the order in which a card gets it.
    fn give(&mut self, inputs: &StepInputs, checkpointing: &Checkpointing) -> Result<()> {
        let (clip_skip, checkpointing) = (self.subject.clip_skip, checkpointing.clone());
        let setting = Setting { clip_skip, checkpointing, draws: None };
        let (flat, params) = (&mut self.gradient, &self.params);
        let forward = forward_backward((&self.models, params), setting, inputs, &mut |id, g| {
            g.device().backend().add_at(flat, params.range(id).start, &g)
        })?;
        drop(forward);
        let clip = clip_factor(&self.gradient, &self.inverse_scale, 1.)?;
        if let Some(optimizer) = self.optimizer.on_card() {
            optimizer.give(&mut self.params, &self.gradient, &self.touched, &clip)?;
        }
        Ok(())
    }
}

/// What the text encoders take for the captions that they read together, before the training.
fn read_captions(
    subject: &Subject<'_>,
    card: &'static Card,
    encoders: Option<&TextEncoders>,
) -> Result<usize> {
    let [together, chunks] = subject.captions;
    let tokens = vec![0; together * chunks * CHUNK];
    let pooled = subject.parts.text_encoder_2.and_then(|(config, _)| config.pooled);
    let second =
        pooled.map(|pooled| SecondPrompts { ids: tokens.clone(), pooled, sizes: Vec::new() });
    let prompts = Prompts { ids: tokens, weights: None, chunks, second };
    let (trace, _) = card.trace(|| {
        let list = prompts.id_list().map_err(into_engine_error)?;
        let ids = prompts.text_ids(&Ids::new(card.device(), &list)?);
        let text = Text::Tokens { ids: ids.map_err(into_engine_error)?, factors: None };
        encode_text(&Tape::inference(None), encoders, subject.clip_skip, &text)
    })?;
    Ok(trace.peak())
}

/// The VAE alone on a recording card.
pub struct VaeRecording {
    card: &'static Card,
    vae: Vae,
    /// Bytes of its weights.
    pub weights: usize,
}

impl VaeRecording {
    /// Loads it on a card like `facts`.
    pub fn new(part: (&VaeConfig, &dyn Weights), facts: &CardFacts, dtype: DType) -> Result<Self> {
        Self::on(recorder::open(facts.clone(), usize::MAX)?, part, dtype)
    }

    /// Loads it on a card that is open.
    pub fn on(
        device: Device,
        (config, weights): (&VaeConfig, &dyn Weights),
        dtype: DType,
    ) -> Result<Self> {
        let card = device.card().context("a recording card is a card")?;
        let mut meter = Meter(card, card.memory_stats().live);
        let vae = Vae::load(weights, config, device, dtype)?;
        Ok(Self { card, vae, weights: meter.lap() })
    }

    /// Most bytes, weights included, while images `[batch,height,width]` are encoded.
    pub fn encode(&self, [batch, height, width]: [usize; 3]) -> Result<usize> {
        let shape = [batch, height, width, self.vae.config().image_channels];
        self.peak(&shape, |images| self.vae.encode(images).map(drop))
    }

    /// Most bytes, weights included, while latents `[height,width]` of one picture are decoded.
    pub fn decode(&self, [height, width]: [usize; 2], tiling: Tiling) -> Result<usize> {
        let shape = [1, height, width, self.vae.config().latent_channels];
        self.peak(&shape, |latents| self.vae.decode_by(latents, tiling).map(drop))
    }

    fn peak(
        &self,
        shape: &[usize],
        run: impl FnOnce(&Tensor) -> engine::Result<()>,
    ) -> Result<usize> {
        let (trace, ()) =
            self.card.trace(|| run(&Tensor::zeros(self.card.device(), shape, DType::F32)?))?;
        Ok(self.weights + trace.peak())
    }
}

/// The engine's own error where it was one.
fn into_engine_error(error: anyhow::Error) -> engine::EngineError {
    match error.downcast::<engine::EngineError>() {
        Ok(error) => error,
        Err(error) => engine::EngineError::Unsupported(format!("{error:#}")),
    }
}
