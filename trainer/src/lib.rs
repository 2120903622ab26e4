//! One rank of one training run: options, dataset, objective, optimizer, the loop, checkpoints.

pub mod base;
pub mod checkpoint;
pub mod console;
pub mod data_plan;
pub mod dataset;
pub mod gradients;
pub mod memory;
pub mod metadata;
pub mod network;
pub mod objective;
pub mod optimizer;
pub mod options;
pub mod progress;
pub mod rng;
pub mod selftest;
pub mod step;
pub mod tensorboard;
