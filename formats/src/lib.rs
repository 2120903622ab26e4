//! Bytes, names and files of Stable Diffusion models and LoRAs; no arithmetic on tensors.
//!
//! Promises: files are memory-mapped and never copied whole; nothing in a file is ever executed;
//! bad input of any kind is a [`FormatError`] that names the file, never a panic; what is written
//! appears complete or not at all. This crate knows no networks and no ranks.
#![deny(missing_docs)]

pub mod adapter;
pub mod atomic;
pub mod atomic_folder;
mod base_model;
pub mod clip_vocabulary;
mod container;
mod diffusers_dir;
mod dtype;
mod error;
mod family;
pub mod hub;
mod keys;
pub mod lora_file;
mod lora_modules;
mod mmap;
pub mod model_files;
pub mod model_hash;
pub mod model_spec;
pub mod pickle;
pub mod picture_text;
pub mod prompt_lines;
pub mod safetensors_file;
mod single_file;
pub mod stream;
mod tensor;
mod tensor_file;

pub use adapter::sdxl_original_name;
pub use base_model::{BaseModel, OpenOptions, open_base_model, open_base_model_with};
pub use container::SaveAs;
pub use dtype::{Dtype, SavePrecision, bytes_from_f32, extend_f32};
pub use error::FormatError;
pub use family::Family;
pub use keys::Component;
pub use lora_modules::{LoraModule, group_modules};
pub use tensor::{OwnedTensor, TensorSpec, TensorView, Weights};
pub use tensor_file::{TensorFile, open_tensor_file};
