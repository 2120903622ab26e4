//! What a picture shows and how it is made, with the defaults of sd-scripts' gen_img.

use std::sync::Arc;

use super::{Picture, PipelineError};
use crate::SizeIds;
use crate::sampler::{SamplerKind, SamplerOptions};

/// What a picture shows and how it is made.
///
/// A picture made from another, only where the mask is white:
///
/// ```
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
///
/// use models::pipeline::{Mask, Picture, Pipeline, PipelineOptions, Request};
/// use models::sampler::SamplerOptions;
///
/// # let model = "../tests/data/parity/model";
/// let pipeline = Pipeline::load(model, &PipelineOptions::default())?;
/// let gray = Picture::from_rgb8(64, 64, &[128; 64 * 64 * 3])?;
/// let left = (0..64 * 64).map(|i| if i % 64 < 32 { 1. } else { 0. }).collect();
/// let request = Request {
///     prompt: "a green tree".into(),
///     width: 64,
///     height: 64,
///     options: SamplerOptions::new(4),
///     image: Some(Arc::new(gray)),
///     strength: 0.75, // three of the four steps
///     mask: Some(Arc::new(Mask { width: 64, height: 64, white: left })),
///     ..Request::default()
/// };
/// let picture = pipeline.generate(&request, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!((picture.width, picture.height), (64, 64));
/// # Ok::<(), models::pipeline::PipelineError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What it shows; `(word:1.2)` weighs.
    pub prompt: String,
    /// What it does not show.
    pub negative_prompt: String,
    /// Of SDXL, what its second text encoder reads; `None` is `prompt`.
    pub prompt_2: Option<String>,
    /// Of SDXL, the same for what it does not show; `None` is `negative_prompt`.
    pub negative_prompt_2: Option<String>,
    /// Columns, a multiple of 8.
    pub width: usize,
    /// Rows, a multiple of 8.
    pub height: usize,
    /// Of the noise: the same seed is the same picture, also in diffusers on the CPU.
    pub seed: u64,
    /// Which sampler.
    pub sampler: SamplerKind,
    /// Steps and other options of the sampler. What the model predicts and whether it was trained with
    /// zero terminal SNR is the model's: a pipeline puts its own in.
    pub options: SamplerOptions,
    /// Weight of the prompt over the negative prompt.
    pub guidance_scale: f32,
    /// Layers of the text encoder to leave out, as sd-scripts counts: `None` is 1, of SDXL 2.
    pub clip_skip: Option<usize>,
    /// Chunks of 75 tokens that a prompt may have.
    pub most_chunks: usize,
    /// A picture to start from instead of noise (img2img), of any size: it is resized.
    pub image: Option<Arc<Picture>>,
    /// The share of the steps by which `image` is changed: 1 keeps hardly anything of it.
    pub strength: f64,
    /// What of `image` is made anew; the rest stays.
    pub mask: Option<Arc<Mask>>,
    /// Make a smaller picture first, which is enlarged and gone over.
    pub highres_fix: Option<HighresFix>,
    /// What SDXL is told of the picture instead of its own size.
    pub size_ids: Option<SizeHints>,
}

/// What SDXL is told of a picture (`--original_width` and its like); what is `None` follows the picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeHints {
    /// Columns and rows of the picture before it was resized.
    pub original: [Option<usize>; 2],
    /// The same for the negative prompt; `None` is `original`.
    pub original_negative: [Option<usize>; 2],
    /// Left and top of the crop.
    pub crop: [usize; 2],
}

impl SizeHints {
    /// Sizes for prompt and negative prompt of a picture of so many columns and rows.
    pub(super) fn of(self, [width, height]: [usize; 2]) -> [SizeIds; 2] {
        let or = |given: [Option<usize>; 2], else_: [usize; 2]| {
            [given[0].unwrap_or(else_[0]), given[1].unwrap_or(else_[1])]
        };
        let original = or(self.original, [width, height]);
        let negative = or(self.original_negative, original);
        let pair = |[x, y]: [usize; 2]| [y as f32, x as f32];
        [original, negative].map(|original| SizeIds {
            original: pair(original),
            crop: pair(self.crop),
            target: pair([width, height]),
        })
    }
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            prompt_2: None,
            negative_prompt_2: None,
            width: 512,
            height: 512,
            seed: 0,
            sampler: SamplerKind::Ddim,
            options: SamplerOptions::new(50),
            guidance_scale: 7.5,
            clip_skip: None,
            most_chunks: 1,
            image: None,
            strength: 0.8,
            mask: None,
            highres_fix: None,
            size_ids: None,
        }
    }
}

/// A picture made in two stages (`--highres_fix_scale`): a model composes well at the size that it
/// was trained at, and draws details well at a larger one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HighresFix {
    /// Sides of the first stage by those of the picture, within 0..1; rounded down to multiples of 32.
    pub scale: f64,
    /// Steps of the first stage.
    pub steps: usize,
    /// The share of steps by which a given picture is changed in the first stage; `None` is
    /// [`Request::strength`], which is that of the second stage.
    pub strength: Option<f64>,
    /// Enlarge the latents (bicubic), not the picture (Lanczos).
    pub latents: bool,
}

impl Default for HighresFix {
    fn default() -> Self {
        Self { scale: 0.5, steps: 28, strength: None, latents: false }
    }
}

impl HighresFix {
    /// The request of the first stage.
    pub fn first(&self, request: &Request) -> Request {
        let rounded = |side: usize| (side as f64 * self.scale + 0.5) as usize;
        let scaled = |side: usize| rounded(side) - rounded(side) % 32;
        let told = |sides: [Option<usize>; 2]| sides.map(|side| side.map(rounded));
        let smaller = |hints: SizeHints| SizeHints {
            original: told(hints.original),
            original_negative: told(hints.original_negative),
            crop: hints.crop.map(rounded),
        };
        let mut first = Request {
            width: scaled(request.width),
            height: scaled(request.height),
            strength: self.strength.unwrap_or(request.strength),
            size_ids: request.size_ids.map(smaller),
            highres_fix: None,
            ..request.clone()
        };
        first.options.steps = self.steps;
        first
    }
}

impl Request {
    /// The size of the latents.
    ///
    /// # Errors
    /// Sides that the VAE cannot give, a mask without a picture, a first stage that is none.
    pub(super) fn check(&self) -> Result<[usize; 2], PipelineError> {
        let Self { width, height, .. } = *self;
        let fits = |side: usize| side >= 64 && side.is_multiple_of(8);
        if !fits(width) || !fits(height) {
            return Err(PipelineError::Size { width, height });
        }
        if self.mask.is_some() && self.image.is_none() {
            return Err(PipelineError::MaskAlone);
        }
        if let Some(highres) = &self.highres_fix {
            // Also where it is no number.
            let within = highres.scale > 0. && highres.scale < 1.;
            if !within || highres.first(self).check().is_err() {
                return Err(PipelineError::HighresScale { scale: highres.scale, width, height });
            }
        }
        Ok([width / 8, height / 8])
    }

    /// Whether the two can be made in one batch.
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        let given = |request: &Self| (request.image.is_some(), request.strength);
        (self.width, self.height) == (other.width, other.height)
            && self.sampler == other.sampler
            && self.options == other.options
            && self.guidance_scale == other.guidance_scale
            && given(self) == given(other)
            && self.highres_fix == other.highres_fix
            && self.size_ids == other.size_ids
    }
}

/// What of a picture is made anew.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// One number per pixel, row by row: 1 (white) is made anew, 0 (black) stays.
    pub white: Vec<f32>,
}

impl Mask {
    /// A mask of a picture's brightness.
    pub fn of(picture: &Picture) -> Self {
        let bright = |rgb: &[f32; 3]| 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
        Self {
            width: picture.width,
            height: picture.height,
            white: picture.rgb.as_chunks::<3>().0.iter().map(bright).collect(),
        }
    }
}
