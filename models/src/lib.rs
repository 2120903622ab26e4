//! What is computed: text encoder, U-Net, VAE, noise schedule, samplers and LoRA, on one device.
//!
//! Models are forward code over the engine's tape; the tape gives the backward. Feature maps are
//! NHWC `[B,H,W,C]`, tokens `[B,T,C]`. Widths, depths and heads come from a model's config or, where
//! there is none, from the shapes of its tensors. Names inside are those of diffusers and
//! transformers. This crate knows no ranks, no data set and no random numbers: they are passed in.

mod clip;
mod config_value;
mod error;
#[cfg(test)]
mod full_size;
pub mod lora;
pub mod pipeline;
pub mod pixel_order;
mod preset;
pub mod prompt;
mod reader;
mod resnet;
pub mod sampler;
mod schedule;
mod unet;
mod vae;

pub use clip::{ClipConfig, ClipTextModel, join_chunks, token_factors};
pub use error::{ModelError, Result};
pub use preset::{Preset, preset};
pub use reader::{SlotVisitor, TensorShape};
pub use schedule::{NoiseSchedule, ScheduleSettings};
pub use unet::{Unet, UnetConfig, UnetInput, timestep_embedding};
pub use vae::{Moments, Tiling, Vae, VaeConfig};
