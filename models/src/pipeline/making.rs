//! Requests to pictures: those that are alike go through the U-Net together.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::picture::{decode, encode};
use super::resize::{Filter, resize};
use super::text::Prompt;
use super::{
    Denoising, Embedding, Picture, Pipeline, PipelineError, Predictor, Progress, Request, Subject,
    TextReader, TorchNoise, Watch,
};
use crate::sampler::{Prediction, Sampler, SamplerOptions};

/// A request on its way.
struct Job<'r> {
    /// Its place among all.
    place: usize,
    request: &'r Request,
    prompt: Arc<Embedding>,
    negative: Arc<Embedding>,
}

/// What a stage starts from.
enum Start<'r> {
    Noise,
    Picture(Cow<'r, Picture>),
    Latents(Vec<f32>),
}

/// One stage of jobs that are alike.
struct Stage<'r> {
    /// Size, sampler and scale of all.
    like: Cow<'r, Request>,
    starts: Vec<Start<'r>>,
    /// Added to the seeds.
    later: u64,
    /// Whether masks hold.
    masked: bool,
}

impl Pipeline {
    /// The picture of one request.
    ///
    /// # Errors
    /// What cannot be made as asked for; a stop by `watch` ([`PipelineError::Stopped`]).
    pub fn generate(
        &self,
        request: &Request,
        watch: &mut Watch<'_>,
    ) -> Result<Picture, PipelineError> {
        let mut pictures = self.generate_batch(std::slice::from_ref(request), watch)?;
        let Request { width, height, .. } = *request;
        pictures.pop().ok_or(PipelineError::Size { width, height })
    }

    /// The pictures of requests, in their order.
    ///
    /// Requests of one size, sampler, number of steps and scale share the calls of the U-Net: faster
    /// on cards, and memory grows with their number. How they are grouped changes a picture by no more
    /// than the rounding of its arithmetic.
    ///
    /// # Errors
    /// As [`Pipeline::generate`]; all requests are looked at before the first is made.
    pub fn generate_batch(
        &self,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Picture>, PipelineError> {
        let groups = self.groups(requests)?;
        let mut of = 0;
        for group in &groups {
            of += self.evaluations(group[0].request)?;
        }
        let mut before = 0;
        let mut pictures: Vec<Option<Picture>> = requests.iter().map(|_| None).collect();
        for group in &groups {
            let mut done = before;
            let mut watch = |_: Progress| -> ControlFlow<()> {
                done += 1;
                watch(Progress { done, of })
            };
            let made = self.make(group, &mut watch)?;
            before = done;
            for (job, picture) in group.iter().zip(made) {
                pictures[job.place] = Some(picture);
            }
        }
        Ok(pictures.into_iter().flatten().collect())
    }

    /// Requests that can share calls, each group in the order of the requests.
    fn groups<'r>(&self, requests: &'r [Request]) -> Result<Vec<Vec<Job<'r>>>, PipelineError> {
        let mut groups: Vec<Vec<Job<'r>>> = Vec::new();
        for (place, request) in requests.iter().enumerate() {
            request.check()?;
            let reader = TextReader {
                tokenizers: &self.tokenizers,
                encoders: &self.text_encoders,
                params: None,
                clip_skip: request.clip_skip,
                most_chunks: request.most_chunks,
            };
            let prompts = [
                Prompt { first: &request.prompt, second: request.prompt_2.as_deref() },
                Prompt {
                    first: &request.negative_prompt,
                    second: request.negative_prompt_2.as_deref(),
                },
            ];
            let [prompt, negative] = self.texts.read(&reader, prompts)?;
            let job = Job { place, request, prompt, negative };
            let alike = |group: &&mut Vec<Job>| {
                group[0].request.goes_with(job.request)
                    && group[0].prompt.tokens() == job.prompt.tokens()
            };
            match groups.iter_mut().find(alike) {
                Some(group) => group.push(job),
                None => groups.push(vec![job]),
            }
        }
        Ok(groups)
    }

    /// The sampler's options, with what is the model's and not the request's.
    fn sampler_options(&self, request: &Request, from_noise: bool) -> SamplerOptions {
        let mut options = request.options.clone();
        if self.prediction == Prediction::Velocity {
            options.prediction = Prediction::Velocity;
        }
        options.zero_terminal_snr |= self.zero_terminal_snr;
        options.strength = (!from_noise).then_some(request.strength);
        options
    }

    /// How often the U-Net is called for a request.
    fn evaluations(&self, request: &Request) -> Result<usize, PipelineError> {
        let of_stage = |request: &Request, from_noise| {
            let options = self.sampler_options(request, from_noise);
            Ok::<_, PipelineError>(Sampler::new(request.sampler, &options)?.evaluations())
        };
        let from_noise = request.image.is_none();
        match &request.highres_fix {
            None => of_stage(request, from_noise),
            Some(highres) => {
                let first = highres.first(request);
                Ok(of_stage(&first, from_noise)? + of_stage(request, false)?)
            }
        }
    }

    fn make(&self, jobs: &[Job<'_>], watch: &mut Watch<'_>) -> Result<Vec<Picture>, PipelineError> {
        let request = jobs[0].request;
        let given = |job: &Job<'_>| match &job.request.image {
            Some(image) => Start::Picture(Cow::Owned(Picture::clone(image))),
            None => Start::Noise,
        };
        let starts = jobs.iter().map(given).collect();
        let whole = Stage { like: Cow::Borrowed(request), starts, later: 0, masked: true };
        let Some(highres) = &request.highres_fix else {
            let latents = self.latents(jobs, whole, watch)?;
            return decode(&self.vae, &latents, request.check()?, self.tiling);
        };
        let first = highres.first(request);
        let (small, large) = (first.check()?, request.check()?);
        let latents = self.latents(jobs, Stage { like: Cow::Owned(first), ..whole }, watch)?;
        let starts = match highres.latents {
            true => {
                let channels = self.unet.config().in_channels;
                let enlarge = |one| resize(one, channels, small, large, Filter::Bicubic);
                let each = small[0] * small[1] * channels;
                latents.chunks(each).map(enlarge).map(Start::Latents).collect()
            }
            false => {
                let pictures = decode(&self.vae, &latents, small, self.tiling)?;
                pictures.into_iter().map(|small| Start::Picture(Cow::Owned(small))).collect()
            }
        };
        // As gen_img: another seed, and the mask has done its work.
        let second = Stage { like: Cow::Borrowed(request), starts, later: 1, masked: false };
        let latents = self.latents(jobs, second, watch)?;
        decode(&self.vae, &latents, large, self.tiling)
    }

    /// Latents of all pictures of a stage, one behind the other.
    fn latents(
        &self,
        jobs: &[Job<'_>],
        stage: Stage<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f32>, PipelineError> {
        let like = stage.like.as_ref();
        let size = like.check()?;
        let from_noise = stage.starts.iter().any(|start| matches!(start, Start::Noise));
        let (mut noises, mut starts, mut masks) = (Vec::new(), Vec::new(), Vec::new());
        for (job, start) in jobs.iter().zip(stage.starts) {
            let mut noise = TorchNoise::new(job.request.seed.wrapping_add(stage.later));
            starts.push(match start {
                Start::Noise => None,
                Start::Latents(latents) => Some(latents),
                Start::Picture(picture) => {
                    let picture = picture.resized(like.width, like.height);
                    Some(encode(&self.vae, &picture, &mut noise, self.tiling)?)
                }
            });
            noises.push(noise);
            masks.push(job.request.mask.as_ref().filter(|_| stage.masked).map(|mask| {
                resize(&mask.white, 1, [mask.width, mask.height], size, Filter::Bilinear)
            }));
        }
        let mut subjects: Vec<Subject<'_>> = Vec::new();
        for (((job, noise), start), mask) in jobs.iter().zip(noises).zip(&starts).zip(&masks) {
            let (prompt, negative) = (&*job.prompt, &*job.negative);
            let (start, mask) = (start.as_deref(), mask.as_deref());
            subjects.push(Subject { prompt, negative, noise, start, mask });
        }
        let how = Denoising {
            size,
            sampler: like.sampler,
            options: self.sampler_options(like, from_noise),
            guidance_scale: like.guidance_scale,
            sizes: like.size_ids.map(|hints| hints.of([like.width, like.height])),
        };
        let predictor = Predictor { unet: &self.unet, params: None };
        predictor.denoise(&mut subjects, &how, watch)
    }
}
