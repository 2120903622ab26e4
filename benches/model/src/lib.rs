//! Inputs made by a program instead of shipped: models of the Stable Diffusion 1.x single-file layout with random
//! weights, and drawn pictures. The same version gives the same bytes on every machine.

pub mod layout;
pub mod pictures;
pub mod random;
pub mod text_and_vae;
pub mod unet;
pub mod write;
