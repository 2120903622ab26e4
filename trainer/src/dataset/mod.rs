//! From folders of pictures to batches: what is trained on, in which order, as the reference would.
//!
//! The way of a sample: [`config`] reads what was asked for, [`group`] finds the images and sorts
//! them into [`buckets`], [`order`] says which rank uses which sample when, [`latent_cache`] keeps
//! what the VAE makes of them, and [`loader`] prepares batches in the background ([`image_file`],
//! [`resize`], [`caption`], [`tokenizer`]). Every random choice is keyed by the global sample index.

pub mod buckets;
pub mod caption;
pub mod config;
mod error;
pub mod group;
pub mod image_file;
pub mod order;
mod prompt_weights;
pub mod resize;
mod scan;
pub mod tokenizer;

pub use config::{
    DatasetConfig, DatasetDefaults, DatasetInput, DatasetOptions, Interpolation, SubsetOptions,
    plan_datasets,
};
pub use error::DatasetError;
pub use group::DatasetGroup;
pub use order::{GlobalBatch, SampleKey, Sampler};
pub use tokenizer::{ClipTokenizer, TokenLength};
