//! One rank of one training run: options, dataset, objective, optimizer, the loop, checkpoints.

pub mod base;
pub mod checkpoint;
pub mod cli;
pub mod console;
pub mod data_plan;
pub mod dataset;
pub mod gradients;
pub mod latents;
pub mod lr;
pub mod memory;
pub mod metadata;
pub mod network;
pub mod noising;
pub mod objective;
pub mod optimizer;
pub mod options;
pub mod plan;
pub mod progress;
pub mod rng;
pub mod run;
pub mod saver;
pub mod selftest;
pub mod step;
pub mod tensorboard;
pub mod train;
