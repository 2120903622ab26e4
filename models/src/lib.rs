//! Stable Diffusion 1.x and 2.x: text encoder, U-Net, VAE, noise schedule, samplers and LoRA, on one
//! device, and pictures from them.
//!
//! # Pictures
//!
//! A [`pipeline::Pipeline`] is loaded from a `.safetensors` or `.ckpt` file, a diffusers folder or a hub
//! id. LoRA files of every kind and naming come on top, each with a multiplier that can be changed until
//! they are merged:
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use models::pipeline::{Pipeline, PipelineOptions, Request};
//! use models::sampler::{SamplerKind, SamplerOptions};
//!
//! # let model = "../tests/data/parity/model";
//! # let [style, character] =
//! #     ["lierla", "c3lier"].map(|kind| format!("../tests/data/parity/{kind}/after5.safetensors"));
//! let mut pipeline = Pipeline::load(model, &PipelineOptions::default())?;
//! let style = pipeline.add_lora(style.as_ref(), 0.5)?;
//! let character = pipeline.add_lora(character.as_ref(), 0.7)?;
//!
//! let request = Request {
//!     prompt: "a (red:1.2) circle on a white table".into(),
//!     negative_prompt: "blurry".into(),
//!     sampler: SamplerKind::EulerAncestral,
//!     options: SamplerOptions::new(20),
//!     seed: 42,
//! #   width: 64,
//! #   height: 64,
//!     ..Request::default()
//! };
//! # let request = Request { options: SamplerOptions::new(2), ..request };
//! let mut watch = |progress: models::pipeline::Progress| {
//!     eprintln!("{} of {}", progress.done, progress.of);
//!     ControlFlow::Continue(()) // `Break` stops
//! };
//! let picture = pipeline.generate(&request, &mut watch)?;
//! assert_eq!(picture.to_rgb8().len(), 3 * picture.width * picture.height);
//!
//! pipeline.set_multiplier(style, 0.8)?; // another strength; 0 is the base model's picture
//! let other = pipeline.generate(&request, &mut watch)?;
//! # assert_ne!(picture, other);
//! pipeline.merge_loras(); // part of the weights from here on
//! # assert_eq!(other, pipeline.generate(&request, &mut watch)?);
//! # let _ = character;
//! # Ok::<(), models::pipeline::PipelineError>(())
//! ```
//!
//! `examples/pipeline.rs` is that as a program. A [`pipeline::Request`] has more: a picture to start
//! from, a mask, two stages.
//!
//! # Parts
//!
//! - [`pipeline`]: from prompts to pictures; its stages can be used one by one, with a LoRA in training.
//! - [`sampler`]: the way from noise to a picture's latents, equal to diffusers' schedulers.
//! - [`prompt`]: CLIP's tokenizer, and weights in prompts.
//! - [`lora`]: networks as they are trained, and files of them over a model's weights.
//! - [`ClipTextModel`], [`Unet`], [`Vae`]: the models themselves.
//!
//! Models are forward code over the engine's tape; the tape gives the backward. Feature maps are
//! NHWC `[B,H,W,C]`, tokens `[B,T,C]`. Widths, depths and heads come from a model's config or, where
//! there is none, from the shapes of its tensors. Names inside are those of diffusers and
//! transformers. This crate knows no ranks and no data set; random numbers are passed in, but for the
//! noise of a seed ([`pipeline::TorchNoise`]).

mod clip;
mod config_value;
mod error;
#[cfg(test)]
mod full_size;
pub mod lora;
mod mersenne;
pub mod pipeline;
pub mod pixel_order;
mod preset;
pub mod prompt;
mod reader;
mod resnet;
pub mod sampler;
mod schedule;
mod texts;
mod unet;
mod vae;

pub use clip::{ClipConfig, ClipTextModel, end_rows, join_chunks, token_factors};
pub use error::{ModelError, Result};
pub use mersenne::Mt19937;
pub use preset::{Preset, preset, second_text_preset};
pub use reader::{SlotVisitor, TensorShape};
pub use schedule::{NoiseSchedule, ScheduleSettings};
pub use texts::{SecondIds, TextEncoders, TextIds, TextOutput};
pub use unet::{SizeIds, Unet, UnetConfig, UnetInput, timestep_embedding};
pub use vae::{Moments, Tiling, Vae, VaeConfig};
