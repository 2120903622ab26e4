//! From noise to latents: the sampler's loop around the U-Net, with classifier-free guidance.

use std::ops::ControlFlow;

use engine::{DType, ParamStore, Tape, Tensor, Value};

use super::{Embedding, PipelineError, TorchNoise};
use crate::pixel_order::nhwc_from_nchw;
use crate::sampler::{Sampler, SamplerKind, SamplerOptions};
use crate::{SizeIds, Unet, UnetInput};

/// Who predicts noise.
#[derive(Clone, Copy)]
pub struct Predictor<'m> {
    /// The U-Net.
    pub unet: &'m Unet,
    /// Values of the adapters in it, if it has any.
    pub params: Option<&'m ParamStore>,
}

/// How pictures that are made together are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Denoising {
    /// Columns and rows of the latents: an eighth of the picture's.
    pub size: [usize; 2],
    /// Which sampler.
    pub sampler: SamplerKind,
    /// Its options.
    pub options: SamplerOptions,
    /// Weight of the prompt over the negative prompt (`--scale`); at 1 the latter is not looked at.
    pub guidance_scale: f32,
    /// What SDXL is told of the sizes, for prompt and negative prompt; `None`: an uncropped picture of
    /// this size.
    pub sizes: Option<[SizeIds; 2]>,
}

impl Denoising {
    fn sizes(&self) -> [SizeIds; 2] {
        let [width, height] = self.size.map(|side| (side * 8) as f32);
        let whole = SizeIds { original: [height, width], crop: [0.; 2], target: [height, width] };
        self.sizes.unwrap_or([whole; 2])
    }
}

/// One of the pictures that are made together.
#[derive(Clone)]
pub struct Subject<'a> {
    /// Hidden states of the prompt.
    pub prompt: &'a Embedding,
    /// Hidden states of the negative prompt, of as many tokens.
    pub negative: &'a Embedding,
    /// Where its noise comes from.
    pub noise: TorchNoise,
    /// Latents to start from, `[h,w,4]` as the U-Net sees them, with `options.strength`.
    pub start: Option<&'a [f32]>,
    /// What is made anew, one number per latent pixel in 0..1; the rest stays as `start` is.
    pub mask: Option<&'a [f32]>,
}

/// One evaluation of the U-Net is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Evaluations done.
    pub done: usize,
    /// Of all.
    pub of: usize,
}

/// Called after each evaluation; to break stops the work.
pub type Watch<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// What the U-Net is told at every evaluation.
struct Conditions {
    /// `[B,T,C]`.
    context: Value,
    /// SDXL's pooled text `[B,P]` and embedded sizes.
    pooled: Option<(Value, Tensor)>,
}

impl Predictor<'_> {
    /// Latents of the pictures, `[B,h,w,4]` row-major, as the U-Net knows them.
    ///
    /// # Errors
    /// Options that the sampler does not offer, subjects that do not fit each other, a stop by
    /// `watch` ([`PipelineError::Stopped`]).
    pub fn denoise(
        &self,
        subjects: &mut [Subject<'_>],
        how: &Denoising,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f32>, PipelineError> {
        let channels = self.unet.config().in_channels;
        let pixels = how.size[0] * how.size[1];
        let each = pixels * channels;
        if let Some(params) = self.params {
            params.refresh()?;
        }
        let mut sampler = Sampler::new(how.sampler, &how.options)?;
        let draw = |subjects: &mut [Subject<'_>], out: &mut [f32]| {
            for (subject, part) in subjects.iter_mut().zip(out.chunks_mut(each)) {
                let mut noise = vec![0.; each];
                subject.noise.fill(&mut noise);
                part.copy_from_slice(&nhwc_from_nchw(&noise, channels, pixels));
            }
        };
        let mut noise = vec![0.; each * subjects.len()];
        draw(subjects, &mut noise);
        let start: Option<Vec<f32>> = subjects
            .iter()
            .map(|s| s.start)
            .collect::<Option<Vec<_>>>()
            .map(|parts| parts.concat());
        let mut latents = match &start {
            Some(start) => sampler.add_noise(start, &noise)?,
            None => {
                let mut latents = noise.clone();
                sampler.scale_initial_noise(&mut latents);
                latents
            }
        };
        let conditions = self.conditions(subjects, how)?;
        while let Some(timestep) = sampler.timestep() {
            let prediction =
                self.predict(&sampler.scale_input(&latents), timestep, &conditions, how)?;
            sampler.step(&prediction, &mut latents, &mut |out| draw(subjects, out))?;
            if let Some(start) = &start {
                keep(&sampler, subjects, (start, &noise), &mut latents)?;
            }
            let progress = Progress { done: sampler.done(), of: sampler.evaluations() };
            if watch(progress).is_break() {
                return Err(PipelineError::Stopped);
            }
        }
        Ok(latents)
    }

    /// What holds for all evaluations: of the negative prompts, then of the prompts; without guidance
    /// only of the prompts.
    fn conditions(
        &self,
        subjects: &[Subject<'_>],
        how: &Denoising,
    ) -> Result<Conditions, PipelineError> {
        let device = self.unet.device();
        let negatives = subjects.iter().filter(|_| how.guidance_scale != 1.).map(|s| s.negative);
        let all: Vec<&Embedding> = negatives.chain(subjects.iter().map(|s| s.prompt)).collect();
        let (tokens, width) = all.first().map_or((0, 0), |first| (first.tokens(), first.width));
        if all.iter().any(|one| (one.tokens(), one.width) != (tokens, width)) {
            return Err(PipelineError::UnequalPrompts);
        }
        let rows: Vec<f32> = all.iter().flat_map(|one| &one.rows).copied().collect();
        let context = Tensor::from_f32(device, &[all.len(), tokens, width], &rows, DType::F32)?;
        let pooled: Option<Vec<&[f32]>> = all.iter().map(|one| one.pooled.as_deref()).collect();
        let pooled = match pooled {
            Some(pooled) if self.unet.config().added.is_some() => {
                let [prompt, negative] = how.sizes();
                let mut sizes = vec![negative; all.len() - subjects.len()];
                sizes.resize(all.len(), prompt);
                let width = pooled.first().map_or(0, |one| one.len());
                let waves = self.unet.config().size_waves(width, &sizes)?;
                let shape = [all.len(), waves.len() / all.len().max(1)];
                let sizes = Tensor::from_f32(device, &shape, &waves, DType::F32)?;
                let rows = pooled.concat();
                let pooled = Tensor::from_f32(device, &[all.len(), width], &rows, DType::F32)?;
                Some((Value::constant(pooled), sizes))
            }
            _ => None,
        };
        Ok(Conditions { context: Value::constant(context), pooled })
    }

    /// What the U-Net says, guided: one call for the negative prompts and the prompts.
    fn predict(
        &self,
        latents: &[f32],
        timestep: f32,
        conditions: &Conditions,
        how: &Denoising,
    ) -> Result<Vec<f32>, PipelineError> {
        let context = &conditions.context;
        let channels = self.unet.config().in_channels;
        let batch = context.shape()[0];
        let [width, height] = how.size;
        let pictures = latents.len() / (width * height * channels);
        let twice = batch == 2 * pictures;
        let input = match twice {
            true => [latents, latents].concat(),
            false => latents.to_vec(),
        };
        let device = self.unet.device();
        let input =
            Tensor::from_f32(device, &[batch, height, width, channels], &input, DType::F32)?;
        let waves = self.unet.waves(device, &vec![timestep; batch])?;
        let tape = Tape::inference(self.params);
        let added = match &conditions.pooled {
            Some((pooled, sizes)) => Some(self.unet.added(&tape, pooled, sizes)?),
            None => None,
        };
        let added = added.as_ref();
        let input = UnetInput { latents: &input, waves: &waves, context, added };
        let output = self.unet.forward(&tape, input)?.tensor().to_vec_f32()?;
        if !twice {
            return Ok(output);
        }
        let (without, with) = output.split_at(output.len() / 2);
        let guide = |(without, with): (&f32, &f32)| without + how.guidance_scale * (with - without);
        Ok(without.iter().zip(with).map(guide).collect())
    }
}

/// Puts back what the masks keep: the given picture, with as much noise as the latents have now.
fn keep(
    sampler: &Sampler,
    subjects: &[Subject<'_>],
    (start, noise): (&[f32], &[f32]),
    latents: &mut [f32],
) -> Result<(), PipelineError> {
    if subjects.iter().all(|subject| subject.mask.is_none()) {
        return Ok(());
    }
    let original = match sampler.timestep() {
        Some(_) => sampler.add_noise(start, noise)?,
        None => start.to_vec(),
    };
    let each = latents.len() / subjects.len();
    for ((subject, now), then) in
        subjects.iter().zip(latents.chunks_mut(each)).zip(original.chunks(each))
    {
        let Some(mask) = subject.mask else { continue };
        let channels = each / mask.len();
        for ((now, then), new) in now.chunks_mut(channels).zip(then.chunks(channels)).zip(mask) {
            for (now, then) in now.iter_mut().zip(then) {
                *now = *now * new + then * (1. - new);
            }
        }
    }
    Ok(())
}
