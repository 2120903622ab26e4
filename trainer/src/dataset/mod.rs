//! From folders of pictures to batches: what is trained on, in which order, as the reference would.
//!
//! The way of a sample: [`config`] reads what was asked for, [`group`] finds the images and sorts
//! them into [`buckets`], [`order`] says which rank uses which sample when, [`latent_cache`] keeps
//! what the VAE makes of them, and [`loader`] prepares batches in the background (the crate
//! `pictures`, [`caption`], [`tokenizer`]). Every random choice is keyed by the global sample index.

pub mod buckets;
pub mod caption;
pub mod config;
mod error;
pub mod fixed;
pub mod group;
mod held_out;
pub mod latent_cache;
pub mod latent_file;
pub mod loader;
pub mod mask;
pub mod order;
mod ordered;
pub mod picture;
mod scan;
mod summary;

pub use config::{
    DatasetConfig, DatasetDefaults, DatasetInput, DatasetOptions, SubsetOptions, plan_datasets,
};
pub use error::DatasetError;
pub use fixed::FixedBatches;
pub use group::DatasetGroup;
pub use latent_cache::{CacheOptions, CachePlace, LatentEncoder, LatentStore, cache_latents};
pub use loader::{Batch, Loader, LoaderOptions, LoaderParts, SampleMeta, Tokens, worker_count};
pub use models::prompt::{ClipTokenizer, TokenLength};
pub use order::{GlobalBatch, SampleKey, Sampler};
