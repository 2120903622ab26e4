//! What a run takes of a card, to the byte: its models and steps on a card that only records.
//!
//! Nothing of the base model's files is read but shapes, and nothing is computed: the host code of a
//! step runs as it would, asks for memory as it would, and a second suffices for a full-size model.

use anyhow::{Context, Result};
use engine::cuda::driver::CardFacts;
use engine::cuda::flat::clip_factor;
use engine::cuda::{Card, Trace, recorder};
use engine::{Checkpointing, DType, Device, ElementLoss, ParamId, ParamStore, Tensor};
use formats::Weights;
use models::lora::LoraNetwork;
use models::{ClipConfig, ClipTextModel, SizeIds, TextEncoders, Unet, UnetConfig, Vae, VaeConfig};

use crate::inputs::{CHUNK, EncodedPrompts, MicroBatch, Prompts, SecondPrompts, StepInputs};
use crate::objective::Noised;
use crate::optimizer::{Build, Choice, Optimize, TensorForm, TensorStep};
use crate::step::{Models, Setting, forward_backward};

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
    models: Models,
    params: ParamStore,
    gradient: Tensor,
    touched: Tensor,
    inverse_scale: Tensor,
    optimizer: Box<dyn Optimize>,
    /// What stays on the card.
    pub resident: Resident,
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
        let device = recorder::open(facts.clone(), usize::MAX)?;
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
        let (config, weights) = subject.parts.unet;
        let unet = Unet::load_stored(weights, config, device, (dtype, stored))?;
        resident.unet = meter.lap();
        let mut params = subject.network.parameters(device, subject.values.to_vec())?;
        resident.trained = meter.lap();
        let mut models = Models { text_encoder: Some(text_encoder), unet };
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
        if subject.encoded {
            models.text_encoder = None;
            resident.text_encoder = 0;
        }
        let mut recording = Self {
            subject,
            device,
            card,
            models,
            params,
            gradient,
            touched,
            inverse_scale,
            optimizer,
            resident,
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

    /// Most bytes that the VAE takes, weights included, to encode images `[batch,height,width]`; and
    /// its weights alone.
    pub fn encode_images(&self, [batch, height, width]: [usize; 3]) -> Result<(usize, usize)> {
        let mut meter = Meter(self.card, self.card.memory_stats().live);
        let (config, weights) = self.subject.parts.vae;
        let vae = Vae::load(weights, config, self.device, self.subject.vae_dtype)?;
        let resident = meter.lap();
        let (device, shape) = (self.device, [batch, height, width, 3]);
        let (trace, _) = self.card.trace(|| {
            let images = Tensor::zeros(device, &shape, DType::F32)?;
            vae.encode(&images)
        })?;
        Ok((resident + trace.peak(), resident))
    }
}

/// The engine's own error where it was one.
fn into_engine_error(error: anyhow::Error) -> engine::EngineError {
    match error.downcast::<engine::EngineError>() {
        Ok(error) => error,
        Err(error) => engine::EngineError::Unsupported(format!("{error:#}")),
    }
}
